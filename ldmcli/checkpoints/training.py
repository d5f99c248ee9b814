"""How a single file's model was trained, as far as the file tells: prediction type and noise schedule."""

import dataclasses
import itertools
import logging
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.buildable import betas_of
from ldmcli.checkpoints.families import Family
from ldmcli.checkpoints.files import WeightFile, read_numbers
from ldmcli.config import UNDECIDED, ScheduleConfig
from ldmcli.disk.opening import read_text
from ldmcli.errors import BadDataError, printable

_log = logging.getLogger(__name__)
_MAX_YAML_BYTES = 1 << 18  # a second to parse; real ones have 4 kB
_YAML_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# What trainers and ModelSpec write in a header's metadata.
_TYPE_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "ss_prediction_type")
_TYPES = _YAML_TYPES | {
    "epsilon": "epsilon",
    "noise": "epsilon",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "x": "sample",
    "sample": "sample",
}
_VELOCITY_KEYS = ("ss_v_parameterization", "v_parameterization", "v_pred", "modelspec.v_pred")
_ZERO_SNR_KEYS = ("ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr", "modelspec.ztsnr")
_LEVELS = "alphas_cumprod"
# How far from the usual schedule levels stored in a type may lie and still be it, rounded: a share, and at least.
_ROUNDING = {"F16": (2e-3, 0.0), "BF16": (1e-2, 0.0)}
_ROUNDING |= {"F8_E4M3": (0.07, 1e-3), "F8_E4M3FNUZ": (0.07, 1e-3), "F8_E5M2": (0.13, 0.0), "F8_E5M2FNUZ": (0.13, 0.0)}
_SAME = (1e-5, 0.0)


def schedule_of_file(file: WeightFile, family: Family) -> ScheduleConfig:
    """The schedule of a checkpoint in the original layout: the usual one, but for what the file says otherwise.

    Marks named `v_pred` and `ztsnr` tell v-prediction and zero terminal SNR (Lin et al. 2023); so do words in the
    header's metadata (ModelSpec's and trainers'), and a .yaml of the same name beside the file, as the original code
    has it. Where nothing does and the family has both kinds, the type is UNDECIDED. Levels stored under
    `alphas_cumprod` are used as they are, unless they are the usual ones but for rounding. Raises BadDataError where
    the levels are none, or the .yaml cannot be read.
    """
    marked = "v_prediction" if "v_pred" in file.tensors else None
    written = _from_metadata(file.metadata, file.path)
    told = _from_yaml(file.path.with_suffix(".yaml"))
    usual = ScheduleConfig(
        prediction_type=marked or written or told or family.prediction_type or UNDECIDED,
        zero_terminal_snr="ztsnr" in file.tensors or any(_is_true(file.metadata.get(key)) for key in _ZERO_SNR_KEYS),
    )
    return _with_levels(usual, file) if _LEVELS in file.tensors else usual


def _from_metadata(metadata: Mapping[str, str], path: Path) -> str | None:
    """The prediction type that the header's metadata name, if they do."""
    for key in _TYPE_KEYS:
        word = metadata.get(key, "").strip().lower()
        if word in _TYPES:
            return _TYPES[word]
        if word:
            _log.warning("%s: %s %s is not known and passed over", printable(str(path)), key, printable(word, 100))
    return "v_prediction" if any(_is_true(metadata.get(key)) for key in _VELOCITY_KEYS) else None


def _is_true(word: str | None) -> bool:
    return word is not None and word.strip().lower() in ("true", "1", "yes")


def _with_levels(usual: ScheduleConfig, file: WeightFile) -> ScheduleConfig:
    levels = read_numbers(file, _LEVELS)
    expected = list(itertools.accumulate((1 - beta for beta in betas_of(usual)), operator.mul))
    share, least = _ROUNDING.get(file.tensors[_LEVELS].dtype, _SAME)
    if len(levels) == len(expected) and all(
        abs(a - b) <= max(share * b, least) for a, b in zip(levels, expected, strict=True)
    ):
        return usual
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not falling or not 0 <= levels[-1] <= levels[0] < 1:
        raise BadDataError(f"{printable(str(file.path))}: its {_LEVELS} do not fall from below 1 to no less than 0.")
    return dataclasses.replace(
        usual, training_steps=len(levels), alphas_cumprod=tuple(levels), zero_terminal_snr=levels[-1] == 0
    )


def _from_yaml(path: Path) -> str | None:
    """The prediction type that the original code's configuration gives, if there is one and it does."""
    if not path.is_file():
        return None
    import yaml

    text = read_text(path, _MAX_YAML_BYTES)
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few could stand for any number
            raise BadDataError(f"{printable(str(path))} has aliases, which no configuration of a model needs.")
        tables = list(_tables(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = printable(" ".join(str(error).split()), 200)
        raise BadDataError(f"{printable(str(path))} is not valid YAML ({said}).") from None
    found = next((table["parameterization"] for table in tables if "parameterization" in table), None)
    if found is None:
        return "epsilon" if any("params" in table for table in tables) and "model" in (tables or [{}])[0] else None
    if not isinstance(found, str) or found not in _YAML_TYPES:
        shown = printable(str(found), 100)
        raise BadDataError(f"{printable(str(path))}: parameterization {shown} is none of {', '.join(_YAML_TYPES)}.")
    return _YAML_TYPES[found]


def _tables(value: Any) -> Iterator[Mapping[Any, Any]]:
    """The tables in what a YAML file holds, outer ones first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(inner)
