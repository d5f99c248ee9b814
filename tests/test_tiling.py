"""Tiled decoding gives the picture of the plain decode, with less held in memory."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.models import tiling
from ldmcli.models.taesd import TinyVAE
from ldmcli.models.vae import AutoencoderKL


@pytest.fixture(scope="module")
def small_vae(one_thread: None) -> AutoencoderKL:
    """Random weights in float64, so that rounding hides nothing; one level has no shortcut, one only upsampling."""
    vae = AutoencoderKL(VAEConfig(block_channels=(8, 16, 16), layers_per_block=1, norm_groups=4))
    randomise(vae, torch.Generator().manual_seed(0))
    return vae.double().requires_grad_(False).eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 4, 1, 1), (3, 4, 7, 5), (2, 4, 13, 1), (1, 4, 3, 40)])
@pytest.mark.parametrize("strip", [1, 300, 5000, 1 << 23])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tiled_is_the_plain_decode(
    small_vae: AutoencoderKL,
    shape: tuple[int, ...],
    strip: int,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strips of one row, of some, and of all: always the picture of the plain decode."""
    monkeypatch.setattr(tiling, "STRIP", strip)
    latents = normal(*shape).contiguous(memory_format=memory_format)
    torch.testing.assert_close(tiling.decode_tiled(small_vae, latents), small_vae.decode(latents))


def test_tiling_leaves_latents_and_weights_alone(small_vae: AutoencoderKL) -> None:
    latents = normal(1, 4, 6, 6)
    before = [tensor.clone() for tensor in [latents, *small_vae.parameters()]]
    first = tiling.decode_tiled(small_vae, latents)
    assert torch.equal(tiling.decode_tiled(small_vae, latents), first)
    assert all(torch.equal(one, other) for one, other in zip(before, [latents, *small_vae.parameters()], strict=True))


def test_tiling_in_16_bits(small_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from the exact picture than the plain decode, whose rounding it shares."""
    monkeypatch.setattr(tiling, "STRIP", 2000)
    latents = normal(1, 4, 16, 16)
    halved = AutoencoderKL(small_vae.config).bfloat16()
    halved.load_state_dict(small_vae.state_dict())
    exact = small_vae.decode(latents)
    with torch.inference_mode():
        plain, tiled = (decode(latents.bfloat16()) for decode in (halved.decode, tiled_by(halved)))
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).norm() < 1.1 * (plain - exact).norm()


def tiled_by(vae: AutoencoderKL | TinyVAE) -> Callable[[Tensor], Tensor]:
    return lambda latents: tiling.decode_tiled(vae, latents)


def largest_input(vae: AutoencoderKL, decode: Callable[[Tensor], Tensor], latents: Tensor) -> int:
    """The most numbers that a convolution works on at once, of those behind the middle block."""
    sizes: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, inputs: sizes.append(inputs[0].numel()))
        for layer in vae.decoder.up_blocks.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    decode(latents)
    for hook in hooks:
        hook.remove()
    return max(sizes)


def test_work_space_does_not_grow_with_the_picture(small_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "STRIP", 10_000)
    small, large = normal(1, 4, 16, 16), normal(1, 4, 32, 32)
    assert largest_input(small_vae, small_vae.decode, large) == 4 * largest_input(small_vae, small_vae.decode, small)
    assert largest_input(small_vae, small_vae.decode, large) > 200_000
    assert largest_input(small_vae, tiled_by(small_vae), large) < 30_000  # a strip, and the rows around it


@pytest.fixture(scope="module")
def small_taesd(one_thread: None) -> TinyVAE:
    vae = TinyVAE(TinyVAEConfig(channels=4, blocks=(1, 2, 1, 1)))
    randomise(vae, torch.Generator().manual_seed(0))
    return vae.double().requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 9, 5), (2, 4, 20, 17), (1, 4, 41, 1)])
def test_tiled_taesd_is_the_plain_decode(
    small_taesd: TinyVAE, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "TILE", 8)
    latents = 3 * normal(*shape)
    torch.testing.assert_close(tiling.decode_tiled(small_taesd, latents), small_taesd.decode(latents))


def test_taesd_tiles_are_bounded(small_taesd: TinyVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    decode = small_taesd.decode

    def seeing(latents: Tensor) -> Tensor:
        seen.append(tuple(latents.shape))
        return decode(latents)

    monkeypatch.setattr(tiling, "TILE", 8)
    monkeypatch.setattr(small_taesd, "decode", seeing)
    margin = tiling.receptive_field(small_taesd.config.blocks)
    tiling.decode_tiled(small_taesd, normal(1, 4, 40, 20))
    assert len(seen) == 5 * 3
    assert max(max(shape[2:]) for shape in seen) == 8 + 2 * margin


def test_taesd_receptive_field(small_taesd: TinyVAE) -> None:
    """The margin of a tile is no smaller than it must be, and not much larger."""
    margin = tiling.receptive_field(small_taesd.config.blocks)
    latents = normal(1, 4, 1, 2 * margin + 9)
    changed = latents.clone()
    changed[..., 0] += 3
    apart = (small_taesd.decode(latents) - small_taesd.decode(changed)).abs().sum(dim=(0, 1, 2))
    reached = int(apart.nonzero().max()) // 8
    assert margin - 2 <= reached <= margin


@pytest.mark.slow
def test_peak_memory_at_full_size() -> None:
    """Stable Diffusion's own decoder at 512²: two feature maps, not five."""
    assert peak_memory("decode_tiled(vae, latents)") < 0.6 * peak_memory("vae.decode(latents)")


def peak_memory(expression: str) -> int:
    """By how many bytes decoding 64×64 latents raises the peak memory of a process of its own."""
    script = f"""
import resource, torch
from ldmcli.config import VAEConfig
from ldmcli.models.tiling import decode_tiled
from ldmcli.models.vae import AutoencoderKL
vae = AutoencoderKL(VAEConfig()).eval()
del vae.encoder
vae = vae.to(memory_format=torch.channels_last)
latents = torch.randn(1, 4, 64, 64).contiguous(memory_format=torch.channels_last)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
with torch.inference_mode():
    vae.decode(latents[:, :, :8, :8])
    before = peak()
    {expression}
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout)
