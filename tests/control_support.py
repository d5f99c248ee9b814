"""What tests of control networks share: random ones for a model, and their weights in every layout."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from oracle.compvis_layout import _unet_key
from oracle.random_model import randomise
from safetensors.torch import save_file
from torch import Tensor

from ldmcli.config import UNetConfig
from ldmcli.networks.control_net import ControlNet
from ldmcli.steering_config import ControlConfig

State = Mapping[str, Tensor]
_HINT = "controlnet_cond_embedding."


def random_control(unet: UNetConfig, *, hint: tuple[int, ...] = (8, 16, 16, 24), seed: int = 3) -> ControlNet:
    """A control network of a U-Net's own widths, none of whose weights is zero."""
    outputs = (*unet.skip_channels, unet.block_channels[-1])
    network = ControlNet(ControlConfig(unet, outputs, hint_channels=hint))
    randomise(network, torch.Generator().manual_seed(seed))
    return network.requires_grad_(False).eval()


def original_names(state: State, layers: int) -> dict[str, Tensor]:
    """The weights under the names of the authors' own code (`cldm/cldm.py`), without a prefix."""
    last = 1 + max(int(found[1]) for key in state if (found := re.match(rf"{_HINT}blocks\.(\d+)", key)))
    found = {}
    for key, tensor in state.items():
        if key.startswith(_HINT):
            part, leaf = key.removeprefix(_HINT).rsplit(".", 1)
            number = {"conv_in": 0, "conv_out": last + 1}.get(part)
            number = int(part.removeprefix("blocks.")) + 1 if number is None else number
            found[f"input_hint_block.{2 * number}.{leaf}"] = tensor
        elif key.startswith("controlnet_down_blocks."):
            _, number_text, leaf = key.split(".")
            found[f"zero_convs.{number_text}.0.{leaf}"] = tensor
        elif key.startswith("controlnet_mid_block."):
            found[f"middle_block_out.0.{key.rsplit('.', 1)[1]}"] = tensor
        else:
            found[_unet_key(key, layers, set())] = tensor
    return found


def write(path: Path, state: State) -> Path:
    """The weights as a file."""
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    return path
