"""A VAE given on its own decodes as diffusers does, in every layout it comes in; so does TAESD."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.comparing import decoded, relative
from oracle.random_model import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import embedded_model, open_model
from ldmcli.checkpoints.vae_source import open_vae
from ldmcli.config import ModelConfig, TinyVAEConfig
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.tiling import decode_tiled
from ldmcli.pipeline.pipeline import Pipeline

State = dict[str, Tensor]
TOLERANCE = 1e-5
PREFIX = "first_stage_model."


@pytest.fixture(scope="module")
def config(model_folder: Path) -> ModelConfig:
    return open_model(model_folder).config


@pytest.fixture(scope="module")
def original_vae(model_file: Path) -> State:
    """The random model's VAE under its original keys, without prefix."""
    state = load_file(model_file)
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def tiny(one_thread: None) -> Any:
    """diffusers' AutoencoderTiny with few channels, uneven blocks and random weights."""
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, num_decoder_blocks=(2, 3, 1, 1)
    )
    randomise(model, torch.Generator().manual_seed(3))
    return model.requires_grad_(False).eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decode(path: Path, config: ModelConfig, latents: Tensor) -> Tensor:
    """This program's decode by the VAE at `path`, of latents as they are diffused."""
    vae = load_vae(open_vae(path, config), torch.device("cpu"), torch.float32)
    assert not vae.training
    with torch.inference_mode():
        return vae.decode(latents / vae.config.scaling_factor)


def theirs(vae: Any, latents: Tensor) -> Tensor:
    with torch.inference_mode():
        return vae.decode(latents / vae.config.scaling_factor).sample


# ---- the KL autoencoder ----


def old_attention(state: State) -> State:
    """Names from before diffusers 0.18, and matrices that are 1×1 convolutions."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
    return {
        pattern.sub(lambda m: f"{m[1]}{names[m[2]]}.", key): (
            tensor[:, :, None, None] if ".attentions." in key and tensor.ndim == 2 else tensor
        )
        for key, tensor in state.items()
    }


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


KL_FILES = {
    "diffusers keys": lambda ours, original: ours,
    "diffusers keys of old": lambda ours, original: old_attention(ours),
    "original keys": lambda ours, original: original,
    "original keys with prefix": lambda ours, original: under(PREFIX, original),
    "original keys of a training run": lambda ours, original: (
        original
        | {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4)}
        | {"model_ema.decay": torch.zeros(()), "model_ema.encoderconv_inweight": torch.zeros(2)}
    ),
    "original keys with prefix of a training run": lambda ours, original: (
        under(PREFIX, original) | {f"{PREFIX}loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(())}
    ),
}


@pytest.mark.parametrize("layout", KL_FILES)
def test_file(layout: str, random_model: Any, original_vae: State, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    state = KL_FILES[layout](random_model.vae.state_dict(), original_vae)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    latents = normal(2, 4, 12, 9)
    assert relative(decode(path, config, latents), theirs(random_model.vae, latents)) < TOLERANCE


def test_checkpoint_and_model_folder(
    random_model: Any, model_file: Path, model_folder: Path, config: ModelConfig
) -> None:
    latents = normal(1, 4, 12, 12)
    for path in (model_file, model_folder):
        assert relative(decode(path, config, latents), theirs(random_model.vae, latents)) < TOLERANCE


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_folder(random_model: Any, config: ModelConfig, tmp_path: Path, variant: str | None) -> None:
    random_model.vae.save_pretrained(tmp_path, variant=variant)
    latents = normal(1, 4, 12, 12)
    assert relative(decode(tmp_path, config, latents), theirs(random_model.vae, latents)) < TOLERANCE


def test_picture_with_another_vae(pipeline: Pipeline, random_model: Any, config: ModelConfig, tmp_path: Path) -> None:
    """In the pipeline another VAE stands in the model's place, its scaling factor with it."""
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_config(random_model.vae.config, scaling_factor=0.3)
    randomise(other, torch.Generator().manual_seed(8))
    other.save_pretrained(tmp_path)
    vae = load_vae(open_vae(tmp_path, config), torch.device("cpu"), torch.float32)
    latents = normal(1, 4, 12, 12)
    with torch.inference_mode():
        wanted = other.eval().decode(latents / 0.3).sample
    assert relative(decoded(dataclasses.replace(pipeline, vae=vae), latents), wanted) < TOLERANCE


# ---- TAESD ----


def original_tiny(state: State, half: str) -> State:
    """TAESD's own keys of one half: its decoder begins with a clamp, so its layers are numbered one higher."""
    shift = int(half == "decoder")
    start = f"{half}.layers."
    parts = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
    return {re.sub(r"^\d+", lambda m: str(int(m[0]) + shift), key): tensor for key, tensor in parts.items()}


TINY_FILES = {
    "diffusers keys": lambda state: state,
    "diffusers keys, decoder": lambda state: {k: t for k, t in state.items() if k.startswith("decoder.")},
    "original decoder": lambda state: original_tiny(state, "decoder"),
    "original halves": lambda state: (
        under("decoder.", original_tiny(state, "decoder")) | under("encoder.", original_tiny(state, "encoder"))
    ),
    "ComfyUI's halves": lambda state: (
        under("taesd_decoder.", original_tiny(state, "decoder"))
        | under("taesd_encoder.", original_tiny(state, "encoder"))
    ),
}


@pytest.mark.parametrize("layout", TINY_FILES)
def test_tiny_file(layout: str, tiny: Any, config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "taesd.safetensors"
    save_file(TINY_FILES[layout](tiny.state_dict()), path)
    latents = 3 * normal(2, 4, 12, 9)
    ours = decode(path, config, latents)
    assert ours.shape == (2, 3, 96, 72)
    assert relative(ours, theirs(tiny, latents)) < TOLERANCE


@pytest.mark.parametrize("whole_model", [False, True])
def test_tiny_folder(tiny: Any, config: ModelConfig, model_folder: Path, tmp_path: Path, whole_model: bool) -> None:
    """Alone, or as the VAE of a model that was saved with it."""
    if whole_model:
        shutil.copy(model_folder / "model_index.json", tmp_path)
    tiny.save_pretrained(tmp_path / "vae" if whole_model else tmp_path)
    latents = 3 * normal(1, 4, 12, 12)
    assert relative(decode(tmp_path, config, latents), theirs(tiny, latents)) < TOLERANCE


def test_tiny_has_the_keys_and_shapes_of_diffusers() -> None:
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        ours, reference = TinyVAE(TinyVAEConfig()).state_dict(), AutoencoderTiny().state_dict()
    shapes = {key: tensor.shape for key, tensor in reference.items() if key.startswith("decoder.")}
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes


def test_picture_by_taesd(pipeline: Pipeline, tiny: Any, config: ModelConfig, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    vae = load_vae(open_vae(tmp_path, config), torch.device("cpu"), torch.float32)
    latents = normal(1, 4, 12, 12)
    assert relative(decoded(dataclasses.replace(pipeline, vae=vae), latents), theirs(tiny, latents)) < TOLERANCE


# ---- tiling ----


def test_tiling_is_closer_than_that_of_diffusers(embedded_pipeline: Pipeline, embedded_diffusers: Any) -> None:
    """On the embedded model's VAE, whose tiles diffusers makes 16×16 latents large."""
    latents = upscaled_latents()
    reference = embedded_diffusers.vae
    with torch.inference_mode():
        plain = reference.decode(latents).sample
        reference.enable_tiling()
        tiled = reference.decode(latents).sample
        reference.disable_tiling()
        ours = decode_tiled(embedded_pipeline.vae, latents)
    assert levels(tiled, plain) > 10  # a tone of its own for each tile
    assert levels(ours, plain) < 0.01


def upscaled_latents() -> Tensor:
    """The embedded model's latents 48×48 of a smooth ground, on which seams would show, and a sharp object."""
    line = torch.linspace(-1, 1, 192)
    down, across = torch.meshgrid(line, line, indexing="ij")
    picture = torch.stack([0.5 * down, 0.2 - 0.3 * across, 0.4 * across - 0.4 * down])
    picture[:, (down - 0.4) ** 2 + (across - 0.3) ** 2 < 0.05] = torch.tensor([0.8, -0.6, -0.8])[:, None]
    with torch.inference_mode():
        return load_vae(open_model(embedded_model()), torch.device("cpu"), torch.float32).encode(picture[None]).mean


def levels(one: Tensor, other: Tensor) -> float:
    """The largest difference of any pixel's channel, in levels of 255."""
    ones, others = ((image / 2 + 0.5).clamp(0, 1) * 255 for image in (one, other))
    return float((ones - others).abs().max())
