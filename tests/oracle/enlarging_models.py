"""Small models that enlarge pictures, as diffusers' pipelines with random weights: LDM super-resolution and Stable
Diffusion's x4 upscaler."""

from typing import Any

import torch
from oracle.random_model import SMALL_TEXT, randomise

# Wider than any level, which tells attention to it from attention to the map.
TEXT = SMALL_TEXT | {"hidden_act": "gelu", "hidden_size": 128, "num_attention_heads": 2}
VAE = {"block_out_channels": (32, 32, 32), "layers_per_block": 1}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}


def super_resolution() -> Any:
    """An LDMSuperResolutionPipeline."""
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel

    pipeline = LDMSuperResolutionPipeline(
        vqvae=VQModel(**VAE, latent_channels=3, num_vq_embeddings=64),
        unet=UNet2DModel(
            in_channels=6,
            out_channels=3,
            sample_size=64,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            set_alpha_to_one=False,
        ),
    )  # fmt: skip
    for seed, part in enumerate((pipeline.unet, pipeline.vqvae)):
        randomise(part, torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd_upscaler() -> Any:
    """A StableDiffusionUpscalePipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
    from diffusers import UNet2DConditionModel as UNet
    from oracle.random_model import clip_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionUpscalePipeline(
        vae=AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.08333),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=clip_tokenizer(pad_token="!"),
        unet=UNet(
            in_channels=7,
            out_channels=4,
            sample_size=128,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            only_cross_attention=(True, True, False),
            attention_head_dim=8,
            cross_attention_dim=TEXT["hidden_size"],
            use_linear_projection=True,
            num_class_embeds=1000,
        ),
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=DDIMScheduler(
            **betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        watermarker=None,
    )
    for seed, part in enumerate((pipeline.unet, pipeline.vae, pipeline.text_encoder)):
        randomise(part, torch.Generator().manual_seed(seed))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def full_sd_upscaler() -> dict[str, Any]:
    """The parts of the published one, in full size."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from oracle.random_families import build_parts

    attending = ("CrossAttnDownBlock2D",) * 3
    return {
        "unet": UNet2DConditionModel(
            in_channels=7,
            out_channels=4,
            sample_size=128,
            block_out_channels=(256, 512, 512, 1024),
            down_block_types=("DownBlock2D", *attending),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            only_cross_attention=(True, True, True, False),
            attention_head_dim=8,
            cross_attention_dim=1024,
            use_linear_projection=True,
            num_class_embeds=1000,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=4,
        ),
        "text_encoder": build_parts("sd2-v", small=False)["text_encoder"],
    }
