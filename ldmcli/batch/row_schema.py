"""The JSON schema of a row of a prompt file: what a request's fields may be, for editors, agents and validators.

Source: JSON Schema, draft 2020-12.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ldmcli.batch.fields import EXTRAS, IDS, PROMPT, REQUEST_FIELDS, SIZE, SYNONYMS
from ldmcli.batch.survey import MAX_COUNT, MAX_ID
from ldmcli.conditions import CONDITION_FIELDS, MAX_BOXES, MAX_LABEL
from ldmcli.control import MODES, TYPES
from ldmcli.entries import MAX_ENTRIES, MAX_STRENGTH
from ldmcli.hires import MAX_SCALE
from ldmcli.image_prompt import BLOCKS
from ldmcli.lora import MAX_LORA_WEIGHT, MAX_LORAS
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spacings import SPACINGS
from ldmcli.spec import (
    CHOICES,
    INPUT_FILES,
    MAX_EMBEDDINGS,
    RANGES,
    STEERING,
    GenerationRequest,
)

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_DESCRIBED = {
    PROMPT: "What the picture shows.",
    "seed": "Of the noise: the same seed, the same picture. Where there is none, or -1, one is made of the run's and "
    "the row's id.",
    "id": "What the manifest calls the row; of each row another.",
    "custom_id": "As id.",
    "count": "Pictures, with seeds seed, seed + 1, and so on.",
    SIZE: "Width and height in one.",
    "extra": "What the manifest keeps beside the request.",
    "metadata": "As extra.",
}


def _number(low: float, high: float) -> Schema:
    return {"type": "integer" if type(high) is int else "number", "minimum": low, "maximum": high}


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _one_or_more(schema: Schema, most: int) -> Schema:
    """A list of entries; one alone; or a text with semicolons between."""
    alone = schema if schema.get("type") == "string" and "enum" not in schema else _any_of(schema, _TEXT)
    return _any_of(*alone.get("anyOf", [alone]), {"type": "array", "items": schema, "maxItems": most})


_PAIR: Schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_SHARE = _number(0.0, 1.0)
_WEIGHT = _number(-MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)
_LORA = _any_of(
    _NAME,
    {
        "type": "object",
        "properties": {
            "name": _NAME, "weight": _WEIGHT, "text_weight": _WEIGHT, "path": _TEXT, "sha256": _TEXT,
            "in_prompt": _FLAG,
        },
        "required": ["name"],
        "additionalProperties": False,
    },
)  # fmt: skip
_LABEL = _any_of({"type": "integer", "minimum": 0, "maximum": MAX_LABEL}, _NAME)
_BOX = _any_of(
    {
        "type": "object",
        "properties": {"label": _LABEL, "box": {"type": "array", "items": _SHARE, "minItems": 4, "maxItems": 4}},
        "required": ["label", "box"],
        "additionalProperties": False,
    },
    {"type": "array", "prefixItems": [_LABEL, *[_SHARE] * 4], "minItems": 5, "maxItems": 5},
)
_OF_STEERING = {
    "control_strength": _number(0.0, MAX_STRENGTH),
    "control_start": _SHARE,
    "control_end": _SHARE,
    "control_mode": {"type": "string", "enum": list(MODES)},
    "control_type": {"type": "string", "enum": list(TYPES)},
    "canny": _any_of(_NAME, _FLAG, _PAIR),
    "ip_adapter_strength": _number(0.0, MAX_STRENGTH),
    "ip_adapter_blocks": {"type": "string", "enum": list(BLOCKS)},
}
_FIELDS: dict[str, Schema] = {
    **{name: _number(*limits) for name, limits in RANGES.items()},
    **{name: {"type": "string", "enum": list(words)} for name, words in CHOICES.items()},
    **{name: _one_or_more(_OF_STEERING.get(name, _NAME), MAX_ENTRIES) for name in STEERING},
    **dict.fromkeys((PROMPT, "negative_prompt"), _TEXT),
    **dict.fromkeys((*INPUT_FILES, "hires_upscaler"), _NAME),
    "label": _LABEL,
    "layout": {"type": "array", "items": _BOX, "maxItems": MAX_BOXES},
    **dict.fromkeys(("invert_mask", "paste_back"), _FLAG),
    "seed": _number(-1, RANGES["seed"][1]),
    "sampler": _any_of({"enum": list(SAMPLERS)}, _TEXT),  # other programs' names are taken, too
    "schedule": _any_of({"enum": list(SPACINGS)}, _TEXT),
    "guidance_interval": {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 2, "maxItems": 2},
    "hires": _any_of(_number(1.0, MAX_SCALE), _NAME),
    "loras": _one_or_more(_LORA, MAX_LORAS),
    "embeddings": _any_of(_TEXT, {"type": "array", "items": _NAME, "maxItems": MAX_EMBEDDINGS}),
    **dict.fromkeys(IDS, _any_of({"type": "string", "minLength": 1, "maxLength": MAX_ID}, {"type": "integer"})),
    "count": _number(1, MAX_COUNT),
    SIZE: _any_of(_NAME, _PAIR),
    **dict.fromkeys(EXTRAS, _OBJECT),
}


def row_schema(described: Mapping[str, str]) -> Schema:
    """The schema; `described` has a sentence for each field that is an option. A field that is null says nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationRequest)}
    properties: dict[str, Schema] = {}
    for name in (*REQUEST_FIELDS, *(name for name in _FIELDS if name not in REQUEST_FIELDS)):
        kind = _FIELDS[name] if name == PROMPT else _or_null(_FIELDS[name])
        properties[name] = {"description": _DESCRIBED.get(name) or described[name], **kind}
        if isinstance(default := defaults.get(name), str | bool | int | float) and name != "seed":
            properties[name]["default"] = default
    for name, others in SYNONYMS.items():
        properties |= {other: {"$ref": f"#/properties/{name}", "deprecated": True} for other in others.split()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A row of ldm batch",
        "type": "object",
        "properties": properties,
        **_any_of(*({"required": [name]} for name in (PROMPT, *CONDITION_FIELDS))),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return _any_of(*schema["anyOf"], {"type": "null"})
    return schema | {"type": [schema["type"], "null"]} | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})
