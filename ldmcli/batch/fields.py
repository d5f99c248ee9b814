"""What a row may say, by name: the fields of a request and a few more, their other names, and how text becomes their
values."""

import contextlib
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldmcli.checks import MAX_PROMPT_BYTES
from ldmcli.conditions import read_label, read_layout
from ldmcli.errors import UsageError, printable
from ldmcli.hires import UPSCALERS, read_hires, read_upscaler
from ldmcli.image_prompt import NO_MASK
from ldmcli.sampling.names import sampler_of, schedule_of
from ldmcli.spacings import SPACINGS
from ldmcli.spec import (
    ALPHA,
    INPUT_FILES,
    MAX_SEED,
    STEERING,
    STEERING_FILES,
    STEERING_PICTURES,
    GenerationRequest,
    read_loras,
)

PROMPT = "prompt"
TEXTS = (PROMPT, "negative_prompt")  # kept as they are written, spaces included
OWN = (*TEXTS, "seed")  # what rows usually differ in; none of it bears on whether a model can draw the rest
REQUEST_FIELDS = tuple(field.name for field in dataclasses.fields(GenerationRequest))
IDS = ("id", "custom_id")
COLUMNS = (*REQUEST_FIELDS, *IDS, "count")
EXTRAS = ("extra", "metadata")  # objects in a JSON row whose content the manifest keeps
SIZE = "size"  # width and height in one, 512x768
# What other programs call them: diffusers, AUTOMATIC1111, CompVis, ComfyUI, DiffusionDB. Case, spaces, hyphens and
# underscores make no difference.
SYNONYMS = {
    "negative_prompt": "negative neg_prompt negative_text",
    "seed": "seeds noise_seed random_seed",
    "steps": "step num_inference_steps inference_steps num_steps sampling_steps sample_steps ddim_steps",
    "guidance_scale": "cfg cfg_scale cfg_guidance guidance classifier_free_guidance_scale",
    "width": "w image_width",
    "height": "h image_height",
    "sampler": "sampler_name sampling_method sampler_index",
    "eta": "ddim_eta",
    "schedule": "scheduler schedule_type",
    "guidance_rescale": "rescale_cfg cfg_rescale",
    "embeddings": "embedding textual_inversion textual_inversions",
    "loras": "lora",
    "label": "class class_label class_id",
    "map": "semantic_map segmentation",
    "image_embedding": "image_embeds image_embeddings",
    "image": "init_image init_img input_image image_path image_file source_image",
    "mask": "mask_image mask_path mask_file inpaint_mask",
    "strength": "denoising_strength denoise denoise_strength",
    "resize": "resize_mode",
    "image_guidance_scale": "image_cfg_scale image_cfg",
    "depth": "depth_map depth_image",
    "invert_mask": "mask_invert inpainting_mask_invert",
    "masked_content": "inpainting_fill",
    "mask_padding": "inpaint_full_res_padding padding_mask_crop",
    "hires": "hires_upscale hires_resize hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "hires_upscaler": "hr_upscaler",
    "control_net": "controlnet controlnet_model control_model",
    "control_image": "controlnet_image controlnet_conditioning_image conditioning_image hint hint_image",
    "control_strength": "controlnet_conditioning_scale controlnet_weight control_weight control_scale",
    "control_start": "control_guidance_start",
    "control_end": "control_guidance_end",
    "canny": "canny_thresholds",
    "ip_adapter": "ipadapter ip_adapter_model",
    "ip_adapter_image": "image_prompt",
    "ip_adapter_strength": "ip_adapter_scale ip_adapter_weight",
    "ip_adapter_mask": "ip_adapter_masks",
    "count": "n_iter n_samples num_samples num_images num_images_per_prompt num_outputs batch_count",
    SIZE: "resolution image_size",
}
# Options here or elsewhere that a row has none of; a column of the name is probably meant as one.
_OPTIONS = (
    " scale model checkpoint vae refiner upscale upscaler "
    "batchsize device dtype precision facerestoration restorefaces tiling subseed "
    "variationseed styles clipstopatlastlayers "
)
_TYPES = {field.name: field.type for field in dataclasses.fields(GenerationRequest)} | {"count": int}
_WHOLE = {name for name, kind in _TYPES.items() if kind in (int, int | None)}
_NUMBERS = {name for name, kind in _TYPES.items() if kind in (float, float | None)}
_FLAGS = {name for name, kind in _TYPES.items() if kind is bool}
_FLAG_TEXTS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WHOLE_TEXT = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER_TEXT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf(?:inity)?)", re.IGNORECASE)
_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_SIZE_TEXT = re.compile(r"\s*([0-9]{1,9})\s*[x×*]\s*([0-9]{1,9})\s*", re.IGNORECASE)
_EXACT = 1 << 53  # up to here a float is the whole number that was meant
# A field that is only looked at beside another, with a value of that one which takes all there are.
_BESIDE: dict[str, dict[str, Any]] = {"schedule": {"sampler": "euler"}}


def column_name(text: str) -> str:
    """A title as a name: `Guidance Scale` and `guidance-scale` are guidance_scale."""
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def _bare(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text.lower())


_NAMES = {_bare(name): name for name in (*COLUMNS, *EXTRAS, SIZE)}
_NAMES |= {_bare(other): name for name, others in SYNONYMS.items() for other in others.split()}


@functools.lru_cache(4096)
def field_named(title: str) -> str:
    """The field that a title or an option names, maybe in another program's words; "" where it names none."""
    return _NAMES.get(_bare(title[:100]), "")


def from_text(name: str, text: str, *, decimal_comma: bool = False) -> Any:
    """The value of a field written as text; the text itself where it is none, for the check of the field to refuse.
    `decimal_comma`: 7,5 is a number, and 1,000 is refused, which may be 1 or 1000."""
    if name in TEXTS:
        return text
    text = text.strip()
    if name in _FLAGS:
        return _FLAG_TEXTS.get(text.lower(), text)
    if name in _WHOLE or name in _NUMBERS:
        number = text
        if decimal_comma and _COMMA.fullmatch(text) and not _THOUSANDS.fullmatch(text):
            number = text.replace(",", ".")
        if name in _WHOLE and _WHOLE_TEXT.fullmatch(number):
            return int(number)
        if _NUMBER_TEXT.fullmatch(number) and (name in _NUMBERS or "e" not in number.lower()):
            value = normal(name, float(number))
            return value if type(value) is int or name in _NUMBERS else text
    if name == "guidance_interval":
        with contextlib.suppress(ValueError):
            low, high = text.split(":")
            return float(low), float(high)
    return text


def normal(name: str, value: Any) -> Any:
    """The value as its field holds it: 7 and 7.0 are one guidance scale, `Euler a` is euler-a."""
    if name in _NUMBERS and type(value) is int and abs(value) < _EXACT:
        return float(value)
    if name in _WHOLE and type(value) is float and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    if name == "sampler" and type(value) is str:
        return " ".join(filter(None, sampler_of(value) or (value,)))
    if name == "schedule" and type(value) is str:
        return schedule_of(value) or value
    if name == "guidance_interval" and isinstance(value, list) and all(type(one) in (int, float) for one in value):
        return tuple(value)
    if name == "hires_upscaler":
        return read_upscaler(value)
    if name == "hires":
        with contextlib.suppress(UsageError):
            return read_hires(value)
    if name == "embeddings" and isinstance(value, list) and all(type(one) is str for one in value):
        return tuple(value)
    if name in STEERING:
        with contextlib.suppress(UsageError):
            return STEERING[name](name, value)
    if name in ("label", "layout"):
        with contextlib.suppress(UsageError):
            return read_label(value) if name == "label" else read_layout(value)
    if name == "loras":
        with contextlib.suppress(UsageError):  # the check of the field says what is wrong
            return read_loras(value)
    return value


def as_fields(pairs: Iterable[tuple[str, str, Any]]) -> tuple[dict[str, Any], str]:
    """The values by field, and what is wrong with their names together. `pairs` are field, title and value.

    A size becomes width and height, a sampler named as a schedule the sampler; a seed of -1, random in other programs,
    is none.
    """
    fields: dict[str, Any] = {}
    titles: dict[str, str] = {}
    problem = ""
    for given, title, value in pairs:
        name = given
        if name == SIZE:
            sides = _sides(value)
            problem = problem if sides else f"size {printable(repr(value))} is not WIDTHxHEIGHT, such as 512x768."
            several: dict[str, Any] = dict(zip(("width", "height"), sides, strict=False))
        else:
            named = sampler_of(value) if name in ("sampler", "schedule") and type(value) is str else None
            several = {name: normal(name, value)}
            if named and (name == "sampler" or value not in SPACINGS):
                several = {"sampler": named[0]} | ({"schedule": named[1]} if named[1] else {})
        for field, one in several.items():
            if field in titles:
                both = f"{printable(titles[field], 60)} and {printable(title, 60)}"
                problem = f"the row gives {field} twice, as {both}; leave out one."
            elif not (field == "seed" and type(one) is int and one == -1):
                fields[field] = one
            titles[field] = title
    return fields, problem


def _sides(value: Any) -> tuple[int, ...]:
    """Width and height of a size as text or as two numbers; none where it is something else."""
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value):
        return tuple(value)
    found = _SIZE_TEXT.fullmatch(value) if isinstance(value, str) else None
    return tuple(map(int, found.groups())) if found else ()


def located(name: str, value: Any, folder: Path) -> Any:
    """The value of a row's field; the path of a picture, an upscaler or a network as one in the folder of the prompt
    file, a network's where it is there."""
    if name in STEERING_FILES and isinstance(value, tuple):
        anyway = name in STEERING_PICTURES
        return tuple(one if one == NO_MASK else _placed(one, folder, anyway=anyway) for one in value)
    words: dict[str, tuple[str, ...]] = dict.fromkeys(INPUT_FILES, ())
    words |= {"mask": (ALPHA,), "hires_upscaler": UPSCALERS}
    if name in words and isinstance(value, str) and value not in ("", *words[name]) and "\0" not in value:
        return value if "://" in value else os.path.abspath(folder / value)
    return value


def _placed(path: Any, folder: Path, *, anyway: bool) -> Any:
    inside = os.path.abspath(folder / path) if isinstance(path, str) and "://" not in path else path
    return inside if anyway or os.path.lexists(inside) else path


def problem_of(name: str, value: Any) -> str:
    """What is wrong with a field of a request, looked at alone; "" where nothing is."""
    try:
        GenerationRequest(**{PROMPT: ""} | _BESIDE.get(name, {}) | {name: value})
    except UsageError as error:
        if name in _WHOLE | _NUMBERS and isinstance(value, str) and _COMMA.fullmatch(value):
            return f"{str(error).removesuffix('.')}; write its decimals after a point, and no other mark."
        return str(error)
    except RecursionError:
        return f"{name} is nested too deeply; give it plainly."
    return ""


def own_problem(name: str, value: Any) -> str:
    """As `problem_of`, for the fields in OWN, which every row has: the usual is seen at a glance."""
    if name == "seed":
        fine = type(value) is int and 0 <= value <= MAX_SEED
    else:
        fine = type(value) is str and value.isascii() and len(value) <= MAX_PROMPT_BYTES and "\0" not in value
    return "" if fine else problem_of(name, value)


def near(name: str, names: Iterable[str]) -> str:
    """Advice for a name that is not known: the fields that are called about so."""
    bare = _bare(name[:100])
    names = set(names)
    alike = difflib.get_close_matches(bare, [other for other, field in _NAMES.items() if field in names], 3, 0.7)
    found = dict.fromkeys(_NAMES[other] for other in alike)
    return f"did you mean {' or '.join(found)}?" if found else ""


def suspected(title: str) -> str:
    """What a column may have been meant as that is no field; "" where nothing speaks for it."""
    if f" {_bare(title[:100])} " in _OPTIONS:
        return "rows cannot choose it, and the manifest keeps it as a remark"
    return near(title, COLUMNS)


def unknown(name: str) -> str:
    """The sentence on a field that there is none of in a JSON row."""
    advice = near(name, COLUMNS) or f"what is no field goes into an object {EXTRAS[0]}."
    if f" {_bare(name[:100])} " in _OPTIONS:
        advice = f"rows cannot choose it; give it to the command, for all rows, or keep it in an object {EXTRAS[0]}."
    return f"unknown field {printable(repr(name))}: {advice}"
