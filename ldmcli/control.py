"""What a request says of the networks that steer it by pictures: control networks and adapters."""

import re
from collections.abc import Mapping
from typing import Any

from ldmcli.entries import MAX_STRENGTH, Reader, choice, entries, for_each, number, picture, text
from ldmcli.errors import UsageError, printable
from ldmcli.frozen import frozen

CONTROL_FIELDS = (
    "control_net", "control_image", "control_strength", "control_start", "control_end", "control_mode",
    "control_type", "canny",
)  # fmt: skip
MODES = ("balanced", "prompt", "control", "guess")
INPAINT = "inpaint"
# What kinds of pictures Union networks are told by number, by their authors' names and those of what makes such.
TYPES = {
    "openpose": 0, "depth": 1, "scribble": 2, "hed": 2, "softedge": 2, "canny": 3, "lineart": 3, "mlsd": 3,
    "normal": 4, "segment": 5, "tile": 6, INPAINT: 7, "repaint": 7,
}  # fmt: skip
EMBEDDED_CONTROL = "silhouette"  # what the network for the embedded model is called by
CANNY_USUAL, CANNY_OFF = "100,200", "off"
_MAX_THRESHOLD = 1 << 15
_THRESHOLDS = re.compile(r"\s*([0-9]{1,5})\s*[,:]\s*([0-9]{1,5})\s*")
_SOFT = 0.825  # what each coarser residual is weighted down by in soft modes, as in the authors' code
_SOFT_MAPS = (0.25, 0.62, 0.825, 1.0)  # of T2I-Adapter, as AUTOMATIC1111 has them


@frozen
class Control:
    """One network with its picture, `image`, a path or a file's bytes. It steers from the share `start` of the steps to
    the share `end`. `canny` are thresholds where the picture's edges are taken; `type` is a key of TYPES, or empty."""

    net: str
    image: str | bytes
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    type: str = ""
    canny: tuple[int, int] | None = None
    masked: float = -1.0  # what inpainting's pictures hold where they are masked

    @property
    def settings(self) -> tuple[object, ...]:
        """What pictures that are drawn together must agree in."""
        return tuple(value for name, value in vars(self).items() if name != "image")

    @property
    def positive_only(self) -> bool:
        """Whether it does not steer what is computed for negative prompts."""
        return self.mode in ("control", "guess")

    def active(self, count: int) -> list[int]:
        """In which of `count` steps it steers: i where i/count is no less than its start, and (i + 1)/count no more
        than its end, as in diffusers."""
        return [i for i in range(count) if i / count >= self.start and (i + 1) / count <= self.end]

    def weights(self, count: int) -> list[float]:
        """What the residuals are multiplied with, from the finest skip on, the middle last."""
        if self.mode == "balanced":
            return [self.strength] * count
        if self.mode == "guess":  # as diffusers' guess mode: evenly in the logarithm
            return [10 ** (i / max(count - 1, 1) - 1) * self.strength for i in range(count)]
        return [_SOFT ** (count - 1 - i) * self.strength for i in range(count)]

    def map_weights(self, count: int) -> list[float]:
        """The same for an adapter's maps."""
        soft = self.mode != "balanced"
        return [(_SOFT_MAPS[i] if soft and i < len(_SOFT_MAPS) else 1.0) * self.strength for i in range(count)]


def read_control(name: str, value: Any) -> tuple[Any, ...]:
    """The entries of one of the CONTROL_FIELDS. Raises UsageError."""
    return entries(name, value, _READERS[name], alone=name == "canny" and _is_pair(value))


def controls_of(fields: Mapping[str, Any]) -> tuple[Control, ...]:
    """The networks that a request's fields name, with their pictures: `control_image`, or the `image` drawn on. Raises
    UsageError where there are fewer or more of something than networks."""
    found = []
    for given in for_each(fields, CONTROL_FIELDS):
        said = {name.removeprefix("control_"): value for name, value in given.items()}
        if "canny" in said:
            said["canny"] = thresholds(said["canny"])
        control = Control(**said)
        if control.start >= control.end:
            raise UsageError(
                f"control_start {control.start:g} is not before control_end {control.end:g}; there is no step between."
            )
        found.append(control)
    return tuple(found)


def thresholds(written: str) -> tuple[int, int] | None:
    """The two of Canny's edge detector; None where it is off. Raises UsageError."""
    if written == CANNY_OFF:
        return None
    found = _THRESHOLDS.fullmatch(written)
    low, high = (int(found[1]), int(found[2])) if found else (1, 0)
    if not low <= high <= _MAX_THRESHOLD:
        raise UsageError(
            f"canny {printable(repr(written))} is not LOW,HIGH, two whole numbers up to {_MAX_THRESHOLD}, such as "
            f"{CANNY_USUAL}, nor {CANNY_OFF}."
        )
    return low, high


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int for one in value)


def _canny(name: str, value: Any) -> str:
    if value is True or value is False:
        return CANNY_USUAL if value else CANNY_OFF
    written = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    if not isinstance(written, str):
        written = repr(written)
    written = {"true": CANNY_USUAL, "yes": CANNY_USUAL, "false": CANNY_OFF, "no": CANNY_OFF}.get(
        written.lower(), written
    )
    found = thresholds(written)
    return CANNY_OFF if found is None else f"{found[0]},{found[1]}"


_READERS: dict[str, Reader] = {
    "control_net": text,
    "control_image": picture,
    "control_strength": number(MAX_STRENGTH),
    "control_start": number(1.0),
    "control_end": number(1.0),
    "control_mode": choice(MODES),
    "control_type": choice(tuple(TYPES)),
    "canny": _canny,
}
