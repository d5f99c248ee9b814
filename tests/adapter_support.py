"""Small networks to adapt, adapters as files, and the names that every writer of them gives a model's modules."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from oracle.compvis_layout import unet_state
from oracle.random_model import randomise
from safetensors import safe_open
from torch import Tensor, nn

from ldmcli.config import TextEncoderConfig, UNetConfig
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.unet import UNet

SMALL_UNET = UNetConfig(
    sample_size=8,
    block_channels=(32, 64),
    layers_per_block=1,
    attention=(1, 0),
    heads=(4, 4),
    context_dim=32,
    norm_groups=8,
)
SMALL_TEXT = TextEncoderConfig(vocab_size=64, hidden_size=32, intermediate_size=64, layers=2, heads=2, max_length=8)
Networks = dict[str, nn.Module]


def small_networks(dtype: torch.dtype = torch.float32, *, seed: int = 0, **unet: Any) -> Networks:
    """A U-Net and a text encoder with random weights; `unet` replaces settings of the first."""
    generator = torch.Generator().manual_seed(seed)
    networks: Networks = {
        "unet": UNet(dataclasses.replace(SMALL_UNET, **unet)),
        "text_encoder": TextTransformer(SMALL_TEXT),
    }
    for network in networks.values():
        randomise(network, generator)
        network.requires_grad_(False).eval().to(dtype)
    return networks


def state(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies of all weights by part and name."""
    return {
        f"{part}.{key}": tensor.clone() for part, net in networks.items() for key, tensor in net.state_dict().items()
    }


def unequal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> set[str]:
    """The names of weights that differ in any bit."""
    assert a.keys() == b.keys()
    return {key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """The tensors as a safetensors file."""
    from safetensors.torch import save_file

    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def lora_for(folder: Path, path: Path, *, seed: int = 0, size: float = 0.3, alias: str = "") -> Path:
    """A LoRA of rank 2 in sd-scripts' names, of every projection of queries in a model folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        (weights,) = (folder / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        for key, (rows, columns) in ((k, s) for k, s in shapes.items() if k.endswith(("to_q.weight", "q_proj.weight"))):
            name = prefix + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = size * torch.randn(2, columns, generator=generator)
            tensors[f"{name}.lora_up.weight"] = size * torch.randn(rows, 2, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    metadata = {"ss_tag_frequency": json.dumps({"10_x": {"glow toy": 3}})} | (
        {"ss_output_name": alias} if alias else {}
    )
    return write(path, tensors, metadata)


def noise(*shape: int, seed: int = 1, scale: float = 0.2) -> Tensor:
    """Random numbers of a small size."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def layers(network: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    """The layers of these kinds by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def originals(unet: nn.Module) -> dict[str, str]:
    """Each layer's name in the original layout, by a table that is the tests' own."""
    keys = {key: torch.empty(0) for key in unet.state_dict()}
    renamed = zip(keys, unet_state(keys), strict=True)
    return {
        key.removesuffix(".weight"): other.removeprefix("model.diffusion_model.").removesuffix(".weight")
        for key, other in renamed
        if key.endswith(".weight")
    }


def flat(name: str) -> str:
    return name.replace(".", "_")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a writer names a U-Net's layer (of its canonical and its original name) and a text encoder's (of its part and
    name), and its factors. None: it does not train that."""

    name: str
    unet: Callable[[str, str], str | None]
    text: Callable[[str, str], str | None]
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    alpha: str | None = ".alpha"

    def keys(self, networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
        """Each key of a file for these networks with part and name of its layer."""
        found = {}
        for part, network in networks.items():
            names = originals(network) if part == "unet" else {}
            for name in layers(network):
                spelled = self.unet(name, names[name]) if part == "unet" else self.text(_role(part, networks), name)
                if spelled is not None:
                    ends = [end for end in (self.down, self.up, self.alpha) if end is not None]
                    found |= {spelled + end: (part, name) for end in ends}
        return found


def _role(part: str, networks: Mapping[str, nn.Module]) -> str:
    """te, te1 or te2, as sd-scripts numbers text encoders."""
    if "text_encoder_2" not in networks:
        return "te"
    return "te2" if part == "text_encoder_2" else "te1"


def _processor(name: str, _: str = "") -> str | None:
    """An attention's layer as part of its processor."""
    block, attention, rest = name.rpartition(".attn1." if ".attn1." in name else ".attn2.")
    return f"{block}{attention}processor.{rest.removesuffix('.0')}" if attention else None


def _old_text(_: str, name: str) -> str | None:
    block, attention, rest = name.rpartition(".self_attn.")
    part = "text_encoder_2" if _ == "te2" else "text_encoder"
    return f"{part}.text_model.{block}{attention}to_{rest.removesuffix('_proj')}" if attention else None


def _hf(name: str) -> str:
    return name if name == "text_projection" else f"text_model.{name}"


_CLIPS = {"te": "clip_l", "te1": "clip_l", "te2": "clip_g"}
_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}


def _kohya_text(role: str, name: str) -> str:
    return f"lora_{role}_{flat(_hf(name))}"


def _under(prefix: str) -> Callable[[str, str], str]:
    return lambda name, _: prefix + name


def _part_text(role: str, name: str) -> str:
    return f"{_PARTS[role]}.{_hf(name)}"


DIALECTS = (
    Dialect("sd-scripts", lambda name, original: f"lora_unet_{flat(name)}", _kohya_text),
    Dialect("sd-scripts, original names", lambda name, original: f"lora_unet_{flat(original)}", _kohya_text),
    Dialect(
        "transformers 5.6",
        lambda name, original: f"lora_unet_{flat(name)}",
        lambda role, name: f"lora_{role}_{flat(name)}",
    ),
    Dialect("LyCORIS", lambda name, original: f"lycoris_{flat(name)}", lambda role, name: None),
    Dialect("sliders", lambda name, original: f"diffusion_model_{flat(original)}", lambda role, name: None),
    Dialect(
        "ComfyUI",
        lambda name, original: f"diffusion_model.{original}",
        lambda role, name: f"text_encoders.{_CLIPS[role]}.transformer.{_hf(name)}",
    ),
    Dialect("diffusers' processors", _processor, _old_text, "_lora.down.weight", "_lora.up.weight", None),
    Dialect(
        "diffusers' processors, U-Net",
        lambda name, original: f"unet.{_processor(name)}" if _processor(name) else None,
        lambda role, name: None,
        "_lora.down.weight",
        "_lora.up.weight",
        None,
    ),
    Dialect(
        "diffusers", _under("unet."), _part_text, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", None
    ),
    Dialect("diffusers, younger", _under("unet."), _part_text, ".lora.down.weight", ".lora.up.weight", None),
    Dialect("diffusers with PEFT", _under("unet."), _part_text, ".lora_A.weight", ".lora_B.weight", None),
    Dialect(
        "PEFT",
        _under("base_model.model."),
        lambda role, name: f"base_model.model.{_hf(name)}" if role == "te" else None,
        ".lora_A.weight",
        ".lora_B.weight",
        None,
    ),
    Dialect(
        "PEFT, in memory",
        _under("base_model.model."),
        lambda role, name: None,
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        None,
    ),
)
