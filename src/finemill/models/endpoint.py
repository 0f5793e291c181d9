"""A model behind an address that answers OpenAI's chat requests: vLLM, llama.cpp's server, a service."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from finemill.errors import StepError, TemporaryError, UserError
from finemill.models.reply import End, Piece, ThinkingSplitter
from finemill.models.sampling import Sampling

KEY_VARIABLE = "OPENAI_API_KEY"
_TIMEOUT_S = 300
# The request may succeed later; 409 and 425 are services' words for "too early".
_LATER = (408, 409, 425, 429)


class Endpoint:
    """One model of a server.

    Args:
        url: the address that `/chat/completions` follows; with or without `/v1`.
        model: the server's name for the model. Default: the first that it lists.
    Raises: UserError: no address, or the server lists no model. TemporaryError: it is out of reach.
    """

    def __init__(self, url: str, model: str | None = None, *, timeout_s: float = _TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"'{url}' is no address of a server: write http://host:port/v1")
        if parts.username or parts.password:
            raise UserError(f"the address of {parts.hostname} holds credentials: put the key into {KEY_VARIABLE}")
        plain = url.rstrip("/").removesuffix("/chat/completions")
        self.url = plain if parts.path.strip("/") else f"{plain}/v1"
        self._timeout_s = timeout_s
        # Through no proxy to this machine itself.
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        self.model = model or self._first_model()

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: Sampling | None,
        max_new_tokens: int,
        thinking: bool | None = None,
    ) -> Iterator[Piece | End]:
        """The answer to a chat as it comes.

        Args:
            sampling: None leaves it to the server.
            thinking: None leaves it to the template; otherwise `enable_thinking`, as vLLM and llama.cpp read it.
        Raises: UserError: the server refuses the request. TemporaryError: it is out of reach or overloaded.
        """
        splitter = ThinkingSplitter()
        end = End(finished=False)
        for chunk in self._chunks(self._request(messages, sampling, max_new_tokens, thinking, stream=True)):
            usage = _object(chunk.get("usage"))
            if isinstance(usage.get("completion_tokens"), int):
                end = replace(end, num_tokens=usage["completion_tokens"])
            if isinstance(usage.get("prompt_tokens"), int):
                end = replace(end, num_prompt_tokens=usage["prompt_tokens"])
            for choice in _objects(chunk.get("choices")):
                delta = _object(choice.get("delta"))
                thought = delta.get("reasoning_content") or delta.get("reasoning")
                if thought:
                    yield Piece(str(thought), thinking=True)
                if delta.get("content"):
                    yield from splitter.add(str(delta["content"]))
                if choice.get("finish_reason"):
                    end = replace(end, finished=choice["finish_reason"] in ("stop", "tool_calls"))
        yield from splitter.close()
        yield end

    def _request(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling | None,
        max_new_tokens: int,
        thinking: bool | None,
        *,
        stream: bool,
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "max_tokens": max_new_tokens}
        if sampling:
            body |= {"temperature": sampling.temperature, "seed": sampling.seed}
        if sampling and sampling.temperature > 0:
            # What OpenAI's own service knows is always sent, the rest where it changes anything.
            body["top_p"] = sampling.top_p
            body |= {"top_k": sampling.top_k} if sampling.top_k else {}
            body |= {"min_p": sampling.min_p} if sampling.min_p else {}
        if thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": thinking}
        return {**body, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream; a server that does not stream gives one, as if it did."""
        try:
            with self._open("/chat/completions", body) as response:
                if "event-stream" not in response.headers.get("Content-Type", ""):
                    yield _as_chunk(self._read_json(response.read()))
                    return
                for line in response:
                    data = line.strip().removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        chunk = self._read_json(data)
                        if "error" in chunk:
                            raise StepError(f"{self.url} ends the answer: {_message(chunk)}")
                        yield chunk
        except (TimeoutError, ConnectionError, HTTPException) as error:
            raise TemporaryError(f"{self.url} broke off its answer ({error!r}): try again") from None

    def _first_model(self) -> str:
        with self._open("/models") as response:
            listed = self._read_json(response.read()).get("data")
        if not isinstance(listed, list) or not listed or "id" not in listed[0]:
            raise UserError(f"{self.url} lists no model: name one with --model-name")
        return str(listed[0]["id"])

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            return self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
            raise TemporaryError(
                f"{self.url} is out of reach ({getattr(error, 'reason', None) or error!r}): start it, or try again"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> StepError:
        if error.code >= 500 or error.code in _LATER:
            later = TemporaryError(f"{self.url} answers {error.code} {error.reason}: try again later")
            later.retry_after_s = _seconds(error.headers.get("Retry-After"))
            return later
        if error.code in (401, 403):
            return UserError(f"{self.url} refuses the key ({error.code}): set {KEY_VARIABLE}")
        try:
            said = _message(json.loads(error.read()))
        except (ValueError, OSError):
            said = str(error.reason)
        return UserError(f"{self.url} refuses the request ({error.code}): {said}")

    def _read_json(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            shown = data[:60].decode(errors="replace")
            raise UserError(f"{self.url} answers '{shown}', no JSON object: is it an OpenAI-compatible server?")
        return found


def _as_chunk(whole: dict[str, Any]) -> dict[str, Any]:
    choices = [{**choice, "delta": choice.get("message")} for choice in _objects(whole.get("choices"))]
    return {**whole, "choices": choices}


def _object(value: Any) -> dict[str, Any]:
    """A JSON object as it is; an empty one for anything else, which a server that is none may send."""
    return value if isinstance(value, dict) else {}


def _objects(values: Any) -> list[dict[str, Any]]:
    return list(map(_object, values)) if isinstance(values, list) else []


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header; None for none, and for a date."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None


def _message(found: Any) -> str:
    error = found.get("error", found) if isinstance(found, dict) else found
    text = error.get("message", error) if isinstance(error, dict) else error
    return f"{' '.join(str(text).split()):.300}"
