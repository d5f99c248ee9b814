"""What tests of image prompts share: random IP-Adapters for a model, and an image encoder that they read."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from control_support import write
from oracle.random_model import randomise

from ldmcli.config import UNetConfig
from ldmcli.networks.ip_adapter import IPAdapter
from ldmcli.steering_config import IPAdapterConfig

ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "projection_dim": 24, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "hidden_act": "gelu",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "base": {"reads": "embedding", "image_dim": 24, "tokens": 4},
    "plus": {
        "reads": "patches", "image_dim": 32, "tokens": 6, "resampled": True, "dim": 48, "layers": 4, "heads": 2,
        "inner": 192,
    },
    "full": {"reads": "patches", "image_dim": 32, "tokens": 0},
}  # fmt: skip


def random_ip_adapter(unet: UNetConfig, kind: str, *, seed: int = 5) -> IPAdapter:
    """An adapter for a U-Net; each picture makes tokens, keys and values of its own."""
    config = IPAdapterConfig(context_dim=unet.context_dim, places=unet.cross_attentions, **KINDS[kind])
    adapter = IPAdapter(config)
    randomise(adapter, torch.Generator().manual_seed(seed))
    return adapter.requires_grad_(False).eval()


def write_ip_adapter(folder: Path, unet: UNetConfig, kind: str, **changes: Any) -> Path:
    """An adapter's file."""
    adapter = random_ip_adapter(dataclasses.replace(unet, **changes), kind)
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / f"{kind}.safetensors", adapter.state_dict())


def random_encoder() -> Any:
    """transformers' tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    randomise(tower, torch.Generator().manual_seed(8))
    return tower.requires_grad_(False).eval()
