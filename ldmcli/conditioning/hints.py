"""Remarks on what a prompt or its settings say that is not read as it may be meant. Imports nothing heavy."""

import re

from ldmcli.errors import printable

UNREAD_PROMPT = "guidance below 1 draws what the negative prompt says; 1 is unguided"
_WEIGHT = re.compile(r":\s*[+-]?[.\d]+\s*\)")
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{0,200}>?", re.IGNORECASE)
_LOTS = re.compile(r"\{[^{}|\n]{0,200}\|[^{}\n]{0,200}\}|(?<![^\s{|(,])__[\w\-./]{1,60}__(?![^\s}|),.])")
_SHOWN = 40


def syntax_hint(prompt: str, syntax: str = "plain") -> str:
    """A sentence on AUTOMATIC1111's syntax in a prompt that is read plainly, or on what elsewhere is drawn by lot; ""
    where there is none."""
    if found := _LOTS.search(prompt):
        return f"“{printable(found[0], 60)}” in a prompt is text; --dynamic-prompts draws it by lot."
    if syntax != "plain":
        return ""
    if found := _NETWORK.search(prompt):
        what = printable(found[0], 60)
        return f"“{what}” in a prompt is text; --prompt-syntax weighted or --lora FILE:WEIGHT loads a LoRA."
    weight = _WEIGHT.search(prompt)
    start = prompt.rfind("(", 0, weight.start()) if weight else -1
    if weight and start >= 0:
        text = prompt[start : weight.end()]
        what = printable(text if len(text) <= _SHOWN else "(…" + weight[0])
        return f"“{what}” in a prompt is text; --prompt-syntax weighted reads it as a weight."
    if _BREAK.search(prompt):
        return "“BREAK” in a prompt is text; --prompt-syntax weighted reads it as the beginning of a new chunk."
    return ""
