"""A base model's files may say anything: what libraries raise over them is the user's to know, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from finemill.errors import StepError, UserError

_OF_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)
"""What Python code raises over a value of another kind than it expects."""


@contextmanager
def explained_files(what: str) -> Iterator[None]:
    """Say of `what`, as the base model's tokenizer, that it cannot be used, when reading it raises.

    Raises: UserError: names what the library said.
    """
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        # tokenizers, written in Rust, raises plain `Exception`.
        if not isinstance(error, _OF_CONTENT) and type(error) is not Exception:
            raise
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what} cannot be used ({type(error).__name__}: {said}): fetch or write the model again"
        ) from error
