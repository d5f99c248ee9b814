"""Session, the Python API: what it draws, how it tells of it, and that what fails takes nothing else with it."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import ldm_here, pixels, tiny_model, tiny_single_file
from conftest import load, loaded, open_session
from oracle.comparing import pictures_of, pixels_apart
from torch import Tensor, nn

from ldmcli import GenerationRequest, Session
from ldmcli.errors import LdmError, NotFiniteError, UsageError
from ldmcli.fitting import FittedRequest
from ldmcli.images.metadata import read_record
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.session.drawing import DeviceLostError
from ldmcli.session.picture import Picture
from ldmcli.session.session import CancelledError, Progress
from ldmcli.spec import RuntimeSpec
from ldmcli.speed import policy
from ldmcli.speed.offload import Stage

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3


@pytest.fixture
def session() -> Iterator[Session]:
    with open_session(tiny_model()) as session:
        yield session


def asked(count: int, **settings: Any) -> list[GenerationRequest]:
    own = {"steps": STEPS, "width": 16, "height": 16, "guidance_scale": 7.5, "sampler": "ddim"} | settings
    return [GenerationRequest(f"prompt {seed}", seed=seed, **own) for seed in range(count)]


def drawn(session: Session, requests: Sequence[GenerationRequest | FittedRequest], size: int = 1) -> np.ndarray:
    return np.stack([picture.pixels() for picture in session.draw(requests, batch_size=size)])


# ---- the API ----


def test_the_root_names_the_public_classes_and_imports_nothing_heavy() -> None:
    code = """
        import sys
        import ldmcli
        lazy = {"Session", "GenerationRequest", "LoRA", "ModelSpec", "RuntimeSpec"}
        assert set(ldmcli.__all__) <= set(dir(ldmcli)) | lazy
        from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
        session = Session()
        assert (session.spec, session.runtime_spec) == (ModelSpec(), RuntimeSpec())
        fitted = session.fit(GenerationRequest("a star"))
        assert fitted.steps and fitted.width and fitted.sampler
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
    import ldmcli

    assert not hasattr(ldmcli, "Sessions")


def test_pictures_in_order_lazily_with_all_that_is_known_of_them(session: Session) -> None:
    requests = asked(3)
    found = list(session.draw(requests, batch_size=2))
    wanted = pictures_of(load(tiny_model()), requests[:2])
    for i, (picture, request) in enumerate(zip(found, requests, strict=True)):
        assert isinstance(picture, Picture)
        assert picture.request == session.fit(request)
        assert picture.pixels().dtype == np.uint8
        assert picture.pixels().shape == (16, 16, 3)
        assert picture.pixels() is picture.pixels()
        assert picture.latents.shape == (1, 4, 16 // session.config.vae.factor, 16 // session.config.vae.factor)
        assert picture.seconds > 0
        assert picture.runtime == {"device": "cpu", "dtype": "fp32", "attention": "sdpa", "torch": torch.__version__}
        if i < len(wanted):
            assert np.array_equal(picture.pixels(), wanted[i])


def test_requests_as_asked_and_as_fitted_are_drawn_alike(session: Session) -> None:
    requests = asked(2)
    assert np.array_equal(drawn(session, requests), drawn(session, [session.fit(request) for request in requests]))
    other = session.fit(requests[0]).with_seed(1)
    assert other.recorded.seed == other.seed == 1


def test_a_request_that_does_not_fit_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="multiples of"):
        session.fit(GenerationRequest("a", width=17))
    with pytest.raises(UsageError, match="--refiner"):
        session.fit(GenerationRequest("a", refiner_start=0.5))


def test_the_record_is_what_txt2img_writes(session: Session, tmp_path: Path) -> None:
    request = asked(1)[0]
    settings = ["--steps", "3", "--width", "16", "--height", "16", "--guidance-scale", "7.5", "--sampler", "ddim"]
    how = ["--device", "cpu", "--dtype", "fp32", "--threads", "1", "--no-cache", "-s", "0"]
    written = ldm_here("txt2img", request.prompt, "-m", tiny_model(), *settings, *how, "-o", tmp_path)
    (path,) = written.paths
    record = read_record(path)
    (picture,) = session.draw([request])
    assert record["request"] == json.loads(json.dumps(picture.request.to_dict()))
    assert record["model"] == session.identity()
    assert record["runtime"] == picture.runtime
    assert np.array_equal(pixels(path), picture.pixels())


def test_requests_are_taken_as_they_are_needed(session: Session) -> None:
    taken: list[int] = []

    def endless() -> Iterator[GenerationRequest]:
        while True:
            taken.append(1)
            yield asked(1, steps=1)[0]

    pictures = session.draw(endless(), batch_size=2)
    assert taken == []
    for count in (2, 2, 4, 4, 6):
        next(pictures)
        assert len(taken) == count


# ---- steps ----


def test_every_step_is_told_of(session: Session) -> None:
    told: list[Progress] = []
    session_pictures = list(session.draw(asked(3), batch_size=2, on_step=told.append))
    assert [progress.done for progress in told] == [*range(STEPS + 1)] * 2
    assert {progress.steps for progress in told} == {STEPS}
    assert [len(progress.latents) for progress in told] == [2] * (STEPS + 1) + [1] * (STEPS + 1)
    assert [request.seed for request in told[0].requests] == [0, 1]
    assert torch.equal(told[-1].latents, session_pictures[-1].latents)


@pytest.mark.parametrize("at", [0, 1, STEPS])
def test_what_is_written_into_the_latents_is_gone_on_with(session: Session, at: int) -> None:
    def write(progress: Progress) -> None:
        if progress.done == at:
            progress.latents.copy_(progress.latents.flip(-1))

    (plain,) = session.draw(asked(1))
    (changed,) = session.draw(asked(1), on_step=write)
    assert not np.array_equal(plain.pixels(), changed.pixels())
    if at == STEPS:
        assert torch.equal(changed.latents, plain.latents.flip(-1))


class Enough(Exception):
    pass


def test_what_on_step_raises_ends_the_drawing_and_nothing_else(session: Session) -> None:
    wanted = drawn(session, asked(2), 2)

    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise Enough

    with pytest.raises(Enough):
        next(session.draw(asked(2), batch_size=2, on_step=stop))
    assert np.array_equal(drawn(session, asked(2), 2), wanted)


def test_cancelled_from_within(session: Session) -> None:
    done: list[int] = []

    def cancel(progress: Progress) -> None:
        done.append(progress.done)
        session.cancel()

    with pytest.raises(CancelledError):
        list(session.draw(asked(2), on_step=cancel))
    assert done == [0]
    assert len(drawn(session, asked(1))) == 1


def test_cancelled_from_another_thread(session: Session) -> None:
    started, may_go_on, raised = threading.Event(), threading.Event(), []

    def wait(progress: Progress) -> None:
        started.set()
        assert may_go_on.wait(60)

    def draw() -> None:
        try:
            list(session.draw(asked(2), on_step=wait))
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    assert started.wait(60)
    session.cancel()
    may_go_on.set()
    thread.join(60)
    assert len(raised) == 1
    assert len(drawn(session, asked(1))) == 1


# ---- a guest in its process ----


def test_closing_gives_memory_back_and_drawing_reads_it_again(session: Session) -> None:
    (before,) = session.draw(asked(1))
    parameter = weakref.ref(next(loaded(session).model.unet.parameters()))
    kept = before.pixels().copy()
    session.close()
    gc.collect()
    assert parameter() is None  # though a picture of it is there
    assert np.array_equal(before.pixels(), kept)
    session.close()
    assert np.array_equal(drawn(session, asked(1))[0], kept)


def test_two_sessions_do_not_disturb_each_other(session: Session) -> None:
    others = asked(3, width=24)
    with open_session(tiny_single_file()) as other:
        wanted = drawn(session, asked(3)), drawn(other, others)
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for one, two in zip(session.draw(asked(3)), other.draw(others), strict=True):
            found[0].append(one.pixels())
            found[1].append(two.pixels())
    assert all(np.array_equal(np.stack(some), all_) for some, all_ in zip(found, wanted, strict=True))
    session.close()
    assert len(drawn(session, asked(1))) == 1


def test_threads_draw_with_one_session_at_once(session: Session) -> None:
    wanted = [drawn(session, [request])[0] for request in asked(4)]
    found: dict[int, np.ndarray] = {}

    def draw(i: int) -> None:
        found[i] = drawn(session, [asked(4)[i]])[0]

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(np.array_equal(found[i], wanted[i]) for i in range(4))


def test_nothing_of_the_process_is_touched() -> None:
    """Neither the number of threads, nor the collector, nor the log, nor how it ends; no memory setting of libc's."""
    code = """
        import atexit, ctypes, gc, logging, os, signal, sys
        import torch
        touched = []
        os._exit = lambda code: touched.append("_exit")
        gc.freeze = lambda: touched.append("freeze")
        gc.disable = lambda: touched.append("disable")
        torch.set_num_threads(2)
        from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
        from ldmcli.speed.cpu import heap
        heap.keep_freed_memory = lambda: touched.append("mallopt")
        environment = dict(os.environ)
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        grad, dtype, sampled = torch.is_grad_enabled(), torch.get_default_dtype(), torch.random.get_rng_state()
        with Session(ModelSpec(sys.argv[1]), RuntimeSpec(device="cpu", threads=1, cache=False)) as session:
            pictures = session.draw([GenerationRequest("a", steps=2, width=16, height=16)] * 3, batch_size=2)
            for picture in pictures:
                picture.pixels()
                assert torch.get_num_threads() == 2, torch.get_num_threads()
        session.identity()
        assert touched == [], touched
        assert environment == dict(os.environ)
        assert signals == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert not logging.getLogger().handlers and not logging.getLogger("ldmcli").handlers
        assert logging.getLogger("ldmcli").level == logging.NOTSET and logging.getLogger("ldmcli").propagate
        assert gc.isenabled() and gc.get_freeze_count() == 0
        assert torch.is_grad_enabled() == grad and torch.get_default_dtype() == dtype
        assert torch.equal(torch.random.get_rng_state(), sampled)
        atexit.register(print, "ended as usual", flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tiny_model())],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ended as usual\n"
    assert done.stderr == ""


# ---- what is drawn together ----


def batches(monkeypatch: pytest.MonkeyPatch, limit: Callable[[Pipeline, Sequence[FittedRequest]], None]) -> list[int]:
    """The sizes of the batches that pipelines are asked for; `limit` may raise first."""
    sizes: list[int] = []
    draw = Pipeline.draw

    def limited(self: Pipeline, requests: Sequence[FittedRequest], *more: Any) -> Any:
        sizes.append(len(requests))
        limit(self, requests)
        return draw(self, requests, *more)

    monkeypatch.setattr(Pipeline, "draw", limited)
    return sizes


def test_what_agrees_is_drawn_together_and_comes_in_the_order_asked_for(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings, and prompts that are read in other numbers of chunks, are drawn apart."""
    first, second = asked(3), asked(2, steps=2)
    texts = ["a pear", "a whale, " * 40, "a plum", "a rose, " * 40]
    long = [dataclasses.replace(first[0], prompt=text, on_long_prompt="chunk") for text in texts]
    mixed = [first[0], second[0], first[1], *long, second[1], first[2]]
    alone = drawn(session, mixed)
    sizes = batches(monkeypatch, lambda *_: None)
    found = list(session.draw(mixed, batch_size=len(mixed)))
    assert sorted(sizes) == [2, 2, 2, 3]
    assert [picture.request.recorded for picture in found] == mixed
    assert pixels_apart(np.stack([picture.pixels() for picture in found]), alone) <= 1


def test_a_picture_does_not_depend_on_its_batch(session: Session) -> None:
    requests = asked(8, sampler="euler-a")
    whole = drawn(session, requests, 8)
    assert all(pixels_apart(drawn(session, requests, size), whole) <= 1 for size in (1, 3))


# ---- memory ----


def no_room(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")


def test_out_of_memory_halves_the_batch_and_is_remembered(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(session, asked(8), 8)
    sizes = batches(monkeypatch, lambda _, requests: no_room() if len(requests) > 2 else None)
    assert pixels_apart(drawn(session, asked(8), 8), wanted) <= 1
    assert sizes == [8, 4, 2, 2, 2, 2]
    sizes.clear()
    assert pixels_apart(drawn(session, asked(5), 5), wanted[:5]) <= 1
    assert sizes == [2, 2, 1]
    sizes.clear()
    drawn(session, asked(2, width=24), 2)  # another size has another limit
    assert sizes == [2]


def test_out_of_memory_alone_decodes_in_strips(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(session, asked(2), 2)
    tiled: list[bool] = []
    sizes = batches(monkeypatch, lambda self, _: tiled.append(self.tile_vae) or (self.tile_vae or no_room()))
    assert pixels_apart(drawn(session, asked(2), 2), wanted) <= 1
    assert pixels_apart(drawn(session, asked(1)), wanted[:1]) <= 1
    assert sizes == [2, 1, 1, 1, 1]
    assert tiled == [False, False, True, True, True]


def test_out_of_memory_at_last_offloads(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """After strips; from then on only the part at work is on the device."""
    wanted = drawn(session, asked(2))
    pipeline = loaded(session)
    monkeypatch.setattr(Stage, "may_narrow", property(lambda self: not self.narrow))
    seen: list[tuple[bool, bool]] = []

    def limit(self: Pipeline, _: Any) -> None:
        seen.append((self.tile_vae, self.stage.narrow))
        if not self.stage.narrow:
            no_room()

    batches(monkeypatch, limit)
    assert pixels_apart(drawn(session, asked(2)), wanted) <= 1
    assert seen == [(False, False), (True, False), (True, True), (True, True)]
    assert pipeline.runtime.low_vram


def test_out_of_memory_whatever_is_done_fails_that_picture(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batches(monkeypatch, lambda _, requests: no_room() if requests[0].width == 32 else None)
    big, small = asked(1, width=32)[0], asked(1)[0]
    first, failed, last = session.draw([small, big, small], batch_size=3)
    assert np.array_equal(first.pixels(), last.pixels())
    with pytest.raises(
        LdmError, match=r"^out of memory, even alone and decoded in strips; ask for a smaller picture\.$"
    ):
        failed.pixels()
    assert failed.seconds == 0
    drawn(session, [small])
    assert not loaded(session).tile_vae  # only the big size is decoded in strips


# ---- pictures that fail ----


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotFiniteError("the U-Net gave numbers that are not finite."), "the U-Net gave numbers"),
        (RuntimeError("shapes \x1b[31m do not\nmatch"), r"RuntimeError: shapes \x1b[31m do not."),
    ],
)
def test_one_picture_takes_no_other_with_it(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def limit(_: Pipeline, requests: Sequence[FittedRequest]) -> None:
        if any(request.seed == 5 for request in requests):
            raise error

    wanted = drawn(session, asked(8), 8)
    sizes = batches(monkeypatch, limit)
    found = list(session.draw(asked(8), batch_size=8))
    assert sizes == [8, 4, 4, 2, 1, 1, 2]
    with pytest.raises(LdmError) as raised:
        found.pop(5).pixels()
    assert str(raised.value).startswith(told)
    assert str(raised.value).isprintable()
    rest = np.stack([picture.pixels() for picture in found])
    assert pixels_apart(rest, np.delete(wanted, 5, axis=0)) <= 1


def test_a_prompt_that_cannot_be_encoded_fails_alone(session: Session) -> None:
    weighted = dataclasses.replace(asked(1)[0], prompt_syntax="weighted")
    requests = [dataclasses.replace(weighted, prompt=text) for text in ("a", "(b:1.2.3)", "c")]
    found = list(session.draw(requests, batch_size=3))
    with pytest.raises(LdmError, match="is no weight"):
        found[1].pixels()
    for i in (0, 2):
        assert np.array_equal(found[i].pixels(), drawn(session, [requests[i]])[0])


def test_a_lost_device_ends_the_drawing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that would be drawn after it could be: no picture is to blame."""

    def limit(_: Pipeline, requests: Sequence[FittedRequest]) -> None:
        if requests[0].seed == 2:
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nCUDA …")

    batches(monkeypatch, limit)
    found: list[Picture] = []
    with pytest.raises(DeviceLostError, match="illegal memory access") as raised:
        found.extend(session.draw(asked(4)))
    assert raised.value.exit_code == 75
    assert [picture.request.seed for picture in found] == [0, 1]
    assert found[1].pixels().any()


# ---- numbers that are not finite ----


def overflowing(module: nn.Module, *, always: bool = False) -> Any:
    """From now on the module gives no finite numbers: in 16 bits, or `always`."""

    def overflow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * float("inf") if always or output.dtype != torch.float32 else output

    return module.register_forward_hook(overflow)


def test_latents_that_are_not_finite_are_drawn_again_in_float32(session: Session) -> None:
    """That picture alone; the weights are afterwards what they were."""
    wanted = drawn(session, asked(1))
    with open_session(tiny_model(), dtype="bf16") as halved:
        unet = loaded(halved).model.unet
        before = {name: weight.clone() for name, weight in unet.state_dict().items()}
        handle = overflowing(unet)
        (picture,) = halved.draw(asked(1))
        assert picture.runtime["dtype"] == "bf16"  # nobody has looked at it
        found = picture.pixels()
        handle.remove()
        assert picture.runtime["dtype"] == "fp32"
        assert picture.latents.isfinite().all()
        assert np.abs(found.astype(int) - wanted[0]).mean() < 6
        after = unet.state_dict()
        assert all(weight.dtype == torch.bfloat16 and torch.equal(weight, after[n]) for n, weight in before.items())
        (next_one,) = halved.draw(asked(1))
        next_one.pixels()
        assert next_one.runtime["dtype"] == "bf16"


def test_a_vae_that_overflows_is_widened_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The latents stay; having failed once, the VAE is not tried in 16 bits again."""
    with open_session(tiny_model(), dtype="bf16") as halved:
        pipeline = loaded(halved)
        (plain,) = halved.draw(asked(1))
        wanted = plain.pixels()
        handle = overflowing(pipeline.vae.decoder.up_blocks[-1])
        first, second = halved.draw(asked(2), batch_size=2)
        assert np.abs(first.pixels().astype(int) - wanted).mean() < 6
        assert second.pixels().any()
        assert torch.equal(first.latents, next(iter(halved.draw(asked(2), batch_size=2))).latents)
        assert first.runtime["dtype"] == "bf16"
        assert next(pipeline.vae.parameters()).dtype == torch.float32
        assert pipeline.model.unet.conv_in.weight.dtype == torch.bfloat16
        handle.remove()
    told = [record.message for record in caplog.records if "overflowed" in record.message]
    assert told == ["the VAE overflowed in 16 bits; decoding in float32"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["U-Net", "VAE"])
def test_numbers_that_are_never_finite_fail_the_picture(part: str, dtype: str) -> None:
    with open_session(tiny_model(), dtype=dtype) as broken:
        pipeline = loaded(broken)
        module = pipeline.model.unet if part == "U-Net" else pipeline.vae.decoder
        handle = overflowing(module, always=True)
        (picture,) = broken.draw(asked(1))
        with pytest.raises(
            NotFiniteError, match=f"the {part} gave numbers that are not finite; its weights may be dam"
        ):
            picture.pixels()
        handle.remove()
        assert len(drawn(broken, asked(1))) == 1


@pytest.mark.parametrize(
    ("words", "alone"), [(["a pear"], True), (["a pear", "a fig"], False), (["a", "-c", "2"], False)]
)
def test_a_command_says_whether_it_draws_one_picture_alone(
    words: list[str], alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[bool] = []

    choose = policy.choose_runtime

    def heard_of(spec: RuntimeSpec, *, alone: bool) -> policy.Runtime:
        heard.append(alone)
        return choose(spec, alone=alone)

    monkeypatch.setattr(policy, "choose_runtime", heard_of)
    drawn = ldm_here("txt2img", "-m", tiny_model(), *words, "--steps", "1", "-o", tmp_path, "--no-server")
    assert drawn.code == 0, drawn
    assert heard == [alone]
