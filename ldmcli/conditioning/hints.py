"""Remarks on what a prompt or its settings say that is not read as it may be meant. Imports nothing heavy."""

import os
import re
from collections.abc import Iterator, Sequence

from ldmcli.errors import printable

UNREAD_PROMPT = "guidance below 1 draws what the negative prompt says; 1 is unguided"
_WEIGHT = re.compile(r":\s*[+-]?[.\d]+\s*\)")
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{0,200}>?", re.IGNORECASE)
_LOTS = re.compile(r"\{[^{}|\n]{0,200}\|[^{}\n]{0,200}\}|(?<![^\s{|(,])__[\w\-./]{1,60}__(?![^\s}|),.])")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_BLANK = re.compile(r"\s")
_SHOWN = 40


def argument_hints(prompts: Sequence[str], negative_prompt: str) -> Iterator[str]:
    """Sentences on prompts that seem to be one without quotes, and on a negative prompt that seems to be a count."""
    words = all(word and not word.startswith("-") and not _BLANK.search(word) for word in prompts)
    if words and (len(prompts) > 2 or (len(prompts) == 2 and prompts[0].lower() in ("a", "an", "the"))):
        whole = printable(" ".join(prompts), 60)
        yield f'{len(prompts)} prompts of one word each; with quotes, "{whole}" is one'
    if picture := next((one for one in prompts if one.lower().endswith(_PICTURES) and os.path.isfile(one)), ""):
        yield f"“{printable(picture)}” is drawn as a prompt; --image is for a picture to start from"
    if negative_prompt.strip().isdecimal():
        yield f"“{printable(negative_prompt.strip())}” is the negative prompt; --count says how many pictures"


def empty_hint(model: str) -> str:
    """A sentence on a prompt that says nothing, for a model that reads prompts."""
    return f'a prompt is empty, and {printable(model)} reads prompts, as in `ldm "a red apple"`'


def syntax_hint(prompt: str, syntax: str = "plain") -> str:
    """A sentence on AUTOMATIC1111's syntax in a prompt that is read plainly, or on what elsewhere is drawn by lot; ""
    where there is none."""
    if found := _LOTS.search(prompt):
        return f"“{printable(found[0], 60)}” in a prompt is text; --dynamic-prompts draws it by lot"
    if syntax != "plain":
        return ""
    if found := _NETWORK.search(prompt):
        what = printable(found[0], 60)
        return f"“{what}” in a prompt is text; --prompt-syntax weighted or --lora FILE:WEIGHT loads a LoRA"
    weight = _WEIGHT.search(prompt)
    start = prompt.rfind("(", 0, weight.start()) if weight else -1
    if weight and start >= 0:
        text = prompt[start : weight.end()]
        what = printable(text if len(text) <= _SHOWN else "(…" + weight[0])
        return f"“{what}” in a prompt is text; --prompt-syntax weighted reads it as a weight"
    if _BREAK.search(prompt):
        return "“BREAK” in a prompt is text; --prompt-syntax weighted reads it as the beginning of a new chunk"
    return ""
