"""The Triton kernels and the layers that use them, run on the CPU by Triton's interpreter.

Triton decides when it is imported whether its functions are interpreted, for all of a process: tests/test_kernels.py
runs this file in a process of its own, with TRITON_INTERPRET=1. The interpreter cuts float32 off to bfloat16 where a
card rounds, hence the wider bounds there.
"""

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import UNetConfig, VAEConfig
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.speed.cuda import choice, group_norm, rows, trial
from ldmcli.speed.cuda.fused import fuse
from ldmcli.speed.cuda.group_norm import group_norm_silu, groups_together, part_pixels, plain_group_norm_silu
from ldmcli.speed.cuda.rows import (
    add_and_norm,
    add_bias_residual,
    geglu,
    plain_add_and_norm,
    plain_add_bias_residual,
    plain_geglu,
)
from ldmcli.speed.cuda.trial import kernels_work

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

WIDTHS = [4, 8, 10, 16, 20, 30, 40, 60, 80]  # channels of a group: of Stable Diffusion's VAE and U-Net
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# How much farther than the plain way from what float64 gives a kernel may be: no farther, but for chance.
SLACK = {torch.float32: 1.1, torch.float16: 1.1, torch.bfloat16: 2.1}
ROUNDING = {torch.float32: 5e-7, torch.float16: 3e-4, torch.bfloat16: 4e-3}
UNET = UNetConfig(
    block_channels=(20, 40), layers_per_block=1, attention=(1, 0), heads=(2, 2), context_dim=16, norm_groups=2
)
VAE = VAEConfig(block_channels=(8, 16), norm_groups=2, layers_per_block=1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(choice, "DEVICES", choice.DEVICES | {"cpu"})
    monkeypatch.setattr(trial, "DEVICES", trial.DEVICES | {"cpu"})
    kernels_work.cache_clear()
    yield
    kernels_work.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from here on."""
    names: list[str] = []
    code = choice.code()
    assert code is not None
    for name in ("part_moments", "norm_parts", "gate", "add_rows", "add_and_norm_rows"):
        kernel = getattr(code, name)

        class Noted:
            def __getitem__(self, grid: Any, kernel: Any = kernel, name: str = name) -> Any:
                names.append(name)
                return kernel[grid]

        monkeypatch.setattr(code, name, Noted())
    return names


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


def no_farther(ours: Tensor, theirs: Tensor, right: Tensor) -> None:
    """`ours` is right but for rounding, and as near to it as `theirs`, the plain result in the same number type."""
    assert ours.dtype == theirs.dtype
    assert relative(ours, right) < ROUNDING[ours.dtype]
    assert relative(ours, right) < SLACK[ours.dtype] * relative(theirs, right) + 1e-7


def check_norm(x: Tensor, groups: int, shift: Tensor | None, *, activate: bool = True) -> None:
    weight, bias = normal(x.shape[1], dtype=x.dtype, seed=2), normal(x.shape[1], dtype=x.dtype, seed=3)
    settings: dict[str, Any] = {"shift": shift, "activate": activate}
    ours = group_norm_silu(x, groups, weight, bias, 1e-5, **settings)
    plain = plain_group_norm_silu(x, groups, weight, bias, 1e-5, **settings)
    wide = settings | {"shift": None if shift is None else shift.double()}
    right = plain_group_norm_silu(x.double(), groups, weight.double(), bias.double(), 1e-5, **wide)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    no_farther(ours, plain, right)


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
    "kind",
    ["row for all", "rows apart", "one pixel", "one group", "wide groups", "odd groups", "many parts", "few parts"],
)
def test_odd_maps(kind: str, monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    if kind == "row for all":
        check_norm(normal(2, 20, 3, 5), 2, normal(1, 20))
    elif kind == "rows apart":
        check_norm(normal(2, 20, 3, 5), 2, normal(2, 50)[:, 10:30])
    elif kind == "one pixel":
        check_norm(normal(2, 40, 1, 1), 2, None)
    elif kind == "one group":
        check_norm(normal(1, 70, 3, 3), 1, normal(1, 70))
    elif kind == "wide groups":
        check_norm(normal(1, 600, 3, 11), 2, None)  # wider than a block is meant to be
    elif kind == "odd groups":
        check_norm(normal(2, 3 * 100, 3, 13), 3, normal(2, 300))  # the last block has room for one more
    elif kind == "many parts":
        check_norm(normal(1, 12, 41, 53), 2, normal(1, 12))  # 2,173 pixels: 64 parts and more blocks, the last short
    else:
        monkeypatch.setattr(group_norm, "PROGRAMS", 3)
        check_norm(normal(1, 12, 41, 17), 2, normal(1, 12))  # 697 pixels in 3 parts of 8 blocks, the last short
    assert launches


def test_a_large_mean_cancels_nothing() -> None:
    """Sums of squares would lose all digits here; torch's own group norm of such maps does lose some."""
    x = normal(1, 20, 24, 24) + 1000
    weight, bias = torch.ones(20), torch.zeros(20)
    ours = group_norm_silu(x, 2, weight, bias, 1e-5, activate=False)
    right = plain_group_norm_silu(x.double(), 2, weight.double(), bias.double(), 1e-5, activate=False)
    assert relative(ours, right) < 1.3e-4  # two of the last binary digit of 1000, for numbers near 1


def test_parts_cover_a_map() -> None:
    for pixels in (1, 64, 65, 4096, 4097, 262144, 1 << 20):
        for others in (1, 10, 160, 5000):
            part = part_pixels(pixels, others)
            assert part % group_norm.ROWS == 0
            assert 1 <= -(-pixels // part) <= group_norm.PARTS


@pytest.mark.parametrize(
    ("width", "together"), [(4, 32), (8, 32), (10, 16), (16, 16), (20, 8), (30, 8), (80, 2), (300, 1)]
)
def test_a_block_has_whole_groups(width: int, together: int) -> None:
    assert groups_together(32, width) == together


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 320), (3, 7, 40), (1, 3, 1280)], ids=str)
def test_sum_with_its_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, launches: list[str]) -> None:
    h, residual = (normal(*shape, dtype=dtype, seed=seed) * 2 + 1 for seed in (1, 2))
    vectors = [normal(shape[-1], dtype=dtype, seed=seed) for seed in (3, 4, 5)]
    values = h, vectors[0], residual, *vectors[1:]
    plain = plain_add_and_norm(*values, 1e-5)
    right = plain_add_and_norm(*(value.double() for value in values), 1e-5)
    for found in zip(add_and_norm(*values, 1e-5), plain, right, strict=True):
        no_farther(*found)
    assert launches == ["add_and_norm_rows"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 2 * 80), (3, 2 * 257), (1, 9, 2 * 1)], ids=str)
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype, launches: list[str]) -> None:
    x = normal(*shape, dtype=dtype) * 3
    no_farther(geglu(x), plain_geglu(x), plain_geglu(x.double()))
    assert launches == ["gate"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 10, 64, 80])
@pytest.mark.parametrize("both", [False, True])
def test_sum(channels: int, dtype: torch.dtype, both: bool, launches: list[str]) -> None:
    h, residual = (normal(2, channels, 7, 5, dtype=dtype, seed=seed) for seed in (1, 2))
    biases = [normal(channels, dtype=dtype, seed=seed) for seed in (3, 4)][: 1 + both]
    values = h, biases[0], residual, *biases[1:]
    plain = plain_add_bias_residual(*values)
    right = plain_add_bias_residual(*(value.double() for value in values))
    no_farther(add_bias_residual(h, biases[0], residual, *biases[1:]), plain, right)
    assert launches == ["add_rows"]


@pytest.mark.parametrize("refused", ["not channels last", "empty", "float64", "differentiated"])
def test_the_twin_computes_the_rest(refused: str, launches: list[str]) -> None:
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
    ours = group_norm_silu(x, 2, weight, bias, 1e-5)
    assert ours.equal(plain_group_norm_silu(x, 2, weight, bias, 1e-5))
    assert add_bias_residual(x * 1, bias, x).equal(plain_add_bias_residual(x * 1, bias, x))
    tokens = x.permute(0, 3, 2, 1)[:, ::2] if refused == "not channels last" else x.permute(0, 2, 3, 1)
    assert geglu(tokens).equal(plain_geglu(tokens))
    assert not launches


def run(model: Any, inputs: torch.dtype) -> Tensor:
    """What a U-Net predicts, or a VAE decodes, for inputs that are rounded to a number type."""
    dtype = next(model.parameters()).dtype
    if isinstance(model, AutoencoderKL):
        return model.decode(normal(1, 4, 5, 3, dtype=inputs).to(dtype))
    context = model.project_context(normal(1, 7, 16, dtype=inputs).to(dtype))
    return model(normal(1, 4, 6, 5, dtype=inputs).to(dtype), normal(1, 80, dtype=inputs).to(dtype), context)


def models(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A U-Net or VAE with random weights, and the same fused."""
    plain: nn.Module = UNet(UNET) if kind == "unet" else AutoencoderKL(VAE)
    randomise(plain, torch.Generator().manual_seed(0))
    plain.requires_grad_(False).eval().to(dtype, memory_format=torch.channels_last)
    return plain, fuse(copy.deepcopy(plain))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("unet", torch.float32), ("unet", torch.float16), ("vae", torch.float32), ("vae", torch.bfloat16)],
)
def test_fused_models(kind: str, dtype: torch.dtype, launches: list[str]) -> None:
    plain, fused = models(kind, dtype)

    theirs = run(plain, dtype)
    assert not launches
    ours = run(fused, dtype)
    kinds = Counter(type(part).__name__ for part in (fused.decoder if kind == "vae" else fused).modules())
    norms = kinds["FusedGroupNorm"]
    assert launches.count("part_moments") == launches.count("norm_parts") == norms
    assert launches.count("add_rows") == kinds["FusedResnetBlock"] + kinds["FusedSpatialTransformer"]
    assert launches.count("add_and_norm_rows") == 2 * kinds["FusedTransformerBlock"]
    assert launches.count("gate") == kinds["FusedGEGLU"]
    right = run(plain.double(), dtype)
    bound = {torch.float32: 5e-6, torch.float16: 1.0, torch.bfloat16: 1.0}[dtype]
    # Half as much again: rounding in another order is another draw of the same error.
    assert relative(ours, right) < min(bound, 1.5 * SLACK[dtype] * relative(theirs, right) + 1e-6)


def test_a_check_passes() -> None:
    assert kernels_work(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("lie", ["geglu", "add_bias_residual", "group_norm_silu", "add_and_norm"])
def test_a_kernel_that_lies_is_found(
    lie: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = group_norm if lie == "group_norm_silu" else rows
    true = getattr(module, lie)

    def lying(*values: Any, **settings: Any) -> Any:
        found = true(*values, **settings)
        return (found[0], found[1] * 1.01) if isinstance(found, tuple) else found * 1.01

    monkeypatch.setattr(module, lie, lying)
    with caplog.at_level(logging.WARNING):
        assert not kernels_work(torch.device("cpu"), torch.float16)
    assert len(caplog.messages) == 1
    assert "comes out wrong" in caplog.text


def test_a_kernel_that_fails_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_compiler(*values: Any, **settings: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nlong story")

    monkeypatch.setattr(group_norm, "group_norm_silu", no_compiler)
    with caplog.at_level(logging.WARNING):
        assert not kernels_work(torch.device("cpu"), torch.float16)
    assert "(Failed to find C compiler.)" in caplog.text
