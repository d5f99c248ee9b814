"""Who can run, as data: this program, its variants with one setting changed, its peers; and what each is to draw."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldmcli.errors import UsageError, printable

PROMPT = "a red apple on a blue background"
CLOCKS = ("cold", "image", "step")


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture by DDIM, or `batch_size` pictures at once whose seeds count up from `seed`; sizes in pixels.

    `model` is a path; it gives sizes and guidance where they are None, and `ldm` resolves "auto", before any other is
    asked. `settings` are the contender's own, `prepared` is the folder of the model that it converted.
    """

    name: str
    model: str
    prompt: str = PROMPT
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepared: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.startswith("cuda")

    def to_json(self) -> str:
        """All fields as one line."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program with its settings; `module` answers the questions of serving.py, and `packages` is what it imports.

    `settings` are fields of a RuntimeSpec, or what its module knows. `dtype`: "run" is that of the run, "plain"
    float32 on a CPU and fp16 on a GPU, "native" bf16 on a CPU that has it, else as "plain". `device` is the only kind
    of device that it runs on, if any; `alone`: it draws one picture at a time; `clocks` are those that time it.
    `environment` is added to that of its processes.
    """

    name: str
    module: str = "bench.ours"
    packages: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "run"
    device: str = ""
    alone: bool = False
    clocks: tuple[str, ...] = CLOCKS
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is this program, whatever its settings."""
        return self.module == "bench.ours"


OURS = Contender("ldm")
# All are compared with it: nothing that makes this program fast, and no rounding to TF32.
_PLAIN = {"attention": "sdpa", "kernels": "torch", "cuda_graph": False}
REFERENCE = Contender("ldm fp32", settings=_PLAIN, dtype="fp32", environment={"NVIDIA_TF32_OVERRIDE": "0"})


def _diffusers(name: str, dtype: str, **settings: Any) -> Contender:
    return Contender(name, "bench.peer_diffusers", ("diffusers",), settings, dtype)


CONTENDERS = {
    contender.name: contender
    for contender in (
        _diffusers("diffusers", "plain"),
        _diffusers("diffusers-channels-last", "run", channels_last=True),
        _diffusers("diffusers-bf16", "bf16", channels_last=True),
        _diffusers("diffusers-compile", "native", channels_last=True, compile=True),
        Contender("openvino", "bench.peer_openvino", ("openvino", "diffusers"), {}, "native", "cpu", alone=True),
        # It keeps nothing on disk and finds nothing compiled.
        Contender("ldm-no-cache", settings={"cache": False}, clocks=("cold",)),
        Contender("ldm-eager", settings={"cuda_graph": False}),
        Contender("ldm-torch-kernels", settings={"kernels": "torch"}),
        Contender("ldm-plain", settings={"cuda_graph": False, "kernels": "torch"}),
        Contender("ldm-sdpa", settings={"attention": "sdpa"}),
        Contender("ldm-xformers", packages=("xformers",), settings={"attention": "xformers"}, device="cuda"),
        Contender("ldm-compile", settings={"compile": True}),
        Contender("ldm-low-vram", settings={"low_vram": True}),
        Contender("ldm-tiled", settings={"vae_tiling": True}),
    )
}


def chosen(names: str) -> list[Contender]:
    """The contenders of a comma-separated list, each once. Raises UsageError for an unknown one."""
    wanted = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    for name in wanted:
        if name not in CONTENDERS:
            raise UsageError(f"contender {printable(repr(name))} is not known; choose from {', '.join(CONTENDERS)}.")
    return [CONTENDERS[name] for name in wanted]


def obstacle(contender: Contender, job: Job, installed: Callable[[str], object] = importlib.util.find_spec) -> str:
    """Why a contender cannot do the job here; "" where it can."""
    missing = [package for package in contender.packages if installed(package) is None]
    if missing:
        return f"needs {' and '.join(missing)}, which this Python does not have (pip install {' '.join(missing)})"
    if contender.device not in ("", "cuda" if job.on_gpu else "cpu"):
        return f"runs on {contender.device} alone, and this run is on {job.device}"
    if contender.alone and job.batch_size > 1:
        return f"draws one picture at a time, and {job.batch_size} at once are asked for"
    if not contender.is_ours and not Path(job.model).is_dir():
        return "reads only diffusers folders, and the model is a single file"
    return ""


def job_for(contender: Contender, job: Job, facts: Mapping[str, Any]) -> Job:
    """The contender's job, given that of the run and what `ldm` told of its device and number type."""
    plain = "fp16" if job.on_gpu else "fp32"
    native = "bf16" if facts["bf16_native"] and not job.on_gpu else plain
    dtype = {"run": facts["dtype"], "plain": plain, "native": native}.get(contender.dtype, contender.dtype)
    return dataclasses.replace(job, name=contender.name, dtype=dtype, settings={**job.settings, **contender.settings})
