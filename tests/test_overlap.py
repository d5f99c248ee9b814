"""Drawing overlaps with what comes after it, and nothing else changes: pictures, errors, the order of reports. A device
that computes by itself is waited for by whoever wants its numbers, in the thread that writes them."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import tiny_model
from conftest import open_session

from ldmcli.cli import run
from ldmcli.fitting import FittedRequest
from ldmcli.pipeline.pipeline import Drawn, Pipeline
from ldmcli.session.picture import Arrival
from ldmcli.spec import GenerationRequest
from ldmcli.stopwatch import Stopwatch


class Draws:
    """Notes the seeds of each batch as it is drawn; `wait_for` one waits until that is being drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: dict[int, Exception] | None = None) -> None:
        self.seeds: list[list[int]] = []
        self._more = threading.Condition()
        draw = Pipeline.draw

        def noted(pipeline: Pipeline, requests: Sequence[FittedRequest], *more: Any) -> Drawn:
            with self._more:
                self.seeds.append([request.seed for request in requests])
                self._more.notify_all()
            for seed in self.seeds[-1]:
                if bad and seed in bad:
                    raise bad[seed]
            return draw(pipeline, requests, *more)

        monkeypatch.setattr(Pipeline, "draw", noted)

    def wait_for(self, seed: int) -> bool:
        with self._more:
            return self._more.wait_for(lambda: any(seed in batch for batch in self.seeds), 60)


# ---- the command line ----


def txt2img(folder: Path, *more: str) -> int:
    common = ["-m", str(tiny_model()), "-s", "1", "--steps", "1", "--device", "cpu", "-q", "--no-cache"]
    return run(["txt2img", "a", *common, "-o", str(folder), *more])


def test_txt2img_draws_a_batch_while_it_writes_the_last(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But with --json, whose times are of one batch alone. The files are the same."""
    from ldmcli.cli.output import Output

    draws, write = Draws(monkeypatch), Output.write
    before: list[int] = []

    def waiting(self: Output, data: bytes, seed: int, report: dict[str, Any]) -> None:
        if seed == 1 and threading.current_thread() is not threading.main_thread():
            assert draws.wait_for(3)
        before.append(len(draws.seeds))
        write(self, data, seed, report)

    monkeypatch.setattr(Output, "write", waiting)
    assert txt2img(tmp_path / "ahead", "-c", "5", "-b", "2") == 0
    assert draws.seeds == [[1, 2], [3, 4], [5]]
    draws.seeds.clear()
    before.clear()
    assert txt2img(tmp_path / "json", "-c", "5", "-b", "2", "--json") == 0
    assert before == [1, 1, 2, 2, 3]
    names = sorted(path.name for path in (tmp_path / "json").iterdir())
    assert len(names) == 5
    assert all((tmp_path / "json" / n).read_bytes() == (tmp_path / "ahead" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("error", "code", "written"),
    [(RuntimeError("no"), 1, {1, 2, 4}), (torch.AcceleratorError("CUDA error: an illegal memory access"), 75, {1, 2})],
)
def test_txt2img_writes_what_it_has_before_it_fails(
    one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, written: set[int]
) -> None:
    """Of the batch of a picture that cannot be drawn the others are there; after a lost device there are no more."""
    Draws(monkeypatch, {3: error})
    assert txt2img(tmp_path, "-c", "4", "-b", "2") == code
    assert {path.name for path in tmp_path.iterdir()} == {f"ldm-{seed}.png" for seed in written}


# ---- parts ----


def test_times_are_taken_when_the_device_is_done() -> None:
    waited: list[int] = []
    stopwatch = Stopwatch()
    stopwatch.settle = lambda: waited.append(1)
    with stopwatch.phase("denoise"):
        assert waited == []
        stopwatch.mark("first_step")
        stopwatch.mark("first_step")
        assert waited == [1]
    assert waited == [1, 1]
    with pytest.raises(ValueError, match="lost"), stopwatch.phase("vae"):
        raise ValueError("lost")
    assert waited == [1, 1]
    assert set(stopwatch.report()["phases"]) == {"denoise", "vae"}


def test_pictures_that_arrive_on_a_cpu_are_there_at_once_and_share_their_time() -> None:
    drawn = Drawn(
        torch.zeros(2, 4, 2, 2), [torch.ones(2, 2, 3), torch.zeros(2, 2, 3)], torch.tensor([[True, False]] * 2)
    )
    started = time.perf_counter() - 4
    first = Arrival(drawn, started, None)
    found, latents_finite, image_finite = first.picture(0)
    assert (found.tolist(), latents_finite, image_finite) == (np.ones((2, 2, 3)).tolist(), True, False)
    assert 2 <= first.seconds() < 60
    # What was asked for meanwhile begins when the first is done.
    assert 0 <= Arrival(drawn, started, first).seconds() < first.seconds()


# ---- a GPU ----


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_host_does_not_wait_on_a_gpu(embedded_folder: Path) -> None:
    """Between pictures that differ in nothing but their seeds nothing is waited for."""
    asked = [GenerationRequest("a star", seed=seed, steps=8) for seed in range(3)]
    with open_session(embedded_folder, device="cuda") as session:
        for _ in range(2):
            wanted = [picture.pixels() for picture in session.draw(asked)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = list(session.draw(asked))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(np.array_equal(one.pixels(), picture) for one, picture in zip(found, wanted, strict=True))
