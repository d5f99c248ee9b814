"""diffusers' folders of the latent diffusion paper's models draw what its own pipelines draw."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.random_model import randomise
from paper_models import PROMPT, VOCABULARY

from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

FP32 = RuntimeSpec(device="cpu", dtype="fp32", cache=False)
STEPS, SEED = 4, 3
pytestmark = pytest.mark.usefixtures("one_thread")
UNETS: dict[str, dict[str, Any]] = {
    "celeba": {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 16,
    },
    "churches": {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "downsample_type": "resnet",
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"], "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 32, "norm_eps": 1e-6,
        "attn_norm_num_groups": 16,
    },
}  # fmt: skip


def stage(levels: int) -> dict[str, Any]:
    return {
        "block_out_channels": [32] * levels, "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def random(module: Any) -> Any:
    randomise(module, torch.Generator().manual_seed(1))
    return module.eval()


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


def ours(folder: Path, **settings: Any) -> np.ndarray:
    with Session(ModelSpec(str(folder)), FP32) as session:
        (picture,) = session.draw([GenerationRequest(**({"prompt": "", "seed": SEED, "steps": STEPS} | settings))])
        return picture.pixels()


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.std() > 5 and np.abs(one.astype(int) - np.rint(other * 255)).max() <= 1


@pytest.mark.parametrize("name", UNETS)
def test_unconditional_folders(name: str, tmp_path: Path) -> None:
    from diffusers import LDMPipeline, UNet2DModel, VQModel

    unet = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, **UNETS[name]
    )  # fmt: skip
    vae = VQModel(**stage(3), num_vq_embeddings=50, latent_channels=3)
    pipeline = LDMPipeline(vqvae=random(vae), unet=random(unet), scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(SEED)
    theirs = pipeline(generator=generator, num_inference_steps=STEPS, output_type="np").images[0]
    assert alike(ours(tmp_path), theirs)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_text_folders(scale: float, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n")
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(VOCABULARY), encoder_layers=2, encoder_ffn_dim=96, encoder_attention_heads=4, head_dim=8,
            d_model=48,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, cross_attention_dim=48,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        attention_head_dim=4,
    )  # fmt: skip
    pipeline = LDMTextToImagePipeline(
        vqvae=random(AutoencoderKL(**stage(4))), bert=random(bert), tokenizer=BertTokenizer(str(vocabulary)),
        unet=random(unet), scheduler=scheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    theirs = pipeline(
        PROMPT, 48, 80, num_inference_steps=STEPS, guidance_scale=scale, generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]  # fmt: skip
    drawn = ours(folder, prompt=PROMPT, guidance_scale=scale, height=48, width=80)
    assert alike(drawn, theirs)
