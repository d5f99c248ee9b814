"""Another program's picture: which program's it is, and what is taken from it."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldmcli.errors import BadDataError
from ldmcli.foreign.comfy import read_comfy
from ldmcli.foreign.forms import DRAW_THINGS, EASY, KOHYA, read_fooocus, read_swarm, read_table
from ldmcli.foreign.infotext import read_infotext
from ldmcli.foreign.invoke import read_dream, read_invoke, read_old
from ldmcli.foreign.novelai import read_novelai
from ldmcli.foreign.stealth import read_stealth
from ldmcli.foreign.taken import Taken, json_object
from ldmcli.images.metadata import iterate_picture_text

_ENTITIES = {"&quot;": '"', "&apos;": "'", "&lt;": "<", "&gt;": ">", "&#xA;": "\n", "&amp;": "&"}
_Reader = Callable[[Mapping[str, str]], Taken | None]


def read_foreign(path: Path) -> Taken | None:
    """What is taken from a picture that another program made; None where none that is known did. Raises
    MissingInputError where there is no such file, StorageError where reading fails."""
    texts: dict[str, str] = {}
    try:
        for keyword, text in iterate_picture_text(path):
            texts.setdefault(keyword, text)
    except BadDataError:  # what is damaged or too large behind them leaves them as they are
        return _of_texts(texts)
    return _of_texts(texts) or _of_texts(read_stealth(path))


def _of_texts(texts: Mapping[str, str]) -> Taken | None:
    for keyword, read in _READERS.items():
        if keyword in texts:
            with contextlib.suppress(BadDataError):
                if taken := read(texts):
                    return taken
    return None


def _parameters(texts: Mapping[str, str]) -> Taken | None:
    text = texts["parameters"]
    if not text.lstrip().startswith("{"):
        return read_infotext(text)
    said: dict[str, Any] = json_object(text)
    if isinstance(said.get("sui_image_params"), dict):
        return read_swarm(said["sui_image_params"])
    if "c" in said and "uc" in said:
        return read_table("Draw Things", said, DRAW_THINGS)
    if "num_inference_steps" in said:
        return read_table("Easy Diffusion", said, EASY)
    return read_fooocus(said) if "base_model" in said or "metadata_scheme" in said else None


def _comment(texts: Mapping[str, str]) -> Taken | None:
    """Of NovelAI; older ones of Fooocus have theirs there too."""
    if "NovelAI" in texts.get("Software", "") or "Description" in texts or '"uc"' in texts["Comment"]:
        return read_novelai(texts)
    said = json_object(texts["Comment"])
    return read_fooocus(said) if "base_model" in said else None


def _prompt(texts: Mapping[str, str]) -> Taken | None:
    """Of ComfyUI, whose is JSON; of kohya's scripts or Easy Diffusion, whose is not."""
    with contextlib.suppress(BadDataError):
        return read_comfy(texts["prompt"])
    if "negative_prompt" in texts:
        return read_table("Easy Diffusion", texts, EASY)
    known = {name: value for name, value in texts.items() if name in KOHYA}
    return read_table("kohya's scripts", known, KOHYA) if {"seed", "steps"} <= known.keys() else None


def _easy(texts: Mapping[str, str]) -> Taken | None:
    said = {name.lower().replace(" ", "_"): value for name, value in texts.items()}
    return read_table("Easy Diffusion", said, EASY)


def _xmp(texts: Mapping[str, str]) -> Taken | None:
    """Of Draw Things, whose JSON stands in the first comment of the XML."""
    text = texts["XML:com.adobe.xmp"].partition("exif:UserComment")[2]
    text = "{" + text.partition("{")[2].partition("<")[0].rpartition("}")[0] + "}"
    for entity, sign in _ENTITIES.items():
        text = text.replace(entity, sign)
    return read_table("Draw Things", json_object(text), DRAW_THINGS) if text != "{}" else None


# By a text's keyword, the surest first.
_READERS: dict[str, _Reader] = {
    "invokeai_metadata": lambda texts: read_invoke(texts["invokeai_metadata"]),
    "sd-metadata": lambda texts: read_old(texts["sd-metadata"]),
    "Dream": lambda texts: read_dream(texts["Dream"]),
    "parameters": _parameters,
    "Comment": _comment,
    "prompt": _prompt,
    "Negative Prompt": _easy,
    "XML:com.adobe.xmp": _xmp,
}
