"""Write the trained parts as one half-precision folder in diffusers' layout, byte for byte the same for the
same weights.

    python weights/recipe/export.py --folder weights/tiny-emoji
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from presets import RUNS
from safetensors.torch import save_file
from training import load

from ldmcli.checkpoints.layout import WORD_LIST

VERSION = "0.42.1"  # the diffusers release whose vocabulary the configurations use
LIMIT_BYTES = 20_000_000

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": VERSION,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

# What evaluate.py found it best drawn with; ldm reads it, diffusers does not
GENERATION = {"guidance_scale": 2.5, "num_inference_steps": 25}


def unet_config(config: dict) -> dict:
    """UNetConfig's fields in diffusers' words; `attention_head_dim` is the number of heads, as in SD1's own
    file."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config["attention"]]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config["attention"])]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "attention_head_dim": config["heads"][0],
        "block_out_channels": list(config["block_channels"]),
        "center_input_sample": False,
        "cross_attention_dim": config["context_dim"],
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config["in_channels"],
        "layers_per_block": config["layers_per_block"],
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": config["norm_eps"],
        "norm_num_groups": config["norm_groups"],
        "out_channels": config["out_channels"],
        "sample_size": config["sample_size"],
        "up_block_types": up,
    }


def vae_config(config: dict, pixels: int) -> dict:
    levels = len(config["block_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(config["block_channels"]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config["in_channels"],
        "latent_channels": config["latent_channels"],
        "layers_per_block": config["layers_per_block"],
        "norm_num_groups": config["norm_groups"],
        "out_channels": config["out_channels"],
        "sample_size": pixels,
        "scaling_factor": config["scaling_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_encoder_config(config: dict) -> dict:
    """TextEncoderConfig's fields in transformers' words; short prompts are filled up with end marks."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "hidden_act": config["activation"],
        "hidden_size": config["hidden_size"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config["intermediate_size"],
        "layer_norm_eps": config["norm_eps"],
        "max_position_embeddings": config["max_length"],
        "model_type": "clip_text_model",
        "num_attention_heads": config["heads"],
        "num_hidden_layers": config["layers"],
        "pad_token_id": config["eos_token_id"],
        "projection_dim": config["hidden_size"],
        "torch_dtype": "float16",
        "vocab_size": config["vocab_size"],
    }


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Half precision, sorted by name, contiguous; refuses what would not survive float16 or a repository's
    limits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key in sorted(state):
        tensors[key] = state[key].detach().to(torch.float16).contiguous(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key} is not finite in float16")
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"} | (metadata or {}))
    if part.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"{path} would be over {LIMIT_BYTES} bytes")
    part.chmod(0o644)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUNS, help="where the stages left their results")
    parser.add_argument("--folder", type=Path, default=RUNS / "tiny-emoji", help="where to write the model")
    parser.add_argument("--checkpoint", action="store_true", help="the average so far of a stage 2 still in training")
    args = parser.parse_args()

    refined = args.run / "decoder.pt"
    vae, model = load(refined if refined.exists() else args.run / "vae.pt"), trained(args)
    write_json(args.folder / "model_index.json", MODEL_INDEX)
    write_json(args.folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(args.folder / "generation_config.json", GENERATION)
    write_json(args.folder / "unet" / "config.json", unet_config(model["unet_config"]))
    write_weights(args.folder / "unet" / "diffusion_pytorch_model.safetensors", model["unet"])
    pixels = model["unet_config"]["sample_size"] * 2 ** (len(vae["config"]["block_channels"]) - 1)
    write_json(args.folder / "vae" / "config.json", vae_config(vae["config"], pixels))
    write_weights(args.folder / "vae" / "diffusion_pytorch_model.safetensors", vae["model"])
    write_json(args.folder / "text_encoder" / "config.json", text_encoder_config(model["text_config"]))
    # transformers has had this prefix in its files for as long as there are any, and reads them with it
    prefixed = {f"text_model.{key}": value for key, value in model["text"].items()}
    write_weights(args.folder / "text_encoder" / "model.safetensors", prefixed)
    (args.folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for source in sorted((args.run / "tokenizer").iterdir()):
        shutil.copyfile(source, args.folder / "tokenizer" / source.name)
    shutil.copyfile(args.run / WORD_LIST, args.folder / WORD_LIST)
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"step {model['step']}: {size / 1e6:.2f} MB -> {args.folder}")


def trained(args: argparse.Namespace) -> dict:
    """Stage 2's result, or the same of its checkpoint."""
    if not args.checkpoint:
        return load(args.run / "model.pt")
    state = load(args.run / "unet_checkpoint.pt")
    parts = {name: {} for name in ("unet", "text")}
    for key, value in state["average"].items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return {**parts, "step": state["step"], "unet_config": state["unet_config"], "text_config": state["text_config"]}


if __name__ == "__main__":
    main()
