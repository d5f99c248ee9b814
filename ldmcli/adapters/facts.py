"""What can be said of an adapter without a model: kinds, rank, the family it is for, trigger words. From headers."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldmcli.adapters.adapter import Adapter, Change
from ldmcli.checkpoints.families import CONTEXTS, REFINER, SD1, SD2, SDXL
from ldmcli.checkpoints.file_kinds import with_article
from ldmcli.checkpoints.header import HeaderError, parse_json_object
from ldmcli.checkpoints.layout import ADAPTER_FILES
from ldmcli.disk.opening import shown
from ldmcli.errors import printable
from ldmcli.spec import GenerationRequest

# What is in modules' names of no other family; the likeliest first.
_MARKS = (
    ("joint_blocks", "Stable Diffusion 3"),
    ("double_blocks", "Flux"),
    ("single_transformer_blocks", "Flux"),
    ("transformer.transformer_blocks", "Stable Diffusion 3"),
    ("transformer_transformer_blocks", "Stable Diffusion 3"),
    ("te2_", SDXL.name),
    ("text_encoder_2", SDXL.name),
    ("clip_g", SDXL.name),
)
_STATED = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
# What else files of sd-scripts and modelspec call the families.
_WRITTEN = (
    ("stable-diffusion-xl-v1-refiner", REFINER.name),
    ("stable-diffusion-xl", SDXL.name),
    ("sdxl", SDXL.name),
    ("stable-diffusion-v1", SD1.name),
    ("sd_v1", SD1.name),
    ("stable-diffusion-v2", SD2.name),
    ("sd_v2", SD2.name),
)
# LoRAs of distilled models: what their names have in them, and the settings that their authors give; a number of steps
# in the name wins. Source: the model cards of LCM-LoRA, SDXL-Turbo, SDXL-Lightning and Hyper-SD.
_WORD = r"(?<![a-z])(?:{})(?![a-z])"
_OF_A_MODEL = r"(?=.*(?:sd|xl|\d[-_ ]*steps?))"
_DISTILLED = (
    ("LCM", _WORD.format("lcm|latent[-_ ]?consistency"), {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}),
    (
        "Turbo",
        f"{_OF_A_MODEL}.*{_WORD.format('turbo')}",
        {"sampler": "euler-a", "schedule": "trailing", "steps": 4, "guidance_scale": 1.0},
    ),
    (
        "Lightning",
        f"{_OF_A_MODEL}.*{_WORD.format('lightning')}",
        {"sampler": "euler", "schedule": "trailing", "steps": 4, "guidance_scale": 1.0},
    ),
    (
        "Hyper-SD",
        r"(?<![a-z])hyper[-_ ]?sd",
        {"sampler": "ddim", "schedule": "trailing", "steps": 8, "guidance_scale": 1.0},
    ),
)
_STEPS = re.compile(r"(?<!\d)(\d{1,2})[-_ ]*steps?")
_NAMES = ("ss_output_name", "modelspec.title")
_TAGS = 5  # that are given as trigger words where none are named


def facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter's kinds with their numbers of modules, rank, family, trigger words, bundled embeddings and metadata,
    as JSON values. The rank is the commonest; None where no kind has one."""
    kinds = Counter(_kind(change) for change in adapter.changes.values())
    ranks = Counter(change.rank for change in adapter.changes.values() if change.rank)
    return {
        "kinds": dict(kinds.most_common()),
        "rank": ranks.most_common(1)[0][0] if ranks else None,
        "family": base_family(adapter),
        "trigger_words": trigger_words(adapter.metadata),
        "embeddings": sorted({key.split(".")[1] for key in adapter.bundled}),
        "metadata": dict(adapter.metadata),
    } | ({"wants": wants(adapter)[1]} if wants(adapter)[0] else {})


def wants(adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """What an adapter makes of a model that needs other settings, "LCM" say, and those, by the fields of a request; by
    its metadata, its file's name, and of a file that is called as all are, its folders'. Nothing where none tells."""
    path = adapter.path
    generic = os.path.isdir(path) or path.name in ADAPTER_FILES
    names = [adapter.metadata.get(name, "") for name in _NAMES]
    names += path.parts[-4:] if generic else [path.stem]
    for name in map(str.lower, names):
        for kind, pattern, settings in _DISTILLED:
            if re.search(pattern, name[:300]):
                steps = _STEPS.search(name)
                own = {"steps": int(steps[1])} if steps else {}
                return kind, settings | own | ({"guidance_scale": 5.0} if kind == "Hyper-SD" and "cfg" in name else {})
    return "", {}


def wish(adapter: Adapter, request: GenerationRequest) -> str:
    """A sentence on the settings that an adapter wants and a request leaves open; "" where there are none."""
    kind, settings = wants(adapter)
    open_ = [name for name in settings if getattr(request, name) is None]
    if not {"sampler", "steps", "guidance_scale"} & set(open_):
        return ""
    options = " ".join(f"--{name.replace('_', '-')} {settings[name]:g}" if name in ("steps", "guidance_scale")
                       else f"--{name} {settings[name]}" for name in open_)  # fmt: skip
    return f"{shown(adapter.path)} is {with_article(kind)} LoRA, which is drawn with other settings: {options}"


def base_family(adapter: Adapter) -> str | None:
    """The name of the family an adapter is for: by the width of the text that its layers read, else by its modules'
    names or its metadata; None where nothing tells."""
    if family := CONTEXTS.get(adapter.context_width or 0):
        return family
    for mark, family in _MARKS:
        if any(mark in name for name in adapter.changes):
            return family
    for key in _STATED:
        stated = adapter.metadata.get(key, "")
        if stated:
            return next((family for word, family in _WRITTEN if stated.startswith(word)), printable(stated, 60))
    widths = {change.inputs for name, change in adapter.changes.items() if name.endswith("q_proj")}
    return next((family for width, family in CONTEXTS.items() if width in widths), None)


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that a LoRA was trained to answer: those its metadata names, else the tags that most of its pictures
    had."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if phrase:
        return [word.strip() for word in phrase.split(",") if word.strip()]
    try:
        folders = parse_json_object(metadata.get("ss_tag_frequency", "{}").encode())
    except HeaderError:
        return []
    tags: Counter[str] = Counter()
    for counts in folders.values():
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if isinstance(count, int):
                tags[tag.strip()] += count
    return [tag for tag, _ in tags.most_common(_TAGS) if tag]


def _kind(change: Change) -> str:
    """The kind in the words users know."""
    infos = change.infos
    name = change.kind.name
    if "oft_blocks" in infos and len(infos["oft_blocks"].shape) == 4:
        return "BOFT"
    if name == "LoRA" and (math.prod(infos["down"].shape[2:]) > 1 or "mid" in infos):
        name = "LoCon"
    return f"{name} with DoRA" if {"dora_scale", "magnitude"} & infos.keys() else name
