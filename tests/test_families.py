"""Telling weight files apart by their tensors."""

from pathlib import Path

import pytest

from ldmcli.checkpoints.families import REFINER, SD1, SD2, SD2_NOISE, SD_UPSCALER, SDXL, UNCLIP, Family
from ldmcli.checkpoints.file_kinds import KINDS, describe_single_file, require_family
from ldmcli.errors import BadDataError

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."
PATH = Path("model.safetensors")


def original_unet(in_channels: int = 4, *, channels: int = 320, linear: bool = False) -> Shapes:
    proj = (channels, channels) if linear else (channels, channels, 1, 1)
    return {
        f"{UNET}input_blocks.0.0.weight": (channels, in_channels, 3, 3),
        f"{UNET}input_blocks.1.1.proj_in.weight": proj,
        f"{UNET}middle_block.1.proj_in.weight": proj,
        f"{UNET}output_blocks.0.0.in_layers.0.weight": (channels,),
    }


VAE: Shapes = {
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
}
CLIP: Shapes = {
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
}
NEW_CLIP = {key.replace("text_model.", ""): shape for key, shape in CLIP.items()}
OPEN_CLIP: Shapes = {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)}
SDXL_TEXT: Shapes = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
}
LABEL: Shapes = {f"{UNET}label_emb.0.0.weight": (1280, 2816)}
FOLDER_UNET: Shapes = {
    "conv_in.weight": (320, 4, 3, 3),
    "time_embedding.linear_1.weight": (1280, 320),
    "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
    "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
}


def wide(shapes: Shapes, channels: int) -> Shapes:
    return {**shapes, "conv_in.weight": (320, channels, 3, 3)}


def keys(*names: str) -> Shapes:
    return {name: (4, 4) for name in names}


SD1_UNET, SDXL_UNET = original_unet(), original_unet(linear=True) | LABEL
SD2_UNET = original_unet(linear=True)
ADDED = keys("add_embedding.linear_1.weight")
SD2_FOLDER = FOLDER_UNET | {
    "mid_block.attentions.0.proj_in.weight": (1280, 1280),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 1024),
}

MODELS: list[tuple[Family, str, Shapes]] = [
    (SD1, "Stable Diffusion 1.x checkpoint", SD1_UNET | VAE | CLIP),
    (SD1, "Stable Diffusion 1.x checkpoint", SD1_UNET | VAE | NEW_CLIP),
    (SD1, "Stable Diffusion 1.x checkpoint", original_unet(channels=32) | VAE | CLIP),
    (
        SD1,
        "Stable Diffusion 1.x checkpoint",
        SD1_UNET | VAE | CLIP | {"model_ema.decay": (), "alphas_cumprod": (1000,)},
    ),
    (SD2, "Stable Diffusion 2.x checkpoint", SD2_UNET | VAE | OPEN_CLIP),
    (UNCLIP, "Stable Diffusion 2.x unCLIP", SDXL_UNET | VAE | OPEN_CLIP | keys("noise_augmentor.betas")),
    (SDXL, "SDXL checkpoint", SDXL_UNET | VAE | SDXL_TEXT),
    (SDXL, "SDXL checkpoint", SDXL_UNET | VAE | SDXL_TEXT | keys("v_pred", "ztsnr")),
    (SD1, "Stable Diffusion 1.x inpainting (9 input channels)", original_unet(9) | VAE | CLIP),
    (
        SD2_NOISE,
        "Stable Diffusion 2.x inpainting (9 input channels)",
        original_unet(9, linear=True) | VAE | OPEN_CLIP,
    ),
    (SDXL, "SDXL inpainting (9 input channels)", original_unet(9, linear=True) | LABEL | VAE | SDXL_TEXT),
    (SD1, "instruct-pix2pix (8 input channels)", original_unet(8) | VAE | CLIP),
    (SDXL, "SDXL instruct-pix2pix (8 input channels)", original_unet(8, linear=True) | LABEL | VAE | SDXL_TEXT),
    (
        SD2_NOISE,
        "Stable Diffusion 2.x depth (5 input channels)",
        original_unet(5, linear=True) | VAE | OPEN_CLIP | keys("depth_model.model.scratch.weight"),
    ),
    (
        SD_UPSCALER,
        "Stable Diffusion 2.x upscaler (7 input channels)",
        original_unet(7, linear=True) | VAE | OPEN_CLIP,
    ),
    (REFINER, "SDXL refiner checkpoint", SDXL_UNET | VAE | keys("conditioner.embedders.0.model.ln_final.weight")),
]

OTHERS: list[tuple[str, Shapes]] = [
    ("Stable Diffusion 2.x checkpoint without its VAE", SD2_UNET | OPEN_CLIP),
    ("SDXL in EDM's formulation (Playground 2.5, CosXL)", SDXL_UNET | VAE | SDXL_TEXT | keys("edm_mean", "edm_std")),
    ("SDXL in EDM's formulation (Playground 2.5, CosXL)",
     original_unet(8, linear=True) | LABEL | VAE | SDXL_TEXT | keys("edm_vpred.sigma_max")),
    ("SDXL checkpoint without its VAE", SDXL_UNET | SDXL_TEXT),
    ("SDXL checkpoint without its text encoders", SDXL_UNET | VAE),
    ("SDXL U-Net only (original keys)", SDXL_UNET),
    ("unknown",
     SD1_UNET | VAE | keys("cond_stage_model.transformer.attn_layers.layers.0.0.weight")),
    ("retrieval-augmented latent diffusion (RDM)", original_unet(16) | VAE),
    ("Stable Diffusion image-variations model", SD1_UNET | VAE | keys("cond_stage_model.model.visual.conv1.weight")),
    ("Stable Diffusion 1.x checkpoint without its text encoder", SD1_UNET | VAE),
    ("Stable Diffusion 1.x checkpoint without its VAE", SD1_UNET | CLIP),
    ("Stable Diffusion 1.x with ControlNet", SD1_UNET | VAE | CLIP | keys("control_model.a")),
    ("U-Net only (original keys)", SD1_UNET),
    ("U-Net only (diffusers keys)", FOLDER_UNET),
    ("Stable Diffusion inpainting U-Net (9 input channels, diffusers keys)", wide(FOLDER_UNET, 9)),
    ("instruct-pix2pix U-Net (8 input channels, diffusers keys)", wide(FOLDER_UNET, 8)),
    ("SDXL inpainting U-Net (9 input channels, diffusers keys)", wide(FOLDER_UNET, 9) | ADDED),
    ("SDXL U-Net (diffusers keys)", FOLDER_UNET | ADDED),
    ("Stable Diffusion 2.x U-Net (diffusers keys)", SD2_FOLDER),
    ("Flux/SD3 transformer", keys("double_blocks.0.img_attn.qkv.weight", "img_in.weight")),
    ("Flux/SD3 transformer", keys(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight") | VAE),
    ("Flux/SD3 transformer", keys("transformer_blocks.0.attn.to_q.weight", "x_embedder.weight", "norm_out.weight")),
    ("LoRA", keys("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight")),
    ("LoRA", keys("unet.down_blocks.0.attentions.0.to_q.lora_A.weight")),
    ("LoRA", keys("down_blocks.0.attentions.0.processor.to_q_lora.down.weight")),
    ("LoRA", keys("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a")),
    ("ControlNet", keys("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight")),
    ("ControlNet", FOLDER_UNET | keys("controlnet_cond_embedding.conv_in.weight")),
    ("IP-Adapter", keys("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    ("VAE only", {key.removeprefix("first_stage_model."): shape for key, shape in VAE.items()}),
    ("VAE only", VAE),
    ("TAESD", keys("encoder.layers.0.weight", "decoder.layers.1.weight")),
    ("TAESD", keys("1.weight", "3.conv.0.weight", "3.conv.2.weight")),
    ("CLIP text encoder only", {key.removeprefix("cond_stage_model.transformer."): CLIP[key] for key in CLIP}),
    ("CLIP text encoder only", {key.removeprefix("cond_stage_model.transformer."): NEW_CLIP[key] for key in NEW_CLIP}),
    ("T5 text encoder only", keys("encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("textual-inversion embedding", {"emb_params": (4, 768)}),
    ("textual-inversion embedding", {"clip_l": (4, 768), "clip_g": (4, 1280)}),
    ("textual-inversion embedding", {"<cat-toy>": (768,)}),
    ("unknown", {}),
    ("unknown", keys("layer.weight", "layer.bias")),
    ("unknown", original_unet(5) | VAE | CLIP),
    ("unknown", SD2_UNET | VAE | CLIP),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "shapes"), MODELS)
def test_models_of_any_size_are_accepted(family: Family, name: str, shapes: Shapes) -> None:
    assert describe_single_file(shapes) == name
    assert require_family(shapes, PATH) is family


@pytest.mark.parametrize(("name", "shapes"), OTHERS)
def test_other_files_are_named_and_refused(name: str, shapes: Shapes) -> None:
    assert describe_single_file(shapes) == name
    with pytest.raises(BadDataError) as caught:
        require_family(shapes, PATH)
    message = str(caught.value)
    assert message.startswith("model.safetensors ")
    assert "\n" not in message
    assert (name if name != "unknown" else "no model this version knows") in message


def test_messages_read_as_sentences() -> None:
    def message(shapes: Shapes) -> str:
        with pytest.raises(BadDataError) as caught:
            require_family(shapes, PATH)
        return str(caught.value)

    assert message(keys("a.lora_A.weight")) == (
        "model.safetensors is a LoRA, not a whole model; "
        "name the model it was made for with --model, and this with --lora."
    )
    variations = keys("cond_stage_model.model.visual.conv1.weight")
    assert message(SD1_UNET | VAE | variations) == (
        "model.safetensors looks like Stable Diffusion image-variations model; this version reads Stable "
        "Diffusion 1.x, 2.x and XL and the latent diffusion paper's models."
    )
    assert "an IP-Adapter" in message(keys("image_proj.a", "ip_adapter.b"))


def test_unknown_file_shows_its_first_keys_escaped_and_cut() -> None:
    shapes = {f"\x1b[2J{i}" + "x" * 5000: (1,) * 30 for i in range(1000)}
    with pytest.raises(BadDataError) as caught:
        require_family(shapes, PATH)
    message = str(caught.value)
    assert "\x1b" not in message
    assert "and 995 more" in message
    assert len(message) < 1500


@pytest.mark.parametrize(("family", "name", "shapes"), MODELS)
def test_a_model_may_lack_its_vae_where_another_is_named(family: Family, name: str, shapes: Shapes) -> None:
    bare = {key: shape for key, shape in shapes.items() if key not in VAE}
    assert "without its VAE" in describe_single_file(bare)
    assert require_family(bare, PATH, own_vae=False) is family
    with pytest.raises(BadDataError, match="name a VAE for it with --vae"):
        require_family(bare, PATH)


def test_every_row_has_something_to_match() -> None:
    assert all(kind.prefixes or kind.parts or kind.keys for kind in KINDS)
