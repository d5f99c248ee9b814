"""What stands in for CUDA graphs where there is no GPU: it keeps to the same contract, and is as strict."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ldmcli import ModelSpec, RuntimeSpec, Session
from ldmcli.pipeline.pipeline import DiffusionModel, Pipeline
from ldmcli.speed import policy
from ldmcli.speed.cuda.graph import Graphs

FORBIDDEN = ("_local_scalar_dense", "nonzero", "_pin_memory")  # what a GPU refuses while it records


class Tape(TorchDispatchMode):
    """Notes what is done to tensors. What it meets ready-made it keeps by where it is in memory, as a GPU does: what is
    written there later is read, a tensor that moved away is not followed."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[Any, Any, Any, list[Any]]] = []
        self._met: dict[int, tuple[Tensor, Tensor]] = {}  # by id, which the first of the two keeps taken
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in FORBIDDEN):
            raise RuntimeError("operation not permitted when stream is capturing")
        for value in tree_flatten((args, kwargs))[0]:
            if isinstance(value, Tensor) and id(value) not in self._made:
                self._met.setdefault(id(value), (value, value.detach()))
        result = func(*args, **(kwargs or {}))
        results = tree_flatten(result)[0]
        self._noted.append((func, args, kwargs or {}, results))
        self._made |= {id(value) for value in results} - self._met.keys()
        return result

    def play(self, result: Tensor) -> Tensor:
        """Do it all again, and return what `result` then is."""
        now = {number: there for number, (_, there) in self._met.items()}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, results in self._noted:
            again = tree_flatten(func(*tree_map(current, args), **tree_map(current, kwargs)))[0]
            now |= {id(old): new for old, new in zip(results, again, strict=True)}
        return now[id(result)]


class TapeRecording:
    """A tape, and the one tensor into which it is played: before that, and once it is freed, there is no result."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        with Tape() as self._tape:
            self._result = work()
        self.output = torch.full_like(self._result, torch.nan)
        self.freed = False

    def replay(self) -> None:
        assert not self.freed
        with torch.inference_mode():  # a GPU does not ask
            self.output.copy_(self._tape.play(self._result))


class FakeRecorder:
    """Records tapes; `fails` is what recording raises, `lost` what waiting for the device does."""

    def __init__(self, fails: Exception | None = None, lost: Exception | None = None) -> None:
        self.fails, self.lost = fails, lost
        self.warmed = 0
        self.recordings: list[TapeRecording] = []

    @property
    def living(self) -> int:
        return sum(not recording.freed for recording in self.recordings)

    def warm(self, work: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return work()

    def record(self, work: Callable[[], Tensor]) -> TapeRecording:
        if self.fails is not None:
            raise self.fails
        self.recordings.append(TapeRecording(work))
        return self.recordings[-1]

    def free(self, recordings: Iterable[Any]) -> None:
        if self.lost is not None:
            raise self.lost
        for recording in recordings:
            assert not recording.freed
            recording.freed = True
            with torch.inference_mode():
                recording.output.fill_(torch.nan)


def load_plainly(path: Path) -> Pipeline:
    """This program's pipeline of a model on disk, on the CPU in float32 with torch's own layers, as they are on a GPU:
    oneDNN's would move their weights with the shapes of what they are given."""
    with mock.patch.object(policy, "lay_out", lambda module, **_: module):
        session = Session(ModelSpec(str(path)), RuntimeSpec(device="cpu", dtype="fp32"))
        session.load()
    assert session._drawer is not None
    return session._drawer.pipeline


def recording(pipeline: Pipeline, recorder: FakeRecorder) -> Pipeline:
    """The pipeline with its steps recorded; its parts are shared with the first."""

    def with_graphs(model: DiffusionModel) -> DiffusionModel:
        return dataclasses.replace(model, graphs=Graphs(recorder, [model.unet]))

    refiner = pipeline.refiner and with_graphs(pipeline.refiner)
    return dataclasses.replace(pipeline, model=with_graphs(pipeline.model), refiner=refiner)
