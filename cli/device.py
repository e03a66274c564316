"""Whether a device that a flag or a file names can be computed on here."""

from dla_cache.errors import SpecError


def require_device(name: str) -> None:
    """Passes a torch device on which a tensor can be made and read back.

    Raises:
        SpecError: if `name` is no torch device, or one that this machine or this build of torch has not.
    """
    import torch

    try:
        torch.zeros(1, device=torch.device(name)).tolist()
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:  # torch has no class of its own for this
        usable = "`cpu` or `cuda`" if torch.cuda.is_available() else "`cpu`; torch finds no CUDA here"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"device `{name}` cannot be used here: {reason[:200]}", hint=f"use {usable}") from error


def require_devices(names: str) -> str:
    """One torch device or several, with a comma between them, that can be used here; `auto`: all GPUs, else the CPU.

    Raises:
        SpecError: as `require_device`.
    """
    import torch

    if names == "auto":
        names = ",".join(f"cuda:{number}" for number in range(torch.cuda.device_count())) or "cpu"
    for name in dict.fromkeys(names.split(",")):
        require_device(name)
    return names
