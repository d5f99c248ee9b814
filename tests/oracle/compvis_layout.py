"""diffusers' tensors under the names of the original Stable Diffusion 1 checkpoints.

Written down for the tests alone, from CompVis' `openaimodel.py` and `diffusionmodules/model.py`, so that the program's
own table is checked against another.
"""

import re

from torch import Tensor

State = dict[str, Tensor]


def compvis_state(unet: State, vae: State, text: State) -> State:
    """One original Stable Diffusion 1 checkpoint from the three parts of a pipeline."""
    state = unet_state(unet) | vae_state(vae)
    for key, tensor in text.items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return state


def unet_state(unet: State) -> State:
    """The U-Net's part of an original checkpoint, whatever its levels and blocks."""
    levels, layers = _count(unet, r"down_blocks\.(\d+)"), _count(unet, r"down_blocks\.0\.resnets\.(\d+)")
    attending = {int(match[1]) for key in unet if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))}
    assert levels == _count(unet, r"up_blocks\.(\d+)")
    return {f"model.diffusion_model.{_unet_key(key, layers, attending)}": tensor for key, tensor in unet.items()}


def vae_state(vae: State) -> State:
    """The VAE's part of an original checkpoint. There, its attention is made of 1×1 convolutions."""
    levels = _count(vae, r"decoder\.up_blocks\.(\d+)")
    state = {}
    for key, tensor in vae.items():
        is_matrix = ".attentions." in key and tensor.ndim == 2
        state[f"first_stage_model.{_vae_key(key, levels)}"] = tensor[:, :, None, None] if is_matrix else tensor
    return state


def _count(state: State, pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))


def _unet_key(key: str, layers: int, attending: set[int]) -> str:
    simple = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "class_embedding": "label_emb",
        "class_embedding.linear_1": "label_emb.0.0",
        "class_embedding.linear_2": "label_emb.0.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    stem, _, leaf = key.rpartition(".")
    if stem in simple:
        return f"{simple[stem]}.{leaf}"
    parts = key.split(".")
    if parts[0] == "mid_block":
        index = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])]
        return f"middle_block.{index}.{_unet_rest(parts[1], parts[3:])}"
    level, kind, index = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        if kind == "downsamplers":  # `Downsample.op` is a block of its own behind the level's resnets
            return f"input_blocks.{1 + level * (layers + 1) + layers}.0.op.{leaf}"
        block = 1 + level * (layers + 1) + index
        return f"input_blocks.{block}.{int(kind == 'attentions')}.{_unet_rest(kind, parts[4:])}"
    if kind == "upsamplers":  # inside the level's last block, behind its attention where it has one
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if level in attending else 1}.conv.{leaf}"
    block = level * (layers + 1) + index
    return f"output_blocks.{block}.{int(kind == 'attentions')}.{_unet_rest(kind, parts[4:])}"


def _unet_rest(kind: str, rest: list[str]) -> str:
    if kind == "attentions":
        return ".".join(rest)
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return ".".join([names[rest[0]], *rest[1:]])


def _vae_key(key: str, levels: int) -> str:
    key = re.sub(r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key)
    for pattern, replacement in (
        (r"encoder\.down_blocks\.(\d)", r"encoder.down.\1"),
        (r"\.resnets\.(\d)\.(?=.*)", r".block.\1."),
        (r"decoder\.up\.(\d)\.attentions\.(\d)\.", r"decoder.up.\1.attn.\2."),
        (r"encoder\.down\.(\d)\.attentions\.(\d)\.", r"encoder.down.\1.attn.\2."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"mid_block\.block\.0", "mid.block_1"),
        (r"mid_block\.block\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ):
        key = re.sub(pattern, replacement, key)
    return key
