"""What a failure is to people: one line and an exit code, whoever raised it."""

import errno
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from finemill.credentials import without_credentials
from finemill.errors import StepError, TemporaryError, UserError
from finemill.storage.staging import lasting_temporary_folder
from finemill.tracking.progress import EVENTS_VARIABLE

_TEMPORARY = {errno.EAGAIN, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ESTALE}
_PLACES = "--store, FINEMILL_CACHE, HF_HOME and TMPDIR name the folders that are written to"
# Modules that come with another package than the one they are named after.
_BROUGHT_BY = {"yaml": "pyyaml", "kubernetes": "kfp", "kfp_server_api": "kfp", "huggingface_hub": "transformers"}
_EXTRA = re.compile(r"""^([\w.-]+).*extra == ["']([\w-]+)["']""")


def explain(error: Exception, place: Path | None = None) -> StepError | None:
    """What a foreign exception means to the user; None for what nobody but this project can mend.

    Args:
        place: what an error without a file name is about.
    """
    text = " ".join(str(error).split())
    if isinstance(error, StepError):
        return error
    if isinstance(error, ImportError):
        return _explain_import(error)
    if isinstance(error, OSError):
        return _explain_os(error, place)
    if type(error).__module__.startswith("botocore.") or _passed_through(error, "botocore"):
        return UserError(f"S3: {text}: correct the AWS_* variables or the profile")
    if "out of memory" in text and (type(error).__name__ == "OutOfMemoryError" or "CUDA" in text):
        return UserError(
            f"the GPU's memory is not enough ({'. '.join(text.split('. ')[:3])}): lower the batch size, max_length or "
            "memory_gb, or end what else uses the GPU"
        )
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return UserError("a file or folder has a name that is no UTF-8: rename it, or choose another --store")
    if isinstance(error, UnicodeError) and "idna" in text:
        return UserError(f"an address names no host ({text}): correct it")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return UserError(f"this machine's memory is not enough ({text or 'MemoryError'}): use a larger one")
    if text.startswith("Could not determine home directory"):
        return UserError("there is no home folder: set HOME, or FINEMILL_CACHE if only the cache needs one")
    if type(error).__name__ == "SafetensorError":
        return UserError(f"a safetensors file cannot be read ({text}): fetch or write the model again")
    return None


def _passed_through(error: Exception, package: str) -> bool:
    """Whether an exception comes from a package, which raises what Python does at settings that it cannot read."""
    traceback, names = error.__traceback__, set[str]()
    while traceback:
        names.add(traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        traceback = traceback.tb_next
    return package in names


def _explain_os(error: OSError, place: Path | None) -> StepError | None:
    if isinstance(error, ConnectionError | TimeoutError) or error.errno in _TEMPORARY:
        return TemporaryError(f"{error}: try again")
    if error.errno is None:
        # transformers says so what a model's folder lacks; subclasses belong to libraries that speak to servers.
        return UserError(" ".join(str(error).split())) if type(error) is OSError else None
    what = f"{error.strerror} ({error.filename or place})" if error.filename or place else str(error.strerror)
    return UserError(what if error.errno in (errno.ENOENT, errno.EISDIR) else f"{what}: {_PLACES}")


def _explain_import(error: ImportError) -> StepError | None:
    module = (error.name or "").partition(".")[0]
    if module == "finemill":
        return None
    text = " ".join(str(error).split())
    if error.path and _is_in_the_way(Path(error.path), module):
        return UserError(
            f"{text}: that file is found in the place of the module: rename it, or start in another folder"
        )
    package = _package_with(module) if module else "finemill[all]"
    return UserError(f"{text}: install it with pip install '{package}'")


def _is_in_the_way(file: Path, module: str) -> bool:
    """Whether a module is a file of the working folder, or another one in the place of Python's own."""
    is_python_s = module in sys.stdlib_module_names and Path(os.__file__).parent not in file.parents
    return is_python_s or file.parent == Path.cwd()


def _package_with(module: str) -> str:
    """What to install for `module`: finemill with the first extra that brings it, or a package of that name, as a
    database's driver, that finemill has no say in.
    """
    try:
        required = requires("finemill") or []
    except PackageNotFoundError:
        return "finemill[all]"
    package = _BROUGHT_BY.get(module, module).replace("_", "-").lower()
    extras = {found[1].lower(): found[2] for line in reversed(required) if (found := _EXTRA.match(line))}
    if package in extras:
        return f"finemill[{extras[package]}]"
    return "finemill" if any(re.split(r"[^\w.-]", line)[0].lower() == package for line in required) else module


@contextmanager
def explained(place: Path | None = None) -> Iterator[None]:
    """Raise what `explain` makes of an exception in the block, the others as they are."""
    try:
        yield
    except Exception as error:
        known = explain(error, place)
        if known is None or known is error:
            raise
        raise known from error


def describe(command: str, error: Exception) -> tuple[str, int]:
    """One line for people, without the command's own name before it, and the exit code."""
    known = explain(error)
    text = str(known) if known else f"{type(error).__name__}: {error}"
    line = without_credentials(" ".join(text.split()))
    line = line.removeprefix(f"finemill {command}: ").removeprefix(f"{command}: ")
    return (line, known.exit_code) if known else (f"a fault in finemill itself, {line}", 1)


def report(command: str, error: Exception) -> int:
    """Print one line for a failed command; of a fault of our own with the file that has the traceback.

    Where standard error is kept in a log, in a pod and under `finemill run`, the traceback is there.
    Returns: the exit code.
    """
    line, exit_code = describe(command, error)
    if explain(error) is None:
        text = without_credentials("".join(traceback.format_exception(error)))
        kept = EVENTS_VARIABLE in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ
        log = None if kept else _write_log(command, text)
        if log is None:
            _say(text)
        line += f"; the traceback is in {log or 'the lines above'}: please report it"
    _say(f"finemill {command}: {line}")
    return exit_code


def _say(text: str) -> None:
    # The exit code is told where nothing else can be.
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _write_log(command: str, text: str) -> str | None:
    """The file that holds `text`; None where none can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="replace",
            dir=lasting_temporary_folder(),
            prefix=f"finemill-{command}-",
            suffix=".log",
            delete=False,
        ) as file:
            file.write(text)
    except OSError:
        return None
    return file.name
