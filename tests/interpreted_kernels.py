"""The Triton kernels and the layers that use them, run on the CPU by Triton's interpreter.

Triton decides when it is imported whether its functions are interpreted, for all of a process: tests/test_kernels.py
runs this file in a process of its own, with TRITON_INTERPRET=1. The interpreter cuts float32 off to bfloat16 where a
card rounds, hence the wider bounds there.
"""

import contextlib
import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import UNetConfig, VAEConfig
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.speed.cuda import kernels
from ldmcli.speed.cuda.fused import compile_ahead, fuse
from ldmcli.speed.cuda.kernels import add_and_norm, add_bias_residual, geglu, group_norm_silu, kernels_work

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

WIDTHS = [4, 8, 10, 16, 20, 30, 40, 60, 80]  # channels of a group: of Stable Diffusion's VAE and U-Net
FP32, FP16, BF16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How much farther than the plain way from what float64 gives a kernel may be: no farther, but for chance.
SLACK = {FP32: 1.1, FP16: 1.1, BF16: 2.1}
ROUNDING = {FP32: 5e-7, FP16: 3e-4, BF16: 4e-3}
UNET = UNetConfig(
    block_channels=(20, 40), layers_per_block=1, attention=(1, 0), heads=(2, 2), context_dim=16, norm_groups=2
)
VAE = VAEConfig(block_channels=(8, 16), norm_groups=2, layers_per_block=1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(kernels, "DEVICES", {"cuda", "cpu"})
    kernels_work.cache_clear()
    yield
    kernels_work.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from here on."""
    names: list[str] = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k))[0])
    return names


@contextlib.contextmanager
def by_torch() -> Iterator[None]:
    """No kernel takes anything inside the block."""
    with mock.patch.object(kernels, "DEVICES", set()):
        yield


def normal(*shape: int, dtype: torch.dtype = FP32, seed: int = 1, device: str = "cpu") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def check(kernel: Callable[..., Any], *values: Any, slack: float | None = None, **settings: Any) -> list[Tensor]:
    """What a kernel gives is right but for rounding, and as near to that as torch's result in the same number type."""

    def results(dtype: torch.dtype | None = None) -> list[Tensor]:
        def own(value: Any) -> Any:  # a kernel may write over it
            if not isinstance(value, Tensor):
                return value
            return value.clone(memory_format=torch.preserve_format) if dtype is None else value.to(dtype)

        found = kernel(*map(own, values), **{name: own(value) for name, value in settings.items()})
        return list(found) if isinstance(found, tuple) else [found]

    with by_torch():
        plain, right = results(), results(torch.float64)
    found = results()
    for ours, theirs, exact in zip(found, plain, right, strict=True):
        assert ours.dtype == theirs.dtype
        assert slack or relative(ours, exact) < ROUNDING[ours.dtype]
        assert relative(ours, exact) < (slack or SLACK[ours.dtype]) * relative(theirs, exact) + 1e-7
    return found


def check_norm(x: Tensor, groups: int, shift: Tensor | None, *, activate: bool = True) -> None:
    weight, bias = normal(x.shape[1], dtype=x.dtype, seed=2), normal(x.shape[1], dtype=x.dtype, seed=3)
    (out,) = check(group_norm_silu, x, groups, weight, bias, 1e-5, shift=shift, activate=activate)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, dtype) for i, width in enumerate(WIDTHS) for dtype in (DTYPES if width in (10, 40) else [DTYPES[i % 3]])],
    ids=str,
)
def test_group_norm(width: int, dtype: torch.dtype, launches: list[str]) -> None:
    batch = 1 + width % 3 % 2
    size = (17, 19) if width < 20 else (5, 7)  # more pixels than a block has rows, and few
    x = normal(batch, 4 * width, *size, dtype=dtype) * 2 + 3
    check_norm(x, 4, normal(batch, 4 * width, dtype=dtype, seed=4) if width % 4 else None, activate=width != 30)
    assert launches == ["part_moments", "norm_parts"]


@pytest.mark.parametrize(
    ("shape", "groups", "shifts"),
    {
        "row for all": ((2, 20, 3, 5), 2, 1),
        "one pixel": ((2, 40, 1, 1), 2, None),
        "one group": ((1, 70, 3, 3), 1, 1),
        "wide groups": ((1, 600, 3, 11), 2, None),  # wider than a block is meant to be
        "odd groups": ((2, 3 * 100, 3, 13), 3, 2),  # the last block has room for one more
        "many parts": ((1, 12, 41, 53), 2, 1),  # 2,173 pixels: 64 parts and more blocks, the last short
    }.values(),
    ids=str,
)
def test_odd_maps(shape: tuple[int, ...], groups: int, shifts: int | None, launches: list[str]) -> None:
    check_norm(normal(*shape), groups, None if shifts is None else normal(shifts, shape[1]))
    assert launches


def test_shifts_that_lie_apart_and_few_parts(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    check_norm(normal(2, 20, 3, 5), 2, normal(2, 50)[:, 10:30])
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    check_norm(normal(1, 12, 41, 17), 2, normal(1, 12))  # 697 pixels in 3 parts of 8 blocks, the last short
    assert len(launches) == 4


def test_a_large_mean_cancels_nothing() -> None:
    """Sums of squares would lose all digits here; torch's own group norm of such maps does lose some."""
    x = normal(1, 20, 24, 24) + 1000
    weight, bias = torch.ones(20), torch.zeros(20)
    ours = group_norm_silu(x, 2, weight, bias, 1e-5, activate=False)
    right = group_norm_silu(x.double(), 2, weight.double(), bias.double(), 1e-5, activate=False)
    assert relative(ours, right) < 1.3e-4  # two of the last binary digit of 1000, for numbers near 1


def test_parts_cover_a_map() -> None:
    for pixels in (1, 64, 65, 4096, 4097, 262144, 1 << 20):
        for others in (1, 10, 160, 5000):
            part = kernels.part_pixels(pixels, others)
            assert part % kernels.ROWS == 0
            assert 1 <= -(-pixels // part) <= kernels.most_parts(pixels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_gates_and_layer_norms(dtype: torch.dtype, launches: list[str]) -> None:
    for shape in ((2, 5, 320), (3, 7, 40), (1, 3, 1280)):
        h, residual = (normal(*shape, dtype=dtype, seed=seed) * 2 + 1 for seed in (1, 2))
        bias, weight, norm_bias = (normal(shape[-1], dtype=dtype, seed=seed) for seed in (3, 4, 5))
        check(add_and_norm, h, bias, residual, weight, norm_bias, 1e-5)
        check(add_and_norm, h, bias, None, weight, norm_bias, 1e-5)
        check(add_bias_residual, h, bias, residual)
    for shape in ((2, 5, 2 * 80), (3, 2 * 257), (1, 9, 2 * 1)):
        check(geglu, normal(*shape, dtype=dtype) * 3)
    for channels in (3, 10, 64, 80):
        h, residual = (normal(2, channels, 7, 5, dtype=dtype, seed=seed) for seed in (1, 2))
        one, other = (normal(channels, dtype=dtype, seed=seed) for seed in (3, 4))
        check(add_bias_residual, h, one, residual)
        check(add_bias_residual, h, one, residual, other)
    assert launches == ["add_and_norm_rows", "add_and_norm_rows", "add_rows"] * 3 + ["gate"] * 3 + ["add_rows"] * 8


@pytest.mark.parametrize("refused", ["not channels last", "empty", "float64", "differentiated"])
def test_torch_computes_the_rest(refused: str, launches: list[str]) -> None:
    x = normal(2, 20, 4, 4)
    if refused == "not channels last":
        x = x.contiguous()
    elif refused == "empty":
        x = x[:0]
    elif refused == "float64":
        x = x.double()
    else:
        x.requires_grad_()
    weight, bias = torch.ones(20, dtype=x.dtype), torch.zeros(20, dtype=x.dtype)
    group_norm_silu(x, 2, weight, bias, 1e-5)
    add_bias_residual(x * 1, bias, x)
    geglu(x.permute(0, 3, 2, 1)[:, ::2] if refused == "not channels last" else x.permute(0, 2, 3, 1))
    assert not launches


def run(model: Any, inputs: torch.dtype) -> Tensor:
    """What a U-Net predicts, or a VAE decodes, for inputs that are rounded to a number type."""
    dtype = next(model.parameters()).dtype
    if isinstance(model, AutoencoderKL):
        return model.decode(normal(1, 4, 5, 3, dtype=inputs).to(dtype))
    context = model.project_context(normal(1, 7, 16, dtype=inputs).to(dtype))
    return model(normal(1, 4, 6, 5, dtype=inputs).to(dtype), normal(1, 80, dtype=inputs).to(dtype), context)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "dtype"), [("unet", FP32), ("unet", FP16), ("vae", FP32), ("vae", BF16)])
def test_fused_models(kind: str, dtype: torch.dtype, launches: list[str]) -> None:
    plain: nn.Module = UNet(UNET) if kind == "unet" else AutoencoderKL(VAE)
    randomise(plain, torch.Generator().manual_seed(0))
    plain.requires_grad_(False).eval().to(dtype, memory_format=torch.channels_last)
    fused: Any = fuse(copy.deepcopy(plain))
    theirs = run(plain, dtype)
    assert not launches
    ours = run(fused, dtype)
    kinds = Counter(type(part).__name__ for part in (fused.decoder if kind == "vae" else fused).modules())
    assert launches.count("part_moments") == launches.count("norm_parts") == kinds["FusedGroupNorm"]
    assert launches.count("add_rows") == kinds["FusedResnetBlock"] + 2 * kinds["FusedSpatialTransformer"]
    assert launches.count("add_and_norm_rows") == 3 * kinds["FusedTransformerBlock"]
    assert launches.count("gate") == kinds["FusedGEGLU"]
    right = run(plain.double(), dtype)
    # Half as much again: rounding in another order is another draw of the same error.
    most = 1.5 * SLACK[dtype] * relative(theirs, right) + 1e-6
    assert relative(ours, right) < (min(5e-6, most) if dtype == FP32 else most)


@torch.inference_mode()
@pytest.mark.parametrize("build", [lambda: UNet(UNET), lambda: AutoencoderKL(VAE)], ids=["unet", "vae"])
def test_what_is_launched_was_compiled_ahead(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel with its constants; those of large maps too."""
    found: set[Any] = set()
    monkeypatch.setattr(kernels, "_launch", lambda name, *_, **sizes: found.add((name, *sorted(sizes.items()))))
    monkeypatch.setattr(kernels, "_LARGE", 60)
    with torch.device("meta"):
        skeleton = build()
    compile_ahead(skeleton, torch.device("cpu"), FP16, [120])
    ahead = set(found)
    found.clear()
    model = fuse(build().requires_grad_(False).eval().to(FP16, memory_format=torch.channels_last))
    run(model, FP16)
    assert found
    assert found <= ahead


@pytest.mark.parametrize("lie", [None, *kernels.TRIALS])
def test_a_kernel_that_lies_or_fails_is_found(
    lie: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lie is None:
        assert kernels_work(torch.device("cpu"), FP16)
        return
    true, inputs = kernels.TRIALS[lie]

    def lying(*values: Any) -> Any:
        found = true(*values)
        if values[0].dtype == torch.float64:  # of which torch computes what is right
            return found
        return (found[0], found[1] * 1.01) if isinstance(found, tuple) else found * 1.01

    def failing(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nlong story")

    for wrong, told in ((lying, "comes out wrong"), (failing, "(Failed to find C compiler.)")):
        kernels_work.cache_clear()
        caplog.clear()
        monkeypatch.setitem(kernels.TRIALS, lie, (wrong, inputs))
        with caplog.at_level(logging.WARNING):
            assert not kernels_work(torch.device("cpu"), FP16)
        assert len(caplog.messages) == 1
        assert told in caplog.text
