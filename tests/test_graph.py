"""Steps that are recorded once and replayed: the same bits as without, whatever is asked for next, and nothing that a
replay writes over or reads where it no longer is."""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from graph_support import FakeRecorder
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import ScheduleConfig, UNetConfig
from ldmcli.networks.attention import set_attention
from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.unet import UNet
from ldmcli.sampling.denoiser import Model, predicting
from ldmcli.sampling.guidance import guided, in_interval, within
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.sampling.schedule import Schedule, Step
from ldmcli.speed.cuda.graph import KEPT, PAYS, CudaRecorder, Graphs, recorded, state_of

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = UNetConfig(
    block_channels=(32, 64), layers_per_block=1, attention=(1, 1), heads=(2, 2), context_dim=16, norm_groups=8
)
SCHEDULE = Schedule(ScheduleConfig())
INTERVAL = (0.5, 5.0)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def shared_unet() -> UNet:
    unet = UNet(UNET)
    randomise(unet, torch.Generator().manual_seed(0))
    return unet.requires_grad_(False).eval()


@pytest.fixture
def unet(shared_unet: UNet) -> UNet:
    return copy.deepcopy(shared_unet)


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


@pytest.fixture
def graphs(unet: UNet, recorder: FakeRecorder) -> Graphs:
    return Graphs(recorder, [unet])


def model_of(
    unet: UNet,
    steps: Sequence[Step],
    graphs: Graphs | None = None,
    *,
    seed: int = 1,
    batch: int = 1,
    tokens: int = 7,
    scale: float = 5.0,
    interval: tuple[float, float] | None = None,
) -> Model:
    """The chain of a guided U-Net, recorded if there are `graphs`."""
    if graphs:
        graphs.begin(len(steps))

    def prepared(contexts: int) -> Model:
        conditioning = Conditioning(normal(contexts * batch, tokens, UNET.context_dim, seed=seed))
        conditioning = conditioning.to(unet.conv_in.weight.device, unet.conv_in.weight.dtype)
        return unet.prepare(conditioning, steps, **{"hold": graphs.hold} if graphs else {})

    model = guided(prepared(2), scale)
    if interval:
        model = in_interval(interval, model, prepared(1))
    if graphs is None:
        return model
    return recorded(model, graphs, key=scale, form=lambda step: interval is None or within(interval, step))


def begun(model: Model, graphs: Graphs, calls: int) -> Model:
    graphs.begin(calls)
    return recorded(model, graphs)


def walk(
    unet: UNet,
    graphs: Graphs | None = None,
    *,
    sampler: str = "ddim",
    steps: int = 6,
    size: tuple[int, int] = (8, 8),
    **settings: Any,
) -> list[Tensor]:
    """The latents after each step."""
    way = SCHEDULE.steps(steps, sampler)
    latents = normal(settings.get("batch", 1), 4, *size).to(unet.conv_in.weight.device)
    seeds = iter(range(100))
    with torch.inference_mode():
        denoise = predicting(model_of(unet, way, graphs, **settings), "epsilon")
        noise = lambda: normal(*latents.shape, seed=next(seeds)).to(latents)  # noqa: E731
        return [after.clone() for after in SAMPLERS[sampler](denoise, latents, way, noise, eta=0.5)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether they agree in every bit, and none is missing."""
    return len(one) == len(other) > 0 and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


# ---- the same bits ----


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(unet: UNet, graphs: Graphs, recorder: FakeRecorder, sampler: str) -> None:
    """Several keep predictions of former steps, which no replay may write over."""
    assert same(walk(unet, graphs, sampler=sampler), walk(unet, sampler=sampler))
    assert (recorder.warmed, len(recorder.recordings)) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "recordings"),
    [
        ({"seed": 9}, 1),
        ({"sampler": "euler"}, 1),
        ({"scale": 2.0}, 2),
        ({"batch": 2}, 2),
        ({"size": (8, 9)}, 2),
        ({"tokens": 14}, 2),
        ({"steps": 9}, 2),
        ({"interval": INTERVAL, "steps": 12}, 3),
    ],
    ids=str,
)
def test_what_is_drawn_next(
    unet: UNet, graphs: Graphs, recorder: FakeRecorder, settings: dict[str, Any], recordings: int
) -> None:
    """Prompts, seeds and samplers share a recording; what has another shape or guidance has its own, as have steps with
    and without guidance. And then the first again, with the recording that there is."""
    for drawn in ({}, settings, {}, settings):
        assert same(walk(unet, graphs, **drawn), walk(unet, **drawn))
    assert len(recorder.recordings) == recorder.living == recordings


def test_buffers_are_used_again(unet: UNet, graphs: Graphs) -> None:
    """By the next run, but not twice by one; those that no recording reads go when others are made."""

    def held(*trees: Tensor) -> list[Tensor]:
        graphs.begin(6)
        return [graphs.hold([tree])[0] for tree in trees]

    one, other = held(normal(3), normal(3, seed=2))
    assert one.equal(normal(3))
    assert other.equal(normal(3, seed=2))
    assert held(normal(3, seed=3))[0] is one
    assert one.equal(normal(3, seed=3))
    held(normal(4))
    assert held(normal(3))[0] is not one


def test_outside_inference_mode(unet: UNet, graphs: Graphs) -> None:
    """What is recorded in inference mode can be replayed outside, and the other way round."""
    steps, latents = SCHEDULE.steps(6), normal(1, 4, 8, 8)
    for inference in (False, True, False):
        with torch.inference_mode(inference):
            ours, plain = (model_of(unet, steps, each) for each in (graphs, None))
            for step in steps:
                found = ours(latents, step)
                assert found.equal(plain(latents, step))
                assert found.is_inference() == inference


# ---- when ----


def test_short_runs_are_recorded_once_there_are_many(unet: UNet, graphs: Graphs, recorder: FakeRecorder) -> None:
    for run in range(1, PAYS + 2):
        walk(unet, graphs, steps=1)
        assert len(recorder.recordings) == (run >= PAYS)
    assert recorder.warmed == PAYS - 1
    other = FakeRecorder()
    walk(unet, Graphs(other, [unet]), steps=PAYS - 1)
    assert (other.warmed, other.recordings) == (PAYS - 1, [])


def test_recordings_are_few(unet: UNet, graphs: Graphs, recorder: FakeRecorder) -> None:
    """Those not called for longest go, and are made again when they are called."""
    sizes = [(8 + i, 8) for i in range(KEPT + 2)]
    for size in sizes:
        walk(unet, graphs, size=size, steps=4)
        assert recorder.living <= KEPT
    assert (recorder.living, len(recorder.recordings)) == (KEPT, KEPT + 2)
    walk(unet, graphs, size=sizes[2], steps=4)
    assert len(recorder.recordings) == KEPT + 2
    assert same(walk(unet, graphs, size=sizes[0], steps=5), walk(unet, size=sizes[0], steps=5))
    assert len(recorder.recordings) == KEPT + 3
    assert [r.freed for r in recorder.recordings] == [True, True, False, True, False, False, False]
    for _ in range(2):
        graphs.free()
        assert recorder.living == 0
    assert same(walk(unet, graphs), walk(unet))
    assert recorder.living == 1


# ---- what a recording depends on ----


class _Shifted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight": lambda unet: setattr(
        unet.conv_in, "weight", nn.Parameter(2 * unet.conv_in.weight, requires_grad=False)
    ),
    "the number type": lambda unet: unet.bfloat16(),
    "attention": lambda unet: set_attention(unet, lambda query, key, value: query + value.mean()),
    "a layer": lambda unet: setattr(unet, "conv_out", _Shifted(unet.conv_out)),
    "a hook": lambda unet: unet.conv_in.register_forward_hook(lambda _module, _inputs, output: output + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_recorded_anew(unet: UNet, graphs: Graphs, recorder: FakeRecorder, change: str) -> None:
    first = walk(unet, graphs)
    CHANGES[change](unet)
    second = walk(unet, graphs)
    assert same(second, walk(unet))
    assert not same(first, second)
    assert (recorder.living, len(recorder.recordings)) == (1, 2)


def test_weights_changed_where_they_are_need_no_new_recording(
    unet: UNet, graphs: Graphs, recorder: FakeRecorder
) -> None:
    walk(unet, graphs)
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    assert same(walk(unet, graphs), walk(unet))
    assert len(recorder.recordings) == 1


class Preparing(nn.Module):
    """Keeps a tensor made of its weight when it is first called, as layers may."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(2 * self.weight)
        return x * self.kept[0]


def test_what_layers_prepare_belongs_to_the_module(recorder: FakeRecorder) -> None:
    module, steps = Preparing(), SCHEDULE.steps(5)
    graphs = Graphs(recorder, [module])

    def run() -> list[Tensor]:
        model = begun(lambda latents, _: module(latents), graphs, 5)
        return [model(torch.full((3,), float(i)), step) for i, step in enumerate(steps)]

    run()
    run()
    assert (recorder.warmed, len(recorder.recordings)) == (1, 1)
    before = state_of(module)
    module.kept[0] = 3 * module.weight
    assert state_of(module) != before
    assert torch.equal(run()[4], torch.full((3,), 12.0))
    assert (recorder.warmed, len(recorder.recordings), recorder.living) == (2, 2, 1)


# ---- failures ----


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, torch.AcceleratorError], ids=lambda e: e.__name__)
def test_a_step_that_cannot_be_recorded(
    unet: UNet, graphs: Graphs, recorder: FakeRecorder, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence, and plain steps for good."""
    recorder.fails = error("operation not permitted\nwhen stream is capturing")
    for size in ((8, 8), (8, 9), (8, 8)):
        assert same(walk(unet, graphs, size=size), walk(unet, size=size))
    (line,) = warnings(caplog)
    assert "(operation not permitted)" in line
    assert recorder.warmed == 1


def test_memory_that_runs_out_while_a_step_is_recorded(
    unet: UNet, graphs: Graphs, recorder: FakeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """What is recorded makes room; this shape is drawn plainly from then on, others are recorded."""
    walk(unet, graphs)
    recorder.fails = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
    assert same(walk(unet, graphs, size=(8, 9)), walk(unet, size=(8, 9)))
    assert recorder.living == 0
    walk(unet, graphs, size=(8, 10))
    recorder.fails = None
    walk(unet, graphs, size=(8, 9))
    assert recorder.living == 0
    assert same(walk(unet, graphs), walk(unet))
    assert recorder.living == 1
    assert len(warnings(caplog)) == 1


def test_a_failed_recording_keeps_no_tensor(unet: UNet) -> None:
    """The frames of an error hold what was computed, which the plain step may have no room beside."""
    import gc
    import weakref

    held: list[weakref.ref[Tensor]] = []

    class Failing(FakeRecorder):
        def record(self, work: Callable[[], Tensor]) -> Any:
            result = work()
            held.append(weakref.ref(result))
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def free(self, recordings: Any) -> None:
            assert held[0]() is None
            super().free(recordings)

    gc.disable()
    try:
        walk(unet, Graphs(Failing(), [unet]))
    finally:
        gc.enable()
    assert len(held) == 1


def test_a_lost_device_is_not_passed_over(unet: UNet, caplog: pytest.LogCaptureFixture) -> None:
    lost = torch.AcceleratorError("CUDA error: unspecified launch failure")
    for error in (RuntimeError("capture failed"), torch.OutOfMemoryError("CUDA out of memory.")):
        with pytest.raises(torch.AcceleratorError, match="unspecified"):
            walk(unet, Graphs(FakeRecorder(error, lost), [unet]))
    assert warnings(caplog) == []


def test_memory_that_torch_cannot_give_back_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a capture that CUDA broke off, torch's allocator may refuse; a lost device is another matter."""
    recorder = CudaRecorder(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", mock.Mock(side_effect=RuntimeError("internal assert")))
    recorder.free([])
    monkeypatch.setattr(torch.cuda, "empty_cache", mock.Mock(side_effect=torch.AcceleratorError("lost")))
    with pytest.raises(torch.AcceleratorError):
        recorder.free([])


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_is_broken_off_leaves_no_pool_open(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may have ended it, and refuses to do so twice: then the graph gives up its share by itself."""
    closed: list[tuple[str, int, tuple[int, int]]] = []

    @contextlib.contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: tuple[int, int]) -> None:
        if ended:
            raise RuntimeError("not currently recording to this pool")
        closed.append(("end", device, pool))

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    for name in ("CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda *share: closed.append(("release", *share))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaRecorder(torch.device("cuda", 1)).record(lambda: torch.ones(1))
    assert closed == ([] if ended else [("end", 1, (0, 7)), ("release", 1, (0, 7))])


# ---- real graphs ----

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# As the recording is made in another stream, libraries may choose other kernels; what is read or written in the wrong
# place is off by far more.
CLOSE = 2e-3


@pytest.fixture
def on_gpu(unet: UNet) -> tuple[UNet, Graphs]:
    device = torch.device("cuda", torch.cuda.current_device())
    unet = unet.to(device, torch.float16)
    return unet, Graphs(CudaRecorder(device), [unet])


def close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(relative(*pair) < CLOSE for pair in zip(one, other, strict=True))


def living(graphs: Graphs) -> int:
    return sum(kind.recording is not None for kind in graphs._kinds.values())


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_on_a_gpu(on_gpu: tuple[UNet, Graphs], sampler: str) -> None:
    unet, graphs = on_gpu
    for settings in ({}, {"seed": 7}, {"batch": 2}, {"tokens": 14}, {"interval": INTERVAL, "steps": 12}, {}):
        assert close(walk(unet, graphs, sampler=sampler, **settings), walk(unet, sampler=sampler, **settings))
    assert living(graphs) == KEPT


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler-a", "dpmpp-2m-sde", "unipc", "heun"])
@pytest.mark.parametrize("graphed", [True, False])
def test_the_loop_waits_for_nothing(on_gpu: tuple[UNet, Graphs], graphed: bool, sampler: str) -> None:
    unet, graphs = on_gpu[0], on_gpu[1] if graphed else None
    steps = SCHEDULE.steps(6, sampler)
    walk(unet, graphs, sampler=sampler)
    with torch.inference_mode():
        latents = normal(1, 4, 8, 8).cuda()
        denoise = predicting(model_of(unet, steps, graphs), "epsilon")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in SAMPLERS[sampler](denoise, latents, steps, lambda: torch.randn_like(latents), eta=0.5):
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.cuda
def test_memory_comes_back(on_gpu: tuple[UNet, Graphs]) -> None:
    unet, graphs = on_gpu
    before = torch.cuda.memory_reserved()
    walk(unet, graphs, size=(64, 64))
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    graphs.free()
    assert before <= torch.cuda.memory_reserved() < held


@cuda
@pytest.mark.cuda
def test_a_function_that_waits_cannot_be_recorded_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """It is called plainly, in the stream of before, memory comes back, and the GPU goes on working."""
    device = torch.device("cuda", torch.cuda.current_device())
    layer, steps = nn.Linear(8, 8).to(device), SCHEDULE.steps(6)
    graphs = Graphs(CudaRecorder(device), [layer])

    def waits(latents: Tensor, _: Step) -> Tensor:
        return layer(latents) * float(latents.sum())

    stream = torch.cuda.current_stream()
    with torch.no_grad():
        model = begun(waits, graphs, 6)
        for i, step in enumerate(steps):
            x = torch.full((2, 8), float(i), device=device)
            torch.testing.assert_close(model(x, step), waits(x, step))
            assert torch.cuda.current_stream() == stream
        assert len(warnings(caplog)) == 1
        torch.cuda.empty_cache()
        fine = begun(lambda latents, _: layer(latents), Graphs(CudaRecorder(device), [layer]), 6)
        for step in steps:
            torch.testing.assert_close(fine(x, step), layer(x))


def test_networks_that_are_watched_may_be_given_up(graphs: Graphs) -> None:
    network = nn.Linear(2, 2)
    graphs.watch([network])
    graphs.watch([network])
    gone = weakref.ref(network)
    del network
    assert gone() is None
