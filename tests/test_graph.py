"""Steps that are recorded once and replayed: the same bits as without, whatever is asked for next, and nothing that a
replay writes over or reads where it no longer is."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_support import FakeRecorder, load_plainly, recording, same, walk
from oracle.comparing import relative
from torch import Tensor, nn

from ldmcli.pipeline import Pipeline
from ldmcli.sampling.noise import SeededNoise
from ldmcli.sampling.samplers import SAMPLERS
from ldmcli.sampling.schedule import Schedule
from ldmcli.spec import GenerationRequest, fit_to_model
from ldmcli.speed import policy
from ldmcli.speed.cuda.graph import KEPT, PAYS, CudaRecorder, Graphs, state_of
from ldmcli.speed.tuning import Tuning

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = GenerationRequest(
    "a red star", negative_prompt="blue", sampler="ddim", steps=6, seed=1, width=64, height=64, guidance_scale=5.0
)
LONG = "a whale in a storm, " * 30

Requests = Sequence[GenerationRequest]


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Pipeline:
    """The small model. Not to be changed."""
    return load_plainly(model_folder)


@pytest.fixture
def recorder() -> FakeRecorder:
    return FakeRecorder()


@pytest.fixture
def graphed(plain: Pipeline, recorder: FakeRecorder) -> Pipeline:
    return recording(plain, recorder)


def asked(**settings: Any) -> GenerationRequest:
    return dataclasses.replace(ASKED, **settings)


# ---- the same bits ----


@pytest.mark.parametrize("settings", [{"eta": 0.0}, {"eta": 0.7}], ids=str)
def test_ddim(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder, settings: dict[str, Any]) -> None:
    requests = [asked(**settings)]
    assert same(walk(graphed, requests), walk(plain, requests))
    assert (recorder.warmed, len(recorder.recordings)) == (1, 1)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_every_sampler(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder, sampler: str) -> None:
    """Several keep predictions of former steps, which no replay may write over."""
    requests = [asked(sampler=sampler)]
    assert same(walk(graphed, requests), walk(plain, requests))
    assert (recorder.warmed, len(recorder.recordings)) == (1, 1)


@pytest.mark.parametrize(
    ("requests", "recordings"),
    [
        ([asked(prompt="a pear", negative_prompt="fog", seed=9)], 1),
        ([asked(guidance_scale=2.0)], 2),
        ([asked(guidance_scale=1.0)], 2),
        ([asked(guidance_rescale=0.7)], 2),
        ([asked(), asked(prompt="a pear", seed=3)], 2),
        ([asked(width=72)], 2),
        ([asked(steps=9, sampler="euler")], 1),
        ([asked(prompt=LONG, on_long_prompt="chunk")], 2),
        ([asked(prompt=LONG, negative_prompt=LONG, on_long_prompt="chunk")], 2),
    ],
    ids=lambda value: str(value)[:0] or None,
)
def test_what_is_drawn_next(
    plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder, requests: Requests, recordings: int
) -> None:
    """Prompts, seeds, steps and samplers share a recording; what has another shape or guidance has its own. And then
    the first again, with the recording that there is."""
    for drawn in ([ASKED], requests, [ASKED]):
        assert same(walk(graphed, drawn), walk(plain, drawn))
    assert len(recorder.recordings) == recorder.living == recordings


def test_guidance_in_an_interval(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder) -> None:
    """One recording with guidance, one without: whose inputs are half as many."""
    requests = [asked(steps=12, guidance_interval=(0.5, 5.0), guidance_rescale=0.5)]
    assert same(walk(graphed, requests), walk(plain, requests))
    assert (recorder.warmed, recorder.living) == (2, 2)
    assert same(walk(graphed, requests), walk(plain, requests))
    assert (recorder.warmed, len(recorder.recordings)) == (2, 2)


@pytest.mark.parametrize("name", ["sdxl", "lcm"])
def test_families(family_models: Any, name: str) -> None:
    """Embeddings of each picture's own, as SDXL adds them; and of the guidance scale, as LCM's models are told it."""
    plain, recorder = load_plainly(family_models.path(name)), FakeRecorder()
    graphed = recording(plain, recorder)
    sampler = "lcm" if name == "lcm" else "euler-a"
    first = asked(steps=5, sampler=sampler)
    for requests in ([first, asked(steps=5, sampler=sampler, prompt="a pear")],) * 2:
        assert same(walk(graphed, requests), walk(plain, requests))
    other = {"guidance_scale": 2.0} if name == "lcm" else {"original_width": 700, "crop_top": 30}
    requests = [dataclasses.replace(request, **other) for request in requests]
    assert same(walk(graphed, requests), walk(plain, requests))
    assert recorder.living == 1
    assert not same(walk(plain, requests), walk(plain, [first] * 2))


def test_refiner(family_models: Any) -> None:
    base, refiner = [load_plainly(family_models.path(name)) for name in ("sdxl", "refiner")]
    plain = dataclasses.replace(base, refiner=refiner.model)
    recorder = FakeRecorder()
    graphed = recording(plain, recorder)
    for seed in (1, 2):
        requests = [asked(steps=10, sampler="euler", refiner_start=0.5, seed=seed)]
        assert same(walk(graphed, requests), walk(plain, requests))
    assert (recorder.warmed, recorder.living, len(recorder.recordings)) == (2, 2, 2)


def test_runs_under_way_at_once(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder) -> None:
    """A batch may be begun while another, of the same shapes, still takes its steps."""
    requests = [fit_to_model(asked(prompt=prompt), plain.config) for prompt in ("a pear", "a whale")]
    steps = Schedule(plain.config.schedule).steps(6)

    def walked(pipeline: Pipeline) -> list[Tensor]:
        with torch.inference_mode():
            walks = [
                SAMPLERS["ddim"](pipeline.model.denoiser([one], steps), torch.ones(1, 4, 8, 8), steps, lambda: None)
                for one in requests
            ]
            return [latents for both in zip(*walks, strict=True) for latents in both]

    assert same(walked(graphed), walked(plain))
    assert len(recorder.recordings) == 1


def test_outside_inference_mode(plain: Pipeline, graphed: Pipeline) -> None:
    """What is recorded in inference mode can be replayed outside, and the other way round."""
    request = fit_to_model(ASKED, plain.config)
    steps = Schedule(plain.config.schedule).steps(6)
    for inference in (False, True, False):
        with torch.inference_mode(inference):
            found = [pipeline.model.denoiser([request], steps) for pipeline in (graphed, plain)]
            for step in steps:
                ours, plainly = [denoise(torch.ones(1, 4, 8, 8), step).noise for denoise in found]
                assert torch.equal(ours, plainly)


# ---- when ----


def test_eager_where_the_runtime_says_so(plain: Pipeline) -> None:
    def graphs(**tuning: Any) -> Graphs | None:
        runtime = dataclasses.replace(plain.runtime, tuning=Tuning(**tuning))
        return dataclasses.replace(plain.model, runtime=runtime).graphs

    assert plain.model.graphs is None
    assert graphs(graph=False) is None
    assert graphs(graph=True, low_vram=True) is None
    found = graphs(graph=True)
    assert found is not None
    assert isinstance(found._recorder, CudaRecorder)


def test_short_runs_are_recorded_once_there_are_many(graphed: Pipeline, recorder: FakeRecorder) -> None:
    for run in range(1, PAYS + 2):
        walk(graphed, [asked(steps=1)])
        assert len(recorder.recordings) == (run >= PAYS)
    assert recorder.warmed == PAYS - 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_run_is_not_recorded(graphed: Pipeline, recorder: FakeRecorder, steps: int) -> None:
    walk(graphed, [asked(steps=steps)])
    assert (recorder.warmed, recorder.recordings) == (steps, [])


def test_recordings_are_few(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder) -> None:
    """Those not called for longest go, and are made again when they are called."""
    sizes = [64 + 8 * i for i in range(KEPT + 2)]
    for size in sizes:
        walk(graphed, [asked(height=size, steps=4)])
        assert recorder.living <= KEPT
    assert (recorder.living, len(recorder.recordings)) == (KEPT, KEPT + 2)
    walk(graphed, [asked(height=sizes[2], steps=4)])
    assert len(recorder.recordings) == KEPT + 2
    requests = [asked(height=sizes[0], steps=5)]
    assert same(walk(graphed, requests), walk(plain, requests))
    assert len(recorder.recordings) == KEPT + 3
    assert [r.freed for r in recorder.recordings] == [True, True, False, True, False, False, False]


def test_freed_recordings_are_made_again(plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder) -> None:
    walk(graphed, [ASKED])
    graphed.model.free_graphs()
    assert recorder.living == 0
    graphed.model.free_graphs()
    assert same(walk(graphed, [ASKED]), walk(plain, [ASKED]))
    assert (recorder.living, len(recorder.recordings)) == (1, 2)


# ---- what a recording depends on ----


def own_unet(pipeline: Pipeline) -> Pipeline:
    return dataclasses.replace(
        pipeline, model=dataclasses.replace(pipeline.model, unet=copy.deepcopy(pipeline.model.unet))
    )


def test_in_float32(plain: Pipeline, recorder: FakeRecorder) -> None:
    """Weights that were widened are elsewhere, and elsewhere again when they are as before."""
    half = own_unet(plain)
    half.model.unet.bfloat16()
    half.runtime = half.model.runtime = dataclasses.replace(plain.runtime, dtype=torch.bfloat16)
    half.vae = copy.deepcopy(plain.vae)
    graphed = recording(half, recorder)
    before = walk(graphed, [ASKED])
    with graphed.in_float32():
        wide = walk(graphed, [ASKED])
        assert recorder.living == 1
    after = walk(graphed, [ASKED])
    assert (recorder.living, len(recorder.recordings)) == (1, 3)
    assert same(after, before)
    assert same(before, walk(half, [ASKED]))
    with half.in_float32():
        assert same(wide, walk(half, [ASKED]))
    assert not same(wide, before)


def scaled(unet: nn.Module) -> None:
    unet.conv_in.weight = nn.Parameter(2 * unet.conv_in.weight, requires_grad=False)


def other_attention(unet: nn.Module) -> None:
    policy.set_attention(unet, lambda query, key, value: query + value.mean())


class _Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def other_layer(unet: nn.Module) -> None:
    unet.conv_in.__class__ = _Shifted


def hooked(unet: nn.Module) -> None:
    unet.conv_in.register_forward_hook(lambda _module, _inputs, output: output + 1)


def other_function(unet: nn.Module) -> None:
    unet.conv_in.forward = lambda x: nn.Conv2d.forward(unet.conv_in, x) + 1


@pytest.mark.parametrize("change", [scaled, other_attention, other_layer, hooked, other_function])
def test_a_changed_module_is_recorded_anew(
    plain: Pipeline, recorder: FakeRecorder, change: Callable[[nn.Module], None]
) -> None:
    own = own_unet(plain)
    graphed = recording(own, recorder)
    first = walk(graphed, [ASKED])
    change(own.model.unet)
    second = walk(graphed, [ASKED])
    assert same(second, walk(own, [ASKED]))
    assert not same(first, second)
    assert (recorder.living, len(recorder.recordings)) == (1, 2)


def test_weights_changed_where_they_are_need_no_new_recording(plain: Pipeline, recorder: FakeRecorder) -> None:
    own = own_unet(plain)
    graphed = recording(own, recorder)
    walk(graphed, [ASKED])
    with torch.no_grad():
        own.model.unet.conv_in.weight.mul_(2)
    assert same(walk(graphed, [ASKED]), walk(own, [ASKED]))
    assert len(recorder.recordings) == 1


class Preparing(nn.Module):
    """Keeps a tensor made of its weight when it is first called, as fused layers may."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(2 * self.weight)
        return x * self.kept[0]


def test_what_layers_prepare_belongs_to_the_module() -> None:
    module, recorder = Preparing(), FakeRecorder()
    graphs = Graphs(recorder)

    def run(calls: int) -> list[Tensor]:
        bound = graphs.bind(module, lambda inputs, _: module(inputs[0]), "plain", [], calls)
        return [bound([torch.full((3,), float(i))]) for i in range(calls)]

    run(5)
    run(5)
    assert (recorder.warmed, len(recorder.recordings)) == (1, 1)
    before = state_of(module)
    module.kept[0] = 3 * module.weight
    assert state_of(module) != before
    assert torch.equal(run(5)[4], torch.full((3,), 12.0))
    assert (recorder.warmed, len(recorder.recordings), recorder.living) == (2, 2, 1)


# ---- failures ----


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, torch.AcceleratorError], ids=lambda e: e.__name__)
def test_a_step_that_cannot_be_recorded(
    plain: Pipeline, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence, and plain steps for good."""
    recorder = FakeRecorder(fails=error("operation not permitted\nwhen stream is capturing"))
    graphed = recording(plain, recorder)
    for requests in ([ASKED], [asked(width=72)], [ASKED]):
        assert same(walk(graphed, requests), walk(plain, requests))
    (line,) = warnings(caplog)
    assert "(operation not permitted)" in line
    assert recorder.warmed == 1


def test_memory_that_runs_out_while_a_step_is_recorded(
    plain: Pipeline, graphed: Pipeline, recorder: FakeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """What is recorded makes room; this shape is drawn plainly from then on, others are recorded."""
    walk(graphed, [ASKED])
    recorder.fails = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
    large = [asked(width=72)]
    assert same(walk(graphed, large), walk(plain, large))
    assert recorder.living == 0
    walk(graphed, [asked(width=80)])
    recorder.fails = None
    walk(graphed, large)
    assert recorder.living == 0
    assert same(walk(graphed, [ASKED]), walk(plain, [ASKED]))
    assert recorder.living == 1
    assert len(warnings(caplog)) == 1


def test_a_failed_recording_keeps_no_tensor(plain: Pipeline) -> None:
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
        walk(recording(plain, Failing()), [ASKED])
    finally:
        gc.enable()
    assert len(held) == 1


def test_a_lost_device_is_not_passed_over(plain: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    lost = torch.AcceleratorError("CUDA error: unspecified launch failure")
    for error in (RuntimeError("capture failed"), torch.OutOfMemoryError("CUDA out of memory.")):
        graphed = recording(plain, FakeRecorder(error, lost))
        with pytest.raises(torch.AcceleratorError, match="unspecified"):
            walk(graphed, [ASKED])
    assert warnings(caplog) == []


def test_a_function_that_asks_for_a_number_cannot_be_recorded(recorder: FakeRecorder) -> None:
    """The stand-in is as strict as a GPU."""
    with pytest.raises(RuntimeError, match="capturing"):
        recorder.record(lambda: torch.ones(1) * torch.ones(1).item())


# ---- real graphs ----

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
# As the recording is made in another stream, libraries may choose other kernels; what is read or written in the wrong
# place is off by far more.
CLOSE = 2e-3


@pytest.fixture(scope="module")
def on_gpu(embedded_folder: Path) -> tuple[Pipeline, Pipeline]:
    """The embedded model in fp16 on a GPU, with its steps recorded and plain."""
    from ldmcli.checkpoints.source import open_model
    from ldmcli.pipeline import load_pipeline

    runtimes = [policy.choose_runtime("cuda", "fp16", tuning=Tuning("torch", graph=graph)) for graph in (True, False)]
    source = dataclasses.replace(open_model(embedded_folder), half=True)
    graphed, plain = [load_pipeline(source, runtime) for runtime in runtimes]
    return graphed, plain


def close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(relative(*pair) < CLOSE for pair in zip(one, other, strict=True))


def recorded(pipeline: Pipeline) -> int:
    assert pipeline.model.graphs is not None
    return sum(kind.graph is not None for kind in pipeline.model.graphs._kinds.values())


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "lcm"])
def test_every_sampler_on_a_gpu(on_gpu: tuple[Pipeline, Pipeline], sampler: str) -> None:
    graphed, plain = on_gpu
    for settings in ({}, {"prompt": "a pear", "seed": 7}, {"guidance_scale": 2.0, "guidance_rescale": 0.7}):
        requests = [asked(sampler=sampler, **settings)]
        assert close(walk(graphed, requests), walk(plain, requests))
    assert recorded(graphed) > 0


@cuda
@pytest.mark.cuda
def test_batches_sizes_and_long_prompts_on_a_gpu(on_gpu: tuple[Pipeline, Pipeline]) -> None:
    graphed, plain = on_gpu
    shapes = ([ASKED], [ASKED, asked(seed=2)], [asked(width=96)], [asked(prompt=LONG, on_long_prompt="chunk")])
    for requests in (*shapes, [asked(guidance_interval=(0.5, 5.0), steps=12)], [ASKED]):
        assert close(walk(graphed, requests), walk(plain, requests))
    assert recorded(graphed) == KEPT


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler-a", "dpmpp-2m-sde", "unipc", "heun"])
@pytest.mark.parametrize("which", [0, 1], ids=["recorded", "plain"])
def test_the_loop_waits_for_nothing(on_gpu: tuple[Pipeline, Pipeline], which: int, sampler: str) -> None:
    """Not for the noise that the host draws either."""
    pipeline, request = on_gpu[which], fit_to_model(asked(sampler=sampler), on_gpu[which].config)
    walk(pipeline, [request])
    steps = Schedule(pipeline.config.schedule).steps(6, sampler)
    with torch.inference_mode():
        noise = SeededNoise([1], pipeline._latent_shape(request), pipeline.runtime.device)
        denoise, latents = pipeline.model.denoiser([request], steps), noise()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in SAMPLERS[sampler](denoise, latents, steps, noise, eta=0.5):
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.cuda
def test_in_float32_on_a_gpu(on_gpu: tuple[Pipeline, Pipeline]) -> None:
    graphed, plain = on_gpu
    before = walk(graphed, [ASKED])
    with graphed.in_float32(), plain.in_float32():
        assert close(walk(graphed, [ASKED]), walk(plain, [ASKED]))
        assert recorded(graphed) == 1
    assert close(walk(graphed, [ASKED]), before)


@cuda
@pytest.mark.cuda
def test_memory_comes_back(on_gpu: tuple[Pipeline, Pipeline]) -> None:
    graphed, _ = on_gpu
    graphed.model.free_graphs()
    before = torch.cuda.memory_reserved()
    walk(graphed, [asked(width=512, height=512)])
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    graphed.model.free_graphs()
    assert before <= torch.cuda.memory_reserved() < held


@cuda
@pytest.mark.cuda
def test_a_function_that_waits_cannot_be_recorded_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    """It is called plainly, in the stream of before, and the GPU goes on working."""
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, layer = Graphs(CudaRecorder(device)), nn.Linear(8, 8).to(device)

    def function(inputs: Sequence[Tensor], _: Any) -> Tensor:
        return layer(inputs[0]) * float(inputs[0].sum())

    stream = torch.cuda.current_stream()
    with torch.no_grad():
        call = graphs.bind(layer, function, "waits", [], 6)
        for i in range(6):
            x = torch.full((2, 8), float(i), device=device)
            torch.testing.assert_close(call([x]), function([x], []))
            assert torch.cuda.current_stream() == stream
        assert len(warnings(caplog)) == 1
        fine = Graphs(CudaRecorder(device)).bind(layer, lambda inputs, _: layer(inputs[0]), "fine", [], 6)
        for _ in range(6):
            torch.testing.assert_close(fine([x]), layer(x))
