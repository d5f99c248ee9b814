"""kill -9 at random moments of a batch run: what the last rerun leaves is what an undisturbed run does."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
from cli_support import ldm, pixels, start, tiny_model
from test_batch_cli import assert_whole, manifest

ROWS = 300


def run(path: Path, out: Path, devices: str) -> list[str | Path]:
    return ["batch", path, "-o", out, "-m", tiny_model(), "--steps", "3", "--devices", devices, "-b", "4"]


@pytest.mark.parametrize(
    ("kills", "devices"),
    [
        (5, "cpu"),
        pytest.param(50, "cpu", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(20, "cpu*2", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_killed_again_and_again(tmp_path: Path, kills: int, devices: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "picture {i % 7}", "id": "row-{i}"}}\n' for i in range(ROWS)))
    chance = random.Random(kills)
    out, whole = tmp_path / "out", tmp_path / "whole"
    progress: list[int] = []
    for number in range(kills):
        process = start(*map(str, run(path, out, devices)))
        # Some die while they start, most while they draw; those that finish are none to learn from.
        lines = out / "manifest" / "worker-0.jsonl"
        before = lines.read_bytes().count(b"\n") if lines.exists() else 0
        wanted = before + chance.randrange(0, max(1, 2 * ROWS // kills))
        deadline = chance.uniform(0.0, 1.0) if number % 5 == 0 else 60.0
        _wait(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= wanted, process, deadline)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.communicate()
        progress.append(len(manifest_rows(out)))
    assert progress == sorted(progress)  # nothing that was done is lost
    assert len(set(progress)) > min(kills, ROWS) // 4  # and the kills hit a run that was under way
    last = ldm(*run(path, out, devices), timeout=300)
    assert last.code == 0, last
    assert_whole(out, ROWS)
    assert ldm(*run(path, whole, devices), timeout=300).code == 0
    undisturbed = {record["row"]: whole / record["path"] for record in manifest(whole)}
    for record in manifest(out):
        difference = pixels(out / record["path"]).astype(int) - pixels(undisturbed[record["row"]])
        assert np.abs(difference).max() <= 1, record["row"]


def manifest_rows(out: Path) -> set[int]:
    """The rows that whole lines of the manifests call done."""
    import json

    texts = [path.read_text() for path in (out / "manifest").glob("*.jsonl")] if out.exists() else []
    return {json.loads(line)["row"] for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")}


def _wait(condition: "object", process: "object", seconds: float) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition() and process.poll() is None:  # type: ignore[operator,attr-defined]
        time.sleep(0.005)
