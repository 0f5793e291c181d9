"""What a secret looks like in third parties' texts, and what only looks like one."""

import time

import pytest

from finemill.redaction import without_secret_forms

# Lines as clients and servers write them; a secret is between the marks; it has to go.
SECRETS = """
command: mlflow server --password «hunter22x» --port 5000
mysql -u root --password=«hunter22x» db
psql --password '«hunter 22x»'
curl -u admin:«hunter22x» https://host/api
curl --user admin:«hunter22x» https://host/api
curl --user "admin:«hunter22x»" https://host/api
mysql -p«hunter22x» -u root
helm install x --set mlflow.password=«hunter22x»,foo=bar
docker login -u me -p «hunter22x» registry.io
tool --api-key «sk-abcdefghijklmnop» --model x
tool --token «abcdefghijklmnop1234»
tool --access-token «abcdefghijklmnop1234»
tool --secret-key '«abcdefghij/klmnop1234»'
tool --client-secret «abcdefghijklmnop»
['mlflow', '--password', '«hunter22x»', '--x']
["mlflow", "--token", "«ghp_ab12cd34ef56gh78ij90»"]
POST https://hooks.slack.com/services/T01ABCDEF/B02ABCDEF/«XyZabc123XyZ» failed
https://discordapp.com/api/webhooks/123456789012345678/«abcDEF-ghi_JKL123»abcDEF-ghi
https://outlook.office.com/webhook/0123abcd-0123-0123-0123-0123456789ab@fedcba98-0123-0123-0123-0123456789ab/IncomingWebhook/«0123456789abcdef0123456789abcdef»/99
https://contoso.webhook.office.com/webhookb2/aaaa-bbbb@cccc/IncomingWebhook/«0123456789abcdef0123456789abcdef»/dddd
https://api.telegram.org/bot123456789:«AAE-abcdefghijklmnopqrstuvwxyz012345»/sendMessage
https://chat.googleapis.com/v1/spaces/AAAA/messages?key=AIzaSyABCDEF&token=«tok-en_12»
https://mattermost.example.com/hooks/«xxx9yyy8zzz7xxx9yyy8zzz7ab»
https://open.feishu.cn/open-apis/bot/v2/hook/«0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f»
https://oapi.dingtalk.com/robot/send?access_token=«0a1b2c3d0a1b2c3d»
https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=«693a91f6-7xxx-4bc4»
https://prod-00.westeurope.logic.azure.com:443/workflows/abc/triggers/manual/paths/invoke?api-version=2016-06-01&sp=x&sv=1.0&sig=«aB3-deF»
https://events.pagerduty.com/integration/«0123456789abcdef0123456789abcdef»/enqueue
https://hooks.zapier.com/hooks/catch/1234567/«abc123x»/
https://maker.ifttt.com/trigger/done/with/key/«abcDEF123-abcDEF»
https://func.azurewebsites.net/api/hook?code=«abc/DEF123==»
https://login/cb?code=«4/0AX4XfWh»&state=xyz
https://x/y?jwt=«abc.def.ghi»
https://x/y?«apikey=abcd»
https://x/y?«api_key=abcd»
https://x/y?subscription-key=«abcd»
https://x/y?access_key=«abcd»
https://x/y?session«=abcd»
https://x/y?sessionid«=abcd»&z=1
https://x/y?id_token=«abcd»
https://x/y?client_secret=«abcd»
https://x/y?pass=«abcd»
https://x/y?private_token=«abcd»
https://x/y?X-Amz-Security-Token=«FwoG»%2F
https://x/y?X-Amz-Credential=«AKIA»%2F2026
https://x/y?AWSAccessKeyId=AKIAX&Signature=«abc%3D»&Expires=1
https://storage.googleapis.com/b/o?GoogleAccessId=x&Signature=«abcd»
https://storage.googleapis.com/b/o?X-Goog-Signature=«abcd»
https://acc.blob.core.windows.net/c/f?sp=r&st=2026-01-01&se=2026-02-01&sv=2022-11-02&sr=b&sig=«abc%2Bdef»%3D
https%3A%2F%2Facc.blob.core.windows.net%2Fc%3Fsv%3D1%26sig%3D«abc%252B»
SharedAccessSignature sr=x&sig=«abcdEFG»%3d&se=1&skn=root
SharedAccessSignature=sv=1&sig=«abcdEFG»
BlobEndpoint=https://a;SharedAccessSignature=sv=2022&ss=b&sig=«abcdEFG»%3D
Endpoint=sb://x/;SharedAccessKeyName=root;SharedAccessKey=«abcdEFG123»=
Authorization: Bearer «abcdefg»
authorization: bearer «abcdefg»
Authorization: Token «abcdefg»
Authorization: ApiKey «abcdefg»
Authorization: AWS4-HMAC-SHA256 Credential=AKIAX/2026/us/s3/aws4_request, SignedHeaders=host, Signature=«abcdef012345»
Authorization: AWS AKIAX:«abcdef012345»=
Authorization: Digest username="u", realm="r", nonce="n", response="«abcdef0123»"
Authorization: Negotiate «YIIabc123»==
Authorization: SharedKey acc:«abcdefg123»=
Proxy-Authorization: Basic «dXNlcjpwYXNz»
('Authorization', 'Bearer «abcdefg»')
(b'Authorization', b'Bearer «abcdefg»')
{b'Authorization': b'Bearer «abcdefg»'}
headers=[('authorization', 'Basic «dXNlcjpwYXNz»')]
"Authorization":["Bearer «abcdefg»"]
Authorization%3A%20Bearer%20«abcdefg»
-H 'Authorization: Bearer «abcdefg»'
X-Auth-Token: «abcdef»
X-Vault-Token: «hvs.CAESIabcdef»
PRIVATE-TOKEN: «glpat-abcdefghij0123456789»
x-api-key: «abcdefghijklmnopqrstuvwx»
Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.«abc-DEF_123» was refused
invalid token eyJhbGciOiJIUzI1NiJ9.«eyJzdWIiOiIxIn0».abc-DEF_123
git clone https://oauth2:«glpat-xx»@gitlab.com/a/b.git
git+https://x-access-token:«ghs_abc»@github.com/a/b@main
fatal: Authentication failed for 'https://me«:tok@»github.com/a/b.git/'
ssh://git«:pw@»host:22/x
postgresql+psycopg2://mlflow:«p%40ss»@db:5432/mlflow
mysql+pymysql://mlflow:«pa#ss»@db/mlflow
redis://:«pw123»@host:6379/0
amqp://u:«p?w»@host
mongodb+srv://u«:p@»cluster/db
http_proxy=http://«u:p@»proxy:3128
//user:«secretpw»@host/path
user:«secretpw»@host:5000 refused
Incorrect API key provided: «sk-proj-abcdefghijklmnopqrst». You can
Token «hf_abcdefghijklmnopqrstuvwxyzABCDEFGH» is invalid
«ghp_abcdefghijklmnopqrstuvwxyz0123456789»
github_pat_11ABCDEFG0abcdefghijkl_«mnopqrstuvwxyz0123»
xoxb-12345-«abcdefghijklmnop»
«dapi00000000000000000000000000000000»
AKIAIOSFODNN7EXAMPLE:«wJalrXUtnFEMI»/K7MDENG/bPxRfiCYEXAMPLEKEY
aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/«bPxRfiCYEXAMPLEKEY»
aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/«bPxRfiCYEXAMPLEKEY»
<SecretAccessKey>«wJalrXUtnFEMIK7MDENG»</SecretAccessKey>
<SessionToken>«FQoGZXIvYXdz»</SessionToken>
"SecretAccessKey": "«wJalrXUtnFEMI/K7»"
secretAccessKey: «wJalrXUtnFEMI»/K7MDENG/bPxR
password: «hunter22x»
"password":"«hunter22x»"
{"auths":{"reg.io":{"auth":"«dXNlcjpwYXNz»"}}}
machine host login me password «hunter22x»
_authToken=«npm_abcdefghijklmnop»
PGPASSWORD=«hunter22x» psql
MINIO_ROOT_PASSWORD=«hunter22x»
Cookie: session=«abcdefghijklmnop»
Set-Cookie: mlflow-request=«abcDEF»; HttpOnly
«AIzaSyA1234567890»abcdefghijklmnopqrstuv
-----BEGIN OPENSSH PRIVATE KEY----- «b3BlbnNz»
""".strip().splitlines()

NONE = """
pad_token: <|im_end|>, max_new_tokens=2048
secret: finemill-s3; bad password: check it
tokenizer: hf://Qwen/Qwen3-0.6B, pwd=/tmp
unknown key 'password' in section 'mlflow'
--password is no option of finemill
finemill submit --token-file /x --wait
set mlflow.existingSecret to the secret's name
s3://bucket/prefix/hooks/abc/def
rows.jsonl: the column 'authorization' is no text
Authorization failed: 403 AccessDenied
the secret 'finemill-s3' has no key 'AWS_SECRET_ACCESS_KEY'
token 151645 is not in the vocabulary
the token '<|im_start|>' has no row
tokens: 151645, 151643
exit code: 2
error?code=403
HTTP code=500 reason=x
https://host/x?page=2&part=1
hf://org/name@main
s3://bucket/rows/key@sha256:0000
localhost/finemill-cpu:0.1.0@sha256:abc
registry:5000/finemill-cpu@sha256:abc
user@example.com asked
kubectl -n ml get pods -p x
finemill chat MODEL -u x
the file /hooks/pre-commit is missing
eyJust a word
expected http://host:port or s3://bucket
host:5000/path@v1
key=learning_rate value=1e-4
session=3 of 4
auth: basic is what MLflow's own server asks for
Basic authentication is asked for
Bearer of the name
docker run -p 8080:80 nginx
python -m finemill -p x
ssh -p 2222 host
webhook https://hooks.example.com/finemill answered 500
password: null
token: null
password: ***
--password ***
token count: 123456789012345
tokens_per_second: 1234567890123.5
token_counts=12345abcdefgh
file:///tmp/store/eval/abc@sha256:0123456789abcdef
rows at line 3: {"token": "hello world"}
models:/support-assistant@champion
max_tokens: 2048; stop_token_ids: [151645, 151643]
GET /api/2.0/mlflow/runs/get?run_id=0123456789abcdef0123456789abcdef
metadata.signature: inputs and outputs
client_secret is missing
the passwords of two users
""".strip().splitlines()


@pytest.mark.parametrize("line", SECRETS)
def test_a_secret_is_cut_out_by_its_form(line: str) -> None:
    secret = line.partition("«")[2].partition("»")[0]
    assert secret not in without_secret_forms(line.replace("«", "").replace("»", ""))


@pytest.mark.parametrize("line", NONE)
def test_what_only_looks_like_one_stays(line: str) -> None:
    assert without_secret_forms(line) == line


@pytest.mark.parametrize("piece", ["https://", "://a:", "token=", "login ", "mysql ", "--", "a-", "AKIA", "eyJabcde."])
def test_long_texts_take_no_time(piece: str) -> None:
    """No pattern goes over the rest of the text from each of its positions."""
    started = time.process_time()
    without_secret_forms(piece * 1000)
    assert time.process_time() - started < 2
