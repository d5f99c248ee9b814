"""LoRAs that a prompt names, in AUTOMATIC1111's notation: `<lora:name:0.8>`. Imports nothing heavy.

    <lora:name> · <lora:name:weight> · <lora:name:text weight:U-Net weight> · <lora:name:te=0.5:unet=0.8>

As there, a tag is no text, its name is a file's without ending or what its metadata calls it, the U-Net's weight is the
text encoders' unless it is given, and `lyco` means the same. Not as there: what cannot be meant is an error, and so is
a tag in a negative prompt, where it would be text.
"""

import re

from ldmcli.errors import UsageError, printable
from ldmcli.spec import LoRA

_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]{0,500})>", re.IGNORECASE)
_BROKEN = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]{0,60}", re.IGNORECASE)
_NAMED = ("te", "unet")


def split_tags(prompt: str) -> tuple[str, tuple[LoRA, ...]]:
    """A weighted prompt without its tags, and the LoRAs that they name, in order. Raises UsageError."""
    if "<" not in prompt:
        return prompt, ()
    text = _TAG.sub("", prompt)
    if broken := _BROKEN.search(text):
        raise UsageError(f"“{printable(broken[0], 60)}” in a prompt begins as a LoRA and is none; {_FORM}.")
    return text, tuple(map(_lora, _TAG.finditer(prompt)))


def check_negative(prompt: str) -> None:
    """Raise UsageError where a weighted negative prompt names a LoRA."""
    if "<" in prompt and (found := _TAG.search(prompt)):
        raise UsageError(
            f"“{printable(found[0], 60)}” stands in the negative prompt, where no LoRA can be named; a negative weight "
            "in the prompt takes away what a LoRA adds."
        )


def _lora(tag: "re.Match[str]") -> LoRA:
    shown = f"“{printable(tag[0], 60)}” in a prompt"
    if tag[1].lower() == "hypernet":
        raise UsageError(f"{shown} names a hypernetwork, which this version does not read; leave it out.")
    name, *arguments = (part.strip() for part in tag[2].split(":"))
    given: dict[str, float] = {}
    places = iter(_NAMED)  # of weights without a name, whatever stands between them
    for argument in arguments:
        title, equals, value = argument.rpartition("=")
        key = title.strip() if equals else next(places, "")
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"{shown} has “{printable(argument, 40)}” for a weight; write <lora:name:0.8>.") from None
        if key not in _NAMED or key in given:
            raise UsageError(f"{shown} has “{printable(argument, 40)}”, which is no weight of its own; {_FORM}.")
        given[key] = number
    if not name:
        raise UsageError(f"{shown} has no name; {_FORM}.")
    text_weight = given.get("te", 1.0)
    return LoRA(name, given.get("unet", text_weight), text_weight, in_prompt=True)


_FORM = "write <lora:name:0.8>, or <lora:name:te=0.5:unet=0.8>"
