"""Whole runs give diffusers' latents after every step, and its pixels."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import load
from oracle.comparing import draw, draw_with_diffusers, pixels_apart, relative

from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import GenerationRequest

TOLERANCE = 1e-4
Pair = tuple[Pipeline, Any]

SAMPLERS = [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("plms", 0.0)]


@pytest.fixture(scope="module", params=["random", "embedded"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The same model in this program and in diffusers."""
    if request.param == "random":
        return request.getfixturevalue("pipeline"), request.getfixturevalue("random_model")
    return request.getfixturevalue("embedded_pipeline"), request.getfixturevalue("embedded_diffusers")


def assert_same(pair: Pair, requests: list[GenerationRequest], **schedule: Any) -> None:
    """Same latents after every step and same pixels. Of two float32 programs, one rounds a pixel up where the other
    rounds it down: they may be 1 apart."""
    pipeline, reference = pair
    ours, our_pixels = draw(pipeline, requests)
    theirs, their_pixels = draw_with_diffusers(reference, requests, schedule)
    assert len(ours) == len(theirs) == requests[0].steps
    errors = [relative(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < TOLERANCE, f"worst after step {errors.index(max(errors)) + 1}"
    assert pixels_apart(our_pixels, their_pixels) <= 1
    assert their_pixels.std() > 10  # a picture, not a flat colour


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_trajectory(pair: Pair, sampler: str, eta: float, steps: int, guidance_scale: float) -> None:
    request = GenerationRequest(
        "a red apple on a blue background",
        negative_prompt="a dog, blurry",
        seed=steps,
        steps=steps,
        sampler=sampler,
        eta=eta,
        guidance_scale=guidance_scale,
    )
    assert_same(pair, [request])


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_trajectory_of_a_batch(pair: Pair, sampler: str, eta: float) -> None:
    common: dict[str, Any] = {"steps": 7, "sampler": sampler, "eta": eta, "guidance_scale": 3.0}
    assert_same(
        pair,
        [
            GenerationRequest("a rose", seed=2**63 - 1, **common),
            GenerationRequest("", seed=0, negative_prompt="a rose", **common),
            GenerationRequest("a whale, 猫 🎉 " * 30, seed=7, negative_prompt="fog " * 90, **common),
        ],
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_short_runs(pipeline: Pipeline, random_model: Any, sampler: str, eta: float, steps: int) -> None:
    """PLMS has another formula for each of its first four steps."""
    assert_same((pipeline, random_model), [GenerationRequest("a pear", steps=steps, sampler=sampler, eta=eta)])


@pytest.mark.parametrize("size", [(72, 56), (40, 104)])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sizes_that_do_not_halve_evenly(pair: Pair, sampler: str, size: tuple[int, int]) -> None:
    width, height = size
    common = {"sampler": sampler, "steps": 5, "guidance_scale": 7.5}  # the embedded model has a guidance of its own
    assert_same(pair, [GenerationRequest("a pear", seed=3, width=width, height=height, **common)])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_other_prediction_types(
    model_folder: Path, random_model: Any, tmp_path: Path, prediction_type: str, eta: float
) -> None:
    folder = copy_with(model_folder, tmp_path / "model", {"prediction_type": prediction_type})
    request = GenerationRequest("a pear", seed=4, steps=10, sampler="ddim", eta=eta, guidance_scale=3.0)
    assert_same((load(folder), random_model), [request], prediction_type=prediction_type)


@pytest.mark.parametrize(
    "schedule",
    [
        {"set_alpha_to_one": True},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"num_train_timesteps": 500},
        {"num_train_timesteps": 20, "trained_betas": [0.01 + 0.004 * i for i in range(20)]},
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_other_schedules(
    model_folder: Path, random_model: Any, tmp_path: Path, schedule: dict[str, Any], sampler: str
) -> None:
    folder = copy_with(model_folder, tmp_path / "model", schedule)
    request = GenerationRequest("a pear", seed=4, steps=6, sampler=sampler, guidance_scale=3.0)
    assert_same((load(folder), random_model), [request], **schedule)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_other_spacings(model_folder: Path, random_model: Any, tmp_path: Path, spacing: str) -> None:
    """DDIM only: diffusers' PLMS assumes equal strides in its first step, which these do not have."""
    folder = copy_with(model_folder, tmp_path / "model", {"timestep_spacing": spacing})
    request = GenerationRequest("a pear", seed=4, steps=6, sampler="ddim", guidance_scale=3.0)
    assert_same((load(folder), random_model), [request], timestep_spacing=spacing)


def copy_with(folder: Path, target: Path, schedule: dict[str, Any]) -> Path:
    """The model with other settings in its scheduler_config.json."""
    shutil.copytree(folder, target)
    path = target / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | schedule))
    return target
