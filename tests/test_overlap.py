"""Successive batches overlap on a device that computes by itself, and nothing else changes: pictures, errors, the order
in which things are told.

A CPU does not compute by itself; here it is told so, and what was begun is finished when its turn comes.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_support import batches, item, items, lines_of, pictures, setup_in, statuses
from cli_support import tiny_model
from conftest import load
from ldmcli.batch.drawing import DeviceLostError
from ldmcli.speed.handover import Delivery, Sideline
from torch import Tensor, nn

from ldmcli.batch.feed import Feed, Stop
from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.worker import Worker
from ldmcli.cli import run
from ldmcli.errors import LdmError, NotFiniteError, StorageError
from ldmcli.pipeline import Begun, Pipeline
from ldmcli.spec import GenerationRequest
from ldmcli.stopwatch import Stopwatch

REQUESTS = [GenerationRequest(prompt, seed=seed, steps=2, width=16, height=16) for seed, prompt in enumerate("abc")]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines are told that their device computes by itself, unless parts come and go."""
    monkeypatch.setattr(Pipeline, "works_ahead", property(lambda self: not self.stage.narrow))


@pytest.fixture
def plain(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline whose layers are not laid out for the batch before: its numbers are the same whatever that was."""
    monkeypatch.setattr("ldmcli.speed.policy.lay_out", lambda *_, **__: None)
    return load(tiny_model())


@pytest.fixture
def worker(one_thread: None, ahead: None, tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(setup_in(tmp_path), "worker-0")
    yield worker
    worker.close()


@pytest.fixture
def events(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the worker's pipeline is asked for, in order, by prompts."""
    pipeline = worker._artist.pipeline
    told: list[str] = []
    begin, finish, draw = Pipeline.begin, Pipeline.finish, Pipeline.draw
    names: dict[int, str] = {}

    def noted_begin(requests: Sequence[GenerationRequest]) -> Begun:
        name = _name(requests)
        told.append(f"begin {name}")
        begun = begin(pipeline, requests)
        names[id(begun)] = name
        return begun

    def noted_finish(begun: Begun) -> Any:
        told.append(f"finish {names[id(begun)]}")
        return finish(pipeline, begun)

    def noted_draw(requests: Sequence[GenerationRequest]) -> Any:
        told.append(f"draw {_name(requests)}")
        return draw(pipeline, requests)

    for name, method in (("begin", noted_begin), ("finish", noted_finish), ("draw", noted_draw)):
        monkeypatch.setattr(pipeline, name, method)
    return told


def _name(requests: Sequence[GenerationRequest]) -> str:
    return "".join(request.prompt.removeprefix("prompt ") for request in requests)


def drawn(worker: Worker, plan: Sequence[Sequence[Item]]) -> list[Outcome]:
    return list(worker.run(Feed(plan, Stop())))


def poison(worker: Worker, monkeypatch: pytest.MonkeyPatch, method: str, bad: dict[str, Exception]) -> None:
    """Let `begin`, `finish` or `draw` raise for certain prompts."""
    pipeline = worker._artist.pipeline
    real = getattr(pipeline, method)
    prompts: dict[int, list[str]] = {}

    def poisoned(asked: Any) -> Any:
        of_begun = isinstance(asked, Begun)
        for prompt in prompts.get(id(asked), []) if of_begun else [request.prompt for request in asked]:
            if prompt in bad:
                raise bad[prompt]
        return real(asked)

    if method == "finish":
        begin = pipeline.begin

        def noting(requests: Sequence[GenerationRequest]) -> Begun:
            begun = begin(requests)
            prompts[id(begun)] = [request.prompt for request in requests]
            return begun

        monkeypatch.setattr(pipeline, "begin", noting)
    monkeypatch.setattr(pipeline, method, poisoned)


# ---- a pipeline ----


def test_begun_and_finished_is_drawn(plain: Pipeline, ahead: None) -> None:
    pipeline = plain
    asked = [dataclasses.replace(request, width=64, height=64) for request in REQUESTS]
    first, second = pipeline.begin(asked), pipeline.begin(asked[:1])
    for begun, requests in ((first, asked), (second, asked[:1])):
        found, wanted = pipeline.finish(begun), pipeline.draw(requests)
        assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in wanted]
        assert {(picture.dtype, picture.shape) for picture in found} == {(np.dtype(np.uint8), (64, 64, 3))}


def test_numbers_that_are_not_finite_show_when_it_is_finished(pipeline: Pipeline) -> None:
    handle = pipeline.model.unet.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    begun = pipeline.begin(REQUESTS)
    handle.remove()
    with pytest.raises(NotFiniteError, match="the U-Net gave numbers that are not finite; its weights may be damaged"):
        pipeline.finish(begun)
    handle = pipeline.vae.decoder.register_forward_hook(lambda _module, _inputs, output: output / 0)
    begun = pipeline.begin(REQUESTS)
    with pytest.raises(NotFiniteError, match="VAE"):
        pipeline.finish(begun)
    handle.remove()


def test_a_vae_that_overflows_16_bits_at_some_pictures(
    one_thread: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first such picture on, all are decoded in 32 bits, those too that were begun before it was known."""
    monkeypatch.setattr(logging.getLogger("ldmcli"), "propagate", True)
    caplog.set_level(logging.WARNING, "ldmcli")

    means: list[float] = []

    def pipeline_that_overflows() -> Pipeline:
        pipeline = load(tiny_model(), "bf16")

        def overflow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            mean = float(output.float().mean())
            if len(means) < len(REQUESTS):
                means.append(mean)
                return output
            last = min(means, key=lambda one: abs(one - mean)) == means[-1]
            return output * float("inf") if output.dtype == torch.bfloat16 and last else output

        pipeline.vae.decoder.up_blocks[-1].register_forward_hook(overflow)
        return pipeline

    monkeypatch.setattr("ldmcli.speed.policy.lay_out", lambda *_, **__: None)
    plain, other = pipeline_that_overflows(), pipeline_that_overflows()
    plain.draw(REQUESTS)
    assert next(plain.vae.parameters()).dtype == torch.bfloat16
    wanted = [*plain.draw(REQUESTS[:2]), *plain.draw(REQUESTS), *plain.draw(REQUESTS)]
    begun = [other.begin(REQUESTS[:2])]
    found = []
    for requests in (REQUESTS, REQUESTS):
        begun.append(other.begin(requests))
        found += other.finish(begun.pop(0))
    found += other.finish(begun.pop())
    assert [picture.tobytes() for picture in found] == [picture.tobytes() for picture in wanted]
    assert [record.message for record in caplog.records].count(
        "the VAE overflowed in 16 bits; decoding in float32"
    ) == 2  # once each
    assert next(other.vae.parameters()).dtype == torch.float32


def test_what_was_begun_does_not_change(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a sampler's latents are a place that later steps write to, and a picture is decoded anew."""
    pipeline = plain
    wanted = pipeline.draw(REQUESTS[:1])
    place: list[Tensor] = []
    denoised = Pipeline._denoised

    def in_one_place(self: Pipeline, requests: Any, on_step: Any) -> Tensor:
        latents = denoised(self, requests, on_step)
        if place:
            return place[0].copy_(latents)
        place.append(latents)
        return latents

    monkeypatch.setattr(Pipeline, "_denoised", in_one_place)
    first = pipeline.begin(REQUESTS[:1])
    pipeline.begin(REQUESTS[1:2])
    with torch.inference_mode():
        first.delivery._tensors[0][1] = False  # as if it had overflowed
    assert pipeline.finish(first)[0].tobytes() == wanted[0].tobytes()


def test_prompts_are_encoded_before_anything_else(
    pipeline: Pipeline, ahead: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the device does; what is wrong with one shows when it is used."""
    order: list[str] = []
    run, denoised = Sideline.run, Pipeline._denoised
    monkeypatch.setattr(Sideline, "run", lambda self, work: (order.append("text"), run(self, work))[1])
    monkeypatch.setattr(Pipeline, "_denoised", lambda *a: (order.append("steps"), denoised(*a))[1])
    pipeline.begin(REQUESTS[:1])
    assert order == ["text", "steps"]
    monkeypatch.setattr("ldmcli.pipeline.conditions", _fail)
    assert len(pipeline.finish(pipeline.begin(REQUESTS[:1]))) == 1


def _fail(*_: Any) -> Any:
    raise LdmError("the weights of a prompt leave nothing.")


# ---- a worker ----


def test_a_batch_is_begun_before_the_one_before_is_finished(worker: Worker, tmp_path: Path, events: list[str]) -> None:
    outcomes = drawn(worker, list(batches(items(5), 2)))
    assert events == ["begin 01", "begin 23", "finish 01", "begin 4", "finish 23", "finish 4"]
    assert [outcome.item.number for outcome in outcomes] == list(range(5))
    assert statuses(outcomes) == dict.fromkeys(range(5), "done")
    assert all(outcome.seconds > 0 for outcome in outcomes)
    found = pictures(tmp_path, outcomes)
    (tmp_path / "plain").mkdir()
    wanted = [worker._artist.pipeline.draw([one.request for one in batch]) for batch in batches(items(5), 2)]
    assert found.tobytes() == np.concatenate([np.stack(each) for each in wanted]).tobytes()


def test_on_a_cpu_each_batch_is_drawn_by_itself(
    worker: Worker, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert not worker._artist.works_ahead
    sizes: list[int] = []
    draw = Pipeline.draw
    monkeypatch.setattr(Pipeline, "draw", lambda self, requests: (sizes.append(len(requests)), draw(self, requests))[1])
    monkeypatch.setattr(Pipeline, "begin", lambda *_: pytest.fail("begun"))
    assert statuses(drawn(worker, list(batches(items(3), 2)))) == dict.fromkeys(range(3), "done")
    assert sizes == [2, 1]


def test_what_is_done_is_told_before_more_is_waited_for(worker: Worker, events: list[str]) -> None:
    """Whoever hands out batches gives a third when the first is told of; and a plan may wait for its input."""
    told: list[int] = []

    def plan() -> Iterator[list[Item]]:
        yield items(1)
        yield [item(1)]
        while told != [0, 1]:
            pass
        yield [item(2)]

    for outcome in worker.run(Feed(plan(), Stop())):
        told.append(outcome.item.number)
    assert told == [0, 1, 2]


def test_one_bad_row_takes_no_other_with_it(
    worker: Worker, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that shows when it is begun or when it is finished."""
    errors = {"prompt 1": RuntimeError("asked"), "prompt 6": NotFiniteError("not finite.")}
    poison(worker, monkeypatch, "draw", errors)
    poison(worker, monkeypatch, "begin", {"prompt 1": errors["prompt 1"]})
    poison(worker, monkeypatch, "finish", {"prompt 6": errors["prompt 6"]})
    outcomes = drawn(worker, list(batches(items(10), 4)))
    assert statuses(outcomes) == dict.fromkeys(range(10), "done") | {1: "failed", 6: "failed"}
    assert [outcome.error for outcome in outcomes if outcome.error] == ["RuntimeError: asked", "not finite."]
    assert [event for event in events if "draw" in event] == ["draw 0", "draw 23", "draw 45", "draw 7"]
    assert events.index("begin 89") < events.index("finish 89")
    assert lines_of(tmp_path) == {n: ["failed" if n in (1, 6) else "done"] for n in range(10)}


def test_out_of_memory_halves_the_batch_and_those_after_it(
    worker: Worker, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = worker._artist.pipeline
    for name in ("begin", "draw"):
        real = getattr(pipeline, name)

        def limited(requests: Sequence[GenerationRequest], real: Any = real) -> Any:
            if len(requests) > 2:
                events.append("no room")
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(requests)

        monkeypatch.setattr(pipeline, name, limited)
    outcomes = drawn(worker, list(batches(items(8), 4)))
    assert statuses(outcomes) == dict.fromkeys(range(8), "done")
    assert events == ["no room", "draw 01", "draw 23", "begin 45", "begin 67", "finish 45", "finish 67"]
    alone = pictures(tmp_path, drawn(worker, [[one] for one in items(8)]))
    assert np.abs(pictures(tmp_path, outcomes).astype(int) - alone).max() <= 1


@pytest.mark.parametrize("method", ["begin", "finish"])
def test_a_lost_device_ends_the_run(
    worker: Worker, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """It may show in the batch after the one that is to blame: what was told of is done, the rest is drawn again."""
    lost = torch.AcceleratorError("CUDA error: an illegal memory access\nCUDA …")
    poison(worker, monkeypatch, method, {"prompt 2": lost})
    told = []
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        told.extend(worker.run(Feed([[one] for one in items(5)], Stop())))
    # The batch before was still on the device when the third was begun.
    noted = {0: ["done"]} if method == "begin" else {0: ["done"], 1: ["done"]}
    assert lines_of(tmp_path) == noted
    assert {outcome.item.number for outcome in told} == set(noted)


def test_what_a_plan_raises_comes_after_its_batches(worker: Worker, events: list[str], tmp_path: Path) -> None:
    def breaking() -> Iterator[list[Item]]:
        yield from batches(items(4), 2)
        raise LdmError("the input is damaged.")

    told = []
    with pytest.raises(LdmError, match="damaged"):
        told.extend(outcome.item.number for outcome in worker.run(Feed(breaking(), Stop())))
    assert told == [0, 1, 2, 3]


def test_stop_finishes_what_was_begun(worker: Worker, events: list[str], tmp_path: Path) -> None:
    stop, found = Stop(), []
    for outcome in worker.run(Feed(batches(items(100), 2), stop)):
        stop.request()
        found.append(outcome)
    assert statuses(found) == dict.fromkeys(range(4), "done")
    assert set(lines_of(tmp_path)) == set(range(4))


def test_a_full_disk_ends_the_run_after_what_was_begun(
    worker: Worker, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldmcli.batch import pictures as files

    def full(folder: Path, path: str, data: bytes) -> str:
        if "00000002-" in path:
            raise StorageError("cannot write: No space left on device.")
        return write(folder, path, data)

    write = files.write_picture
    monkeypatch.setattr("ldmcli.batch.worker.write_picture", full)
    told = []
    with pytest.raises(StorageError):
        told.extend(outcome.item.number for outcome in worker.run(Feed(list(batches(items(9), 3)), Stop())))
    assert told == [0, 2, 3, 4, 5]  # the second batch had been begun
    assert set(lines_of(tmp_path)) == set(told)


def test_memory_that_runs_out_at_last_sends_parts_away(
    worker: Worker, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After tiling; from then on nothing is begun ahead."""
    pipeline = worker._artist.pipeline
    monkeypatch.setattr(type(pipeline.stage), "may_narrow", property(lambda self: not self.narrow))
    for name in ("begin", "draw"):
        real = getattr(pipeline, name)

        def limited(requests: Sequence[GenerationRequest], real: Any = real) -> Any:
            if not pipeline.stage.narrow and requests[0].width == 24:
                events.append("tiled" if pipeline.tile_vae else "no room")
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(requests)

        monkeypatch.setattr(pipeline, name, limited)
    plan = [items(2), [item(2, width=24)], [item(3)], [item(4)]]
    outcomes = drawn(worker, plan)
    assert statuses(outcomes) == dict.fromkeys(range(5), "done")
    assert events == ["begin 01", "no room", "tiled", "draw 2", "finish 01", "draw 3", "draw 4"]
    wanted = load(tiny_model()).draw([item(4).request])
    assert np.abs(pictures(tmp_path, outcomes[4:]).astype(int) - wanted[0]).max() <= 1


def test_memory_that_runs_out_whatever_is_done(
    worker: Worker, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(worker._artist.pipeline.stage), "may_narrow", property(lambda self: not self.narrow))
    no_room = {"prompt 0": torch.OutOfMemoryError("CUDA out of memory.")}
    poison(worker, monkeypatch, "begin", no_room)
    poison(worker, monkeypatch, "draw", no_room)
    first, second = drawn(worker, [items(1), [item(1)]])
    assert first.error == "out of memory, even alone and decoded in strips; ask for a smaller picture."
    assert second.status == "done"
    assert worker._artist.pipeline.stage.narrow


# ---- the command line ----


@pytest.fixture
def steps_of(monkeypatch: pytest.MonkeyPatch, ahead: None, one_thread: None) -> list[str]:
    """What happens in `ldm txt2img`, in order."""
    from ldmcli.cli.output import Output

    logger = logging.getLogger("ldmcli")  # which the command line sets up for itself
    for name in ("level", "propagate", "handlers"):
        monkeypatch.setattr(logger, name, getattr(logger, name) if name != "handlers" else list(logger.handlers))
    told: list[str] = []
    begin, finish, draw, write = Pipeline.begin, Pipeline.finish, Pipeline.draw, Output.write

    def noted(name: str, real: Any) -> Any:
        return lambda *a, **k: (told.append(name), real(*a, **k))[1]

    monkeypatch.setattr(Pipeline, "begin", noted("begin", begin))
    monkeypatch.setattr(Pipeline, "finish", noted("finish", finish))
    monkeypatch.setattr(Pipeline, "draw", noted("draw", draw))
    monkeypatch.setattr(Output, "write", noted("write", write))
    return told


def txt2img(folder: Path, *more: str) -> int:
    common = ["-m", str(tiny_model()), "-s", "1", "--steps", "1", "--device", "cpu", "-q", "--no-cache"]
    return run(["txt2img", "a", *common, "-o", str(folder), *more])


def test_txt2img_begins_a_batch_before_it_writes_the_last(
    steps_of: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert txt2img(tmp_path / "ahead", "-c", "5", "-b", "2") == 0
    both = ["finish", "write", "write"]
    assert steps_of == ["begin", "begin", *both, "begin", *both, "finish", "write"]
    steps_of.clear()
    monkeypatch.setattr(Pipeline, "works_ahead", False)
    assert txt2img(tmp_path / "plain", "-c", "5", "-b", "2") == 0
    assert steps_of == ["draw", "write", "write"] * 2 + ["draw", "write"]
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 5
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "ahead" / n).read_bytes() for n in names)


def test_txt2img_writes_what_it_has_before_it_fails(
    steps_of: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Pipeline.begin

    def failing(self: Pipeline, requests: Sequence[GenerationRequest], *more: Any) -> Begun:
        if requests[0].seed == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return begin(self, requests, *more)

    monkeypatch.setattr(Pipeline, "begin", failing)
    assert txt2img(tmp_path, "-c", "6", "-b", "2") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ldm-1.png", "ldm-2.png"]


# ---- parts ----


def test_times_are_taken_when_the_device_is_done() -> None:
    waited: list[int] = []
    stopwatch = Stopwatch(lambda: waited.append(1))
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


def test_a_delivery_on_a_cpu_is_there_at_once() -> None:
    tensor = torch.arange(3)
    assert Delivery([tensor]).wait()[0].tolist() == [0, 1, 2]
    assert Delivery([]).wait() == []


cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("size", [pytest.param(size, marks=cuda) for size in (1, 3)])
def test_the_same_files_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """With prompts pushed out of a small cache all the time, so that memory of theirs is used again."""
    monkeypatch.setattr("ldmcli.conditioning.prompt_cache.PromptCache._add", _forgetful)
    row = [item(n, f"prompt {n} {n % 7}", steps=8, width=64, height=64) for n in range(24)]
    found = []
    for name in ("ahead", "plain"):
        if name == "plain":
            monkeypatch.setattr(Pipeline, "works_ahead", False)
        worker = Worker(setup_in(tmp_path / name, device="cuda", dtype="fp16"), "worker-0")
        assert worker._artist.works_ahead is (name == "ahead")
        found.append(pictures(tmp_path / name, drawn(worker, list(batches(row, size)))))
        worker.close()
    assert np.array_equal(*found)


def _forgetful(self: Any, key: Any, conditioning: Any) -> None:
    self._held[key] = conditioning
    while len(self._held) > 8:
        self._held.popitem(last=False)


@pytest.mark.parametrize("count", [pytest.param(3, marks=cuda)])
def test_the_host_does_not_wait_on_a_gpu(embedded_folder: Path, count: int) -> None:
    """Between the beginnings of batches that differ in nothing but their seeds nothing is waited for."""
    from ldmcli.checkpoints.source import open_model
    from ldmcli.pipeline import load_pipeline
    from ldmcli.speed.policy import choose_runtime

    pipeline = load_pipeline(open_model(embedded_folder), choose_runtime("cuda", "fp32"))
    asked = [GenerationRequest("a star", seed=seed, steps=8) for seed in range(count)]
    for _ in range(2):
        wanted = [pipeline.draw([one])[0] for one in asked]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = [pipeline.begin([one]) for one in asked]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(np.array_equal(pipeline.finish(one)[0], picture) for one, picture in zip(begun, wanted, strict=True))
