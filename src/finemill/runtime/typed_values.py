"""What a person wrote on KFP's pages, where nothing packs it: the kubelet expands `$(NAME)` and `$$`, KFP `{{...}}`."""

from collections.abc import Mapping
from typing import Any

from finemill.credentials import credential_in
from finemill.errors import UserError
from finemill.transport import is_packed


def check_typed(value: Any, where: str) -> None:
    """Look for texts that may have been changed on their way into this pod.

    Args:
        value: a parameter as it arrived; what is packed in it is as it was sent.
        where: what it is called.
    Raises: UserError: a text has what is expanded, or holds a credential, which `$(NAME)` became.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_typed(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_typed(item, where)
    elif isinstance(value, str) and not is_packed(value):
        credential = credential_in(value)
        if credential:
            raise UserError(f"'{where}' holds the value of {credential}, which no configuration may: take it out")
        if "$" in value or "{{" in value:
            raise UserError(
                f"'{where}' has $ or {{{{ in it, which KFP's pages do not hand on as they were written: start the run "
                "with `finemill submit --engine kfp`"
            )
