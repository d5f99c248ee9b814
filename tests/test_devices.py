"""What each command draws on a GPU is what it draws on a CPU, but for rounding."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import ldm_here, pixels
from PIL import Image

from ldmcli.sampling.catalogue import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
GLYPHS = ROOT / "weights" / "tiny-glyphs"
FOX = ["txt2img", "a fox", "-s", "1"]
COMMANDS = {f"sampler {name}": ["txt2img", "a red apple", "--steps", "8", "--sampler", name] for name in SAMPLERS} | {
    "four at once": ["txt2img", "a cat", "-c", "4", "-b", "4", "-s", "1"],
    "wide": ["txt2img", "a cat", "--size", "128x64", "-s", "1"],
    "img2img": ["img2img", "a cat", "-i", "picture.png", "--strength", "0.6", "-s", "1"],
    "inpainting": ["img2img", "a cat", "-i", "picture.png", "--mask", "mask.png", "-s", "1"],
    "hires": [*FOX, "--hires", "2"],
    "upscaled": [*FOX, "--upscale", "embedded"],
    "upscale": ["upscale", "picture.png"],
    "silhouette": [*FOX, "--control-net", "silhouette", "--control-image", str(ROOT / "weights" / "silhouette.png")],
    "map": ["sample", "-m", str(GLYPHS / "map.safetensors"), "--map", str(GLYPHS / "map.png"), "-s", "1"],
    "class": ["sample", "-m", str(GLYPHS / "class.safetensors"), "--label", "cat", "-g", "3", "-s", "1"],
    "guidance": [*FOX, "--guidance-rescale", "0.7", "--guidance-interval", "0.2:5", "--sampler", "euler"],
    "tiled": [*FOX, "--vae-tiling"],
    "batch": ["batch", "prompts.txt", "-b", "4"],
}
WAYS = {  # on a GPU alone
    "low vram": ["--low-vram"],
    "no graph": ["--no-cuda-graph"],
    "torch's kernels": ["--kernels", "torch"],
    "triton's kernels": ["--kernels", "triton"],
    "chunked": ["--attention", "chunked"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    Image.open(ROOT / "weights" / "demo.png").convert("RGB").resize((64, 64)).save(made / "picture.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(made / "mask.png")
    (made / "prompts.txt").write_text("a red apple\na cat on green\nan owl\na fox on blue\na robot\n")
    return made


def drawn(words: Sequence[str], folder: Path, out: Path, *where: str) -> list[np.ndarray]:
    out = out / "picture.png" if words[0] == "upscale" else out
    result = ldm_here(*words, "-o", out, *where, "-q", cwd=folder)
    assert result.code == 0, result
    return [pixels(path) for path in sorted(out.rglob("*.png") if out.is_dir() else [out])]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "levels"), [("fp16", 6), ("fp32", 4)])
@pytest.mark.parametrize("name", [*COMMANDS, *WAYS])
def test_a_gpu_draws_what_a_cpu_draws(name: str, dtype: str, levels: int, folder: Path, tmp_path: Path) -> None:
    words, more = (COMMANDS[name], []) if name in COMMANDS else (FOX, WAYS[name])
    here = drawn(words, folder, tmp_path / "cpu", "--device", "cpu", "--dtype", "fp32")
    there = drawn([*words, *more], folder, tmp_path / "gpu", "--device", "cuda", "--dtype", dtype)
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        apart = np.abs(one.astype(int) - other)
        assert apart.max() <= levels
        assert apart.mean() < 0.25
