"""How a single file's model was trained, as far as the file tells: prediction type and noise schedule."""

import dataclasses
import itertools
import operator
import re
from pathlib import Path

from ldmcli.checkpoints.buildable import betas_of
from ldmcli.checkpoints.families import Family
from ldmcli.checkpoints.files import WeightFile, read_numbers
from ldmcli.config import UNDECIDED, ScheduleConfig
from ldmcli.disk.opening import read_text
from ldmcli.errors import BadDataError, printable

_MAX_YAML_BYTES = 1 << 20
_PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?(\w+)""", re.MULTILINE)
_YAML_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_LEVELS = "alphas_cumprod"
# How far from the usual schedule levels stored in a type may lie and still be it, rounded: a share, and at least.
_ROUNDING = {"F16": (2e-3, 0.0), "BF16": (1e-2, 0.0)}
_ROUNDING |= {"F8_E4M3": (0.07, 1e-3), "F8_E4M3FNUZ": (0.07, 1e-3), "F8_E5M2": (0.13, 0.0), "F8_E5M2FNUZ": (0.13, 0.0)}
_SAME = (1e-5, 0.0)


def schedule_of_file(file: WeightFile, family: Family) -> ScheduleConfig:
    """The schedule of a checkpoint in the original layout: the usual one, but for what the file says otherwise.

    Marks named `v_pred` and `ztsnr` tell v-prediction and zero terminal SNR (Lin et al. 2023); a .yaml of the same name
    beside the file, as the original code has it, tells the parameterization. Where nothing does and the family has
    both kinds, the type is UNDECIDED. Levels stored under `alphas_cumprod` are used as they are, unless they are the
    usual ones but for rounding. Raises BadDataError where the levels are none.
    """
    marked = "v_prediction" if "v_pred" in file.tensors else None
    told = _from_yaml(file.path.with_suffix(".yaml"))
    usual = ScheduleConfig(
        prediction_type=marked or told or family.prediction_type or UNDECIDED,
        zero_terminal_snr="ztsnr" in file.tensors,
    )
    return _with_levels(usual, file) if _LEVELS in file.tensors else usual


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
    text = read_text(path, _MAX_YAML_BYTES)
    found = _PARAMETERIZATION.search(text)
    if found is None:
        return "epsilon" if "params:" in text and "model:" in text else None
    if found[1] not in _YAML_TYPES:
        raise BadDataError(
            f"{printable(str(path))}: parameterization {printable(found[1])} is none of {', '.join(_YAML_TYPES)}."
        )
    return _YAML_TYPES[found[1]]
