"""Text encoder, U-Net and VAE give diffusers' numbers: 1e-5 relative in float32.

Where group norms see so few numbers that they blow rounding errors up, both programs compute in float64 instead, and
agree to 1e-10.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from oracle.comparing import decoded, relative
from oracle.random_model import random_pipeline, save

from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import embedded_model, open_model
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.speed.cpu import winograd

TOLERANCE = 1e-5
PROMPTS = ["", "a red apple on a blue background", "naïve 猫 🎉 " * 60]
Pair = tuple[Pipeline, Any]


@pytest.fixture(scope="module", params=["random", "embedded"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The same model in this program and in diffusers."""
    if request.param == "random":
        return request.getfixturevalue("pipeline"), request.getfixturevalue("random_model")
    return request.getfixturevalue("embedded_pipeline"), request.getfixturevalue("embedded_diffusers")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def our_context(pipeline: Pipeline, prompts: list[str]) -> torch.Tensor:
    return torch.cat([conditioning.context for conditioning in pipeline.model.prompts.encode(prompts)])


def their_context(reference: Any, prompts: list[str]) -> torch.Tensor:
    tokenizer = reference.tokenizer
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return reference.text_encoder(tokenizer(prompts, **length, return_tensors="pt").input_ids)[0].detach()


def compare_unets(pipeline: Pipeline, reference: Any, latents: torch.Tensor, timestep: int) -> float:
    context = normal(len(latents), pipeline.config.text_encoders[0].max_length, pipeline.config.unet.context_dim)
    unet = pipeline.model.unet
    with torch.inference_mode():
        ours = unet(latents, unet.embed_time(torch.tensor([timestep])), unet.project_context(context))
        theirs = reference.unet(latents, timestep, context).sample
    return relative(ours, theirs)


def test_text_context(pair: Pair) -> None:
    pipeline, reference = pair
    ours, theirs = our_context(pipeline, PROMPTS), their_context(reference, PROMPTS)
    for i in range(len(PROMPTS)):
        assert relative(ours[i], theirs[i]) < TOLERANCE


def test_unet(pair: Pair) -> None:
    pipeline, reference = pair
    size = pipeline.config.unet.sample_size
    for timestep in (0, 1, 500, 999):
        assert compare_unets(pipeline, reference, normal(2, 4, size, size), timestep) < TOLERANCE


@pytest.mark.parametrize("size", [(9, 7), (3, 1), (17, 8), (5, 24)])
def test_unet_at_sizes_that_do_not_halve_evenly(pair: Pair, size: tuple[int, int]) -> None:
    ours, theirs = (copy.deepcopy(unet.float()).double() for unet in (pair[0].model.unet, pair[1].unet))
    context = normal(1, pair[0].config.text_encoders[0].max_length, ours.config.context_dim).double()
    latents = normal(1, 4, *size).double()
    with torch.inference_mode():
        our_noise = ours(latents, ours.embed_time(torch.tensor([500])), ours.project_context(context))
        their_noise = theirs(latents, 500, context).sample
    assert relative(our_noise, their_noise) < 1e-10


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 1)])
def test_vae_decodes(pair: Pair, size: tuple[int, int]) -> None:
    latents = normal(1, 4, *size)
    if size != (1, 1):
        theirs = pair[1].vae.decode(latents / pair[1].vae.config.scaling_factor).sample
        assert relative(decoded(pair[0], latents), theirs) < TOLERANCE
        return
    exact, wanted = (copy.deepcopy(side.vae).double() for side in pair)
    with torch.inference_mode():
        assert relative(exact.decode(latents.double()), wanted.decode(latents.double()).sample) < 1e-10


@pytest.mark.parametrize("size", [(64, 64), (72, 56), (66, 67)])
@pytest.mark.parametrize("name", ["random", "embedded"])
def test_vae_encodes(request: pytest.FixtureRequest, name: str, size: tuple[int, int]) -> None:
    model = request.getfixturevalue("model_folder") if name == "random" else embedded_model()
    reference = request.getfixturevalue("random_model" if name == "random" else "embedded_diffusers")
    vae = load_vae(open_model(model), torch.device("cpu"), torch.float32)
    images = normal(2, 3, *size).clamp(-1, 1)
    with torch.inference_mode():
        ours, theirs = vae.encode(images), reference.vae.encode(images).latent_dist
    assert relative(ours.mean, theirs.mean) < TOLERANCE
    assert relative(ours.logvar, theirs.logvar) < TOLERANCE
    assert relative(ours.kl(), theirs.kl()) < TOLERANCE
    draws = [posterior.sample(torch.Generator().manual_seed(3)) for posterior in (ours, theirs)]
    assert relative(*draws) < TOLERANCE


TWO_LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "two levels of one resnet, both attending": {
        "unet": {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "layers_per_block": 1,
        },
        "vae": {"block_out_channels": (32, 64), "layers_per_block": 1, **TWO_LEVELS},
    },
    "heads, depths and groups of their own, linear projections, sines first, shifted": {
        "unet": {
            "attention_head_dim": [2, 4, 8, 8],
            "transformer_layers_per_block": [1, 2, 3, 3],
            "norm_num_groups": 16,
            "norm_eps": 1e-3,
            "use_linear_projection": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        "vae": {"norm_num_groups": 8},
    },
    "another text encoder": {
        "text": {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-3,
        },
        "unet": {"cross_attention_dim": 128},
    },
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_other_dimensions(name: str, tmp_path: Path, one_thread: None) -> None:
    reference = random_pipeline(**DIMENSIONS[name])
    pipeline = load(save(reference, tmp_path / "model"))
    assert compare_unets(pipeline, reference, normal(1, 4, 15, 16), 500) < TOLERANCE
    latents = normal(1, 4, 5, 4)
    theirs = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample
    assert relative(decoded(pipeline, latents), theirs) < TOLERANCE
    assert relative(our_context(pipeline, PROMPTS), their_context(reference, PROMPTS)) < TOLERANCE


def test_layers_wide_enough_for_fewer_multiplications(
    tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """speed/cpu/winograd.py computes what large maps of many channels go through, doubled or not."""
    reference = random_pipeline(
        unet={
            "block_out_channels": (96, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
        },
        vae={"block_out_channels": (96, 128), "layers_per_block": 1, **TWO_LEVELS},
    )
    pipeline = load(save(reference, tmp_path / "model"))
    shapes: list[tuple[int, bool]] = []
    convolve = winograd.convolve

    def noting(x: torch.Tensor, *args: Any, doubled: bool = False) -> torch.Tensor:
        shapes.append((x.shape[1], doubled))
        return convolve(x, *args, doubled=doubled)

    monkeypatch.setattr(winograd, "convolve", noting)
    assert compare_unets(pipeline, reference, normal(2, 4, 32, 32), 500) < TOLERANCE
    assert set(shapes) == {(96, False), (192, False), (224, False), (128, True)}
    shapes.clear()
    latents = normal(1, 4, 40, 36)
    theirs = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample
    assert relative(decoded(pipeline, latents), theirs) < TOLERANCE
    assert set(shapes) == {(96, False), (128, False), (128, True)}
