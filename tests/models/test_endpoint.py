import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from finemill.errors import StepError, TemporaryError, UserError
from finemill.models.endpoint import Endpoint
from finemill.models.reply import Reply, collect
from finemill.models.sampling import GREEDY, Sampling
from tests.serving import serving

QUESTION = [{"role": "user", "content": "How many?"}]
JSON, EVENTS = "application/json", "text/event-stream"


class Server(ThreadingHTTPServer):
    """Answers every request alike, and remembers the last one."""

    status = 200
    kind = JSON
    body = b"{}"
    asked: dict[str, Any]
    key: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.asked = json.loads(self.rfile.read(length) or b"{}")
        self.server.key = self.headers.get("Authorization")
        self.send_response(self.server.status)
        self.send_header("Content-Type", self.server.kind)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen."""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(("127.0.0.1", 0), Handler)) as running:
        yield running


@pytest.fixture
def ask(server: Server) -> Callable[..., Reply]:
    def ask(kind: str, body: str | bytes, status: int = 200, sampling: Sampling | None = None, **options: Any) -> Reply:
        server.kind, server.status = kind, status
        server.body = body.encode() if isinstance(body, str) else body
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "small", timeout_s=5)
        return collect(endpoint.stream(QUESTION, sampling=sampling, max_new_tokens=9, **options))

    return ask


def events(*chunks: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": None}]}


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_comes_in_a_field_of_its_own(ask: Callable[..., Reply], field: str) -> None:
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    body = events(delta(**{field: "1 + "}), delta(**{field: "1"}), delta(content="Tw"), delta(content="o."), end, usage)
    assert ask(EVENTS, body) == Reply("1 + 1", "Two.", True, 7)


def test_thinking_comes_in_the_text_and_an_answer_is_cut(ask: Callable[..., Reply]) -> None:
    body = events(delta(content="<th"), delta(content="ink>a</think>b"), {"choices": [{"finish_reason": "length"}]})
    assert ask(EVENTS, body) == Reply("a", "b", False, None)


def test_a_server_that_does_not_stream_is_read_all_the_same(ask: Callable[..., Reply]) -> None:
    whole = {"choices": [{"message": {"content": "Two."}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}
    assert ask(JSON, json.dumps(whole)) == Reply("", "Two.", True, 2)


def test_sampling_and_mode_are_sent_only_where_they_say_something(ask: Callable[..., Reply], server: Server) -> None:
    ask(EVENTS, events())
    assert set(server.asked) == {"model", "messages", "max_tokens", "stream", "stream_options"}
    ask(EVENTS, events(), sampling=Sampling(0.6, 0.95, 20), thinking=False)
    assert server.asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert (server.asked["temperature"], server.asked["top_p"], server.asked["top_k"]) == (0.6, 0.95, 20)
    assert "min_p" not in server.asked
    ask(EVENTS, events(), sampling=GREEDY)
    assert server.asked["temperature"] == 0
    assert "top_p" not in server.asked


def test_the_key_is_the_environments(
    ask: Callable[..., Reply], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    ask(EVENTS, events())
    assert server.key == "Bearer secret"


@pytest.mark.parametrize(
    ("kind", "body", "status", "error", "said"),
    [
        (JSON, '{"error": {"message": "no such\\nmodel"}}', 404, UserError, "refuses the request .404.: no such model"),
        (JSON, "{}", 401, UserError, "set OPENAI_API_KEY"),
        (JSON, "overloaded", 429, TemporaryError, "try again later"),
        (JSON, "", 503, TemporaryError, "try again later"),
        ("text/html", "<html>hello", 200, UserError, "answers '<html>hello', no JSON object"),
        (JSON, "[1]", 200, UserError, "no JSON object"),
        (EVENTS, "data: {broken\n\n", 200, UserError, "no JSON object"),
        (EVENTS, 'data: {"error": {"message": "out of memory"}}\n\n', 200, StepError, "ends the answer: out of memory"),
    ],
)
def test_what_a_server_says_amiss_is_one_line(
    ask: Callable[..., Reply], kind: str, body: str, status: int, error: type[StepError], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        ask(kind, body, status)
    assert "\n" not in str(raised.value)


def test_without_a_name_the_first_listed_model_is_asked(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    server.body = b'{"data": [{"id": "one"}, {"id": "two"}]}'
    assert (Endpoint(url).model, Endpoint(url).url) == ("one", f"{url}/v1")
    server.body = b'{"data": []}'
    with pytest.raises(UserError, match="--model-name"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["http://", "ftp://host/v1", "host:80"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="no address"):
        Endpoint(url, "m")


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as raised:
        Endpoint("http://me:secret@host/v1", "m")
    assert "secret" not in str(raised.value)


def test_a_server_that_is_down_is_asked_again_later() -> None:
    with pytest.raises(TemporaryError, match="out of reach"):
        Endpoint("http://127.0.0.1:9/v1")
