"""What a file is, as plain facts: the request in a picture, or the make-up of a model. Reads headers, without torch."""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.file_kinds import describe_single_file
from ldmcli.checkpoints.files import WeightFile, open_weights
from ldmcli.checkpoints.header import TensorInfo
from ldmcli.checkpoints.source import ModelSource, model_of_file, open_model
from ldmcli.config import UNDECIDED
from ldmcli.errors import BadDataError
from ldmcli.foreign.pictured import read_foreign
from ldmcli.images.formats import format_of_file
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.images.png_text import carries_embedding

_UNKNOWN = "epsilon or v_prediction: the network tells when it draws"


def inspect(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Facts about a picture, a model folder or a .safetensors file, as JSON values. Raises LdmError if it is none."""
    if format_of_file(path):
        return {"kind": "picture", **_picture(path)}
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        return {"kind": "model", **_model(open_model(path, allow_pickle=allow_pickle))}
    weights = open_weights(path, allow_pickle=allow_pickle)
    try:
        return {"kind": "model", **_model(model_of_file(weights))}
    except BadDataError:
        # No model that can be run, but what the file holds can still be said.
        totals = _totals(weights.tensors.values())
        return {"kind": "weights", "is": _kind(weights), **totals, "tensors": len(weights.tensors)}


def _picture(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except BadDataError:
        parameters, foreign = read_parameters(path), read_foreign(path)
        facts: dict[str, Any] = {} if parameters is None else {"parameters": parameters}
        if foreign is not None:
            facts |= {"made_by": foreign.tool, "request": foreign.fields, "weights": foreign.weights}
            facts |= {"not_taken": foreign.left}
        if facts:
            return facts
        if carries_embedding(path):
            return {}
        raise


def _model(source: ModelSource) -> dict[str, Any]:
    config = source.config
    parts = {}
    for part in map(source.part, source.parts):
        tensors = [file.tensors[key] for key, file in part.keys().items() if not key.endswith("position_ids")]
        parts[part.name] = {**_totals(tensors), **dataclasses.asdict(part.config)}
    prediction_type = config.schedule.prediction_type
    return {
        "is": _kind(source.single_file) if source.single_file else f"{config.family}, diffusers folder",
        "family": config.family,
        "reads": config.unet.reads or None,
        "conditioned_on": ", ".join(config.conditions) or "nothing",
        "prediction_type": _UNKNOWN if prediction_type == UNDECIDED else prediction_type,
        "zero_terminal_snr": config.schedule.starts_without_signal,
        "defaults": dataclasses.asdict(config.defaults),
        "default_size": f"{config.default_size}x{config.default_size}",
        "parts": parts,
    }


def _kind(weights: WeightFile) -> str:
    return describe_single_file({key: info.shape for key, info in weights.tensors.items()})


def _totals(tensors: Iterable[TensorInfo]) -> dict[str, Any]:
    found = list(tensors)
    return {
        "parameters": sum(math.prod(info.shape) for info in found),
        "bytes": sum(info.end - info.start for info in found),
        "dtype": ", ".join(sorted({info.dtype for info in found})),
    }
