"""Convolutions in fewer multiplications give the plain convolution's numbers, in bounded work space."""

import copy
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.networks.layers import Upsample
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.cpu import winograd
from ldmcli.speed.cpu.onednn import lay_out
from ldmcli.speed.policy import choose_runtime

CHANNELS_LAST = torch.channels_last
TOLERANCE = 1.5e-6  # about 1e-6 is seen, and 5e-7 of the plain convolution
WIDE, LARGE = winograd.CHANNELS, 40  # channels and pixels along a side from which it serves


def normal(*shape: int, seed: int = 1) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=CHANNELS_LAST) if values.ndim == 4 else values


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool = False) -> Tensor:
    x = F.interpolate(x.double(), scale_factor=2.0) if doubled else x.double()
    return F.conv2d(x, weight.double(), None if bias is None else bias.double(), padding=1)


def laid_out(layer: nn.Module, *, fold: bool = True) -> Any:
    randomise(layer, torch.Generator().manual_seed(0))
    return lay_out(layer.requires_grad_(False).eval().to(memory_format=CHANNELS_LAST), fold=fold)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the result of every convolution computed so from here on."""
    shapes: list[tuple[int, ...]] = []
    convolve = winograd.convolve

    def counting(*args: Any, **settings: Any) -> Tensor:
        out = convolve(*args, **settings)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(winograd, "convolve", counting)
    return shapes


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (1, 1), (2, 9), (5, 7), (6, 3), (16, 15), (33, 4)])
def test_numbers(size: tuple[int, int], doubled: bool) -> None:
    for batch, bias in ((1, None), (3, normal(17, seed=3))):
        x, weight = normal(batch, 24, *size), normal(17, 24, 3, 3, seed=2)
        out = winograd.convolve(x, weight, bias, doubled=doubled)
        assert relative(out, exact(x, weight, bias, doubled=doubled)) < TOLERANCE
        assert out.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("work", [1, 100_000, 300_000, 900_000, 3_000_000])  # from a row of tiles to all images at once
def test_strips(work: int, doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(5, 20, 22, 18), normal(28, 20, 3, 3, seed=2), normal(28, seed=3)
    monkeypatch.setattr(winograd, "WORK", work)
    strips = []
    compute = winograd._Strip.compute
    monkeypatch.setattr(winograd._Strip, "compute", lambda self, out: (strips.append(out), compute(self, out)))
    out = winograd.convolve(x, weight, bias, doubled=doubled)
    assert relative(out, exact(x, weight, bias, doubled=doubled)) < TOLERANCE
    assert sum(strip[..., 0].numel() for strip in strips) == out[:, 0].numel()  # nothing computed twice
    assert (len(strips) == 1) == (work == 3_000_000 and not doubled)


def test_weights_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights at the points take four times the room: never more than WEIGHTS bytes of them are there at a time."""
    x, weight, bias = normal(2, 20, 9, 8), normal(50, 20, 3, 3, seed=2), normal(50, seed=3)
    monkeypatch.setattr(winograd, "WEIGHTS", 4 * 36 * 20 * 16)
    sizes = []
    at_points = winograd._at_points

    def noting(part: Tensor) -> Tensor:
        there = at_points(part)
        sizes.append(there.nbytes)
        return there

    monkeypatch.setattr(winograd, "_at_points", noting)
    assert relative(winograd.convolve(x, weight, bias), exact(x, weight, bias)) < TOLERANCE
    assert len(sizes) == 4
    assert max(sizes) <= winograd.WEIGHTS


def test_a_picture_does_not_depend_on_its_neighbours_in_a_batch() -> None:
    x, weight = normal(3, 24, 12, 12), normal(24, 24, 3, 3, seed=2)
    x[1] *= 1e6
    out, alone = winograd.convolve(x, weight, None), winograd.convolve(x[2:], weight, None)
    assert relative(out[2:], alone) < TOLERANCE
    assert relative(out[:1], exact(x[:1], weight, None)) < TOLERANCE


def test_where_it_serves() -> None:
    large = normal(1, WIDE, LARGE, LARGE)
    assert winograd.suits(large, WIDE)
    assert not winograd.suits(large, WIDE - 1)  # as for an image's three channels
    assert not winograd.suits(large[:, 1:], WIDE)
    assert not winograd.suits(normal(1, WIDE, 20, 20), WIDE)
    assert winograd.suits(normal(1, WIDE, 20, 20), WIDE, doubled=True)
    assert winograd.suits(normal(4, WIDE, 20, 20), WIDE)
    assert not winograd.suits(large.contiguous(), WIDE)
    assert not winograd.suits(large.bfloat16(), WIDE)
    assert not winograd.suits(large.double(), WIDE)
    assert not winograd.suits(large.to("meta"), WIDE)


def test_layers_use_it_where_it_serves(calls: list[tuple[int, ...]]) -> None:
    """From one size to another and back; a weight laid out for oneDNN in between is plain again."""
    conv = laid_out(nn.Conv2d(WIDE, WIDE + 4, 3, padding=1))
    large, small = normal(1, WIDE, LARGE, LARGE), normal(1, WIDE, 8, 8)
    weight, bias = conv.weight.clone(), conv.bias.clone()
    with torch.inference_mode():
        first = conv(large)
        for x in (small, small, small, large, small, large):
            assert relative(conv(x), exact(x, weight, bias)) < TOLERANCE
        assert torch.equal(conv(large), first)
    assert calls == [(1, WIDE + 4, LARGE, LARGE)] * 4
    assert torch.equal(conv.state_dict()["weight"], weight)


@pytest.mark.parametrize(
    ("size", "geometry"),
    [(1, {}), (3, {}), (3, {"padding": 1, "stride": 2}), (3, {"padding": 2, "dilation": 2}),
     (3, {"padding": 1, "groups": 2}), (5, {"padding": 2})],
)  # fmt: skip
def test_other_convolutions_stay(size: int, geometry: dict[str, int], calls: list[tuple[int, ...]]) -> None:
    conv = laid_out(nn.Conv2d(WIDE, WIDE, size, **geometry))
    x, weight, bias = normal(1, WIDE, LARGE, LARGE), conv.weight.double(), conv.bias.double()
    with torch.inference_mode():
        assert relative(conv(x), F.conv2d(x.double(), weight, bias, **geometry)) < TOLERANCE
    assert not calls


def test_gradients_flow(calls: list[tuple[int, ...]]) -> None:
    conv, upsample = laid_out(nn.Conv2d(WIDE, WIDE, 3, padding=1)), laid_out(Upsample(WIDE))
    x = normal(1, WIDE, LARGE, LARGE).requires_grad_()
    for layer in (conv, upsample):
        layer(x).sum().backward()
    assert x.grad is not None
    conv.requires_grad_(True)
    conv(x.detach()).sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.abs().sum() > 0
    assert not calls


@pytest.mark.parametrize("fold", [True, False])
def test_upsampling(fold: bool, calls: list[tuple[int, ...]]) -> None:
    plain = Upsample(WIDE)
    fast, wanted = laid_out(copy.deepcopy(plain), fold=fold), plain
    randomise(wanted, torch.Generator().manual_seed(0))
    wanted = wanted.double()
    with torch.inference_mode():
        for height, width, size in ((20, 21, None), (8, 8, None), (20, 20, (40, 40)), (20, 20, (39, 40))):
            x = normal(1, WIDE, height, width)
            assert relative(fast(x, size), wanted(x.double(), size)) < TOLERANCE
    # At the last, odd size the map is grown first and convolved then.
    assert calls == [(1, WIDE, 40, 42), (1, WIDE, 40, 40), (1, WIDE, 39, 40)]


@pytest.mark.parametrize(("kernels", "served"), [("auto", True), ("torch", False)])
def test_the_user_may_do_without(kernels: str, served: bool, calls: list[tuple[int, ...]]) -> None:
    layers = nn.ModuleList([nn.Conv2d(WIDE, WIDE, 3, padding=1), Upsample(WIDE)]).requires_grad_(False)
    choose_runtime(RuntimeSpec(device="cpu", dtype="fp32", kernels=kernels)).prepare(layers)
    x = normal(1, WIDE, LARGE, LARGE)
    with torch.inference_mode():
        for layer in layers:
            layer(x)
    assert len(calls) == (2 if served else 0)
