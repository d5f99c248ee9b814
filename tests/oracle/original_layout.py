"""diffusers' tensors under the names of the original Stable Diffusion checkpoints, of any version.

Written down for the tests alone, from Stability AI's `stablediffusion` and `generative-models` and from open_clip's
`transformer.py`. It works on the meta device too. The U-Net and VAE are named as in version 1.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from oracle.compvis_layout import State, compvis_state, unet_state, vae_state
from oracle.random_families import random_last_layer
from torch import Tensor

_LAYER = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def original_state(parts: Mapping[str, Any]) -> State:
    """One original checkpoint of a pipeline's parts: of XL's refiner where there is a text_encoder_2 alone, of XL where
    there is one beside a text_encoder; else of version 1 or 2, by the text encoder's activation."""
    states: dict[str, State] = {name: part.state_dict() for name, part in parts.items()}
    state = unet_state(states["unet"]) | vae_state(states["vae"])
    text, text_2 = states.get("text_encoder"), states.get("text_encoder_2")
    if text_2 is None:
        assert text is not None
        if parts["text_encoder"].config.hidden_act == "quick_gelu":
            return compvis_state(states["unet"], states["vae"], text)
        whole = text | random_last_layer(text)
        return state | _under("cond_stage_model.model.", _with_projection(openclip_state(whole)))
    if text is None:
        return state | _under("conditioner.embedders.0.model.", openclip_state(text_2))
    bare = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    state |= _under("conditioner.embedders.0.transformer.text_model.", bare)
    return state | _under("conditioner.embedders.1.model.", openclip_state(text_2))


def openclip_state(text: State) -> State:
    """A CLIPTextModel's tensors as open_clip names and joins them; a projection lies the other way round there."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    first = bare["embeddings.token_embedding.weight"]
    state: State = {
        "token_embedding.weight": first,
        "positional_embedding": bare["embeddings.position_embedding.weight"],
        "ln_final.weight": bare["final_layer_norm.weight"],
        "ln_final.bias": bare["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6052, device=first.device),
    }
    if "text_projection.weight" in bare:
        state["text_projection"] = bare["text_projection.weight"].T.contiguous()
    for key, tensor in bare.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if not match:
            continue
        block, rest, leaf = f"transformer.resblocks.{match[1]}", match[2], match[3]
        if rest == "self_attn.q_proj":
            joined = [bare[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            state[f"{block}.attn.in_proj_{leaf}"] = torch.cat(joined)
        elif not rest.startswith("self_attn.") or rest.endswith("out_proj"):
            state[f"{block}.{dict(_LAYER)[rest]}.{leaf}"] = tensor
    return state


def with_extras(state: State) -> State:
    """The same model with what training leaves in such files beside it."""
    extras: dict[str, Tensor] = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "alphas_cumprod": alphas_cumprod(),
        "alphas_cumprod_prev": torch.zeros(1000),
        "betas": torch.zeros(1000),
        "sqrt_alphas_cumprod": torch.zeros(1000),
        "log_one_minus_alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "logvar": torch.zeros(1000),
        "lvlb_weights": torch.zeros(1000),
        "denoiser.sigmas": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(1),
    }
    if any(key.startswith("cond_stage_model.model.") for key in state):
        extras["cond_stage_model.model.attn_mask"] = torch.zeros(77, 77)
    if any(key.startswith("conditioner.embedders.0.transformer.") for key in state):
        ids = torch.arange(77)[None]
        extras["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = ids
    return state | extras


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule, as the original files carry it."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def write(state: State, path: Path) -> Path:
    """`state` as a safetensors file."""
    from safetensors.torch import save_file

    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    return path


def _with_projection(state: State) -> State:
    """Version 2's files carry a projection that nothing reads."""
    table = state["positional_embedding"]
    width = table.shape[1]
    return state | {"text_projection": torch.full((width, width), 0.01, device=table.device, dtype=table.dtype)}


def _under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}
