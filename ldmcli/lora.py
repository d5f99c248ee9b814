"""LoRAs and other adapters, as a request names them. Imports nothing heavy."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from ldmcli.checks import check_number, check_text
from ldmcli.errors import UsageError, printable
from ldmcli.frozen import frozen

MAX_LORAS = 64
MAX_LORA_WEIGHT = 1000.0


@frozen
class LoRA:
    """A LoRA or another adapter: `name` is its file, its folder, ORG/NAME[/FILE] of the hub, or what it is called in
    the folder of LoRAs. `weight` scales its changes to the U-Net, `text_weight` those to the text encoders.

    Fitting fills in `path`, as which it is found again, and `sha256`, of its numbers. `in_prompt`: a prompt names it.
    Raises UsageError where a field cannot be meant.
    """

    name: str
    weight: float = 1.0
    text_weight: float = 1.0
    path: str = ""
    sha256: str = ""
    in_prompt: bool = False

    def __post_init__(self) -> None:
        for text in (self.name, self.path, self.sha256):
            check_text("a LoRA's name", text)
        if not self.name:
            raise UsageError("a LoRA has no name; give its file.")
        check_number("a LoRA's weight", self.weight, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)
        check_number("a LoRA's text_weight", self.text_weight, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)

    @property
    def what(self) -> tuple[object, ...]:
        """What it does to a picture, wherever its file lies."""
        return self.sha256 or self.path or self.name, self.weight, self.text_weight

    @classmethod
    def read(cls, value: Any) -> "LoRA":
        """A LoRA as options and rows write it: FILE, FILE:WEIGHT, FILE:WEIGHT:TEXT_WEIGHT, or an object with the fields
        of this class, whose text_weight is the weight unless it is given. Raises UsageError."""
        if isinstance(value, LoRA):
            return value
        if isinstance(value, Mapping):
            names = [field.name for field in dataclasses.fields(cls)]
            unknown = [name for name in value if name not in names]
            if unknown or "name" not in value:
                wrong = f"no field {printable(repr(unknown[0]))}" if unknown else "to have a name"
                raise UsageError(f"a LoRA has {wrong}; its fields are {', '.join(names[:4])}.")
            return cls(**({"text_weight": value.get("weight", 1.0)} | dict(value)))
        if not isinstance(value, str):
            raise UsageError(f"a LoRA is FILE:WEIGHT or an object, not {printable(repr(value))}.")
        name, weights = value, list[float]()
        while len(weights) < 2 and not os.path.lexists(name):
            rest, colon, last = name.rpartition(":")
            try:
                weights = [float(last), *weights] if colon else weights
            except ValueError:
                break
            if not colon:
                break
            name = rest
        if not name or not all(map(math.isfinite, weights)):
            raise UsageError(f"{printable(repr(value))} is not FILE, FILE:WEIGHT or FILE:WEIGHT:TEXT_WEIGHT.")
        return cls(name, *((weights[0], weights[-1]) if weights else ()))


def read_loras(value: Any) -> tuple[LoRA, ...]:
    """A list of LoRAs, each as `LoRA.read` takes it; or one alone; or several in one text, with semicolons between.
    Raises UsageError."""
    if isinstance(value, str):
        value = [one.strip() for one in value.split(";") if one.strip()]
    elif isinstance(value, LoRA | Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise UsageError(f"loras {printable(repr(value))} is not a list of FILE:WEIGHT texts or of objects.")
    if len(value) > MAX_LORAS:
        raise UsageError(f"loras has {len(value)} entries; at most {MAX_LORAS} are accepted.")
    return tuple(map(LoRA.read, value))
