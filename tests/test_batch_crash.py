"""kill -9 at random moments of a batch run: what the last rerun leaves is what an undisturbed run does."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import lora_for
from batch_support import assert_whole, manifest
from cli_support import ldm_here, pixels, start, tiny_model
from PIL import Image

slow = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("kills", "rows", "devices"),
    [(4, 100, "cpu"), pytest.param(50, 300, "cpu", marks=slow), pytest.param(20, 300, "cpu*2", marks=slow)],
)
def test_killed_again_and_again(one_thread: None, tmp_path: Path, kills: int, rows: int, devices: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "picture {i % 7}", "id": "row-{i}"}}\n' for i in range(rows)))
    options = ("-m", tiny_model(), "--steps", "3", "--dtype", "fp32", "--devices", devices, "-b", "4")
    chance = random.Random(kills)
    out, whole = tmp_path / "out", tmp_path / "whole"
    lines = out / "manifest" / "worker-0.jsonl"

    def noted() -> int:
        return lines.read_bytes().count(b"\n") if lines.exists() else 0

    progress: list[int] = []
    for number in range(kills):
        # Some die while they start, most while they draw; those that finish are none to learn from.
        enough = noted() + chance.randrange(0, max(1, 2 * rows // (kills + 1)))
        end = time.monotonic() + (chance.uniform(0.0, 1.0) if number % 5 == 4 else 60.0)
        with start("batch", path, "-o", out, *options) as process:
            while time.monotonic() < end and noted() < enough and process.poll() is None:
                time.sleep(0.005)
            process.kill()
        progress.append(len(rows_done(out)))
    assert progress == sorted(progress)  # nothing that was done is lost
    assert len(set(progress)) > kills // 4  # and the kills hit a run that was under way
    assert ldm_here("batch", path, "-o", out, *options).code == 0
    assert_whole(out, rows)
    assert ldm_here("batch", path, "-o", whole, *options).code == 0
    undisturbed = {record["row"]: whole / record["path"] for record in manifest(whole)}
    for record in manifest(out):
        difference = pixels(out / record["path"]).astype(int) - pixels(undisturbed[record["row"]])
        assert np.abs(difference).max() <= 1, record["row"]


def test_killed_with_pictures_masks_loras_and_second_passes(one_thread: None, tmp_path: Path) -> None:
    """Every row of another kind: what the reruns leave is byte for byte what one run does."""
    lora_for(tiny_model(), tmp_path / "lora.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")
    Image.fromarray((noise[..., 0] > 127).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    kinds: list[dict[str, Any]] = [
        {"image": "in.png", "strength": 0.7},
        {"image": "in.png", "mask": "mask.png"},
        {"loras": [f"{tmp_path / 'lora.safetensors'}:0.7"]},
        {"hires": "2", "hires_upscaler": "lanczos", "hires_steps": 2},
        {"image": "in.png", "loras": [str(tmp_path / "lora.safetensors")], "hires": "2"},
    ]
    path, rows = tmp_path / "rows.jsonl", 30
    path.write_text("".join(json.dumps({"prompt": "x", **kinds[i % len(kinds)]}) + "\n" for i in range(rows)))
    options = ("-m", tiny_model(), "--steps", "3", "--dtype", "fp32", "--devices", "cpu", "-b", "1", "--no-cache")
    out, whole = tmp_path / "out", tmp_path / "whole"
    for enough in (5, 16):
        with start("batch", path, "-o", out, *options) as process:
            while len(rows_done(out)) < enough and process.poll() is None:
                time.sleep(0.02)
            process.kill()
    before = rows_done(out)
    assert len(before) >= 16
    assert ldm_here("batch", path, "-o", out, *options).code == 0
    assert ldm_here("batch", path, "-o", whole, *options).code == 0
    assert before <= rows_done(out) == rows_done(whole)
    found, wanted = (
        {file.relative_to(folder): file.read_bytes() for file in (folder / "images").rglob("*") if file.is_file()}
        for folder in (out, whole)
    )
    assert len(wanted) == rows
    assert found == wanted


def rows_done(out: Path) -> set[str]:
    """The beginnings, with the row's number, of the whole lines in the manifests."""
    texts = [path.read_text() for path in out.glob("manifest/*.jsonl")]
    return {line.partition(",")[0] for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")}
