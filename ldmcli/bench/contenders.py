"""Who can run: this program and its peers, as data."""

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.bench.task import Job, Task
from ldmcli.errors import UsageError, printable

_log = logging.getLogger(__name__)
_OURS = "ldmcli.bench.ours"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program with its settings; `module` has its `main`, `packages` are what it imports beyond this program's.

    `dtype` "" is what a plain user of it gets: float32 on a CPU, fp16 on a GPU; "run" is the number type of the run;
    "native" is bf16 on a CPU that has it, else as "". `device`: the only kind it runs on, if there is but one.
    `prepares`: it converts the model before it starts; `alone`: it draws one picture at a time. `settings` are fields
    of the task that are otherwise for it, `environment` what its processes find beyond the others'.
    """

    name: str
    module: str
    packages: tuple[str, ...] = ()
    dtype: str = ""
    channels_last: bool = False
    compiled: bool = False
    device: str = ""
    prepares: bool = False
    alone: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether it is this program, whatever its settings."""
        return self.module == _OURS


def _variant(name: str, device: str = "", packages: tuple[str, ...] = (), **settings: Any) -> Contender:
    return Contender(name, _OURS, packages, "run", device=device, settings=tuple(settings.items()))


OURS = _variant("ldm")
NO_CACHE = "ldm --no-cache"  # the same program, for which nothing is kept on disk; its cold start is another
# What all are compared with: nothing of this program's that makes it fast, and no rounding to TF32, which NVIDIA's
# libraries do in float32 otherwise.
REFERENCE = Contender(
    "ldm fp32",
    _OURS,
    settings=(("dtype", "fp32"), ("attention", "sdpa"), ("kernels", "torch"), ("graph", False), ("compiled", False),
              ("low_vram", False)),
    environment=(("NVIDIA_TF32_OVERRIDE", "0"),),
)  # fmt: skip
# This program again, each with one setting that is otherwise: what the setting is worth.
VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("ldm-eager", graph=False),
        _variant("ldm-torch-kernels", kernels="torch"),
        _variant("ldm-plain", graph=False, kernels="torch"),
        _variant("ldm-sdpa", attention="sdpa"),
        _variant("ldm-xformers", "cuda", ("xformers",), attention="xformers"),
        _variant("ldm-compile", compiled=True),
        _variant("ldm-low-vram", low_vram=True),
    )
}

_DIFFUSERS = "ldmcli.bench.peer_diffusers"
PEERS = {
    peer.name: peer
    for peer in (
        Contender("diffusers", _DIFFUSERS, ("diffusers",)),
        Contender("diffusers-channels-last", _DIFFUSERS, ("diffusers",), "run", channels_last=True),
        Contender("diffusers-bf16", _DIFFUSERS, ("diffusers",), "bf16", channels_last=True),
        Contender("diffusers-compile", _DIFFUSERS, ("diffusers",), "native", channels_last=True, compiled=True),
        Contender(
            "openvino",
            "ldmcli.bench.peer_openvino",
            ("openvino", "diffusers"),
            "native",
            device="cpu",
            prepares=True,
            alone=True,
        ),
    )
}


def chosen_peers(names: str) -> list[Contender]:
    """The peers and variants of `ldm` of a comma-separated list, each once. Raises UsageError for one that is unknown
    or not installed."""
    known = PEERS | VARIANTS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UsageError(f"contender {printable(repr(name))} is not known; choose from {', '.join(known)}.")
    peers = [known[name] for name in dict.fromkeys(wanted)]
    for peer in peers:
        missing = [package for package in peer.packages if not _installed(package)]
        if missing:
            raise UsageError(
                f"contender {peer.name} needs {' and '.join(missing)}, which this Python does not have; run "
                f"pip install {' '.join(missing)}."
            )
    return peers


def check_peers(peers: Sequence[Contender], model: Path, batch_size: int = 1) -> None:
    """Raises UsageError where the peers could not read the model (without the network they take diffusers folders), or
    not draw so many pictures at once."""
    others = [peer for peer in peers if not peer.is_ours]
    if others and not model.is_dir():
        raise UsageError(
            f"{printable(str(model))} is a single file, and {others[0].name} reads only diffusers folders without the "
            "network; name a folder."
        )
    for peer in peers:
        if peer.alone and batch_size > 1:
            raise UsageError(
                f"contender {peer.name} draws one picture at a time, and {batch_size} at once are asked for; leave "
                "out one of the two."
            )


def job_for(contender: Contender, task: Task, facts: dict[str, Any], prepared: str = "") -> Job:
    """The contender's job, given what `ldm` itself told of device and number types (its greeting). Raises UsageError
    where it cannot run on that device."""
    cuda = facts["device"].startswith("cuda")
    kind = "cuda" if cuda else "cpu"
    if contender.device not in ("", kind):
        where = "the CPU" if contender.device == "cpu" else "a GPU"
        raise UsageError(
            f"contender {contender.name} runs on {where}, the others on {facts['device']}; use --device "
            f"{contender.device} or leave it out."
        )
    plain = "fp16" if cuda else "fp32"
    native = "bf16" if facts["bf16_native"] and not cuda else plain
    dtype = {"": plain, "run": facts["dtype"], "native": native}.get(contender.dtype, contender.dtype)
    own = dataclasses.replace(task, **dict(contender.settings))
    if own != task and not cuda and own.attention == task.attention and own.compiled == task.compiled:
        _log.info("%s: on a CPU it is what ldm is; its setting is for GPUs", contender.name)
    return Job(
        own, contender.name, facts["device"], dtype, contender.channels_last, contender.compiled, prepared=prepared
    )  # fmt: skip


def is_ours(name: str) -> bool:
    """Whether a record of this name is of this program, in any of its settings."""
    return name.partition(" ")[0] == OURS.name or name in VARIANTS


def _installed(package: str) -> bool:
    """Whether it can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
