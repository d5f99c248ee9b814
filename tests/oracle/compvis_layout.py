"""diffusers' tensors under the names of the original Stable Diffusion checkpoints.

Written down for the tests alone, from CompVis' `openaimodel.py` and `diffusionmodules/model.py`, so that the program's
own table is checked against another.
"""

import re

from torch import Tensor

State = dict[str, Tensor]


def compvis_state(unet: State, vae: State, text: State, *, levels: int = 4, layers: int = 2) -> State:
    """One original checkpoint from the three parts of a pipeline whose coarsest level has no attention."""
    state = {f"model.diffusion_model.{_unet_key(key, levels, layers)}": tensor for key, tensor in unet.items()}
    for key, tensor in vae.items():
        # In the original the VAE's attention is made of 1×1 convolutions.
        is_matrix = ".attentions." in key and tensor.ndim == 2
        state[f"first_stage_model.{_vae_key(key, levels)}"] = tensor[:, :, None, None] if is_matrix else tensor
    for key, tensor in text.items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    return state


def _unet_key(key: str, levels: int, layers: int) -> str:
    simple = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
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
    if kind == "upsamplers":  # inside the level's last block: behind its attention, which the first level has none of
        return f"output_blocks.{level * (layers + 1) + layers}.{1 if level == 0 else 2}.conv.{leaf}"
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
