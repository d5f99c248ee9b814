"""Prompt files of other programs, whose lines carry options: kohya's sd-scripts (`a cat --n dog --s 20`) and
AUTOMATIC1111's "Prompts from file" (`--prompt "a cat" --steps 20`)."""

import re
import shlex
from typing import Any

from ldmcli.batch.fields import EXTRAS, PROMPT, as_fields, field_named, from_text
from ldmcli.errors import printable

_KOHYA = {
    "n": "negative_prompt", "w": "width", "h": "height", "d": "seed", "s": "steps", "l": "guidance_scale",
    "t": "strength", "ss": "sampler", "ow": "original_width", "oh": "original_height", "ct": "crop_top",
    "cl": "crop_left", "f": "",
}  # fmt: skip
_KOHYA_OTHERS = "nl c am nw nh dsd1 dst1 dsd2 dst2 dsr glt glr gle gls glsn glus g cn ctr rcfg fs"
# Of AUTOMATIC1111's: what names files says nothing of the picture; some say nothing at a certain value.
_OF_FILES = ("outpath_samples", "outpath_grids", "prompt_for_display", "do_not_save_samples", "do_not_save_grid")
_IDLE = {
    "restore_faces": "false", "tiling": "false", "styles": "", "subseed": "-1", "subseed_strength": "0",
    "seed_resize_from_h": "0", "seed_resize_from_w": "0",
}  # fmt: skip
_A1111 = (
    "prompt", "negative_prompt", "seed", "sampler_name", "sampler_index", "batch_size", "n_iter", "steps", "cfg_scale",
    "width", "height", "sd_model", *_OF_FILES, *_IDLE,
)  # fmt: skip
_LONGEST = 1 << 16
_KOHYA_LOOK = re.compile(rf"\s--(?:{'|'.join((*_KOHYA, *_KOHYA_OTHERS.split()))})\s+[^\s-]", re.IGNORECASE)
_A1111_LOOK = re.compile(rf"(?:^|\s)--(?:{'|'.join(_A1111)})[\s=]")


def looks_like(text: str) -> str:
    """The format that a line of plain text seems to be in: "a1111", "kohya" or ""."""
    return "a1111" if _A1111_LOOK.search(text) else "kohya" if _KOHYA_LOOK.search(text) else ""


def kohya_rows(text: str) -> list[tuple[dict[str, Any], str]]:
    """The fields of a line's rows, one for each of its seeds, and what is wrong with them."""
    prompt, *options = re.split(r"\s--(?=\S)", text.strip())
    given: list[tuple[str, str, Any]] = [(PROMPT, PROMPT, prompt)]
    seeds = [""]
    extra, problem = {}, ""
    if prompt.startswith("--"):
        problem = "the line begins with an option; the prompt stands before all of them."
    for option in options:
        name, _, value = option.partition(" ")
        field = _KOHYA.get(name.lower())
        if field == "seed":
            seeds = value.split(",")
        elif field:
            given.append((field, f"--{name}", from_text(field, value.strip())))
        elif field == "":
            extra[f"--{name}"] = value.strip()
        else:
            known = name.lower() in _KOHYA_OTHERS.split()
            problem = _refusal(name, "it has no counterpart here" if known else "kohya's scripts have none of the name")
    rows = []
    for seed in seeds:
        own = [("seed", "--d", from_text("seed", seed))] if seed else []
        fields, wrong = as_fields([*given, *own])
        rows.append((fields | ({EXTRAS[0]: extra} if extra else {}), problem or wrong))
    return rows


def a1111_rows(text: str) -> list[tuple[dict[str, Any], str]]:
    """The fields of the line's one row, and what is wrong with them; a line without options is a prompt."""
    text = text.strip()
    if "--" not in text:
        return [({PROMPT: text}, "")]
    if len(text) > _LONGEST:  # shlex takes a minute for a word of a million letters
        return [({PROMPT: text}, f"the line is longer than {_LONGEST} letters, too long for one with options.")]
    try:
        words = shlex.split(text)
    except ValueError as error:
        return [({PROMPT: text}, f'the line is not read as a shell reads it ({error}); put its prompt in "quotes".')]
    options: list[tuple[str, list[str]]] = []
    problem = "" if words[0].startswith("--") else "the line has text before its options; put it behind --prompt."
    for word in words:
        if word.startswith("--"):
            options.append((word[2:], []))
        elif options:
            options[-1][1].append(word)
    count, given, extra = 1, list[tuple[str, str, Any]](), dict[str, str]()
    for name, values in options:
        value = " ".join(values)
        if name in ("n_iter", "batch_size"):
            number = from_text("count", value)
            problem = problem if type(number) is int and number > 0 else f"--{name} {printable(value)} is no number."
            count *= number if type(number) is int else 1
        elif name in _OF_FILES:
            extra[f"--{name}"] = value
        elif name in _IDLE and value.lower() in (_IDLE[name], ""):
            continue
        elif name in _IDLE or name not in _A1111 or name in ("sampler_index", "sd_model"):
            known = name in _A1111
            problem = _refusal(name, "rows cannot choose it" if known else "AUTOMATIC1111 has none of the name")
        else:
            field = field_named(name)
            given.append((field, f"--{name}", from_text(field, value)))
    fields, wrong = as_fields(given)
    fields |= ({"count": count} if count != 1 else {}) | ({EXTRAS[0]: extra} if extra else {})
    return [(fields, problem or wrong)]


def _refusal(name: str, why: str) -> str:
    return f"option --{printable(name, 40)} is not taken: {why}; leave it out."


READERS = {"kohya": kohya_rows, "a1111": a1111_rows}
