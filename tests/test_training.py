"""What a single file, and a scheduler's configuration, tell of how a model was trained and wants to be drawn with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmcli.checkpoints.families import SD1, SD2, SDXL, Family
from ldmcli.checkpoints.files import open_weights, write_tensors
from ldmcli.checkpoints.folder_config import defaults_for
from ldmcli.checkpoints.training import schedule_of_file
from ldmcli.config import UNDECIDED, Defaults, ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.sampling.schedule import Schedule

LEVELS = Schedule(ScheduleConfig()).alphas_cumprod


def told(tmp_path: Path, family: Family, yaml: str | None = None, **tensors: torch.Tensor) -> ScheduleConfig:
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors or {"x": torch.zeros(1)})
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    return schedule_of_file(open_weights(path), family)


@pytest.mark.parametrize(
    ("family", "prediction_type"), [(SD1, "epsilon"), (SD2, UNDECIDED), (SDXL, "epsilon")], ids=["SD1", "SD2", "SDXL"]
)
def test_a_file_that_tells_nothing_is_its_familys(tmp_path: Path, family: Family, prediction_type: str) -> None:
    assert told(tmp_path, family) == ScheduleConfig(prediction_type=prediction_type)


def test_marks_are_read(tmp_path: Path) -> None:
    mark = torch.zeros(0)
    assert told(tmp_path, SDXL, v_pred=mark).prediction_type == "v_prediction"
    schedule = told(tmp_path, SDXL, v_pred=mark.clone(), ztsnr=mark.clone())
    assert schedule.zero_terminal_snr
    assert float(Schedule(schedule).alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(
    ("yaml", "prediction_type"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    parameterization: eps\n", "epsilon"),
        ("model:\n  params:\n    parameterization: 'x0'  # image\n", "sample"),
        ("model:\n  target: ldm\n  params:\n    linear_start: 0.00085\n", "epsilon"),
        ("something: else\n", UNDECIDED),
        ("# parameterization: v is not said\n", UNDECIDED),
    ],
)
def test_the_original_configuration_beside_the_file_is_read(tmp_path: Path, yaml: str, prediction_type: str) -> None:
    assert told(tmp_path, SD2, yaml).prediction_type == prediction_type


def test_an_unknown_parameterization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"model\.yaml: parameterization flow is none of eps, v, x0"):
        told(tmp_path, SD2, "parameterization: flow\n")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_usual_levels_are_known_in_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Else a file halved for distribution would be drawn with by rounded levels, and unlike its folder."""
    assert told(tmp_path, SD1, alphas_cumprod=LEVELS.to(dtype)) == ScheduleConfig()


def test_other_levels_are_honoured(tmp_path: Path) -> None:
    levels = torch.linspace(0.99, 0.01, 500)
    schedule = told(tmp_path, SD1, alphas_cumprod=levels)
    assert schedule.training_steps == 500
    assert torch.equal(Schedule(schedule).alphas_cumprod, levels)


def test_levels_that_end_in_nothing_are_zero_terminal_snr(tmp_path: Path) -> None:
    schedule = told(tmp_path, SD1, alphas_cumprod=torch.linspace(0.99, 0.0, 1000))
    assert schedule.starts_without_signal
    assert float(Schedule(schedule).alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(
    "levels", [torch.ones(1000), torch.linspace(0, 1, 1000), torch.linspace(0.9, -0.1, 1000), torch.tensor([0.5])]
)
def test_levels_that_are_none_are_refused(tmp_path: Path, levels: torch.Tensor) -> None:
    with pytest.raises(BadDataError, match="alphas_cumprod do not fall"):
        told(tmp_path, SD1, alphas_cumprod=levels)


USUAL = Defaults()
TURBO = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("config", "reads_guidance", "defaults"),
    [
        ({"_class_name": "PNDMScheduler"}, False, USUAL),
        ({"_class_name": "DDIMScheduler", **TURBO}, False, USUAL),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, False, USUAL),
        ({"_class_name": "EulerDiscreteScheduler", **TURBO, "prediction_type": "v_prediction"}, False, USUAL),
        ({"_class_name": "EulerDiscreteScheduler", **TURBO, "rescale_betas_zero_snr": True}, False, USUAL),
        ({"_class_name": "EulerDiscreteScheduler", **TURBO}, False, Defaults("euler", 4, 1.0)),
        ({"_class_name": "EulerAncestralDiscreteScheduler", **TURBO}, False, Defaults("euler-a", 4, 1.0)),
        ({"_class_name": "LCMScheduler"}, False, Defaults("lcm", 4, 1.0)),
        ({"_class_name": "LCMScheduler"}, True, Defaults("lcm", 4, 8.0)),
    ],
)
def test_models_of_few_steps_are_known_by_their_scheduler(
    tmp_path: Path, config: dict[str, Any], reads_guidance: bool, defaults: Defaults
) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    assert defaults_for(path, USUAL, reads_guidance=reads_guidance) == defaults
    assert defaults_for(tmp_path / "none.json", USUAL, reads_guidance=reads_guidance) == USUAL
