"""Tiled decoding gives the picture of the plain decode, with less held in memory."""

import copy
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import ldm_here
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.checkpoints.source import embedded_model, open_model
from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.errors import StorageError, UsageError
from ldmcli.networks import feature_map, tiling
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.vae import AutoencoderKL, PixelAttention
from ldmcli.speed import memory
from ldmcli.speed.cpu.onednn import lay_out


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
def test_tiled_is_the_plain_decode(
    small_vae: AutoencoderKL, shape: tuple[int, ...], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of one row, of some, and of all: always the picture of the plain decode."""
    monkeypatch.setattr(tiling, "STRIP", strip)
    monkeypatch.setattr(tiling, "ROWS", 1)
    latents = normal(*shape)
    torch.testing.assert_close(tiling.decode_tiled(small_vae, latents), small_vae.decode(latents))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 4, 4), (2, 3, 52, 28), (1, 3, 12, 160)])
@pytest.mark.parametrize("strip", [1, 300, 5000, 1 << 23])
def test_tiled_is_the_plain_encode(
    small_vae: AutoencoderKL, shape: tuple[int, ...], strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "STRIP", strip)
    monkeypatch.setattr(tiling, "ROWS", 1)
    images = normal(*shape)
    found, wanted = tiling.encode_tiled(small_vae, images), small_vae.encode(images)
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.logvar, wanted.logvar)


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
    monkeypatch.setattr(tiling, "ROWS", 1)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_maps_out_of_memory(
    small_vae: AutoencoderKL, dtype: torch.dtype, spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as from maps in memory; files without names, of which none stays open."""
    vae = copy.deepcopy(small_vae).to(dtype)
    latents = normal(2, 4, 13, 5).to(dtype)
    seen, made = [], []
    temporary_file = tempfile.TemporaryFile

    def counted(*args: Any, **settings: Any) -> Any:
        made.append(settings["dir"])
        return temporary_file(*args, **settings)

    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    vae.decoder.conv_out.register_forward_hook(lambda *_: seen.append(list(spilling.iterdir())))
    before = len(os.listdir("/proc/self/fd"))
    spilled = tiling.decode_tiled(vae, latents)
    assert len(os.listdir("/proc/self/fd")) == before
    assert made
    assert set(made) == {str(spilling)}
    assert seen
    assert not any(seen)
    monkeypatch.setattr(feature_map, "KEPT", 1 << 40)
    made.clear()
    assert torch.equal(tiling.decode_tiled(vae, latents), spilled)
    assert not made


@pytest.fixture
def spilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files; all maps go there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(feature_map, "KEPT", 0)
    monkeypatch.setattr(tiling, "STRIP", 2000)
    monkeypatch.setattr(tiling, "ROWS", 3)
    return tmp_path


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 4, 9, 23), (2, 4, 7, 12)])
def test_tiled_in_single_precision(laid_out: bool, shape: tuple[int, ...], spilling: Path, one_thread: None) -> None:
    """Also with layers laid out for oneDNN."""
    vae = AutoencoderKL(VAEConfig(block_channels=(8, 16, 16), layers_per_block=1, norm_groups=4))
    randomise(vae, torch.Generator().manual_seed(0))
    vae = vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    latents = normal(*shape).float().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        plain = vae.decode(latents)
        if laid_out:
            lay_out(vae, fold=True)
        for _ in range(2):
            tiled = tiling.decode_tiled(vae, latents)
            assert (tiled - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("tokens", [(1, 1), (5, 3), (8, 40), (40, 8)])
def test_attention_in_parts(
    small_vae: AutoencoderKL, tokens: tuple[int, int], spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a hundred and of none, whose softmax would overflow without its maximum."""
    monkeypatch.setattr(tiling, "QUERIES", 8)
    monkeypatch.setattr(tiling, "STRIP", 64)
    block = copy.deepcopy(small_vae.decoder.mid_block.attentions[0])
    assert isinstance(block, PixelAttention)
    for product in (block.to_q, block.to_k):
        product.weight.mul_(40)
    rows = normal(1, block.group_norm.num_channels, *tokens)
    x = feature_map.FeatureMap(rows.shape[1], *tokens, like=rows)
    x.write(0, rows)
    tiling._attend(block, x)
    torch.testing.assert_close(x.read(slice(0, tokens[0])), block(rows))


def test_disk_full(small_vae: AutoencoderKL, spilling: Path) -> None:
    """The system's own refusal, after a part of what was to be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(StorageError) as caught:
            tiling.decode_tiled(small_vae, normal(1, 4, 16, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 74
    assert all(words in str(caught.value) for words in (str(spilling), "File too large", "set TMPDIR"))


def test_a_file_that_lost_what_was_written(
    small_vae: AutoencoderKL, spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_map.FeatureMap, "cut", lambda self, _: self._file.truncate(0))
    with pytest.raises(StorageError, match="Input/output error"):
        tiling.decode_tiled(small_vae, normal(1, 4, 16, 16))


def test_no_folder_for_temporary_files(
    small_vae: AutoencoderKL, spilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(spilling / "none"))
    with pytest.raises(StorageError, match=r"No such file or directory.*TMPDIR"):
        tiling.decode_tiled(small_vae, normal(1, 4, 16, 16))


def test_pieces_of_a_write() -> None:
    """The system may move less than it was asked for."""
    rows, moved = normal(1, 3, 20, 30).contiguous(memory_format=torch.channels_last), bytearray()
    feature_map._transfer(lambda left: moved.extend(left[:1001]) or min(len(left), 1001), rows)
    assert bytes(moved) == rows.permute(0, 2, 3, 1).numpy().tobytes()


def test_sizes_that_fit_only_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_model(embedded_model()).config.vae
    monkeypatch.setattr(memory, "host_memory", lambda: 20 * 2048**2)
    with pytest.raises(UsageError, match="--vae-tiling"):
        memory.check_memory(config, 2048, 2048)
    memory.check_memory(config, 2048, 2048, tiled=True)
    with pytest.raises(UsageError, match=r"smaller one\.$"):
        memory.check_memory(config, 4096, 2048, tiled=True)


def test_sizes_that_are_hardly_meant_are_said(tmp_path: Path) -> None:
    config = open_model(embedded_model()).config
    assert memory.large(config, 248, 256) == ""
    for size in ((256, 256), (1016, 1024)):
        assert "which shows more things, not larger ones; --upscale" in memory.large(config, *size)
        drawn_on = dataclasses.replace(config, unet=dataclasses.replace(config.unet, joins="map"))
        assert memory.large(drawn_on, *size) == ""
    assert f"1920×1080 has {1920 * 1080 // config.default_size**2} times" in memory.large(config, 1920, 1080)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "width": 4096, "height": 4096}\n' * 2)
    checked = ldm_here("batch", tmp_path / "rows.jsonl", "--dry-run")
    assert checked.code == 0
    assert checked.err.count("times the pixels that the model was made for") == 1


def test_peak_memory_does_not_grow_with_the_picture() -> None:
    """But for the picture itself: 12 bytes a pixel. Maps of this VAE have 128, and three are there at a time."""
    script = """
import torch
from ldmcli.config import VAEConfig
from ldmcli.networks import feature_map, tiling
from ldmcli.networks.vae import AutoencoderKL
torch.set_num_threads(1)
tiling.STRIP, feature_map.KEPT = 1 << 18, 1 << 22
vae = AutoencoderKL(VAEConfig(block_channels=(32, 16, 16, 16, 16), layers_per_block=1, norm_groups=4)).eval()
vae = vae.to(memory_format=torch.channels_last)
def peak(side):
    latents = torch.randn(1, 4, side, side).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        tiling.decode_tiled(vae, latents)
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
small, large = peak(32), peak(80)
feature_map.KEPT = 1 << 40
print(large - small, peak(80) - small)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, grown_in_memory = map(int, done.stdout.split())
    pixels = 16**2 * (80**2 - 32**2)
    assert grown < 40 * pixels
    assert grown_in_memory > 200 * pixels
