"""Published IP-Adapters and image encoders in full size, without data: every key is read, and none is left."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from oracle.test_control_key_lists import UNETS, model_of
from oracle.test_key_lists import write_hollow
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldmcli.checkpoints.files import WeightFile
from ldmcli.checkpoints.ip_adapter_source import open_image_encoder, open_ip_adapter
from ldmcli.checkpoints.load_ip_adapter import load_image_encoder, load_ip_adapter

CPU = torch.device("cpu")
_XL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"sd1": {"cross_attention_dim": 768, "attention_head_dim": 8}, "sdxl": _XL}
Shapes = dict[str, tuple[int, ...]]


def keys_and_values(unet: str) -> Shapes:
    """By diffusers' own list of attention processors."""
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel(**SETTINGS[unet])
    modules, found = dict(network.named_modules()), {}
    for i, name in enumerate(network.attn_processors):
        if "attn2" in name:
            width, context = modules[name.removesuffix(".processor")].to_k.weight.shape
            found |= {f"ip_adapter.{i}.to_{letter}_ip.weight": (width, context) for letter in "kv"}
    return found


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def base(clip: int, context: int) -> Shapes:
    return linear("proj", 4 * context, clip) | norm("norm", context)


def plus(clip: int, context: int, dim: int) -> Shapes:
    found: Shapes = {"latents": (1, 16, dim)} | linear("proj_in", dim, clip)
    found |= linear("proj_out", context, dim) | norm("norm_out", context)
    for i in range(4):
        found |= norm(f"layers.{i}.0.norm1", dim) | norm(f"layers.{i}.0.norm2", dim)
        found |= linear(f"layers.{i}.0.to_q", dim, dim, bias=False)
        found |= linear(f"layers.{i}.0.to_kv", 2 * dim, dim, bias=False)
        found |= linear(f"layers.{i}.0.to_out", dim, dim, bias=False)
        found |= norm(f"layers.{i}.1.0", dim)
        found |= linear(f"layers.{i}.1.1", 4 * dim, dim, bias=False)
        found |= linear(f"layers.{i}.1.3", dim, 4 * dim, bias=False)
    return found


def full(clip: int, context: int) -> Shapes:
    return linear("proj.0", clip, clip) | linear("proj.2", context, clip) | norm("proj.3", context)


# With the sizes of the authors' files, in MB of 16 bits.
ADAPTERS = {
    "ip-adapter_sd15": ("sd1", base(1024, 768), 44.6),
    "ip-adapter_sd15_vit-G": ("sd1", base(1280, 768), 46.2),
    "ip-adapter-plus_sd15": ("sd1", plus(1280, 768, 768), 98.2),
    "ip-adapter-full-face_sd15": ("sd1", full(1280, 768), 43.6),
    "ip-adapter_sdxl": ("sdxl", base(1280, 2048), 702.6),
    "ip-adapter_sdxl_vit-h": ("sdxl", base(1024, 2048), 698.4),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", plus(1280, 2048, 1280), 847.5),
}


def read_shapes(file: WeightFile, keys: Iterable[str], *_: Any) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        yield key, torch.empty(file.tensors[key].shape, device="meta")


def hollow(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_key_of_an_adapter_is_left(name: str, tmp_path: Path) -> None:
    unet, projection, megabytes = ADAPTERS[name]
    state = hollow({f"image_proj.{key}": shape for key, shape in projection.items()} | keys_and_values(unet))
    assert 2e-6 * sum(tensor.numel() for tensor in state.values()) == pytest.approx(megabytes, rel=2e-3)
    part = open_ip_adapter(write_hollow(tmp_path / f"{name}.safetensors", state), model_of(unet))
    assert part.config.places == UNETS[unet].cross_attentions
    with mock.patch("ldmcli.checkpoints.load.read_tensors", read_shapes):
        adapter = load_ip_adapter(part, CPU, torch.float32)
    assert {key: tensor.shape for key, tensor in adapter.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120, "projection_dim": 1024}, 632.1),
        ({"hidden_size": 1664, "num_hidden_layers": 48, "intermediate_size": 8192, "projection_dim": 1280}, 1844.9),
    ],
    ids=["ViT-H", "ViT-bigG"],
)
def test_no_key_of_an_image_encoder_is_left(settings: dict[str, int], millions: float, tmp_path: Path) -> None:
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, num_attention_heads=16, patch_size=14))
    state = dict(tower.state_dict())
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.1)
    old = {"vision_model.embeddings.position_ids": torch.empty(1, 257, dtype=torch.int64, device="meta")}
    part = open_image_encoder(write_hollow(tmp_path / "model.safetensors", state | old))
    with mock.patch("ldmcli.checkpoints.load.read_tensors", read_shapes):
        encoder = load_image_encoder(part, CPU, torch.float32)
    assert encoder.config.heads == 16
    assert encoder.tower.state_dict().keys() == state.keys()
