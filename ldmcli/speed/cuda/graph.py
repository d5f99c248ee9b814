"""Steps of a model, recorded once and replayed: on a GPU as a CUDA graph, which starts all its kernels at one word of
the host. Started one by one, a small batch's many short kernels leave a fast GPU waiting.

    graphs = Graphs(CudaRecorder(device), [unet])    # beside the network, for as long as it lives
    graphs.begin(calls=len(steps))                   # each run, one at a time
    model = unet.prepare(…, hold=graphs.hold)        # keys, values and the steps' tables, in buffers that stay
    model = recorded(guided(model, …), graphs, key=(scale, rescale), form=lambda step: low < step.sigma <= high)
    graphs.free()                                    # where memory is short, and before weights move

A replay computes where the recording did: on the same memory, with the same weights. So the model that is recorded

- reads its latents, what `graphs.hold` gave, and the weights of the modules, and nothing else that changes;
- reads of its step the `index` alone, a one-element int64 tensor on the device: `sampling.schedule.at` looks it up;
- branches on the host by what `form(step)` tells apart, and by numbers that `key` holds;
- never asks the device for a number.

Any model that keeps to this can be recorded, whatever it wraps. What it gives is copied out, so that no replay writes
over it. A recording is dropped once weights, layers, attention or other functions in the modules have changed.
"""

import contextlib
import dataclasses
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.errors import printable
from ldmcli.sampling.denoiser import Model
from ldmcli.sampling.schedule import Step
from ldmcli.speed.memory import is_out_of_memory

KEPT = 4  # kinds of calls whose recordings are kept: guided and not, for the batches of a job and its shorter last one
# Calls of a kind from which on it is recorded. Recording takes the host about as long as one call that is not replayed,
# so that a run of one to three steps would be slower for it; many such runs add up.
PAYS = 4

Work = Callable[[], Tensor]
Tree = Any  # a Tensor, or a list or tuple of Trees
_log = logging.getLogger(__name__)


def recorded(
    model: Model, graphs: "Graphs", key: Hashable = (), form: Callable[[Step], Hashable] = lambda step: ()
) -> Model:
    """`model` of the run that `graphs` began last, with its calls replayed where that pays. See the module for what it
    may read, `key` and `form`."""
    return lambda latents, step: graphs.call(model, (key, form(step)), latents, step)


class Graphs:
    """The recordings of models made of some modules, which are made and dropped as they are needed. For one thread, one
    run after the other, and one stream of a GPU: recordings share memory for what they compute in between."""

    def __init__(self, recorder: "CudaRecorder", modules: Sequence[nn.Module]) -> None:
        self._recorder = recorder
        self._modules = modules
        self._watched: list[weakref.ref[nn.Module]] = []  # which others may give up
        self._kinds: OrderedDict[tuple[Hashable, tuple[_Slot, ...]], _Kind] = OrderedDict()  # the last called last
        self._plain: set[Hashable] = set()  # shapes of calls that there was no memory to record
        self._slots: list[_Slot] = []
        self._held: tuple[_Slot, ...] = ()  # by the run, whose calls are still to come
        self._calls = 0
        self._state: list[Any] | None = None
        self._off = self._warned = False

    def begin(self, calls: int) -> None:
        """Begin a run that calls its models about so often. What the last one held may be written over."""
        state = self._state_now()
        if state != self._state:
            self.free()
            self._state = state
        self._held, self._calls = (), calls

    def hold(self, tree: Tree) -> Tree:
        """The tree's tensors, computed before the run's steps, in buffers that a recording may read."""
        signature = _signature(tree)
        free = [slot for slot in self._slots if slot not in self._held]
        slot = next((slot for slot in free if slot.signature == signature), None)
        if slot is None:
            read = {slot for _, held in self._kinds for slot in held}
            with torch.inference_mode(False):  # to be changed inside and outside it
                slot = _Slot(signature, _like(tree))
            self._slots = [*self._held, *(other for other in free if other in read), slot]
        for own, given in zip(_leaves(slot.buffers), _leaves(tree), strict=True):
            own.copy_(given)
        self._held += (slot,)
        return slot.buffers

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Know of further modules that what is recorded computes with."""
        known = {ref() for ref in self._watched}
        self._watched += [weakref.ref(module) for module in modules if module not in known]

    def free(self) -> None:
        """Drop all recordings and give their memory back. Raises torch.AcceleratorError where the device works no
        more."""
        recordings = [kind.recording for kind in self._kinds.values() if kind.recording]
        self._kinds.clear()
        self._slots.clear()
        if recordings:
            self._recorder.free(recordings)

    def call(self, model: Model, form: Hashable, latents: Tensor, step: Step) -> Tensor:
        """What `model` gives, replayed where that pays."""
        self._calls -= 1
        shape = (form, tuple(slot.signature for slot in self._held), latents.shape, latents.dtype)
        if self._off or shape in self._plain:
            return model(latents, step)
        kind = self._kinds.setdefault((shape, self._held), _Kind())
        self._kinds.move_to_end((shape, self._held))
        while len(self._kinds) > KEPT:
            _, oldest = self._kinds.popitem(last=False)
            if oldest.recording:
                self._recorder.free([oldest.recording])
        kind.calls += 1
        work = kind.on_own_inputs(model, latents, step)
        if not kind.recording and kind.calls > 1 and kind.calls + self._calls >= PAYS:
            kind.recording = self._recorded(work)
            if not kind.recording:
                self._plain.add(shape)
                return model(latents, step)
        if kind.recording:
            kind.recording.replay()
            return kind.recording.output.clone()
        with torch.inference_mode():  # as when it is recorded: a compiler looks at that
            output = self._recorder.warm(work)
        return output.clone()

    def _recorded(self, work: Work) -> "CudaGraph | None":
        """The call recorded, or None where that cannot be. Unless memory ran out, nothing is recorded any more then."""
        try:
            with torch.inference_mode():
                recording = self._recorder.record(work)
        except RuntimeError as error:
            reason = printable(str(error).strip().partition("\n")[0])
            no_room = is_out_of_memory(error)
        else:
            self._state = self._state_now()  # layers may have prepared weights when they were first called
            return recording
        # Out here the error is gone, with its frames and the tensors in them.
        self.free()
        self._recorder.free([])  # of what was begun; and a lost device must not pass for a step that cannot be recorded
        self._off = not no_room
        if not self._warned:
            self._warned = True
            _log.warning("a step could not be recorded as a CUDA graph (%s); going on without, more slowly", reason)
        return None

    def _state_now(self) -> list[Any]:
        watched = [module for ref in self._watched if (module := ref()) is not None]
        return [state_of(module) for module in (*self._modules, *watched)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """Buffers like the tensors of a tree, which has this signature."""

    signature: Hashable
    buffers: Tree


@dataclasses.dataclass
class _Kind:
    """Calls alike in all but what is in their tensors: how many there were, what they read, and their recording."""

    calls: int = 0
    inputs: tuple[Tensor, Tensor] | None = None  # latents and the step's index
    recording: "CudaGraph | None" = None

    def on_own_inputs(self, model: Model, latents: Tensor, step: Step) -> Work:
        """The call, on tensors that stay: with these latents and this step's index in them from now on."""
        if self.inputs is None:
            with torch.inference_mode(False):
                self.inputs = torch.empty_like(latents), torch.zeros(1, dtype=torch.int64, device=latents.device)
        own, index = self.inputs
        own.copy_(latents)
        index.fill_(step.index)
        return lambda: model(own, dataclasses.replace(step, index=index))


def _leaves(tree: Tree) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for branch in tree for leaf in _leaves(branch)]


def _like(tree: Tree) -> Tree:
    """Tensors of the same shapes, types and layouts, in the same tree."""
    return torch.empty_like(tree) if isinstance(tree, Tensor) else type(tree)([_like(branch) for branch in tree])


def _signature(tree: Tree) -> Hashable:
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


@dataclasses.dataclass(eq=False)
class CudaGraph:
    """A CUDA graph, and the tensor into which it writes its result."""

    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        """Compute it again, with what is now in the tensors that it reads."""
        self.graph.replay()


class CudaRecorder:
    """Records work on one GPU that reads tensors which outlive it, and never asks the host for a number. All graphs
    that live share one pool of memory, so that each is replayed alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch refuses one that all graphs have left
        self._living: weakref.WeakSet[CudaGraph] = weakref.WeakSet()

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

    def record(self, work: Work) -> CudaGraph:
        """Record the work; nothing is computed. Other threads may use the GPU meanwhile. Raises RuntimeError where it
        cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        if not self._living:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # torch.cuda.graph leaves its own stream as the current one where it fails: the context before it does not.
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side(), capture_error_mode="thread_local"),
            ):
                output = work()
        except RuntimeError:
            # What torch leaves open where CUDA breaks a capture off: allocation from the pool, and the graph's share in
            # it. Where torch has ended it, it refuses to once more.
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                torch._C._cuda_releasePool(self._device.index, self._pool)
            raise
        recording = CudaGraph(graph, output)
        self._living.add(recording)
        return recording

    def free(self, recordings: Iterable[CudaGraph]) -> None:
        """Wait for the GPU, drop the graphs, and give free memory back to it. Raises torch.AcceleratorError where it
        works no more."""
        torch.cuda.synchronize(self._device)
        for recording in recordings:
            self._living.discard(recording)
            recording.graph.reset()
            del recording.output
        try:
            torch.cuda.empty_cache()
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # torch's allocator still takes a capture that failed for one under way
            _log.debug("memory is not given back (%s)", str(error).partition("\n")[0])

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream
