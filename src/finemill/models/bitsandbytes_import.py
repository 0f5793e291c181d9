"""bitsandbytes without torch's compiler, which nothing here compiles with."""

from importlib.util import find_spec


def import_bitsandbytes() -> None:
    """Import bitsandbytes, which PEFT does sooner or later, without loading inductor: two seconds of each step.

    It wraps three functions in `torch.compile` for devices that it has no kernels for. What is wrapped while the
    default backend is "eager" runs as it is written.
    """
    import torch

    # The older releases of torch that are supported have no default to set.
    if find_spec("bitsandbytes") is None or not hasattr(torch.compiler, "set_default_backend"):
        return
    before = torch.compiler.get_default_backend()
    torch.compiler.set_default_backend("eager")
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compiler.set_default_backend(before)
