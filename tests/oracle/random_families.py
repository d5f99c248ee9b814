"""Every family that can be drawn with, for diffusers: the published configurations, and small models shaped alike.

A small model keeps what makes its family (kinds of blocks, added conditioning, whose text encoders) and is narrower.
Its attention heads are 64 wide, as those of 2.x and XL are: original files do not say, so nothing else can be read.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from oracle.random_model import SCHEDULER, SMALL_VAE, clip_tokenizer, randomise_pipeline

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A family's configuration as published, and what replaces it in the small model. `texts` and `small_texts` are by
    part; `scheduler` is a class and its settings, `extras` are the pipeline's own."""

    pipeline: str
    unet: Settings
    vae: Settings
    texts: Mapping[str, Settings]
    small_unet: Settings
    small_texts: Mapping[str, Settings]
    scheduler: tuple[str, Settings]
    extras: Settings = dataclasses.field(default_factory=dict)


_DOWN, _UP = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
_FOUR_LEVELS = {
    "down_block_types": _DOWN * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + _UP * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
_SD1_UNET = _FOUR_LEVELS | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
_SD2_UNET = _FOUR_LEVELS | {
    "attention_head_dim": [5, 10, 20, 20],  # diffusers' word for the number of heads
    "cross_attention_dim": 1024,
    "sample_size": 64,
    "use_linear_projection": True,
}
_XL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", *_DOWN, *_DOWN),
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": (*_UP, *_UP, "UpBlock2D"),
    "use_linear_projection": True,
}
_REFINER_UNET = _XL_UNET | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": (384, 768, 1536, 1536),
    "cross_attention_dim": 1280,
    "down_block_types": ("DownBlock2D", *_DOWN, *_DOWN, "DownBlock2D"),
    "projection_class_embeddings_input_dim": 1280 + 5 * 256,
    "transformer_layers_per_block": 4,
    "up_block_types": ("UpBlock2D", *_UP, *_UP, "UpBlock2D"),
}
_VAE = SMALL_VAE | {"block_out_channels": (128, 256, 512, 512), "sample_size": 512}
_XL_VAE = _VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

# The begin and end marks are those of the published files: not the tokenizer's, and read by nothing but pooling.
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_VIT_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last is never read
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_BIG_G = _VIT_H | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

_SMALL_LEVELS = {"block_out_channels": (64, 128, 128, 128), "attention_head_dim": [1, 2, 2, 2], "sample_size": 16}
_SMALL_L = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 1}
_SMALL_H = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_G = _SMALL_H | {"num_hidden_layers": 3}

_EULER = {
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

_SD2 = Recipe(
    pipeline="StableDiffusionPipeline",
    unet=_SD2_UNET,
    vae=_VAE,
    texts={"text_encoder": _VIT_H},
    small_unet=_SMALL_LEVELS | {"cross_attention_dim": 128},
    small_texts={"text_encoder": _SMALL_H},
    scheduler=("PNDMScheduler", {}),
)
_SD2_V = dataclasses.replace(
    _SD2,
    unet=_SD2_UNET | {"sample_size": 96, "upcast_attention": True},
    small_unet=_SD2.small_unet | {"sample_size": 24},
    scheduler=("DDIMScheduler", {"prediction_type": "v_prediction"}),
)
_XL = Recipe(
    pipeline="StableDiffusionXLPipeline",
    unet=_XL_UNET,
    vae=_XL_VAE,
    texts={"text_encoder": _CLIP_L, "text_encoder_2": _BIG_G},
    # The pooled prompt has a width of its own, so that a projection laid out the wrong way round shows.
    small_unet={
        "attention_head_dim": [1, 2, 3],
        "block_out_channels": (64, 128, 192),
        "cross_attention_dim": 64 + 128,
        "projection_class_embeddings_input_dim": 96 + 6 * 256,
        "sample_size": 12,
        "transformer_layers_per_block": [1, 2, 3],
    },
    small_texts={"text_encoder": _SMALL_L, "text_encoder_2": _SMALL_G | {"projection_dim": 96}},
    scheduler=("EulerDiscreteScheduler", _EULER),
    extras={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
)

RECIPES = {
    "sd2": _SD2,
    "sd2-v": _SD2_V,
    "sd2-zero-snr": dataclasses.replace(_SD2_V, scheduler=("DDIMScheduler", _ZERO_SNR)),
    "sdxl": _XL,
    "sdxl-zero-snr": dataclasses.replace(_XL, scheduler=("EulerDiscreteScheduler", _EULER | _ZERO_SNR)),
    "turbo": dataclasses.replace(
        _XL, scheduler=("EulerAncestralDiscreteScheduler", _EULER | {"timestep_spacing": "trailing"})
    ),
    "refiner": Recipe(
        pipeline="StableDiffusionXLImg2ImgPipeline",
        unet=_REFINER_UNET,
        vae=_XL_VAE,
        texts={"text_encoder_2": _BIG_G},
        small_unet={
            "attention_head_dim": [1, 2, 2, 2],
            "block_out_channels": (64, 128, 128, 128),
            "cross_attention_dim": 128,
            "projection_class_embeddings_input_dim": 128 + 5 * 256,
            "sample_size": 16,
            "transformer_layers_per_block": 2,
        },
        small_texts={"text_encoder_2": _SMALL_G | {"projection_dim": 128}},
        scheduler=("EulerDiscreteScheduler", _EULER),
        extras={
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "add_watermarker": False,
            "text_encoder": None,
            "tokenizer": None,
        },
    ),
    "lcm": Recipe(
        pipeline="LatentConsistencyModelPipeline",
        unet=_SD1_UNET | {"time_cond_proj_dim": 256},
        vae=_VAE,
        texts={"text_encoder": _CLIP_L},
        small_unet=_SMALL_LEVELS | {"attention_head_dim": 8, "cross_attention_dim": 64, "time_cond_proj_dim": 32},
        small_texts={"text_encoder": _SMALL_L},
        scheduler=(
            "LCMScheduler",
            {"original_inference_steps": 50, "set_alpha_to_one": True, "steps_offset": 0},
        ),
    ),
}


def build_parts(name: str | Recipe, *, small: bool, **unet: Any) -> dict[str, Any]:
    """diffusers' and transformers' modules of a recipe by part, on the current default device; `unet` replaces single
    settings of the U-Net."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    recipe = RECIPES[name] if isinstance(name, str) else name
    widths: Settings = {key: SMALL_VAE[key] for key in ("block_out_channels", "sample_size")} if small else {}
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**{**recipe.vae, **widths}),
        "unet": UNet2DConditionModel(**{**recipe.unet, **(recipe.small_unet if small else {}), **unet}),
    }
    for part, settings in recipe.texts.items():
        model = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        parts[part] = model(CLIPTextConfig(**{**settings, **(recipe.small_texts[part] if small else {})}))
    return parts


def random_family(name: str, *, seed: int = 0, **unet: Any) -> Any:
    """The small model of a recipe as diffusers' pipeline, with random weights; `unet` replaces single settings."""
    parts = build_parts(name, small=True, **unet)
    pipeline = as_pipeline(RECIPES[name], parts)
    randomise_pipeline(pipeline, tuple(parts), seed)
    return pipeline


def as_pipeline(recipe: Recipe, parts: Mapping[str, Any]) -> Any:
    """diffusers' pipeline of a recipe with these networks."""
    import diffusers

    tokenizers = {
        # The padding of an OpenCLIP encoder is token 0, that of OpenAI's its end mark.
        part.replace("text_encoder", "tokenizer"): clip_tokenizer(
            pad_token="!" if settings["hidden_act"] == "gelu" else "<|endoftext|>"
        )
        for part, settings in recipe.texts.items()
    }
    pipeline_class = getattr(diffusers, recipe.pipeline)
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    takes = inspect.signature(pipeline_class.__init__).parameters
    return pipeline_class(
        **parts,
        **tokenizers,
        scheduler=_scheduler(recipe),
        **{key: value for key, value in unused.items() if key in takes},
        **recipe.extras,
    )


def same_networks(name: str) -> str:
    """The first recipe with the same networks as this one, and so the same random weights; maybe itself."""

    def networks(recipe: Recipe) -> tuple[Any, ...]:
        return recipe.unet, recipe.small_unet, recipe.vae, recipe.texts, recipe.small_texts

    return next(other for other, recipe in RECIPES.items() if networks(recipe) == networks(RECIPES[name]))


def with_scheduler(pipeline: Any, name: str) -> Any:
    """diffusers' pipeline with the networks of `pipeline` and the noise schedule of a recipe."""
    import diffusers

    recipe = RECIPES[name]
    settings = {"requires_safety_checker": False} if recipe.pipeline == "StableDiffusionPipeline" else recipe.extras
    parts = pipeline.components | {"scheduler": _scheduler(recipe)}
    other = getattr(diffusers, recipe.pipeline)(**{**parts, **settings})
    other.set_progress_bar_config(disable=True)
    return other


def _scheduler(recipe: Recipe) -> Any:
    import diffusers

    name, settings = recipe.scheduler
    return getattr(diffusers, name).from_config({**SCHEDULER, **settings})


def random_last_layer(text: Mapping[str, torch.Tensor], seed: int = 5) -> dict[str, torch.Tensor]:
    """What an original Stable Diffusion 2 file has beyond its folder: the text transformer's last layer, which is not
    read; here made of an earlier layer's numbers in another order."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    layers = 1 + max(int(key.split(".")[2]) for key in bare if key.startswith("encoder.layers."))
    generator = torch.Generator().manual_seed(seed)
    return {
        key.replace(f"layers.{layers - 1}.", f"layers.{layers}."): tensor
        if tensor.is_meta
        else tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
        for key, tensor in bare.items()
        if key.startswith(f"encoder.layers.{layers - 1}.")
    }
