"""Published networks in full size, without data: every key is read, and none is left."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from control_support import original_names
from oracle.test_key_lists import write_hollow
from torch import Tensor

from ldmcli.checkpoints.control_source import open_control
from ldmcli.checkpoints.families import SD1, SD2, SDXL
from ldmcli.checkpoints.files import WeightFile
from ldmcli.checkpoints.load_control import load_control
from ldmcli.checkpoints.source import PartSource
from ldmcli.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig

UNETS = {
    "sd1": UNetConfig(),
    "sd2": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
    "sdxl": UNetConfig(
        block_channels=(320, 640, 1280), attention=(0, 2, 10), middle_attention=10, heads=(5, 10, 20),
        context_dim=2048, linear_projection=True, pooled_dim=1280, added_numbers=6,
    ),
}  # fmt: skip
FAMILY = {"sd1": SD1.name, "sd2": SD2.name, "sdxl": SDXL.name}
_XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
}
NETWORKS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "sd1": ("sd1", "ControlNetModel", {"cross_attention_dim": 768}, 361.28),
    "sd2": (
        "sd2", "ControlNetModel",
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}, 364.23,
    ),
    "sdxl": ("sdxl", "ControlNetModel", _XL, 1251.18),
    "union": ("sdxl", "ControlNetUnionModel", _XL | {"num_control_type": 6}, 1254.73),
    "promax": ("sdxl", "ControlNetUnionModel", _XL | {"num_control_type": 8}, 1255.38),
    "full adapter": ("sd1", "T2IAdapter", {}, 77.37),
    "light adapter": (
        "sd1", "T2IAdapter",
        {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}, 18.7,
    ),
    "xl adapter": ("sdxl", "T2IAdapter", {"adapter_type": "full_adapter_xl", "downscale_factor": 16}, 79.03),
}  # fmt: skip


def adapter_names(state: dict[str, Tensor], *, light: bool) -> dict[str, Tensor]:
    """An adapter's weights under its authors' names."""
    found = {}
    for key, tensor in state.items():
        parts = key.removeprefix("adapter.").split(".")
        if light:
            parts = ["body" if part == "resnets" else part for part in parts]
        elif parts[0] == "body":
            number = 2 * int(parts[1]) + (int(parts[3]) if parts[2] == "resnets" else 0)
            parts = ["body", str(number), *(parts[4:] if parts[2] == "resnets" else parts[2:])]
        found[".".join(parts)] = tensor
    return found


def model_of(name: str) -> ModelConfig:
    return ModelConfig(FAMILY[name], UNETS[name], VAEConfig(), (TextEncoderConfig(),), ScheduleConfig())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_key_is_left(name: str, layout: str, tmp_path: Path) -> None:
    model, kind, settings, millions = NETWORKS[name]
    with torch.device("meta"):
        state = dict(getattr(diffusers, kind)(**settings).state_dict())
    assert sum(tensor.numel() for tensor in state.values()) / 1e6 == pytest.approx(millions, abs=0.01 + millions / 1e3)
    given = state
    if layout == "original":
        if kind == "ControlNetUnionModel":
            pytest.skip("only in diffusers' layout")
        adapter = kind == "T2IAdapter"
        given = adapter_names(state, light="light" in name) if adapter else original_names(state, 2)
    path = write_hollow(tmp_path / "net.safetensors", given)

    def read_shapes(file: WeightFile, keys: Iterable[str], *_: Any) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, torch.empty(file.tensors[key].shape, device="meta")

    source = open_control(path, model_of(model))
    with mock.patch("ldmcli.checkpoints.load.read_tensors", read_shapes):
        network = load_control(source, PartSource("unet", path, UNETS[model], ()), torch.device("cpu"), torch.float32)
    found = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert found == {key: tensor.shape for key, tensor in state.items()}
