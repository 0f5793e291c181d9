"""A GGUF file served by llama.cpp inside this process, through the `xllamacpp` wheel."""

import gc
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finemill.errors import StepError, UserError
from finemill.models.generation import Answer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
# Answers decoded together: llama.cpp batches them, which is worth more than threads for a small model.
_PARALLEL = 8


class LlamaServer:
    """The server's completion and tokenize functions."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._plain_token_id = self.tokenize("a")[0]

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with the marks of special tokens read as such and nothing added."""
        body = {"content": text, "add_special": False, "parse_special": True}
        tokens: list[int] = self._post("/tokenize", body)["tokens"]
        return tokens

    def chat_prompt(self, messages: Messages, tools: Tools = (), *, thinking: bool) -> str:
        """What the file's chat template makes of a chat. Raises: StepError: llama.cpp cannot run the template on it."""
        return str(self._chat("/apply-template", messages, tools, thinking)["prompt"])

    def chat(self, messages: Messages, *, thinking: bool, max_new_tokens: int) -> str:
        """The beginning of the answer to a chat, thinking first. Raises: StepError: the server does not answer."""
        options = {"temperature": 0, "max_tokens": max_new_tokens}
        result = self._chat("/v1/chat/completions", messages, (), thinking, **options)
        message = result["choices"][0]["message"]
        return f"{message.get('reasoning_content') or ''}{message.get('content') or ''}"

    def _chat(self, path: str, messages: Messages, tools: Tools, thinking: bool, **options: int) -> Any:
        body: dict[str, Any] = {"messages": [_as_openai_does(message) for message in messages], **options}
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
        if tools:
            body["tools"] = list(tools)
        try:
            return self._post(path, body)
        except urllib.error.HTTPError as error:
            line = " ".join(error.read().decode(errors="replace").split())
            raise StepError(f"llama.cpp refuses a chat (HTTP {error.code}): {line:.300}") from None

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        stop_texts: Sequence[str],
        max_new_tokens: int,
        on_progress: Callable[[int], None],
    ) -> list[Answer]:
        """Greedy answers in the order of `prompts`; the text of the token that ended the turn is left out."""
        answers: list[Answer] = []
        with ThreadPoolExecutor(_PARALLEL) as pool:
            requests = [{"prompt": list(prompt), "max_tokens": max_new_tokens} for prompt in prompts]
            for result in pool.map(self._complete, requests):
                choice = result["choices"][0]
                stop = next((stop for stop in stop_texts if choice["text"].endswith(stop)), "")
                answers.append(
                    Answer(
                        choice["text"].removesuffix(stop),
                        result["usage"]["completion_tokens"],
                        finished=choice["finish_reason"] == "stop",
                    )
                )
                on_progress(len(answers))
        return answers

    def next_token_log_probabilities(self, prompt: Sequence[int], count: int) -> dict[int, float]:
        """Log-probability of the `count` likeliest next tokens under the full softmax of the model's logits."""
        # The server reports no probabilities for a token that ends inside a UTF-8 character. They are those before
        # sampling, so that a bias may choose a harmless token without changing them.
        bias = [[self._plain_token_id, 1e4]]
        result = self._complete({"prompt": list(prompt), "max_tokens": 1, "logprobs": count, "logit_bias": bias})
        content = (result["choices"][0].get("logprobs") or {}).get("content")
        if not content:
            raise StepError(f"llama.cpp reports no probabilities after {len(prompt)} tokens")
        entries = content[0]["top_logprobs"]
        # A probability that underflows is reported as null.
        return {entry["id"]: -math.inf if entry["logprob"] is None else entry["logprob"] for entry in entries}

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = self._server.handle_completions({"temperature": 0, **request})
        if "choices" not in result:
            raise StepError(f"llama.cpp refused a prompt of {len(request['prompt'])} tokens: {result}")
        return result

    def _post(self, path: str, body: object) -> Any:
        """The server listens on the loopback interface: no proxy may come between."""
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)


def _as_openai_does(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its calls' arguments as JSON text, which chat templates get as values."""
    if not message.get("tool_calls"):
        return dict(message)
    functions = [
        {**call["function"], "arguments": json.dumps(call["function"]["arguments"])} for call in message["tool_calls"]
    ]
    calls = [{**call, "function": function} for call, function in zip(message["tool_calls"], functions, strict=True)]
    return {**message, "tool_calls": calls}


@contextmanager
def serve(path: Path, num_threads: int, context_length: int, *, adapter: Path | None = None) -> Iterator[LlamaServer]:
    """Load `path` into llama.cpp, with room for `context_length` tokens in each of the parallel answers.

    Args:
        adapter: LoRA in a GGUF file of its own, which is added while the model runs.
    Raises: StepError: llama.cpp does not load the file.
    """
    params = _params(path, num_threads, context_length, _PARALLEL)
    # Thinking marks and tool calls are special tokens in some models: answers are compared with them.
    params.special = True
    if adapter:
        import xllamacpp

        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    with _running(params, StepError) as server:
        yield LlamaServer(server)


@contextmanager
def serve_chats(
    path: Path,
    num_threads: int,
    context_length: int,
    *,
    parallel: int = 1,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str = "",
) -> Iterator[str]:
    """Load `path` into llama.cpp and answer OpenAI's requests, with the file's own chat template.

    Args:
        context_length: tokens that a chat may have.
        parallel: chats that are answered at once.
        port: 0 takes a free one.
        name: what the server calls the model.
    Yields: the address, http://host:port.
    Raises: UserError: llama.cpp does not load the file.
    """
    params = _params(path, num_threads, context_length, parallel)
    params.hostnames = [host]
    params.port = port
    params.model_alias = {name or path.stem}
    with _running(params, UserError) as server:
        yield str(server.listening_address)


def _params(path: Path, num_threads: int, context_length: int, parallel: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context_length * parallel
    params.n_parallel = parallel
    params.warmup = False
    params.fit_params = False
    params.ui = False
    params.verbosity = -1
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = num_threads
        # Threads that wait for work sleep instead of spinning, which on busy cores takes the time from those that work.
        threads.poll = 0
    return params


@contextmanager
def _running(params: Any, failure: type[StepError]) -> Iterator[Any]:
    import xllamacpp

    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise failure(f"llama.cpp does not load {Path(params.model.path).name}: {error}") from error
    try:
        yield server
    finally:
        # The model is freed with the server, which nothing refers to any longer.
        del server
        gc.collect()


def architecture(path: Path) -> str | None:
    """The family that a GGUF file names."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("general.architecture")
    return str(field.contents()) if field else None
