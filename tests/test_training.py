"""What a single file tells of how its model was trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldmcli.checkpoints.families import SD1, SD2, SDXL, Family
from ldmcli.checkpoints.files import open_weights
from ldmcli.checkpoints.single_file import schedule_of_file
from ldmcli.config import UNDECIDED, ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.sampling.schedule import Schedule

LEVELS = Schedule(ScheduleConfig()).alphas_cumprod


def read(
    tmp_path: Path,
    family: Family,
    yaml: str | None = None,
    metadata: dict[str, str] | None = None,
    **tensors: torch.Tensor,
) -> ScheduleConfig:
    path = tmp_path / "model.safetensors"
    save_file(tensors or {"x": torch.zeros(1)}, path, metadata)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    return schedule_of_file(open_weights(path), family)


@pytest.mark.parametrize(
    ("family", "prediction_type"), [(SD1, "epsilon"), (SD2, UNDECIDED), (SDXL, "epsilon")], ids=["SD1", "SD2", "SDXL"]
)
def test_a_file_that_tells_nothing_is_its_familys(tmp_path: Path, family: Family, prediction_type: str) -> None:
    assert read(tmp_path, family) == ScheduleConfig(prediction_type=prediction_type)


def test_marks_are_read(tmp_path: Path) -> None:
    mark = torch.zeros(0)
    assert read(tmp_path, SDXL, v_pred=mark).prediction_type == "v_prediction"
    schedule = read(tmp_path, SDXL, v_pred=mark.clone(), ztsnr=mark.clone())
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
        ('{"model": {"params": {"parameterization": "v"}}}', "v_prediction"),
        ("model: {target: ldm, params: {linear_start: 0.00085, parameterization: v}}\n", "v_prediction"),
        ("model:\n  params:\n    ? parameterization\n    : >-\n      v\n", "v_prediction"),
        ("note: |\n  parameterization: v\nmodel:\n  params: {}\n", "epsilon"),
    ],
)
def test_the_original_configuration_beside_the_file_is_read(tmp_path: Path, yaml: str, prediction_type: str) -> None:
    assert read(tmp_path, SD2, yaml).prediction_type == prediction_type


def test_an_unknown_parameterization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"model\.yaml: parameterization flow is none of eps, v, x0"):
        read(tmp_path, SD2, "parameterization: flow\n")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("model: [", "is not valid YAML"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "has aliases"),
        ("!!python/object/apply:os.system [echo]\n", "is not valid YAML"),
        ("[" * 2000, "is not valid YAML"),
    ],
)
def test_yaml_that_is_none_is_refused(tmp_path: Path, yaml: str, words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        read(tmp_path, SD2, yaml)


@pytest.mark.parametrize(
    ("metadata", "prediction_type", "zero_snr"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ({"modelspec.predict_key": "V"}, "v_prediction", False),
        ({"prediction_type": "v_prediction", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, "v_prediction", False),
        ({"ss_v_parameterization": "None"}, "epsilon", False),
        ({"modelspec.title": "v"}, "epsilon", False),
        ({"modelspec.prediction_type": "magic"}, "epsilon", False),
    ],
)
def test_the_headers_metadata_are_read(
    tmp_path: Path, metadata: dict[str, str], prediction_type: str, zero_snr: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = read(tmp_path, SDXL, metadata=metadata)
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction_type, zero_snr)
    assert ("magic is not known and passed over" in caplog.text) == ("magic" in metadata.values())


def test_metadata_stand_before_the_yaml_and_decide_what_the_family_does_not(tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "epsilon"}
    assert read(tmp_path, SD2, "model: {params: {parameterization: v}}", said).prediction_type == "epsilon"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_usual_levels_are_known_in_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Else a file halved for distribution would be drawn with by rounded levels, and unlike its folder."""
    assert read(tmp_path, SD1, alphas_cumprod=LEVELS.to(dtype)) == ScheduleConfig()


def test_other_levels_are_honoured(tmp_path: Path) -> None:
    levels = torch.linspace(0.99, 0.01, 500)
    schedule = read(tmp_path, SD1, alphas_cumprod=levels)
    assert schedule.training_steps == 500
    assert torch.equal(Schedule(schedule).alphas_cumprod, levels)


def test_levels_that_end_in_nothing_are_zero_terminal_snr(tmp_path: Path) -> None:
    schedule = read(tmp_path, SD1, alphas_cumprod=torch.linspace(0.99, 0.0, 1000))
    assert schedule.starts_without_signal
    assert float(Schedule(schedule).alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(
    "levels", [torch.ones(1000), torch.linspace(0, 1, 1000), torch.linspace(0.9, -0.1, 1000), torch.tensor([0.5])]
)
def test_levels_that_are_none_are_refused(tmp_path: Path, levels: torch.Tensor) -> None:
    with pytest.raises(BadDataError, match="alphas_cumprod do not fall"):
        read(tmp_path, SD1, alphas_cumprod=levels)
