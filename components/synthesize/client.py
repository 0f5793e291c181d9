"""An endpoint asked with patience: retries, a rate limit, a budget, and a journal of what it has answered."""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finemill.components.synthesize.config import SynthesizeConfig
from finemill.errors import StepError, UserError
from finemill.models.endpoint import Endpoint
from finemill.models.reply import Reply, collect
from finemill.models.sampling import GREEDY, Sampling
from finemill.rows.reasons import DroppedRowError

JOURNAL_FILE = "journal.jsonl"
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
# Tasks of which the likeliest answer is wanted.
_GREEDY_TASKS = ("judge", "translate")


class BudgetSpentError(StepError):
    """The budget does not allow another request."""


class RequestFailedError(StepError):
    """A request that failed as often as it may."""


@dataclass
class Spent:
    """What requests have cost so far; answers out of the journal cost nothing."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0

    def cost(self, config: SynthesizeConfig) -> float:
        """In the currency of the prices."""
        return (
            self.prompt_tokens * config.price_per_million_prompt_tokens
            + self.reply_tokens * config.price_per_million_reply_tokens
        ) / 1e6


class Journal:
    """Replies by request, in a file that grows by a line each: a run that ends early goes on where it was.

    `unsaved` counts those that no checkpoint has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / JOURNAL_FILE
        self._replies: dict[str, str] = {}
        self.unsaved = 0
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                # The last may have been cut while it was saved.
                with suppress(ValueError):
                    entry = json.loads(line)
                    self._replies[entry["request"]] = entry["reply"]

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, request: str) -> str | None:
        """The reply to a request, None if it was not made."""
        return self._replies.get(request)

    def add(self, request: str, reply: str) -> None:
        """Remember a reply."""
        self._replies[request] = reply
        self.unsaved += 1
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"request": request, "reply": reply}, ensure_ascii=False) + "\n")


class Client:
    """One model of a server, for several threads.

    Args:
        endpoint: the server.
        config: the step's.
        journal: what it has answered before.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        config: SynthesizeConfig,
        journal: Journal,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._config = config
        self._journal = journal
        self._sleep = sleep
        self._lock = threading.Lock()
        self._next_start = 0.0
        self.spent = Spent()
        greedy = config.task in _GREEDY_TASKS or not config.temperature
        self._sampling = GREEDY if greedy else Sampling(config.temperature, seed=config.seed)

    def ask(self, task: str, text: str) -> str:
        """The answer to a text under the task's instructions.

        Raises: DroppedRowError: the answer is empty or does not end. BudgetSpentError. RequestFailedError: the server
        failed as often as it may. UserError: it refuses the request.
        """
        told = f"{task}\n\n{self._config.instructions}" if self._config.instructions else task
        messages = [{"role": "system", "content": told}, {"role": "user", "content": text}]
        request = hashlib.sha256(json.dumps([self._endpoint.model, messages]).encode()).hexdigest()
        with self._lock:
            known = self._journal.get(request)
        if known is not None:
            return known
        reply = self._ask_server(messages)
        if not reply.finished:
            raise DroppedRowError("reply_cut", f"{reply.num_tokens or self._config.max_new_tokens} tokens")
        if not reply.answer:
            raise DroppedRowError("reply_empty")
        with self._lock:
            self._journal.add(request, reply.answer)
        return reply.answer

    def _ask_server(self, messages: list[dict[str, str]]) -> Reply:
        for attempt in range(self._config.max_retries + 1):
            self._wait_for_turn()
            try:
                reply = collect(
                    self._endpoint.stream(
                        messages,
                        sampling=self._sampling,
                        max_new_tokens=self._config.max_new_tokens,
                        thinking=self._config.enable_thinking,
                    )
                )
            except UserError:
                raise
            except StepError as error:
                if attempt == self._config.max_retries:
                    raise RequestFailedError(f"{error} ({attempt + 1} attempts)") from None
                with self._lock:
                    self.spent.retries += 1
                self._sleep(_wait_s(attempt, getattr(error, "retry_after_s", None)))
            else:
                self._count(messages, reply)
                return reply
        raise AssertionError("the last attempt ends in an answer or an error")

    def _wait_for_turn(self) -> None:
        """Wait until the rate allows another request. Raises: BudgetSpentError: the budget does not."""
        with self._lock:
            self._check_budget()
            self.spent.requests += 1
            now = time.monotonic()
            wait_s = max(0.0, self._next_start - now)
            if self._config.requests_per_minute:
                self._next_start = max(now, self._next_start) + 60 / self._config.requests_per_minute
        if wait_s:
            self._sleep(wait_s)

    def _check_budget(self) -> None:
        tokens, cost = self.spent.prompt_tokens + self.spent.reply_tokens, self.spent.cost(self._config)
        if self._config.max_tokens is not None and tokens >= self._config.max_tokens:
            raise BudgetSpentError(f"max_tokens {self._config.max_tokens} are spent ({tokens})")
        if self._config.max_cost is not None and cost >= self._config.max_cost:
            raise BudgetSpentError(f"max_cost {self._config.max_cost:g} is spent ({cost:.4g})")

    def _count(self, messages: list[dict[str, str]], reply: Reply) -> None:
        """Add up what a request cost; a server that does not say has taken a token for four characters."""
        asked, said = sum(len(m["content"]) for m in messages), len(reply.thinking) + len(reply.answer)
        with self._lock:
            self.spent.prompt_tokens += asked // 4 if reply.num_prompt_tokens is None else reply.num_prompt_tokens
            self.spent.reply_tokens += said // 4 if reply.num_tokens is None else reply.num_tokens


def _wait_s(attempt: int, asked_for: float | None) -> float:
    """Seconds before the next attempt: what the server asks for, or twice as long each time, not all at once."""
    if asked_for is not None:
        return min(asked_for, _LONGEST_WAIT_S)
    return float(min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S)) * random.uniform(0.5, 1.0)
