"""The queue of the resident models: batches that jobs share, what one job's end does to others, room for models."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import lora_for, noise, write
from cli_support import copy_model, replace, tiny_model

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.errors import UsageError
from ldmcli.serving.openings import Openings
from ldmcli.serving.work import Busy, Job, Work
from ldmcli.session import CancelledError, Picture, loading
from ldmcli.session import session as session_module

RUNTIME = RuntimeSpec(device="cpu", dtype="fp32", threads=1)


def tiny() -> ModelSpec:
    return ModelSpec(str(tiny_model()))


def request(seed: int, **settings: Any) -> GenerationRequest:
    return GenerationRequest("a fox", seed=seed, **({"steps": 2} | settings))


@pytest.fixture
def work(one_thread: None) -> Iterator[Work]:
    work = Work(max_queue=4)
    yield work
    work.close()


class Held:
    """Keeps the thread that works busy until it is let go."""

    def __init__(self, work: Work) -> None:
        self._go, began = threading.Event(), threading.Event()

        def wait(_job: Job) -> None:
            began.set()
            self._go.wait(60)

        self.job = work.call(wait)
        began.wait(60)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self.job.wait(60)


def collected(work: Work, *requests: GenerationRequest, **settings: Any) -> tuple[Job, dict[int, np.ndarray]]:
    found: dict[int, np.ndarray] = {}
    on_picture: Callable[..., object] = lambda place, picture: found.update({place: picture.pixels()})  # noqa: E731
    return work.submit(tiny(), RUNTIME, requests, on_picture=on_picture, **settings), found


def test_jobs_that_agree_share_batches_and_get_their_own_pictures(work: Work) -> None:
    steps: list[tuple[int, int]] = []
    with Held(work):
        jobs = [collected(work, request(1), request(2), on_step=lambda p: steps.append((p.done, p.steps)))]
        jobs += [collected(work, request(3)), collected(work, request(4, steps=3)), collected(work, request(1))]
        assert work.progress().queued == 4
    for job, _ in jobs:
        job.wait(60)
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert [job.at_once for job, _ in jobs] == [2, 1, 1, 1]
    assert work.progress().drawn == 5
    assert [sorted(found) for _, found in jobs] == [[0, 1], [0], [0], [0]]
    with Session(tiny(), RUNTIME) as session:
        drawn = [p.pixels() for p in session.draw([request(1), request(2), request(3), request(4, steps=3)])]
    shared = [jobs[0][1][0], jobs[0][1][1], jobs[1][1][0], jobs[2][1][0]]
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(shared, drawn, strict=True)) <= 1


def test_one_jobs_end_harms_no_other(work: Work) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("nobody listens")

    with Held(work):
        cancelled, nothing = collected(work, request(1))
        deaf = work.submit(tiny(), RUNTIME, [request(2)], on_picture=fail)
        sound, found = collected(work, request(3), request(4))
        cancelled.cancel()
        assert cancelled.done
    sound.wait(60)
    assert sorted(found) == [0, 1]
    with pytest.raises(CancelledError):
        cancelled.wait(60)
    with pytest.raises(ConnectionError):
        deaf.wait(60)
    assert not nothing
    ended, _ = collected(work, request(5, steps=900))
    until_step = threading.Event()
    long = work.submit(tiny(), RUNTIME, [request(6, steps=900)], on_step=lambda *_: until_step.set())
    ended.cancel()
    assert until_step.wait(60)
    long.cancel()
    after, found = collected(work, request(7))
    after.wait(60)
    assert sorted(found) == [0]


def test_a_full_queue_says_when_to_come_again(work: Work) -> None:
    with Held(work):
        jobs = [collected(work, request(seed))[0] for seed in range(4)]
        with pytest.raises(Busy) as busy:
            collected(work, request(5))
        assert busy.value.retry_after >= 1
        jobs[0].cancel()
        jobs.append(collected(work, request(6))[0])
    for job in jobs[1:]:
        job.wait(60)


def test_a_request_that_cannot_be_drawn_is_refused_at_once(work: Work) -> None:
    with Held(work), pytest.raises(UsageError, match="size 13"):
        work.submit(tiny(), RUNTIME, [request(1, width=13)])


def test_the_model_used_last_stays(work: Work) -> None:
    for model in (tiny(), ModelSpec(), tiny()):
        work.submit(model, RUNTIME, [request(1)]).wait(60)
        last = work.models()[0]
        assert (last.model, last.loaded) == (model, True)
        assert sum(each.loaded for each in work.models()) == 1


def test_models_that_differ_in_folders_and_upscaler_are_read_once(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each draws what it would alone."""
    read, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda *given, **settings: (read.append(given), load(*given, **settings))[1])
    lora_for(tiny_model(), tmp_path / "style.safetensors")
    write(tmp_path / "fox.safetensors", {"emb_params": noise(3, 16, scale=1.0)})
    styled = {"prompt_syntax": "weighted", "prompt": "a fox <lora:style:1>"}
    cases = [
        (tiny(), request(1)),
        (dataclasses.replace(tiny(), lora_dir=str(tmp_path)), dataclasses.replace(request(1), **styled)),
        (dataclasses.replace(tiny(), embedding_dir=str(tmp_path)), request(1)),
        (dataclasses.replace(tiny(), upscaler="embedded"), request(1)),
        (dataclasses.replace(tiny(), upscaler="embedded", embedding_dir=str(tmp_path)), request(1)),
    ]
    found: dict[int, list[tuple[np.ndarray, object]]] = {i: [] for i in range(len(cases))}
    for i in (*found, *reversed(found)):
        model, asked = cases[i]

        def keep(_place: int, picture: Picture, drawn: list[tuple[np.ndarray, object]] = found[i]) -> None:
            drawn.append((picture.pixels(), picture.enlarged))

        work.submit(model, RUNTIME, [asked], on_picture=keep).wait(60)
        assert [each.model for each in work.models() if each.loaded] == [model]
    assert len(read) == 1
    alone = []
    for i, (model, asked) in enumerate(cases):
        with Session(model, RUNTIME) as session:
            (picture,) = session.draw([asked])
            alone.append(picture.pixels())
        assert all(np.array_equal(pixels, alone[i]) for pixels, _ in found[i]), i
        assert [enlarged for _, enlarged in found[i]] == [picture.enlarged] * 2
    assert all(not np.array_equal(alone[0], other) for other in alone[1:])
    assert not np.array_equal(alone[3], alone[4])


def test_work_that_is_closed_ends_its_jobs() -> None:
    work = Work()
    job, _ = collected(work, request(1, steps=900))
    work.close()
    with pytest.raises(CancelledError):
        job.wait(60)
    with pytest.raises(Busy):
        collected(work, request(2))


def test_a_model_is_looked_at_again_only_where_a_file_has_changed(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is said of opening it is said each time."""
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "there"):
        model = copy_model(tmp_path / folder / "model")
        (model / "scheduler").mkdir(exist_ok=True)
        replace(model / "scheduler" / "scheduler_config.json", {"_class_name": "KDPM2DiscreteScheduler"})
    looked, open_spec, openings = list[str](), session_module.open_spec, Openings()
    monkeypatch.setattr(session_module, "open_spec", lambda *a, **k: looked.append("") or open_spec(*a, **k))

    def opened(folder: str = "here", model: str = "model") -> tuple[int, int]:
        """How often files were looked at, and how often it was said what their sampler is, by now and now."""
        said = list[str]()
        session = openings.session(
            str(tmp_path / folder), ModelSpec(model), RUNTIME, {}, lambda record: said.append(record.getMessage())
        )
        assert session.fit(request(1)).prompt == "a fox"
        return len(looked), sum("KDPM2DiscreteScheduler" in text for text in said)

    assert [opened(), opened(), opened("there"), opened(), opened("there")] == [(1, 1), (1, 1), (2, 1), (2, 1), (2, 1)]
    replace(tmp_path / "here" / "model" / "tokenizer" / "special_tokens_map.json", {})
    assert [opened(), opened(), opened("there")] == [(3, 1), (3, 1), (3, 1)]
    linked = tmp_path / "linked" / "model"
    linked.mkdir(parents=True)
    for part in (tmp_path / "there" / "model").iterdir():
        (linked / part.name).symlink_to(part)
    assert [opened("linked"), opened("linked")] == [(4, 1), (4, 1)]
    replace(tmp_path / "there" / "model" / "tokenizer" / "special_tokens_map.json", {})
    assert [opened("linked"), opened("linked")] == [(5, 1), (5, 1)]
    named = tmp_path / "named"
    named.mkdir()
    (named / "model").symlink_to(tmp_path / "here" / "model")
    monkeypatch.setenv("LDM_MODELS", str(named))
    assert [opened("named", "model"), opened(".", "model"), opened(".", "model")] == [(6, 1), (7, 1), (7, 1)]
    (tmp_path / "model").symlink_to(tmp_path / "there" / "model")  # which is nearer than the folder of models
    assert opened(".", "model") == (8, 1)
