"""What one contender is asked to draw."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

PROMPT = "a red apple on a blue background"


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture by DDIM, or `batch_size` pictures at once whose seeds count up from `seed`; sizes in pixels.

    `model` is a path; it gives sizes and guidance where they are None, and `ldm` resolves "auto", before any other is
    asked. `settings`
    are the contender's own (contenders.py), `prepared` is the folder of the model that it converted.
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
    def guided(self) -> bool:
        """Whether a step runs the U-Net on two samples, prompt and negative prompt."""
        return self.guidance_scale != 1

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.startswith("cuda")

    def with_steps(self, steps: int) -> "Job":
        """The same job with another number of steps."""
        return dataclasses.replace(self, steps=steps)

    def to_json(self) -> str:
        """All fields as one line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The job that `to_json` wrote. Raises TypeError for an unknown field."""
        return cls(**json.loads(text))
