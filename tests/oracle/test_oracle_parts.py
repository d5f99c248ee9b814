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
from ldmcli.pipeline import Pipeline
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
    ids = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return reference.text_encoder(ids)[0].detach()


def compare_unets(pipeline: Pipeline, reference: Any, latents: torch.Tensor, timestep: int) -> float:
    context = normal(len(latents), pipeline.config.text_encoders[0].max_length, pipeline.config.unet.context_dim)
    unet = pipeline.model.unet
    with torch.inference_mode():
        ours = unet(latents, unet.embed_time(torch.tensor([timestep])), unet.project_context(context))
        theirs = reference.unet(latents, timestep, context).sample
    return relative(ours, theirs)


def test_the_random_model_is_a_fair_test(random_model: Any) -> None:
    latents, context = normal(2, 4, 12, 12), normal(2, 77, 64)
    with torch.inference_mode():
        noise = random_model.unet(latents, 500, context).sample
        other_text = random_model.unet(latents, 500, context.flip(0)).sample
        other_time = random_model.unet(latents, 520, context).sample
        image = random_model.vae.decode(latents / 0.18215).sample
    assert 0.7 < noise.std() < 1.5
    assert (other_text - noise).std() > 0.05
    assert (other_time - noise).std() > 0.05
    assert 0.3 < image.std() < 1.5


def test_text_context(pair: Pair) -> None:
    pipeline, reference = pair
    ours, theirs = our_context(pipeline, PROMPTS), their_context(reference, PROMPTS)
    for i in range(len(PROMPTS)):
        assert relative(ours[i], theirs[i]) < TOLERANCE


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_unet(pair: Pair, timestep: int) -> None:
    pipeline, reference = pair
    size = pipeline.config.unet.sample_size
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


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_vae_decodes(pair: Pair, size: tuple[int, int]) -> None:
    pipeline, reference = pair
    latents = normal(1, 4, *size)
    theirs = reference.vae.decode(latents / reference.vae.config.scaling_factor).sample
    assert relative(decoded(pipeline, latents), theirs) < TOLERANCE


def test_vae_decodes_a_single_latent(pair: Pair) -> None:
    ours, theirs = (copy.deepcopy(side.vae).double() for side in pair)
    latents = normal(1, 4, 1, 1).double()
    with torch.inference_mode():
        assert relative(ours.decode(latents), theirs.decode(latents).sample) < 1e-10


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


@pytest.mark.parametrize(
    ("name", "settings"),
    {
        "one resnet a level": {"unet": {"layers_per_block": 1}, "vae": {"layers_per_block": 1}},
        "two levels, both attending": {
            "unet": {
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D",) * 2,
                "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            },
            "vae": {
                "block_out_channels": (32, 64, 96),
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
            },
        },
        "heads, depths and groups of their own": {
            "unet": {
                "attention_head_dim": [2, 4, 8, 8],
                "transformer_layers_per_block": [1, 2, 3, 3],
                "norm_num_groups": 16,
                "norm_eps": 1e-3,
            },
            "vae": {"norm_num_groups": 8},
        },
        "linear projections, sines first, shifted": {
            "unet": {"use_linear_projection": True, "flip_sin_to_cos": False, "freq_shift": 1},
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
    }.items(),
)
def test_other_dimensions(name: str, settings: dict[str, Any], tmp_path: Path, one_thread: None) -> None:
    reference = random_pipeline(**settings)
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
        vae={
            "block_out_channels": (96, 128),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
        },
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
