"""A folder is drawn as diffusers' `from_pretrained` draws it, untouched, defaults and all.

The pictures of a small random model differ by a level of 255 at most, where a scheduler's word dropped moves them by 40
and more.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.comparing import pixels_apart

from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # diffusers tells at length of configurations that it mends
]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER, HEUN = "EulerDiscreteScheduler", "HeunDiscreteScheduler"
DPM, UNIPC, DDIM = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"

FOLDERS: list[tuple[str, dict[str, Any]]] = [
    *((kind, SD) for kind in (DDIM, EULER, "EulerAncestralDiscreteScheduler", HEUN, DPM, UNIPC, "LCMScheduler")),
    ("PNDMScheduler", SD | {"skip_prk_steps": True}),
    (DDIM, {}),
    (DDIM, SD | {"steps_offset": 0, "clip_sample": True}),
    (DDIM, SD | {"thresholding": True, "set_alpha_to_one": False}),
    (EULER, SD | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 7}),
    (EULER, SD | {"use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    (EULER, SD | {"interpolation_type": "log_linear"}),
    (EULER, SD | {"final_sigmas_type": "sigma_min"}),
    (EULER, SD | {"use_beta_sigmas": True}),
    (HEUN, SD | {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    (DPM, SD | {"use_karras_sigmas": True}),
    (DPM, SD | {"use_exponential_sigmas": True}),
    (DPM, SD | {"use_beta_sigmas": True}),
    (DPM, SD | {"use_lu_lambdas": True}),
    (DPM, SD | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    (DPM, SD | {"solver_order": 3, "thresholding": True, "sample_max_value": 2.0}),
    (DPM, SD | {"solver_order": 1, "final_sigmas_type": "sigma_min"}),
    (DPM, SD | {"solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPM, SD | {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True}),
    (UNIPC, SD | {"use_karras_sigmas": True, "disable_corrector": [0, 2]}),
    (UNIPC, SD | {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    ("LCMScheduler", SD | {"original_inference_steps": 100, "timestep_scaling": 1.0}),
]


def folder_of(source: Path, target: Path, kind: str, said: dict[str, Any]) -> Path:
    """A copy of the model whose scheduler is of this class and says no more than this."""
    shutil.copytree(source, target, copy_function=os.link, ignore=shutil.ignore_patterns("scheduler*", "model_index*"))
    index = json.loads((source / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    (target / "scheduler").mkdir()
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **said}))
    return target


def apart(folder: Path, *, sampler: str | None = None, other: str | None = None, prompt: str = "a red apple") -> int:
    """Levels between ours and theirs in 6 steps; `other` is the class of diffusers for `sampler`."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if other:
        pipeline.scheduler = getattr(diffusers, other).from_config(pipeline.scheduler.config)
    (image,) = pipeline(
        prompt, generator=torch.Generator().manual_seed(3), num_inference_steps=6, guidance_scale=7.5, output_type="np"
    ).images
    session = Session(ModelSpec(model=str(folder)), RuntimeSpec(device="cpu", dtype="fp32", cache=False))
    request = session.fit(GenerationRequest(prompt, seed=3, steps=6, guidance_scale=7.5, sampler=sampler))
    (picture,) = session.draw([request])
    return pixels_apart(np.asarray(picture.pixels()), (image * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "said"), FOLDERS, ids=lambda value: value if isinstance(value, str) else ",".join(value)
)
def test_a_folder_is_drawn_as_it_says(model_folder: Path, tmp_path: Path, kind: str, said: dict[str, Any]) -> None:
    assert apart(folder_of(model_folder, tmp_path / "m", kind, said)) <= 1


@pytest.mark.parametrize(
    ("kind", "said", "sampler", "other"),
    [
        ("PNDMScheduler", SD | {"skip_prk_steps": True}, "euler", EULER),
        ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 0, "clip_sample": True}, "ddim", DDIM),
        (DPM, SD, "ddim", DDIM),
        (DPM, SD | {"use_karras_sigmas": True}, "euler", EULER),
        (UNIPC, SD | {"solver_type": "bh2", "timestep_spacing": "leading"}, "dpmpp-2m", DPM),
    ],
)
def test_another_sampler_reads_the_folder_as_its_class_does(
    model_folder: Path, tmp_path: Path, kind: str, said: dict[str, Any], sampler: str, other: str
) -> None:
    assert apart(folder_of(model_folder, tmp_path / "m", kind, said), sampler=sampler, other=other) <= 1
