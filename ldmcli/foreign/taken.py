"""What is taken from another program's picture, and what is not."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ldmcli.errors import BadDataError, UsageError
from ldmcli.lora import MAX_LORAS, LoRA
from ldmcli.sampling.catalogue import SAMPLERS, check_spacing
from ldmcli.sampling.names import sampler_of, schedule_of
from ldmcli.spec import HIRES_FIELDS, GenerationRequest

_TYPES = {field.name: field.type for field in dataclasses.fields(GenerationRequest)}
_BESIDE: dict[str, dict[str, Any]] = {"schedule": {"sampler": "euler"}, "eta": {"sampler": "ddim"}}
_SIZE = re.compile(r"\D{0,2}(\d{1,6})\s*[x×,]\s*(\d{1,6})\D{0,2}")
_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_MOST_LEFT, _SHOWN = 200, 120
_OFF = ("", "None", "Default (model)", "Automatic", "none", "False", "false", "[]", "{}")


@dataclasses.dataclass
class Taken:
    """Fields of a request, as far as the picture of `tool` has them; the names of its weights; and `left`, what it has
    besides that would change the picture, in its own words."""

    tool: str
    fields: dict[str, Any] = dataclasses.field(default_factory=lambda: {"prompt": ""})
    model: str = ""
    model_hash: str = ""
    vae: str = ""
    left: list[str] = dataclasses.field(default_factory=list)

    @property
    def weights(self) -> dict[str, str]:
        """The names of its weights, as far as it has them."""
        said = {"model": self.model, "model_hash": self.model_hash, "vae": self.vae}
        return {name: value for name, value in said.items() if value}

    def take(self, field: str, value: Any, title: str) -> None:
        """Take a value as a field of a request, or leave it, where it is none; `size`, `model`, `vae` and `lora` are
        fields too, and "" is one that says nothing of the picture."""
        if not field or (is_off(value) and field not in ("prompt", "negative_prompt")):
            return
        if field == "size" and (sides := _SIZE.fullmatch(str(value))):
            self.take("width", sides[1], title)
            self.take("height", sides[2], title)
        elif field in ("model", "vae") and isinstance(value, str):
            setattr(self, field, stem(value))
        elif field == "model_hash" and isinstance(value, str):
            self.model_hash = value.lower() if re.fullmatch("[0-9a-fA-F]{10,64}", value) else ""
        elif field == "seed" and str(value) == "-1":
            return
        elif field == "sampler" and isinstance(value, str) and (named := sampler_of(value)):
            self.fields |= {"sampler": named[0]} | ({"schedule": named[1]} if named[1] else {})
        elif field == "schedule" and isinstance(value, str) and (spacing := schedule_of(value)):
            self.fields["schedule"] = spacing
        elif field in _TYPES and field not in ("sampler", "schedule", "loras") and self._takes(field, value):
            return
        else:
            self.leave(title, value)

    def _takes(self, field: str, value: Any) -> bool:
        kind = _TYPES[field]
        try:
            if kind in (int, int | None, float, float | None) and not isinstance(value, bool):
                value = float(value)
                value = (
                    int(value) if math.isfinite(value) and kind in (int, int | None) and value.is_integer() else value
                )
            GenerationRequest(**{"prompt": ""} | _BESIDE.get(field, {}) | {field: value})
        except (ValueError, TypeError, OverflowError, UsageError):
            return False
        self.fields[field] = value
        return True

    def lora(self, name: Any, weight: Any = 1.0, text_weight: Any = None) -> None:
        """Take a LoRA by its file's name."""
        try:
            text = weight if text_weight is None else text_weight
            one = LoRA(stem(name), float(weight), float(text))
            if len(self.fields.get("loras", [])) >= MAX_LORAS:
                raise ValueError
        except (ValueError, TypeError, AttributeError, UsageError):
            self.leave("LoRA", name)
        else:
            given = {"name": one.name, "weight": one.weight, "text_weight": one.text_weight}
            self.fields["loras"] = [*self.fields.get("loras", []), given]

    def loras(self, listed: Any) -> None:
        """Take several, each a list of name and weight, or an object of model and weight."""
        for one in listed if isinstance(listed, list) else ():
            own = one.get("model", one.get("lora")) if isinstance(one, dict) else None
            if isinstance(own, dict):
                self.lora(own.get("name") or own.get("model_name"), one.get("weight", 1.0))
            elif isinstance(one, list) and len(one) >= 2:
                self.lora(one[0], one[1])
            else:
                self.leave("LoRA", one)

    def leave(self, title: str, value: Any = "") -> None:
        """Say that something was not taken."""
        shown = value if isinstance(value, str) else json.dumps(value, default=str) if _is_flat(value) else "…"
        said = f"{title} {shown}".strip()
        if said and len(self.left) < _MOST_LEFT and said not in self.left:
            self.left.append(said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…")

    def table(self, said: Mapping[str, Any], fields: Mapping[str, str]) -> None:
        """Take all that a table gives a field for; leave the rest, but for what is off."""
        for title, value in said.items():
            if title in fields:
                self.take(fields[title], value, title)
            elif not is_off(value):
                self.leave(title, value)

    def differs(self, otherwise: Mapping[str, str]) -> None:
        """Say how the program's sampler or schedule of the same name is not quite this one's."""
        for name in ("sampler", "schedule"):
            if remark := otherwise.get(self.fields.get(name, "")):
                self.leave(f"{self.fields[name]}'s {remark}")

    def whole(self) -> "Taken":
        """Itself, once what belongs together is: sampler, schedule and eta; a second pass and its settings."""
        if "hires" not in self.fields:
            for name in HIRES_FIELDS:
                if name in self.fields:
                    self.leave(name, self.fields.pop(name))
        sampler, schedule = self.fields.get("sampler"), self.fields.get("schedule")
        if schedule and not sampler:
            self.leave("schedule", self.fields.pop("schedule"))
        elif sampler:
            try:
                check_spacing(SAMPLERS[sampler], schedule)
            except UsageError:
                self.leave("schedule", self.fields.pop("schedule"))
            if self.fields.get("eta") and not SAMPLERS[sampler].takes_eta:
                self.leave("eta", self.fields.pop("eta"))
        return self


def is_off(value: Any) -> bool:
    """Whether a setting's value says that it is not used."""
    return value is None or value is False or value == [] or value == {} or (isinstance(value, str) and value in _OFF)


def stem(name: str) -> str:
    """A weight file's name without folders and ending, whichever system it was written on."""
    bare = PurePosixPath(name.replace("\\", "/")).name
    return next((bare[: -len(end)] for end in _ENDINGS if bare.lower().endswith(end)), bare)


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises BadDataError where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadDataError("its text is no JSON object.")
    return found


def _is_flat(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return len(inner) <= 8 and not any(isinstance(one, dict | list) for one in inner)
