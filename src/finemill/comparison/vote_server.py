"""The page that people vote on: served on this machine only, one pair at a time, without names."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from finemill.comparison.judge import Winner
from finemill.comparison.votes import Pair, Vote, add_vote, read_votes

_PAGE = Path(__file__).with_name("vote.html")
_MOST_BYTES = 1 << 16
_SIDES = ("left", "right", "tie", "undo")


class Ballot:
    """The pairs that are still to be voted on, and what was said."""

    def __init__(self, folder: Path, pairs: Sequence[Pair], by: str) -> None:
        self._folder, self._pairs, self._by = folder, list(pairs), by
        self._lock = Lock()
        self._order: list[int] = []

    def state(self) -> dict[str, Any]:
        """The next pair as the page shows it, without models' names; `pair` is None when all are voted on."""
        votes = read_votes(self._folder)
        done = sum(pair.key in votes for pair in self._pairs)
        number = next((index for index, pair in enumerate(self._pairs) if pair.key not in votes), None)
        shown = None if number is None else _shown(number, self._pairs[number])
        return {"done": done, "all": len(self._pairs), "pair": shown, "undo": bool(self._order)}

    def vote(self, number: int, side: str) -> None:
        """Keep what was said of pair `number`, or take the last vote back.

        Raises: ValueError: there is no such pair, or no such side.
        """
        if side not in _SIDES or not 0 <= number < len(self._pairs):
            raise ValueError(f"no vote: {number}, {side}")
        with self._lock:
            if side == "undo":
                number = self._order.pop() if self._order else number
            else:
                self._order.append(number)
            pair = self._pairs[number]
            right: Winner = "other" if pair.left == "first" else "first"
            winners: dict[str, Winner | None] = {"left": pair.left, "right": right, "tie": "tie", "undo": None}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            add_vote(self._folder, Vote(*pair.key, winners[side], pair.left, self._by, now))


def _shown(number: int, pair: Pair) -> dict[str, Any]:
    sides = (pair.first, pair.other) if pair.left == "first" else (pair.other, pair.first)
    return {
        "number": number,
        "question": pair.first.question,
        "reference": pair.first.answer or pair.first.reference,
        "left": sides[0].completion,
        "right": sides[1].completion,
    }


def open_server(ballot: Ballot, port: int) -> ThreadingHTTPServer:
    """A server on this machine's own address; 0 takes a free port. Raises: OSError: the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_ours():
                return
            if self.path == "/":
                self._send(200, "text/html; charset=utf-8", _PAGE.read_bytes())
            elif self.path == "/state":
                self._send_json(ballot.state())
            else:
                self.send_error(404)

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            length = int(self.headers.get("Content-Length") or 0)
            try:
                if self.path != "/vote" or self.headers.get_content_type() != "application/json":
                    raise ValueError("no vote")
                said = json.loads(self.rfile.read(min(length, _MOST_BYTES)))
                ballot.vote(int(said["number"]), str(said["side"]))
            except (ValueError, KeyError, TypeError):
                self.send_error(400)
                return
            self._send_json(ballot.state())

        def _is_ours(self) -> bool:
            """Whether the page was asked for by this machine's address: not by another site's name for it."""
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host in ("127.0.0.1", "localhost"):
                return True
            self.send_error(403)
            return False

        def _send_json(self, value: Any) -> None:
            self._send(200, "application/json", json.dumps(value).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Requests are no news."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
