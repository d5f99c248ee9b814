"""What is measured: one picture's recipe for all contenders, and how each of them is to compute it."""

import dataclasses
import json
from typing import Any, Self

from ldmcli.speed.tuning import Tuning

PROMPT = "a red apple on a blue background"


class _Json:
    """A frozen dataclass of plain values to and from one line of JSON."""

    def to_json(self) -> str:
        """All fields as one line."""
        assert dataclasses.is_dataclass(self)
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote. Raises TypeError on an unknown or missing field."""
        fields = json.loads(text)
        if isinstance(fields.get("task"), dict):
            fields["task"] = Task(**fields["task"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Task(_Json):
    """What every contender does: the same picture of the same model, in as many steps of DDIM. Sizes in pixels.

    `model` is a path on disk. `dtype`, `device`, `attention` and the fields of a Tuning are as typed, those of `ldm`
    itself. Of `batch_size` pictures drawn at once, the i-th has the seed `seed` + i.
    """

    model: str
    prompt: str = PROMPT
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    width: int = 512
    height: int = 512
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    threads: int = 1
    tile_vae: bool = False
    batch_size: int = 1
    kernels: str = "auto"
    graph: bool = True
    compiled: bool = False
    low_vram: bool = False

    @property
    def tuning(self) -> Tuning:
        """What makes `ldm` fast or small on a GPU."""
        return Tuning(self.kernels, self.graph, self.compiled, self.low_vram)

    @property
    def guided(self) -> bool:
        """Whether a step runs the U-Net on two samples, prompt and negative prompt."""
        return self.guidance_scale != 1


@dataclasses.dataclass(frozen=True)
class Job(_Json):
    """A task as one contender is to do it. `prepared` is the folder of what it converted before, if it does so."""

    task: Task
    name: str
    device: str = "cpu"
    dtype: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    prepared: str = ""

    def with_steps(self, steps: int) -> "Job":
        """The same with another number of steps."""
        return dataclasses.replace(self, task=dataclasses.replace(self.task, steps=steps))


def describe(task: Task) -> dict[str, Any]:
    """The task's fields as plain JSON values, less where its model lies."""
    fields = dataclasses.asdict(task)
    del fields["model"]
    return fields
