"""What can be said of an adapter without a model: kinds, rank, the family it is for, trigger words. From headers."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ldmcli.adapters.adapter import Adapter, Change
from ldmcli.checkpoints.families import REFINER, SD1, SD2, SDXL
from ldmcli.checkpoints.header import HeaderError, parse_json_object
from ldmcli.errors import printable

# The width of the text that cross-attention reads.
_CONTEXT = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name, 1280: REFINER.name}
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
    }


def base_family(adapter: Adapter) -> str | None:
    """The name of the family an adapter is for: by the width of the text that its layers read, else by its modules'
    names or its metadata; None where nothing tells."""
    for name, change in adapter.changes.items():
        if "attn2" in name and name.endswith(("to_k", "to_v")):
            family = _CONTEXT.get(_inputs(change) or 0)
            if family:
                return family
    for mark, family in _MARKS:
        if any(mark in name for name in adapter.changes):
            return family
    for key in _STATED:
        stated = adapter.metadata.get(key, "")
        if stated:
            return next((family for word, family in _WRITTEN if stated.startswith(word)), printable(stated, 60))
    widths = {_inputs(change) for name, change in adapter.changes.items() if name.endswith("q_proj")}
    return next((family for width, family in _CONTEXT.items() if width in widths), None)


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


def _inputs(change: Change) -> int | None:
    """How many inputs the changed module has, of the kinds whose shapes tell."""
    found = (change.infos.get(factor) for factor in ("down", "hada_w1_b", "diff"))
    return next((info.shape[1] for info in found if info and len(info.shape) > 1), None)
