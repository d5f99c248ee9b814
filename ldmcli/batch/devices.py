"""`--devices`: which devices draw, one worker on each: all, 0,1, cuda:2, cpu*4."""

import re

from ldmcli.errors import UsageError, printable

MAX_WORKERS = 256
_PART = re.compile(r"(?:(?P<device>cpu|auto|cuda(?::\d{1,3})?)|(?P<number>\d{1,3}))(?:\*(?P<times>\d{1,3}))?", re.ASCII)


def parse_devices(text: str) -> tuple[str, ...]:
    """One device for each worker, as `--device` names them; `("all",)` for all, which only torch can count.

    Numbers are GPUs; `*N` puts N workers on a device. Raises UsageError.
    """
    parts = [part.strip() for part in text.split(",")]
    if parts == ["all"]:
        return ("all",)
    devices: list[str] = []
    for part in parts:
        found = _PART.fullmatch(part)
        if found is None:
            raise UsageError(
                f"devices {printable(repr(text))} are not known; name all, or some of 0, 1, …, cuda:N, cpu, joined by "
                "commas, each with *N for N workers on it."
            )
        number = found["number"]
        times = int(found["times"] or 1)
        if not 1 <= times <= MAX_WORKERS - len(devices):
            raise UsageError(f"devices {printable(repr(text))} ask for a number of workers outside 1 to {MAX_WORKERS}.")
        devices += [f"cuda:{int(number)}" if number is not None else found["device"]] * times
    return tuple(devices)


def present(devices: tuple[str, ...]) -> tuple[str, ...]:
    """`devices` with all GPUs of this machine in place of `all`, or its CPU where there is none."""
    if devices != ("all",):
        return devices
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)


def cores_each(devices: tuple[str, ...], cores: int) -> int:
    """How many cores each of several workers gets: all there are, shared out among those on the CPU, or among all."""
    on_cpu = sum(device == "cpu" for device in devices)
    return max(1, cores // (on_cpu or len(devices) or 1))
