"""--low-vram: one part at a time is on the device, and the pictures are the same bit for bit.

Here the device is the host itself: parts are copied to other memory and back all the same.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.errors import LdmError
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.speed import offload
from ldmcli.speed.offload import HOST, Stage

REQUESTS = [
    GenerationRequest(prompt, negative_prompt="fog", seed=seed, steps=2, width=32, height=32)
    for seed, prompt in enumerate(("a red apple", "a whale"))
]


def load(path: Path, dtype: str = "fp32", *, low_vram: bool = True, device: str = "cpu", **more: Any) -> Session:
    session = Session(ModelSpec(str(path), **more), RuntimeSpec(device, dtype, low_vram=low_vram and device != "cpu"))
    session.load()
    if low_vram and device == "cpu":
        pipeline_of(session).offload()
    return session


def pipeline_of(session: Session) -> Pipeline:
    assert session._drawer is not None
    return session._drawer.pipeline


def draw(session: Session, requests: Sequence[GenerationRequest] = REQUESTS) -> list[np.ndarray]:
    return [picture.pixels() for picture in session.draw(requests, batch_size=len(requests))]


def same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return len(one) == len(other) > 0 and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are brought, in order."""
    found: list[str] = []
    bring = Stage.bring

    def noting(self: Stage, part: nn.Module, *beside: nn.Module) -> None:
        if self.narrow and part is not self.present:
            found.append(type(part).__name__)
        bring(self, part, *beside)

    monkeypatch.setattr(Stage, "bring", noting)
    return found


# ---- pictures ----


def test_the_same_pictures(one_thread: None, model_folder: Path, moves: list[str]) -> None:
    """And each part comes when it is its turn: encoders only for prompts that were not seen."""
    plain, narrow = load(model_folder, low_vram=False), load(model_folder)
    other = [dataclasses.replace(request, prompt="another") for request in REQUESTS]
    for asked, brought in ((REQUESTS, ["TextTransformer"]), (REQUESTS, []), (other, ["TextTransformer"])):
        moves.clear()
        assert same(draw(narrow, asked), draw(plain, asked))
        assert moves == [*brought, "UNet", "AutoencoderKL"]


def test_a_refiner_and_two_encoders(family_models: Any, moves: list[str]) -> None:
    model, refiner = family_models.path("sdxl"), str(family_models.path("refiner"))
    asked = [dataclasses.replace(r, refiner_start=0.4, steps=4, width=16, height=16) for r in REQUESTS[:1]]
    plain, narrow = (load(model, low_vram=low_vram, refiner=refiner) for low_vram in (False, True))
    moves.clear()
    assert same(draw(narrow, asked), draw(plain, asked))
    assert [name for name in moves if name != "TextTransformer"] == ["UNet", "UNet", "AutoencoderKL"]
    assert moves.count("TextTransformer") == 3
    assert moves[-1] == "AutoencoderKL"


def test_a_second_pass(one_thread: None, model_folder: Path, moves: list[str]) -> None:
    """And each part comes once a pass: the autoencoder's decoder, its encoder, and the decoder again."""
    plain, narrow = load(model_folder, low_vram=False), load(model_folder)
    asked = [dataclasses.replace(REQUESTS[0], hires="2", hires_upscaler="lanczos", hires_steps=2)]
    assert same(draw(narrow, asked), draw(plain, asked))
    assert moves == ["TextTransformer", "UNet", *["AutoencoderKL"] * 2, "UNet", "AutoencoderKL"]


def test_only_the_part_at_work_is_there(model_folder: Path) -> None:
    session = load(model_folder)
    pipeline = pipeline_of(session)
    stage, there = pipeline.stage, []

    def note(*_: Any) -> None:
        found = type(stage.present).__name__
        if there[-1:] != [found]:  # encoders are called once a prompt
            there.append(found)
        for part, home in stage._parts.items():
            assert offload._holds(part, stage._away.get(part, home))

    parts = [part.decoder if part is pipeline.vae else part for part in stage._parts]
    handles = [part.register_forward_pre_hook(note) for part in parts]  # type: ignore[union-attr]
    draw(session, [dataclasses.replace(REQUESTS[0], steps=1)])
    for handle in handles:
        handle.remove()
    assert there == ["TextTransformer", "UNet", "AutoencoderKL"]
    stage.clear()
    note()
    assert there[-1] == "NoneType"


def test_float32_for_a_while(model_folder: Path) -> None:
    plain, narrow = load(model_folder, "bf16", low_vram=False), load(model_folder, "bf16")
    before = draw(plain)
    assert same(draw(narrow), before)
    pipeline = pipeline_of(narrow)
    with pipeline_of(plain).in_float32(), pipeline.in_float32():
        assert {p.dtype for p in pipeline.model.unet.parameters()} == {torch.float32}
        assert same(draw(narrow), draw(plain))
    assert {p.dtype for p in pipeline.model.unet.parameters()} == {torch.bfloat16}
    assert same(draw(narrow), before)


def test_a_vae_that_overflows_16_bits(model_folder: Path) -> None:
    def overflow(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output if output.dtype == torch.float32 else output * float("inf")

    found = []
    for low_vram in (False, True):
        session = load(model_folder, "bf16", low_vram=low_vram)
        vae: Any = pipeline_of(session).vae
        handle = vae.decoder.up_blocks[-1].register_forward_hook(overflow)
        found.append([*draw(session), *draw(session, REQUESTS[:1])])
        handle.remove()
        assert next(vae.parameters()).dtype == torch.float32
    assert same(*found)


def test_parts_leave_in_the_middle_of_a_run(model_folder: Path, moves: list[str]) -> None:
    session = load(model_folder, low_vram=False)
    wanted = draw(session)
    assert moves == []
    pipeline = pipeline_of(session)
    assert not pipeline.stage.may_narrow  # on a CPU nothing is gained
    for _ in range(2):
        pipeline.offload()
        assert same(draw(session), wanted)
    assert moves == ["UNet", "AutoencoderKL"] * 2


# ---- the stage itself ----


class Odd(nn.Module):
    """Weights of all kinds: in other orders in memory, with gaps, of several types, shared, empty; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(7, 6).T, requires_grad=False)
        self.sliced = nn.Parameter(torch.randn(8, 9)[:, 2:5], requires_grad=False)
        self.small = nn.Parameter(torch.randn(3).half(), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 4), requires_grad=False)
        self.same = self.small
        self.register_buffer("table", torch.arange(11))
        self.requires_grad_(False)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(module: nn.Module, wanted: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return list(found) == list(wanted) and all(
        found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items()
    )


@pytest.mark.parametrize("piece", [1, 600, 64 << 20])
def test_weights_of_all_kinds_come_and_go(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", piece)
    one, other = Odd(), Odd()
    wanted, others = state(one), state(other)
    names = dict(one.named_parameters())
    stage = Stage(HOST, narrow=True)
    with torch.inference_mode():
        for part in (one, other, one, one):
            stage.bring(part)
            assert equal(one, wanted)
            assert equal(other, others)
    assert dict(one.named_parameters()).keys() == names.keys()
    assert all(parameter is names[name] for name, parameter in one.named_parameters())
    assert not any(parameter.is_inference() for parameter in one.parameters())
    assert one.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert one.turned.stride() == (1, 6)
    home = stage._parts[one]
    assert len({tensor.untyped_storage().data_ptr() for tensor in home if tensor.numel()}) == {1: 8, 600: 6}.get(
        piece, 1
    )
    assert all(tensor.storage_offset() * tensor.itemsize % offload.ALIGNED == 0 for tensor in home)
    # What leaves goes nowhere: its memory at home was there all the time.
    assert {tensor.data_ptr() for tensor in one.parameters() if tensor.numel()}.isdisjoint(
        tensor.data_ptr() for tensor in home
    )


@pytest.mark.parametrize("at_work", [True, False])
def test_what_was_converted_meanwhile_is_not_lost(at_work: bool) -> None:
    part = nn.Linear(4, 4).requires_grad_(False)
    stage = Stage(HOST, narrow=True)
    stage.bring(part)
    if not at_work:
        stage.clear()
    part.bfloat16()
    with torch.no_grad():
        part.weight.data = part.weight.data * 2
    wanted = state(part)
    for _ in range(2):
        stage.clear()
        assert equal(part, wanted)
        stage.bring(part)
        assert equal(part, wanted)
    assert offload._holds(part, stage._away[part])


def test_a_part_larger_than_the_device() -> None:
    part = nn.Linear(4, 4)
    Stage(HOST, narrow=True, room=80).add(part)
    with pytest.raises(LdmError, match=r"Linear, a part of the model, needs 0.0 GiB .* has 0.0 GiB; use --dtype fp16"):
        Stage(HOST, narrow=True, room=79).add(part)
    Stage(HOST, room=1).add(part)


def test_parts_that_compute_together_are_there_together() -> None:
    parts = [nn.Linear(4, 4).requires_grad_(False) for _ in range(3)]
    wanted = [state(part) for part in parts]
    stage = Stage(HOST, narrow=True)
    stage.bring(parts[0], parts[1])
    assert set(stage._away) == {parts[0], parts[1]}
    places = [part.weight.data_ptr() for part in parts]
    stage.bring(parts[0], parts[1])
    assert [part.weight.data_ptr() for part in parts] == places
    stage.bring(parts[2])
    assert set(stage._away) == {parts[2]}
    stage.forget(parts[2])
    assert stage.present is None
    assert all(equal(part, before) for part, before in zip(parts, wanted, strict=True))


def test_a_device_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False)
    wanted = state(other)
    stage = Stage(HOST, narrow=True)
    stage.bring(one)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", _out_of_memory(torch.empty_like))
        with pytest.raises(LdmError, match="has too little free") as raised:
            stage.bring(other)
    assert raised.value.__cause__ is raised.value.__context__ is None
    assert stage.present is None
    stage.bring(other)
    assert stage.present is other
    assert equal(other, wanted)


def _out_of_memory(real: Any) -> Any:
    def empty_like(tensor: Tensor, **settings: Any) -> Tensor:
        if settings.get("device") == HOST:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(tensor, **settings)

    return empty_like


def test_no_pinned_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("ldmcli"), "propagate", True)
    empty = torch.empty

    def refusing(*size: Any, pin_memory: bool = False, **settings: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: no room\nand more")
        return empty(*size, **settings)

    monkeypatch.setattr(torch, "empty", refusing)
    with caplog.at_level(logging.DEBUG, "ldmcli"):
        assert offload._piece(12, pinned=True).shape == (12,)
    assert [record.message for record in caplog.records] == ["no pinned memory (CUDA error: no room); going on without"]


# ---- on a GPU ----

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=cuda) for dtype in ("fp32", "fp16", "bf16")])
def test_the_same_pictures_on_a_gpu(embedded_folder: Path, model_file: Path, dtype: str) -> None:
    for path in (embedded_folder, model_file):
        plain, narrow = (load(path, dtype, low_vram=low_vram, device="cuda") for low_vram in (False, True))
        wanted = draw(plain)
        assert same(draw(narrow), wanted)
        assert same(draw(narrow), wanted)
        pipeline_of(plain).offload()
        assert same(draw(plain), wanted)


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=cuda)])
def test_what_is_on_the_gpu(embedded_folder: Path, dtype: str) -> None:
    session = load(embedded_folder, dtype, device="cuda")
    pipeline = pipeline_of(session)
    unet, vae, stage = pipeline.model.unet, pipeline.vae, pipeline.stage
    assert {p.device.type for part in (unet, vae) for p in part.parameters()} == {"cpu"}
    before = torch.cuda.memory_allocated()
    draw(session)
    assert {p.device.type for p in vae.parameters()} == {"cuda"}
    assert {p.device.type for p in unet.parameters()} == {"cpu"}
    assert all(tensor.is_pinned() for tensor in stage._parts[unet])
    stage.clear()
    assert torch.cuda.memory_allocated() - before < max(sum(p.nbytes for p in unet.parameters()), 8 << 20)
