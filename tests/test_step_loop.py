"""What must not come back into a run: prompts encoded twice, constants computed anew at each step, numbers that the
host waits for, memory that grows, modules filled with numbers that are then overwritten."""

import gc
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import load, loaded, open_session
from graph_support import FakeRecorder, load_plainly, recording
from oracle.comparing import fitted, pictures_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.networks.transformer import TransformerBlock
from ldmcli.spec import GenerationRequest

if TYPE_CHECKING:
    from ldmcli.pipeline.pipeline import Pipeline

STEPS = 6


class Calls(TorchDispatchMode):
    """Counts what is done to tensors, for each step by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = [Counter()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps[-1][str(func)] += 1
        return func(*args, **(kwargs or {}))

    def next_step(self, done: int, *_: object) -> None:
        if done:
            self.steps.append(Counter())


@pytest.fixture(params=["ddim", "plms", "dpmpp-2m", "unipc"])
def asked(request: pytest.FixtureRequest) -> GenerationRequest:
    return GenerationRequest("a red star", negative_prompt="blue", sampler=request.param, steps=STEPS, seed=1)


@pytest.fixture(scope="module")
def as_on_a_gpu(model_folder: Path) -> "Pipeline":
    return load_plainly(model_folder)


@pytest.fixture(params=["pipeline", "as_on_a_gpu"])
def either(request: pytest.FixtureRequest) -> "Pipeline":
    """The pipeline; and with its steps recorded and replayed, by what stands in for CUDA graphs."""
    found = request.getfixturevalue(request.param)
    return found if request.param == "pipeline" else recording(found, FakeRecorder())


def test_no_step_waits_for_a_number(either: "Pipeline", asked: GenerationRequest) -> None:
    """Reading one number from a device waits until all that was asked of it before is done. And every step does the
    same work as the one before: nothing piles up."""
    pipeline = either
    with Calls() as calls:
        pipeline.draw(fitted(pipeline, [asked]), calls.next_step)
    steps = calls.steps[2:-1]  # PLMS, UniPC and DPM++ begin with steps of their own kind
    waits = ("_local_scalar_dense", "nonzero", "equal", "isfinite", "item", "is_nonzero", "unique")
    found = [op for step in calls.steps[1:-1] for op in step if any(wait in op for wait in waits)]
    assert found == []
    assert len(steps) == STEPS - 2
    products = ("mm", "linear", "conv")
    works = [sum(n for op, n in step.items() if any(product in op for product in products)) for step in steps]
    assert works[0] > 20
    assert len(set(works)) == 1


def test_constants_of_a_run_are_computed_once(pipeline: "Pipeline", asked: GenerationRequest) -> None:
    """Time embeddings for all steps, keys and values of the prompts."""
    unet, calls = pipeline.model.unet, Counter[str]()
    blocks = {name: part for name, part in unet.named_modules() if isinstance(part, TransformerBlock)}
    once = {"time_embedding": unet.time_embedding} | {name: block.attn2.to_k for name, block in blocks.items()}
    hooks = [part.register_forward_hook(lambda *_, n=name: calls.update([n])) for name, part in once.items()]
    pictures_of(pipeline, [asked])
    for hook in hooks:
        hook.remove()
    assert calls == dict.fromkeys(once, 1)


def rows_of(prompts: PromptEncoder) -> list[tuple[int, ...]]:
    """The tokens of each prompt that is encoded from now on."""
    rows: list[tuple[int, ...]] = []
    (encoder,) = prompts.encoders
    encoder.model.register_forward_pre_hook(lambda _, inputs: rows.extend(map(tuple, inputs[0].tolist())))
    return rows


def test_each_distinct_prompt_is_encoded_once(model_folder: Path) -> None:
    """Within a picture, and from picture to picture."""
    fresh = load(model_folder)
    rows = rows_of(fresh.model.prompts)
    asked = [GenerationRequest(prompt, negative_prompt="fog", steps=1, seed=1) for prompt in ("a", "b", "a")]
    for batch in (asked, asked[:1], asked[1:]):
        pictures_of(fresh, batch)
    assert len(rows) == len(set(rows)) == 3


def test_prompts_drawn_first_are_encoded_while_weights_are_read(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldmcli.session import loading

    encoded, wait = [], []
    load_unet, pairs = loading.load_unet, loading.pairs

    begun = threading.Event()
    monkeypatch.setattr(loading, "pairs", lambda *a: (encoded.append(a[2][0].prompt), begun.set(), pairs(*a))[2])
    monkeypatch.setattr(loading, "load_unet", lambda *a: (wait.append(begun.wait(60)), load_unet(*a))[1])
    with open_session(model_folder) as session:
        asked = session.fit(GenerationRequest("a red star", steps=1, seed=1))
        session.load([asked])
        assert (encoded, wait) == (["a red star"], [True])
        rows = rows_of(loaded(session).model.prompts)
        assert next(session.draw([asked])).pixels().any()
    assert rows == []


def test_no_module_holds_numbers_before_its_weights_arrive(
    model_folder: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling 860 million numbers at random takes eleven seconds, and memory for them twice."""
    devices: Counter[str] = Counter()
    register = nn.Module.register_parameter

    def noting(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and name not in self._parameters:  # when it is built, not when it is filled
            devices[parameter.device.type] += 1
        register(self, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", noting)
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("numbers made up"))
    for path in (model_folder, model_file):
        pipeline = load(path)
        assert {p.device.type for p in pipeline.model.unet.parameters()} == {"cpu"}
    assert set(devices) == {"meta"}
    assert devices["meta"] > 200


def test_a_replayed_step_copies_what_changes_and_no_more(as_on_a_gpu: "Pipeline") -> None:
    """Into the recording the latents, and the result out of it: keys, values and the steps' table once a picture."""
    recorder = FakeRecorder()
    graphed = recording(as_on_a_gpu, recorder)
    asked = GenerationRequest("a red star", negative_prompt="blue", sampler="ddim", steps=STEPS, seed=1)
    pictures_of(graphed, [asked])
    recorder.recordings[0].replay = lambda: None  # type: ignore[method-assign]
    recorder.recordings[0].output = torch.zeros_like(recorder.recordings[0].output)
    with Calls() as calls:
        graphed.draw(fitted(graphed, [asked]), calls.next_step)
    copies = [step["aten.copy_.default"] for step in calls.steps[:-1]]
    blocks = [part for part in as_on_a_gpu.model.unet.modules() if isinstance(part, TransformerBlock)]
    assert copies[1:] == [1] * (STEPS - 1)
    assert copies[0] >= 2 + 2 * len(blocks)
    assert [step["aten.clone.default"] for step in calls.steps[1:-1]] == [1] * (STEPS - 1)


def test_memory_does_not_grow_with_steps(either: "Pipeline") -> None:
    """What is alive after the fifth step is alive after the last."""
    pipeline = either
    alive: list[int] = []
    gc.collect()  # other tests' garbage would go while this one counts

    def count(*_: object) -> None:
        alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    pipeline.draw(fitted(pipeline, [GenerationRequest("a star", sampler="plms", steps=12, width=32, height=32)]), count)
    assert len(alive) >= 12
    assert len(set(alive[6:])) == 1
