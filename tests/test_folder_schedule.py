"""What a diffusers folder's scheduler says of how its model is drawn, and what it leaves to each class's defaults."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_support import assert_refused, ldm_here, reconfigured
from fork_server import quick

from ldmcli.checkpoints.folder_schedule import FolderSchedule, folder_schedule
from ldmcli.checkpoints.source import open_model
from ldmcli.config import Defaults, ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.sampling.schedule import Schedule

USUAL = Defaults()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TURBO = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}
DPM = "DPMSolverMultistepScheduler"


def read(tmp_path: Path, kind: str, said: dict[str, Any], **how: Any) -> FolderSchedule:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": kind, **said}))
    return folder_schedule(path, None, USUAL, **how)


@pytest.mark.parametrize(
    ("kind", "said", "reads_guidance", "defaults"),
    [
        ("PNDMScheduler", {}, False, Defaults("plms")),
        ("DDIMScheduler", TURBO, False, Defaults("ddim")),
        ("HeunDiscreteScheduler", {}, False, Defaults("heun")),
        (DPM, {}, False, Defaults("dpmpp-2m")),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, False, Defaults("dpmpp-2m-sde")),
        ("UniPCMultistepScheduler", {}, False, Defaults("unipc")),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, False, Defaults("euler")),
        ("EulerDiscreteScheduler", TURBO | {"prediction_type": "v_prediction"}, False, Defaults("euler")),
        ("EulerDiscreteScheduler", TURBO | {"rescale_betas_zero_snr": True}, False, Defaults("euler")),
        ("EulerDiscreteScheduler", TURBO, False, Defaults("euler", 4, 1.0)),
        ("EulerAncestralDiscreteScheduler", TURBO, False, Defaults("euler-a", 4, 1.0)),
        ("LCMScheduler", {}, False, Defaults("lcm", 4, 1.0)),
        ("LCMScheduler", {}, True, Defaults("lcm", 4, 8.0)),
        ("DPMSolverSinglestepScheduler", {}, False, Defaults("dpmpp-2m")),
    ],
)
def test_the_sampler_a_folder_names_is_its_own(
    tmp_path: Path, kind: str, said: dict[str, Any], reads_guidance: bool, defaults: Defaults
) -> None:
    found = read(tmp_path, kind, said, reads_guidance=reads_guidance)
    assert found.defaults == defaults
    assert ("looks distilled" in found.guess) == (defaults.steps == 4 and defaults.sampler != "lcm")
    assert any("is not here; dpmpp-2m is used" in note for note in found.notes) == ("Single" in kind)


def test_without_a_file_it_is_the_familys(tmp_path: Path) -> None:
    assert folder_schedule(tmp_path / "none.json", None, USUAL) == FolderSchedule(ScheduleConfig(), USUAL)


def test_the_index_wins_over_the_schedulers_own_word(tmp_path: Path) -> None:
    folder = reconfigured(tmp_path / "m", "scheduler", _class_name="DDIMScheduler", **SD)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}))
    assert open_model(folder).config.defaults.sampler == "heun"


def test_what_is_left_out_is_each_class_own(tmp_path: Path) -> None:
    """Case 05: linspace for Euler, though not for DDIM and PLMS."""
    found = read(tmp_path, "PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}).schedule
    steps = {
        name: [round(s.timestep) for s in Schedule(found).steps(4, name)] for name in ("euler", "ddim", "plms", "lcm")
    }
    assert steps["euler"] == [999, 666, 333, 0]
    assert steps["ddim"] == steps["plms"] == [751, 501, 251, 1]
    assert steps["lcm"] == [999, 759, 499, 259]
    assert Schedule(found).steps(4, "euler", "leading")[0].timestep == 751
    assert read(tmp_path, "DDIMScheduler", {}).schedule.beta_schedule == "linear"


@pytest.mark.parametrize("mended", [True, False])
def test_old_configurations_are_mended_where_the_pipeline_does(tmp_path: Path, mended: bool) -> None:
    old = read(tmp_path, "DDIMScheduler", SD | {"steps_offset": 0, "clip_sample": True}, mended=mended).schedule
    assert (old.steps_offset, old.walk.clip) == ((1, None) if mended else (0, 1.0))
    assert old.of("lcm").walk.clip == (None if mended else 1.0)
    silent = read(tmp_path, "DDIMScheduler", SD, mended=mended).schedule
    assert (silent.steps_offset, silent.walk.clip) == ((1, None) if mended else (0, 1.0))
    # Another sampler's class takes its own defaults for what the file leaves out, unmended.
    assert silent.of("euler").steps_offset == 0
    assert "clips the latents" in read(tmp_path, "PNDMScheduler", SD, mended=mended).schedule.of("ddim").note


@pytest.mark.parametrize(
    ("version", "size", "taken"), [("0.8.1", 32, 64), ("0.9.0", 32, 32), ("0.8.1", 96, 96), (None, 32, 32)]
)
def test_an_old_u_nets_size_is_mended(tmp_path: Path, version: str | None, size: int, taken: int) -> None:
    folder = reconfigured(tmp_path / "m", "unet", _diffusers_version=version, sample_size=size)
    assert open_model(folder).config.unet.sample_size == taken


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DPM, {"algorithm_type": "dpmsolver"}),
        (DPM, {"lambda_min_clipped": -1.0}),
        (DPM, {"use_flow_sigmas": True}),
        (DPM, {"variance_type": "learned"}),
        (DPM, {"solver_order": 4}),
        (DPM, {"solver_type": "magic"}),
        (DPM, {"final_sigmas_type": "magic"}),
        (DPM, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"lower_order_final": False}),
        ("UniPCMultistepScheduler", {"disable_corrector": "all"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"sigma_min": -1}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "linspace"}),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_by_name(tmp_path: Path, kind: str, said: dict[str, Any]) -> None:
    schedule = read(tmp_path, kind, SD | said).schedule
    with pytest.raises(BadDataError, match="|".join(said)):
        Schedule(schedule).steps(4, read(tmp_path, kind, said).defaults.sampler)
    assert Schedule(schedule).steps(4, "euler-a")  # which reads none of it


def test_two_ways_to_space_noise_levels_are_one_too_many(tmp_path: Path) -> None:
    said = {"use_karras_sigmas": True, "use_beta_sigmas": True}
    assert "in two ways (karras, beta)" in read(tmp_path, DPM, said).schedule.refused


def test_a_refusal_is_one_sentence_and_another_sampler_draws(tmp_path: Path) -> None:
    folder = reconfigured(tmp_path / "m", "scheduler", _class_name=DPM, algorithm_type="dpmsolver", **SD)
    arguments = ("txt2img", "x", "-m", folder, "--steps", "2", "-o", tmp_path / "x.png")
    refused = ldm_here(*arguments)
    assert_refused(refused, 65, "algorithm_type is 'dpmsolver'", "choose another with --sampler")
    assert ldm_here(*arguments, "--sampler", "euler").code == 0


def test_a_guess_and_a_stand_in_are_said(tmp_path: Path) -> None:
    folder = reconfigured(tmp_path / "m", "scheduler", _class_name="EulerDiscreteScheduler", **TURBO, **SD)
    arguments = ("-W", "63", "-o", tmp_path / "x.png")  # refused once the model is open
    assert quick("txt2img", "x", "-m", folder, *arguments).err.count("looks distilled to few steps") == 1
    (folder / "generation_config.json").write_text('{"guidance_scale": 0.0, "num_inference_steps": 1}')
    assert "looks distilled" not in quick("txt2img", "x", "-m", folder, *arguments).err
    folder = reconfigured(tmp_path / "n", "scheduler", _class_name="KDPM2DiscreteScheduler", **SD)
    said = quick("txt2img", "x", "-m", folder, *arguments).err
    assert "made for KDPM2DiscreteScheduler, which is not here; heun is used in its place" in said
