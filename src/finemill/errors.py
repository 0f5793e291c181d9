"""What a step can end with besides success, each with the exit code of the command line."""


class StepError(Exception):
    """A failure that its message explains completely: printed as one line, never as a traceback."""

    exit_code = 1


class UserError(StepError):
    """Bad input or configuration. Never retried: the same call would fail again."""

    exit_code = 2


class GateFailedError(StepError):
    """A promotion gate said no and the caller asked for that to be a failure (`--strict`)."""

    exit_code = 3


class TemporaryError(StepError):
    """Preempted, or a service out of reach: the same call may succeed later."""

    exit_code = 75
    retry_after_s: float | None = None
    """How long the service asks to be left alone, None where it does not say."""


def kind_of(exit_code: int) -> type[StepError]:
    """What a process that ended with `exit_code` failed with."""
    kinds: tuple[type[StepError], ...] = (UserError, GateFailedError, TemporaryError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), StepError)
