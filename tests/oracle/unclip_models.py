"""A small unCLIP model with random weights, as diffusers' pipeline."""

from typing import Any

import torch
from oracle.original_layout import original_state
from oracle.random_families import build_parts
from oracle.random_model import SCHEDULER, clip_tokenizer, randomise, randomise_pipeline
from torch import Tensor

WIDTH = 40  # of its embeddings


def unclip(width: int = WIDTH, *, statistics: bool = True) -> Any:
    """diffusers' pipeline; without `statistics` its normalizer has mean 0 and deviation 1, as that of the model of
    ViT-H."""
    from diffusers import DDPMScheduler, PNDMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    parts = build_parts(
        "sd2-v", small=True, class_embed_type="projection", projection_class_embeddings_input_dim=2 * width
    )
    normalizer = StableUnCLIPImageNormalizer(width)
    if statistics:
        generator = torch.Generator().manual_seed(5)
        normalizer.mean.data = torch.randn(1, width, generator=generator)
        normalizer.std.data = 0.3 + torch.rand(1, width, generator=generator)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         image_size=32, patch_size=8, projection_dim=width)
    )  # fmt: skip
    randomise(vision, torch.Generator().manual_seed(2))
    pipeline = StableUnCLIPImg2ImgPipeline(
        **parts,
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        image_encoder=vision.eval(),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=clip_tokenizer(pad_token="!"),
        scheduler=PNDMScheduler.from_config(SCHEDULER | {"prediction_type": "v_prediction"}),
    )
    randomise_pipeline(pipeline, tuple(parts), seed=0)
    return pipeline


def original(pipeline: Any, *, statistics: bool = True) -> dict[str, Tensor]:
    """The pipeline as one file in the original layout: with the image encoder, and the noise's levels; and with the
    embeddings' statistics, which not every such file has."""
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    state = {name: tensor.contiguous() for name, tensor in original_state(parts).items()}
    levels = pipeline.image_noising_scheduler.alphas_cumprod
    state |= {f"noise_augmentor.{name}": levels.clone() for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev")}
    state |= {"noise_augmentor.sqrt_alphas_cumprod": levels.sqrt(), "embedder.model.visual.proj": torch.zeros(4, 4)}
    if statistics:
        normalizer = pipeline.image_normalizer.state_dict()
        state |= {f"noise_augmentor.data_{name}": tensor for name, tensor in normalizer.items()}
    return state


def published(width: int) -> dict[str, Any]:
    """The parts of the published models in full size: of embeddings of ViT-H, 1024 numbers, and of ViT-L, 768."""
    sizes = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * width}
    return build_parts("sd2-v", small=False, **sizes)


def embeddings(rows: int, width: int = WIDTH) -> Tensor:
    """Random ones (rows, width)."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(11))
