"""What a request says of its second, larger pass, and how large that is."""

import re
from pathlib import Path
from typing import Any

from ldmcli.errors import UsageError, printable

MAX_SCALE = 16.0
STRENGTH = 0.7  # how much of the enlarged first pass is drawn anew unless asked, as AUTOMATIC1111's web page has it
LATENT, LANCZOS, EMBEDDED = "latent", "lanczos", "embedded"
UPSCALERS = (LATENT, LANCZOS, EMBEDDED)  # any other is a file
_TITLES = {LATENT: "Latent", LANCZOS: "Lanczos"}
_SIZE = re.compile(r"\s*([1-9][0-9]{0,5})\s*[x×*]\s*([1-9][0-9]{0,5})\s*", re.IGNORECASE)
_SCALE = re.compile(r"\s*([0-9]{1,4}(?:\.[0-9]{1,12})?)\s*")


def read_hires(value: Any) -> str:
    """A scale, as text or a number, or WIDTHxHEIGHT, as they are recorded: 2, 1.5, 1024x768. Raises UsageError."""
    text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if found := _SIZE.fullmatch(text):
        return f"{found[1]}x{found[2]}"
    if (found := _SCALE.fullmatch(text)) and 1 <= float(found[1]) <= MAX_SCALE:
        return repr(float(found[1])).removesuffix(".0")
    raise UsageError(
        f"hires {printable(repr(value))} is neither a scale from 1 to {MAX_SCALE:g} nor WIDTHxHEIGHT, such as 1024x768."
    )


def read_upscaler(value: Any) -> Any:
    """An upscaler's name; those of this program in small letters, for other programs write them otherwise."""
    return value.lower() if isinstance(value, str) and value.lower() in UPSCALERS else value


def is_scale(hires: str) -> bool:
    """Whether the second pass's size follows from the first's."""
    return "x" not in hires


def hires_size(hires: str, width: int, height: int) -> tuple[int, int]:
    """Width and height of the second pass after a first of this size; parts of a pixel are cut off."""
    if is_scale(hires):
        return int(width * float(hires)), int(height * float(hires))
    wide, high = hires.split("x")
    return int(wide), int(high)


def run_in_full(steps: int, strength: float) -> int:
    """Of how many steps the last `steps` are those that begin at the noise which `strength` asks for: AUTOMATIC1111
    takes in a second pass as many as are asked for, however much is drawn anew."""
    return int(steps / min(strength, 0.999)) if strength else steps


def upscaler_title(name: str) -> str:
    """What AUTOMATIC1111 calls an upscaler."""
    return _TITLES.get(name) or Path(name).stem
