"""Who can run: this program and its peers, as data."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.bench.task import Job, Task
from ldmcli.errors import UsageError, printable


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program with its settings; `module` has its `main`, `packages` are what it imports beyond this program's.

    `dtype` "" is what a plain user of it gets: float32 on a CPU, fp16 on a GPU; "run" is the number type of the run;
    "native" is bf16 on a CPU that has it, else as "". `cpu_only`, `prepares`: it converts the model before it starts.
    """

    name: str
    module: str
    packages: tuple[str, ...] = ()
    dtype: str = ""
    channels_last: bool = False
    compiled: bool = False
    cpu_only: bool = False
    prepares: bool = False


OURS = Contender("ldm", "ldmcli.bench.ours", dtype="run")
NO_CACHE = "ldm --no-cache"  # the same program, whose prompts are encoded anew; its cold start is another

_DIFFUSERS = "ldmcli.bench.peer_diffusers"
PEERS = {
    peer.name: peer
    for peer in (
        Contender("diffusers", _DIFFUSERS, ("diffusers",)),
        Contender("diffusers-channels-last", _DIFFUSERS, ("diffusers",), "run", channels_last=True),
        Contender("diffusers-bf16", _DIFFUSERS, ("diffusers",), "bf16", channels_last=True),
        Contender("diffusers-compile", _DIFFUSERS, ("diffusers",), "native", channels_last=True, compiled=True),
        Contender(
            "openvino", "ldmcli.bench.peer_openvino", ("openvino", "diffusers"), "native", cpu_only=True, prepares=True
        ),
    )
}


def chosen_peers(names: str) -> list[Contender]:
    """The peers of a comma-separated list, each once. Raises UsageError for one that is unknown or not installed."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in PEERS:
            raise UsageError(f"contender {printable(repr(name))} is not known; choose from {', '.join(PEERS)}.")
    peers = [PEERS[name] for name in dict.fromkeys(wanted)]
    for peer in peers:
        missing = [package for package in peer.packages if not _installed(package)]
        if missing:
            raise UsageError(
                f"contender {peer.name} needs {' and '.join(missing)}, which this Python does not have; run "
                f"pip install {' '.join(missing)}."
            )
    return peers


def check_peers(peers: Sequence[Contender], model: Path) -> None:
    """Raises UsageError where the peers could not read the model: without the network they take diffusers folders."""
    if peers and not model.is_dir():
        raise UsageError(
            f"{printable(str(model))} is a single file, and {peers[0].name} reads only diffusers folders without the "
            "network; name a folder."
        )


def job_for(contender: Contender, task: Task, facts: dict[str, Any], prepared: str = "") -> Job:
    """The contender's job, given what `ldm` itself told of device and number types (its greeting). Raises UsageError
    where it cannot run on that device."""
    cuda = facts["device"].startswith("cuda")
    if cuda and contender.cpu_only:
        raise UsageError(
            f"contender {contender.name} runs on the CPU, the others on {facts['device']}; use --device cpu."
        )
    plain = "fp16" if cuda else "fp32"
    native = "bf16" if facts["bf16_native"] and not cuda else plain
    dtype = {"": plain, "run": facts["dtype"], "native": native}.get(contender.dtype, contender.dtype)
    return Job(
        task, contender.name, facts["device"], dtype, contender.channels_last, contender.compiled, prepared=prepared
    )  # fmt: skip


def _installed(package: str) -> bool:
    """Whether it can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
