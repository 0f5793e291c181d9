import pytest

from finemill.credentials import clean_credentials, credential_in, without_credentials
from finemill.errors import UserError


def test_a_line_break_behind_a_secret_is_cut_off() -> None:
    environment = {"AWS_SESSION_TOKEN": "FQoGZXIv\n", "FINEMILL_MLFLOW_TRACKING_TOKEN": " tok\r\n", "OTHER": "x\n"}
    clean_credentials(environment)
    assert environment == {"AWS_SESSION_TOKEN": "FQoGZXIv", "FINEMILL_MLFLOW_TRACKING_TOKEN": "tok", "OTHER": "x\n"}


def test_one_inside_is_refused_by_name_and_never_shown() -> None:
    with pytest.raises(UserError, match="HF_TOKEN holds a line break") as error:
        clean_credentials({"HF_TOKEN": "hf_SECRET\nhf_OTHER"})
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:pass@host:5000/path", "at http://host:5000/path"),
        ("at http://user:pa/ss@host/path", "at http://host/path"),
        ("at http://user:p@ss@host", "at http://host"),
        ("at https://TOKEN@host/x", "at https://host/x"),
        ("s3://bucket/rows/key@sha256:00", "s3://bucket/rows/key@sha256:00"),
        ("http://host:9000/models/name@main", "http://host:9000/models/name@main"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("https://b.s3/x?X-Amz-Signature=abc&part=1", "https://b.s3/x?X-Amz-Signature=***&part=1"),
        ("https://b/x?sv=1&sig=a%2Bb==", "https://b/x?sv=1&sig=***"),
        ("Invalid header value b'FQoG-SECRET\\n'; x", "Invalid header value ***; x"),
        ("Illegal header value b'Bearer sk-SECRET\\n'", "Illegal header value ***"),
        ("https://host/v1?key=AIzaSECRET&alt=json", "https://host/v1?key=***&alt=json"),
        ("{'Authorization': 'Bearer sk-SECRET', 'x': 1}", "{'Authorization': 'Bearer ***', 'x': 1}"),
        ("> Authorization: Basic dXNlcjpwYXNz", "> Authorization: Basic ***"),
        ("the authorization of the user failed", "the authorization of the user failed"),
        ("host=db user=x password=pass dbname=y", "host=db user=x password=*** dbname=y"),
        ('{"password": "pass", "x": 1}', '{"password": "***", "x": 1}'),
        ("Server=db;PWD=pass;x", "Server=db;PWD=***;x"),
        ("?odbc_connect=PWD%3Dpass", "?odbc_connect=PWD%3D***"),
        ("AccountName=a;AccountKey=k3yk3yk3yk3y==;x", "AccountName=a;AccountKey=***;x"),
        ("> X-Api-Key: k3yk3yk3yk3y", "> X-Api-Key: ***"),
        ("Set-Cookie: sid=k3yk3yk3yk3y; Path=/", "Set-Cookie: sid=***; Path=/"),
        ('{"access_token": "k3yk3yk3yk3y"}', '{"access_token": "***"}'),
        ("https://x/#access_token=k", "https://x/#access_token=***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA", "-----BEGIN RSA PRIVATE KEY-----***-----END RSA"),
        ("pad_token: <|im_end|>, max_new_tokens=2048", "pad_token: <|im_end|>, max_new_tokens=2048"),
        ("secret: finemill-s3; bad password: check it", "secret: finemill-s3; bad password: check it"),
        ("tokenizer: hf://Qwen/Qwen3-0.6B, pwd=/tmp", "tokenizer: hf://Qwen/Qwen3-0.6B, pwd=/tmp"),
    ],
)
def test_what_an_address_holds_is_cut_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_the_environment_s_credentials_are_cut_out_however_they_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a/b+c=SECRET")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "finemill")
    monkeypatch.setenv("HF_TOKEN", "abc")
    text = "finemill: key a/b+c=SECRET, a%2Fb%2Bc%3DSECRET, a/b%2Bc%3DSECRET abc"
    assert without_credentials(text) == "finemill: key ***, ***, *** abc"


@pytest.mark.parametrize(
    "spelled",
    [
        "a%2fb%26%22%5cc%3cd12",
        'a/b&\\"\\\\c<d12',
        "a/b&amp;&quot;\\c&lt;d12",
        "bWU6YS9iJiJcYzxkMTI=",
        'a/b&"\\c<d1',
        "a/b&",
    ],
)
def test_a_secret_is_cut_out_as_libraries_spell_it_and_where_its_text_was_cut(
    spelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an address, in JSON, in a page, in a header, without its end; of a few characters alone nobody can tell."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", 'a/b&"\\c<d12')
    shown = spelled if len(spelled) < 10 else "***"
    assert without_credentials(f"near {spelled}") == f"near {shown}"


@pytest.mark.parametrize(("key_id", "secret"), [("minioadmin", False), ("AKIAIOSFODNN7EXAMPLE", True)])
def test_an_access_key_that_is_a_user_s_name_is_no_secret(
    key_id: str, secret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers of one's own have keys named after a user, as a bucket may be."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    text = f"s3://{key_id}/rows"
    assert credential_in(text) == ("AWS_ACCESS_KEY_ID" if secret else None)
    assert without_credentials(text) == (f"s3://{'***' if secret else key_id}/rows")


@pytest.mark.parametrize(
    ("name", "value", "is_hidden"),
    [
        ("OPENAI_API_KEY", "sk-SECRET", True),
        ("WANDB_API_KEY", "0123456789abcdef", True),
        ("FINEMILL_WEBHOOK_SECRET", "whsec_SECRET", True),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=x;AccountKey=SECRET", True),
        ("PGPASSWORD", "correct-horse", True),
        ("TEAM_TOKEN", "glpat-SECRET-0", True),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token", False),
        ("HF_TOKEN_PATH", "/home/me/token", False),
        ("POSTGRES_PASSWORD", "postgres", False),
        ("KEYBOARD", "dvorak-programmer", False),
    ],
)
def test_a_variable_named_as_a_secret_is_one(
    name: str, value: str, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert without_credentials(f"found {value} there") == f"found {'***' if is_hidden else value} there"


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "FINEMILL_WEBHOOK_SECRET"])
def test_keys_of_services_lose_their_line_break_too(name: str) -> None:
    environment = {name: "sk-1\n"}
    clean_credentials(environment)
    assert environment == {name: "sk-1"}
