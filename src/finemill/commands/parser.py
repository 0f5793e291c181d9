"""The parser of a command's line: what is wrong with it is one line, too, whatever number of options there are."""

import argparse
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Says an error without the usage, which has a hundred lines for a pipeline."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the options\n")


def count(text: str) -> int:
    """A whole number from 1 on, of an option's text."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return number
