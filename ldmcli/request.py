"""One image's whole recipe, shared by the command line, prompt files and PNG metadata."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ldmcli.config import ModelConfig
from ldmcli.errors import BadDataError, UsageError, printable

SAMPLERS = ("ddim", "plms")
MAX_SEED = 2**64 - 1
MAX_STEPS = 999
MAX_PROMPT_BYTES = 1 << 20
MAX_SIZE = 1 << 17
MAX_GUIDANCE = 1000.0


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """What to draw; `width` and `height` in pixels, None meaning the model's own size.

    `seed` belongs to this one image: it seeds the image's own CPU generator, so the picture does not depend on what
    else is drawn beside it. Raises UsageError when a field is out of range, naming field, value and range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance_scale: float = 7.5
    width: int | None = None
    height: int | None = None
    sampler: str = "ddim"
    eta: float = 0.0

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        _check_text("negative_prompt", self.negative_prompt)
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("steps", self.steps, 1, MAX_STEPS)
        _check_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE)
        _check_number("eta", self.eta, 0.0, 1.0)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1, MAX_SIZE)
        if self.sampler not in SAMPLERS:
            raise UsageError(
                f"sampler {printable(repr(self.sampler))} is not known; choose from {', '.join(SAMPLERS)}."
            )
        if self.sampler == "plms" and self.eta != 0:
            raise UsageError(
                f"eta {self.eta} does not go with sampler plms, which adds no noise; use --sampler ddim or --eta 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GenerationRequest":
        """The request that `to_dict` wrote. Raises BadDataError on an unknown or missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise BadDataError(
                f"the request has unknown fields ({printable(', '.join(unknown))}); it may come from a newer version."
            )
        if "prompt" not in fields:
            raise BadDataError("the request has no prompt.")
        return cls(**fields)


def fit_to_model(request: GenerationRequest, config: ModelConfig) -> GenerationRequest:
    """The request with the model's own size filled in. Raises UsageError where the model cannot draw it: a size that
    is no whole number of latents, or more steps than its schedule has."""
    width = config.default_size if request.width is None else request.width
    height = config.default_size if request.height is None else request.height
    multiple = config.size_multiple
    if width % multiple or height % multiple:
        nearest = "×".join(str(max(1, round(side / multiple)) * multiple) for side in (width, height))
        raise UsageError(
            f"size {width}×{height} does not fit the model, whose sides are multiples of {multiple}; the nearest is "
            f"{nearest}."
        )
    if config.schedule.timesteps(request.steps) is None:
        raise UsageError(
            f"{request.steps} steps do not fit the model's schedule of {config.schedule.training_steps} training "
            "steps; use fewer."
        )
    return dataclasses.replace(request, width=width, height=height)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text, not {type(value).__name__}.")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise UsageError(f"{name} is not valid Unicode text (it holds a lone surrogate).") from None
    if size > MAX_PROMPT_BYTES:
        raise UsageError(f"{name} is {size} bytes long; at most {MAX_PROMPT_BYTES} are accepted.")
    if "\0" in value:
        raise UsageError(f"{name} holds a NUL character; remove it.")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} {printable(repr(value))} is not a whole number from {low} to {high}.")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise UsageError(f"{name} {printable(repr(value))} is not a number from {low:g} to {high:g}.")
