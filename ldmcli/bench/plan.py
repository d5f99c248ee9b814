"""What a user asks of the bench, and what comes out of it."""

import dataclasses
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmcli.bench.contenders import Contender, is_ours
from ldmcli.bench.measure import Record
from ldmcli.bench.task import PROMPT, Task
from ldmcli.errors import UsageError
from ldmcli.speed.memory import host_memory

_SMALL = 500_000_000  # bytes of weights; comparisons with models below are measured more often
_MODEL_SETTINGS = ("width", "height", "guidance_scale", "steps")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure. `model` is a path on disk, or None where weights of `family` are drawn at random; `settings` are
    fields of a Task, None where the model's own serve. `cached`: whether a cold start with known prompts counts too.
    `profiled`: whether the time of a step is told by kinds of work. `compile_cache` is where what contenders compile is
    kept for the next run; None for a folder that is empty at first and removed at the end."""

    model: Path | None
    family: str | None
    settings: Mapping[str, Any]
    peers: tuple[Contender, ...] = ()
    clocks: tuple[str, ...] = ("cold", "image", "step")
    runs: int | None = None
    cached: bool = True
    profiled: bool = False
    compile_cache: Path | None = None


@dataclasses.dataclass
class Results:
    """What was measured: a record for each contender, this program's first, the floor under the model's times, and a
    step's `profile` (see profile.py)."""

    name: str
    task: Task
    records: dict[str, Record]
    floor: dict[str, Any] | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    together: bool = True
    profile: dict[str, Any] | None = None

    @property
    def base(self) -> Record | None:
        """What ratios are to: the first peer; where there is none, the first variant of this program."""
        others = [record for name, record in self.records.items() if name.partition(" ")[0] != "ldm"]
        return next((record for record in others if not is_ours(record.name)), others[0] if others else None)

    @property
    def flawed(self) -> bool:
        """Whether any contender failed or draws something else."""
        return any(record.flawed for record in self.records.values())


def make_task(plan: Plan, model: Path) -> Task:
    """The task for the model at this path, its own settings filled in. Raises LdmError as opening it does, UsageError
    where it cannot draw that."""
    from ldmcli.checkpoints.source import open_model
    from ldmcli.config import UNDECIDED
    from ldmcli.spec import GenerationRequest, fit_to_model
    from ldmcli.speed.cpu.threads import choose_threads

    config = open_model(model).config
    if config.schedule.prediction_type == UNDECIDED:
        raise UsageError(f"{model.name} does not say what its U-Net predicts; bench a diffusers folder of it.")
    settings = {"prompt": PROMPT, **plan.settings}
    names = ("prompt", "negative_prompt", "seed", *_MODEL_SETTINGS)
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    fitted = fit_to_model(GenerationRequest(**given, sampler="ddim"), config)
    settings |= {name: getattr(fitted, name) for name in names}
    last_seed = fitted.seed + settings.get("batch_size", 1) - 1
    GenerationRequest(fitted.prompt, seed=last_seed)  # refused where it is out of range
    settings["threads"] = choose_threads(settings.get("threads"), config.unet)
    return Task(str(model), **settings)


def default_runs(weights: int, peers: int) -> int:
    """How often to measure a model with so many bytes of weights, beside so many peers."""
    return 5 if peers and weights < _SMALL else 3


def environment(threads: int, folder: Path, compile_cache: Path | None = None) -> dict[str, str]:
    """What contenders find in their environment: nothing of ldm's own settings, the same threads for all, no network,
    and caches of their own in `folder`, empty at first; what they compile in `compile_cache` if there is one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LDM_", "_LDM_"))}
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return kept | own | caches(folder) | compile_caches(compile_cache or folder)


def caches(folder: Path) -> dict[str, str]:
    """The environment's words for keeping everything in `folder`."""
    return {"XDG_CACHE_HOME": str(folder / "cache"), **compile_caches(folder)}


def compile_caches(folder: Path) -> dict[str, str]:
    """The environment's words for keeping in `folder` what torch, Triton and the GPU's driver compile."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
    return {name: str(folder / below) for name, below in names.items()}


def machine() -> dict[str, Any]:
    """What the times depend on beside the programs: the CPU's name, how many there are, bytes of memory."""
    cpu = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "memory": host_memory(), "kernel": platform.release()}
