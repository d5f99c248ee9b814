"""Samplers and schedules by every program's name: in options, rows, requests and pictures' text."""

from pathlib import Path
from typing import Any

import pytest
from cli_support import assert_refused, ldm_here, tiny_model

from ldmcli.batch.fields import as_fields
from ldmcli.errors import UsageError
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.sampling.names import sampler_of, schedule_of
from ldmcli.spacings import SPACINGS
from ldmcli.spec import GenerationRequest

# As AUTOMATIC1111, ComfyUI, InvokeAI, NovelAI, k-diffusion and diffusers write them.
NAMES = {
    "DPM++ 2M": ("dpmpp-2m", None), "DPM++ 2M Karras": ("dpmpp-2m", "karras"), "dpmpp_2m": ("dpmpp-2m", None),
    "dpmpp_2m_k": ("dpmpp-2m", "karras"), "k_dpmpp_2m": ("dpmpp-2m", None), "DPMSolver++": ("dpmpp-2m", None),
    "sample_dpmpp_2m": ("dpmpp-2m", None), "DPMSolverMultistepScheduler": ("dpmpp-2m", None),
    "DPM++ 2M SDE Exponential": ("dpmpp-2m-sde", "exponential"), "dpmpp_2m_sde_gpu": ("dpmpp-2m-sde", None),
    "DPM++ 2M SGM Uniform": ("dpmpp-2m", "sgm_uniform"), "DPM++ 2M Align Your Steps": ("dpmpp-2m", "ays"),
    "Euler a": ("euler-a", None), "euler_a": ("euler-a", None), "EULER-A": ("euler-a", None),
    "k_euler_a": ("euler-a", None), "k_euler_ancestral": ("euler-a", None), "K_EULER": ("euler", None),
    "euler_k": ("euler", "karras"), "EulerAncestralDiscreteScheduler": ("euler-a", None),
    "euler_a (karras)": ("euler-a", "karras"), "EulerDiscreteScheduler": ("euler", None), "Heun": ("heun", None),
    "heun_k": ("heun", "karras"), "HeunDiscreteScheduler": ("heun", None), "uni_pc": ("unipc", None),
    "uni_pc_bh2": ("unipc", None), "UniPCMultistepScheduler": ("unipc", None), "ddim": ("ddim", None),
    "DDIMScheduler": ("ddim", None), "PNDMScheduler": ("plms", None), "LCM": ("lcm", None),
    "LCMScheduler": ("lcm", None),
}  # fmt: skip
UNKNOWN = (
    "", "k", "karras", "LMS", "k_lms", "DPM++ SDE", "DPM++ 3M SDE", "dpmpp_2s_ancestral", "dpm_2", "heunpp2",
    "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler",
    "FlowMatchEulerDiscreteScheduler", "x" * 9999,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_the_sampler_and_maybe_the_schedule(name: str) -> None:
    sampler, schedule = NAMES[name]
    assert sampler_of(name) == (sampler, schedule)
    request = GenerationRequest("", sampler=name)
    assert (request.sampler, request.schedule) == (sampler, schedule)
    fields, problem = as_fields([("sampler", "Sampler", name)])
    assert (fields, problem) == ({"sampler": sampler} | ({"schedule": schedule} if schedule else {}), "")


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_another_sampler_is_none_of_these(name: str) -> None:
    assert sampler_of(name) is None
    with pytest.raises(UsageError, match="is not known; choose from ddim"):
        GenerationRequest("", sampler=name)


def test_own_names_and_titles_are_among_them() -> None:
    for row in SAMPLERS.values():
        assert sampler_of(row.name) == sampler_of(row.title) == (row.name, None)
        for spacing in row.spacings:
            if spacing not in ("leading", "linspace"):
                assert sampler_of(f"{row.title} {spacing}") == (row.name, spacing)
    assert [schedule_of(name) for name in SPACINGS] == list(SPACINGS)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("Align Your Steps", "ays"), ("Uniform", "normal"),
        ("Normal", "normal"), ("DDIM", "leading"), ("ddim_uniform", "leading"), ("Polyexponential", "exponential"),
        ("Beta", "beta"), ("Simple", "simple"), ("Automatic", None), ("kl_optimal", None),
    ],
)  # fmt: skip
def test_schedules(name: str, schedule: str | None) -> None:
    assert schedule_of(name) == schedule


def test_a_schedule_said_twice_must_be_the_same() -> None:
    assert GenerationRequest("", sampler="DPM++ 2M Karras", schedule="Karras").schedule == "karras"
    with pytest.raises(UsageError, match=r"sampler DPM\+\+ 2M Karras says its schedule; leave out beta"):
        GenerationRequest("", sampler="DPM++ 2M Karras", schedule="beta")


def draws(folder: Path, *options: str) -> dict[str, Any]:
    out = ldm_here(
        "txt2img", "a", "-m", tiny_model(), "--steps", "2", "-s", "1", "-q", "--json", *options, "-o", folder / "a.png",
        "--overwrite",
    )  # fmt: skip
    assert out.code == 0, out.err
    return {name: out.records[0][name] for name in ("sampler", "schedule")}


def test_options_take_them(tmp_path: Path) -> None:
    assert draws(tmp_path, "--sampler", "DPM++ 2M Karras") == {"sampler": "dpmpp-2m", "schedule": "karras"}
    assert draws(tmp_path, "--sampler", "k_euler", "--schedule", "Align Your Steps") == {
        "sampler": "euler", "schedule": "ays"}  # fmt: skip
    for name, near in (("LMS Karras", "dpmpp-2m"), ("dpmpp_2s_ancestral", "euler-a"), ("DPM++ SDE", "dpmpp-2m-sde"),
                       ("KDPM2DiscreteScheduler", "heun")):  # fmt: skip
        refused = ldm_here("txt2img", "a", "-m", tiny_model(), "--sampler", name, "-o", tmp_path / "b.png")
        assert_refused(refused, 2, f"--sampler '{name}' is not drawn with here; {near} is the nearest; see")
    for option, name in (("--sampler", "ddim2"), ("--schedule", "kl_optimal")):
        refused = ldm_here("txt2img", "a", "-m", tiny_model(), option, name, "-o", tmp_path / "b.png")
        assert_refused(refused, 2, name, "ddim" if option == "--sampler" else "sgm_uniform")


def test_a_grid_takes_them(tmp_path: Path) -> None:
    rows = tmp_path / "p.txt"
    rows.write_text("a\n")
    grid = 'sampler="DPM++ 2M Karras",Euler a,unipc'
    out = ldm_here(
        "batch", rows, "-o", tmp_path / "out", "--grid", grid, "-m", tiny_model(), "--steps", "2", "--json", "-q"
    )
    assert [(one["request"]["sampler"], one["request"]["schedule"]) for one in out.records] == [
        ("dpmpp-2m", "karras"), ("euler-a", None), ("unipc", None),
    ]  # fmt: skip
