"""The whole command, `ldm txt2img`, against diffusers' StableDiffusionPipeline: no pixel is off by more than 1."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle.comparing import draw_with_diffusers, pixels_apart
from PIL import Image

from ldmcli.spec import GenerationRequest


def run_txt2img(*arguments: str | Path) -> list[np.ndarray]:
    """The pictures that `ldm txt2img` writes with these arguments, read back."""
    command = [sys.executable, "-m", "ldmcli", "txt2img", "--quiet", "--device", "cpu", "--dtype", "fp32", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # enough for small models
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    return [np.asarray(Image.open(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},  # all defaults, which are the model's own
        {"sampler": "plms", "steps": 25, "negative_prompt": "a blue background"},
        {"eta": 1.0, "steps": 20, "guidance_scale": 1.0},
    ],
    ids=["ddim", "plms", "ddpm"],
)
def test_command(embedded_diffusers: Any, embedded_folder: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    prompt = "a red apple on a blue background"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    ours = run_txt2img(prompt, *options, "--seed", "11", "--count", "2", "--output", tmp_path)
    own = json.loads((embedded_folder / "generation_config.json").read_text())
    own = {"steps": own["num_inference_steps"], "guidance_scale": own["guidance_scale"]}
    requests = [GenerationRequest(prompt, seed=seed, **{**own, **settings}) for seed in (11, 12)]
    _, theirs = draw_with_diffusers(embedded_diffusers, requests)
    assert pixels_apart(np.stack(ours), theirs) <= 1


def test_command_on_a_single_file(model_file: Path, random_model: Any, tmp_path: Path) -> None:
    size = {"width": 72, "height": 64}
    options = [f"--{name}={value}" for name, value in size.items()]
    ours = run_txt2img("a pear", "--model", model_file, "--seed", "5", "--steps", "5", *options, "--output", tmp_path)
    _, theirs = draw_with_diffusers(random_model, [GenerationRequest("a pear", seed=5, steps=5, **size)])
    assert pixels_apart(np.stack(ours), theirs) <= 1
