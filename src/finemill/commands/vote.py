"""`finemill vote FOLDER`: people say which of two answers is better, blind, on a page of this machine."""

import argparse
import getpass
import webbrowser
from pathlib import Path

from finemill.artifacts.comparison import read_answers
from finemill.commands.parser import CommandParser
from finemill.comparison.page import write_page
from finemill.comparison.summary import summarize
from finemill.comparison.table import Opinions, notes, table
from finemill.comparison.vote_server import Ballot, open_server
from finemill.comparison.votes import pairs_of, read_votes, vote_rates
from finemill.errors import UserError


def execute(name: str, arguments: list[str]) -> int:
    """Serve the page until Ctrl-C, then print the table with the win rates. Returns: the exit code."""
    parsed = _parser(name).parse_args(arguments)
    folder: Path = parsed.folder
    answers = read_answers(folder)
    pairs = pairs_of(answers)
    votes = read_votes(folder)
    if not parsed.show:
        try:
            server = open_server(Ballot(folder, pairs, parsed.by), parsed.port)
        except OSError as error:
            raise UserError(f"vote: port {parsed.port} cannot be opened ({error.strerror}): choose another") from None
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{len(votes)} of {len(pairs)} pairs are voted on; vote at {address}, end with Ctrl-C", flush=True)
        if not parsed.no_browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
        finally:
            server.server_close()
    lines = summarize(answers)
    opinions = Opinions(votes=tuple(vote_rates(pairs, read_votes(folder))))
    write_page(folder, answers, lines, opinions)
    print("\n".join([table(lines, opinions), *notes(opinions)]))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"finemill {name}",
        description="Vote on pairs of answers that `finemill compare --output FOLDER` kept, by keyboard: 1 or left, "
        "2 or right, 0 for neither, u to undo. Which model is on which side is not shown. Votes are kept in "
        "FOLDER/votes.jsonl as they are given; the same command goes on where it was left.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what compare --output wrote")
    parser.add_argument("--by", default=_user(), metavar="NAME", help="who votes (default: this machine's user)")
    parser.add_argument("--port", type=int, default=0, help="of the page (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    parser.add_argument("--show", action="store_true", help="print the result of the votes so far, and serve nothing")
    return parser


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
