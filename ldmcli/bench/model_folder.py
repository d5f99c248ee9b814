"""A diffusers model folder without its weights: configurations, vocabularies and index, written from the dataclasses.

The counterpart of `checkpoints.folder_config`, and as there with the fields of diffusers and transformers; but only
with those that the families of `random_weights` need.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.families import SD1, SD2, SDXL
from ldmcli.conditioning.tokenizer import clip_vocabulary
from ldmcli.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.disk.writing import named_errors

# The class that each family's published models name; samplers beside it read its fields as well.
_SCHEDULERS = {SD1.name: "PNDMScheduler", SD2.name: "DDIMScheduler", SDXL.name: "EulerDiscreteScheduler"}


def write_description(config: ModelConfig, folder: Path) -> None:
    """Write all small files of a model but the index into `folder`, which is there.

    Raises CannotCreateError or StorageError where a file cannot be written.
    """
    for name, content in _configurations(config).items():
        _write_json(folder / name, content)
    for text in config.text_encoders:
        _write_tokenizer(folder / text.part.replace("text_encoder", "tokenizer"), text)


def write_index(config: ModelConfig, folder: Path) -> None:
    """Write model_index.json, which makes a model of the folder. Raises as `write_description` does."""
    _write_json(folder / "model_index.json", _model_index(config))


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` once the block is done; its folder is made if need be.

    Raises CannotCreateError or StorageError where something of that fails.
    """
    temporary = path.with_name(f".{path.name}.part")
    with named_errors(path, "write the file"):
        path.parent.mkdir(exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    with creating(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_tokenizer(folder: Path, text: TextEncoderConfig) -> None:
    """CLIP's own vocabulary in transformers' files; an OpenCLIP encoder fills short prompts up with token 0."""
    vocabulary = clip_vocabulary()
    begin, end = "<|startoftext|>", "<|endoftext|>"
    pad = "!" if text.activation == "gelu" else end
    marks = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.max_length, "do_lower_case": True, **marks}
    merges = "".join(f"{left} {right}\n" for left, right in vocabulary.merges)
    _write_text(folder / "vocab.json", json.dumps(vocabulary.ids))
    _write_text(folder / "merges.txt", "#version: 0.2\n" + merges)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", marks)


def _configurations(config: ModelConfig) -> dict[str, dict[str, Any]]:
    return {
        "unet/config.json": _unet_json(config.unet),
        "vae/config.json": _vae_json(config.vae, config.default_size),
        "scheduler/scheduler_config.json": _scheduler_json(config),
        **{f"{text.part}/config.json": _text_json(text) for text in config.text_encoders},
    }


def _unet_json(unet: UNetConfig) -> dict[str, Any]:
    kinds = ["CrossAttn" if depth else "" for depth in unet.attention]
    depths = [depth or 1 for depth in unet.attention]
    depths[-1] = unet.middle_attention
    added: dict[str, Any] = {}
    if unet.added_numbers:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.added_number_dim,
            "projection_class_embeddings_input_dim": unet.pooled_dim + unet.added_numbers * unet.added_number_dim,
        }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(unet.heads),  # diffusers' word for the number of heads
        "block_out_channels": list(unet.block_channels),
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "flip_sin_to_cos": unet.flip_sin_to_cos,
        "freq_shift": unet.freq_shift,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.layers_per_block,
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "sample_size": unet.sample_size,
        "transformer_layers_per_block": depths,
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": unet.linear_projection,
        **added,
    }


def _vae_json(vae: VAEConfig, sample_size: int) -> dict[str, Any]:
    levels = len(vae.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(vae.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": vae.force_upcast,
        "in_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.layers_per_block,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.out_channels,
        "sample_size": sample_size,
        "scaling_factor": vae.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_json(text: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": [_text_class(text)],
        "bos_token_id": text.bos_token_id,
        "dtype": "float16",
        "eos_token_id": text.eos_token_id,
        "hidden_act": text.activation,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "layer_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "projection_dim": text.projection_dim or text.hidden_size,
        "vocab_size": text.vocab_size,
    }


def _scheduler_json(config: ModelConfig) -> dict[str, Any]:
    schedule = config.schedule
    return {
        "_class_name": _SCHEDULERS[config.family],
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.training_steps,
        "prediction_type": schedule.prediction_type,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "skip_prk_steps": True,
        "steps_offset": schedule.steps_offset,
        "timestep_spacing": schedule.spacing,
    }


def _model_index(config: ModelConfig) -> dict[str, Any]:
    parts = {text.part: ["transformers", _text_class(text)] for text in config.text_encoders}
    parts |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in parts}
    parts |= {
        "scheduler": ["diffusers", _SCHEDULERS[config.family]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    none = [None, None]
    if config.unet.added_numbers:
        rest: dict[str, Any] = {"force_zeros_for_empty_prompt": config.zero_empty_negative}
        return {"_class_name": "StableDiffusionXLPipeline", **parts, **rest}
    rest = {"feature_extractor": none, "safety_checker": none, "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline", **parts, **rest}


def _text_class(text: TextEncoderConfig) -> str:
    return "CLIPTextModelWithProjection" if text.projection_dim else "CLIPTextModel"
