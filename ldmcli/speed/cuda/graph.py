"""A function of tensors, recorded once and replayed: on a GPU as a CUDA graph, which starts all its kernels at one word
of the host. Started one by one, a small batch's many short kernels leave a fast GPU waiting.

A replay computes where the recording did: on the same memory, with the same weights. So a recording has tensors of its
own for what it is given, into which every call is copied; what it gives is copied out; and it is dropped once the
module's weights, layers or attention have changed.
"""

import dataclasses
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldmcli.errors import printable
from ldmcli.speed.memory import is_out_of_memory

KEPT = 4  # kinds of calls whose recordings are kept: guided and not, for the batches of a job and its shorter last one
# Calls of a kind from which on it is recorded. Recording takes the host about as long as one call that is not replayed,
# so that a run of one to three steps would be slower for it; many such runs add up.
PAYS = 4

Work = Callable[[], Tensor]
Nested = Any  # a Tensor, or a list or tuple of Nested
Function = Callable[[Sequence[Tensor], Nested], Tensor]
_log = logging.getLogger(__name__)


class Recording(Protocol):
    """What was recorded. `output` holds the result of the last replay, until the next."""

    output: Tensor

    def replay(self) -> None:
        """Do it again, with what is now in the tensors that it read."""


class Recorder(Protocol):
    """Records work, which reads tensors that outlive it, and never asks the host for a number."""

    def warm(self, work: Work) -> Tensor:
        """Do the work plainly and return its result; it, or its like, can be recorded afterwards."""

    def record(self, work: Work) -> Recording:
        """Record the work; nothing need be computed. Raises RuntimeError where that cannot be."""

    def free(self, recordings: Iterable[Recording]) -> None:
        """Wait for the device, then make these recordings' memory available again. Raises torch.AcceleratorError where
        the device works no more."""


class Graphs:
    """The recordings of one module's calls, made and dropped as they are needed. For one thread, and one stream of a
    GPU: recordings share memory for what they compute in between."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()  # the least recently called first
        self._state: list[Any] | None = None
        self._off = self._told = False

    def bind(
        self, module: nn.Module, function: Function, form: Hashable, constants: Nested, calls: int
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        """`inputs -> function(inputs, constants)`, replayed where that pays, to be called about `calls` times.

        `function` may depend on nothing but its arguments, `module` and `form`. Runs whose arguments agree in shapes
        and types share a recording, whatever is in them, and in whatever order they are called.
        """
        state = state_of(module)
        if state != self._state:
            self.free()
            self._state = state
        run = _Run(module, function, form, constants, calls)
        return lambda inputs: self._call(run, inputs)

    def free(self) -> None:
        """Drop all recordings and give their memory back. Raises torch.AcceleratorError where the device works no
        more."""
        recordings = [kind.graph.recording for kind in self._kinds.values() if kind.graph]
        self._kinds = OrderedDict((key, kind) for key, kind in self._kinds.items() if kind.plain)
        if recordings:
            self._recorder.free(recordings)

    def _call(self, run: "_Run", inputs: Sequence[Tensor]) -> Tensor:
        if self._off:
            return run.function(inputs, run.constants)
        key = (run.form, _signature(inputs), _signature(run.constants))
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        self._forget_oldest()
        run.calls -= 1
        kind.calls += 1
        if not kind.graph and not kind.plain and kind.calls > 1 and kind.calls + run.calls >= PAYS:
            kind.graph = self._recorded(run, inputs)
            kind.plain = not kind.graph
            self._kinds[key] = kind  # all are forgotten where that failed
        if kind.graph:
            return kind.graph.replayed(run, inputs)
        if kind.plain:
            return run.function(inputs, run.constants)
        return self._recorder.warm(lambda: run.function(inputs, run.constants))

    def _forget_oldest(self) -> None:
        while len(self._kinds) > KEPT:
            _, oldest = self._kinds.popitem(last=False)
            if oldest.graph:
                recording, oldest.graph = oldest.graph.recording, None
                self._recorder.free([recording])

    def _recorded(self, run: "_Run", inputs: Sequence[Tensor]) -> "_Graph | None":
        """The call recorded, or None where that cannot be. Unless memory ran out, nothing is recorded any more then."""
        try:
            graph = _Graph(self._recorder, run, inputs)
        except RuntimeError as error:
            reason = printable(str(error).strip().partition("\n")[0])
            no_room = is_out_of_memory(error)
        else:
            self._state = state_of(run.module)  # layers may have prepared weights when they were first called
            return graph
        # Out here the error is gone, with its frames and the tensors in them.
        self.free()
        self._recorder.free([])  # of what was begun; and a lost device must not pass for a step that cannot be recorded
        self._off = not no_room
        if not self._told:
            self._told = True
            _log.warning("a step could not be recorded as a CUDA graph (%s); going on without, more slowly", reason)
        return None


@dataclasses.dataclass
class _Kind:
    """Calls alike in form, shapes and types: how many there were, and their recording. `plain`: not to be recorded."""

    calls: int = 0
    graph: "_Graph | None" = None
    plain: bool = False


@dataclasses.dataclass(eq=False)
class _Run:
    """A function with the constants of one run, and how many calls are still to come."""

    module: nn.Module
    function: Function
    form: Hashable
    constants: Nested
    calls: int


class _Graph:
    """A recording with the tensors that it reads."""

    def __init__(self, recorder: Recorder, run: _Run, inputs: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):  # tensors that may be changed inside and outside inference mode
            self._inputs = [torch.empty_like(tensor) for tensor in inputs]
            self._constants = _like(run.constants)
        self._holds: weakref.ref[_Run] | None = None  # whose constants; not the run itself, which would keep its own
        self._take(run, inputs)
        with torch.inference_mode():
            self.recording = recorder.record(lambda: run.function(self._inputs, self._constants))

    def replayed(self, run: _Run, inputs: Sequence[Tensor]) -> Tensor:
        """The result for these inputs, in memory that no replay writes to."""
        self._take(run, inputs)
        self.recording.replay()
        return self.recording.output.clone()

    def _take(self, run: _Run, inputs: Sequence[Tensor]) -> None:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if self._holds is None or self._holds() is not run:
            for own, given in zip(_leaves(self._constants), _leaves(run.constants), strict=True):
                own.copy_(given)
            self._holds = weakref.ref(run)


def _leaves(tree: Nested) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for branch in tree for leaf in _leaves(branch)]


def _like(tree: Nested) -> Nested:
    """Tensors of the same shapes, types and layouts, in the same tree."""
    return torch.empty_like(tree) if isinstance(tree, Tensor) else type(tree)([_like(branch) for branch in tree])


def _signature(tree: Nested) -> Hashable:
    return (tree.shape, tree.dtype) if isinstance(tree, Tensor) else tuple(_signature(branch) for branch in tree)


def state_of(module: nn.Module) -> list[Any]:
    """What a recording of the module's calls depends on, to be compared with ==: where its tensors are, those in plain
    attributes too, the layers' classes, and functions that were put into them, such as attention's."""
    state: list[Any] = []
    for part in module.modules():
        state.append(type(part))
        for value in vars(part).values():
            if isinstance(value, dict):  # parameters, buffers, hooks
                values: Iterable[Any] = value.values()
            else:
                values = value if isinstance(value, list | tuple) else (value,)
            for each in values:
                if isinstance(each, Tensor):
                    state += (each.data_ptr(), each.dtype)
                elif callable(each) and not isinstance(each, nn.Module):
                    state.append(each)
    return state


class CudaRecorder:
    """Records CUDA graphs on one GPU. All that live share one pool of memory, so that each is replayed alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._living: weakref.WeakSet[_CudaGraph] = weakref.WeakSet()

    def warm(self, work: Work) -> Tensor:
        """Do the work on the stream that records, where libraries get ready what they may not while one is recording.

        Either stream waits for the other before it goes on: so memory that one allocated and the other used can be
        reused as usual.
        """
        with torch.cuda.device(self._device):
            main, side = torch.cuda.current_stream(), self._side()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                output = work()
            main.wait_stream(side)
        return output

    def record(self, work: Work) -> "_CudaGraph":
        """Record the work; nothing is computed. Other threads may use the GPU meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # That of a graph that lives: torch refuses a pool which all graphs have left.
        pool = next((other.graph.pool() for other in self._living), None)
        # torch.cuda.graph leaves its own stream as the current one where it fails: the outer context puts that right.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=pool, stream=self._side(), capture_error_mode="thread_local"),
        ):
            output = work()
        recording = _CudaGraph(graph, output)
        self._living.add(recording)
        return recording

    def free(self, recordings: Iterable[Any]) -> None:
        """Wait for the GPU, drop the graphs, and give free memory back to it. Raises torch.AcceleratorError where it
        works no more."""
        torch.cuda.synchronize(self._device)
        for recording in recordings:
            self._living.discard(recording)
            recording.graph.reset()
            del recording.output
        torch.cuda.empty_cache()

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream


class _CudaGraph:
    """A CUDA graph, and the tensor into which it writes its result."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self.graph = graph
        self.output = output

    def replay(self) -> None:
        self.graph.replay()
