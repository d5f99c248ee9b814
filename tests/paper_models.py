"""The models of the latent diffusion paper in their original layout: tensors by name and shape, and random weights.

Written down for the tests alone, in the words of the original configurations, from CompVis' `openaimodel.py`,
`attention.py`, `x_transformer.py` and `encoders/modules.py`.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.compvis_layout import vae_state
from safetensors.torch import save_file
from torch import Tensor

from ldmcli.config import VAEConfig
from ldmcli.networks.vae import autoencoder_of

Shapes = dict[str, tuple[int, ...]]
CODES = 50
# As many tokens as the small models of text know; pieces of words begin with ##.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", ",", ".", "red", "apple"]
VOCABULARY += [*(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), "##les", "on", "blue", "cafe", "\u4e2d"]
PROMPT = "A red apples, on\ta café (\u4e2d) BLUE."
LAYOUT = ((3, 0.1, 0.2, 0.55, 0.9), (17, 0.5, 0.0, 1.0, 0.33))
UNET = "model.diffusion_model."


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of the paper. `channels` times `mult` are the U-Net's widths; `attention` lists downsampling factors.
    `text`, `labels`, `layout` and `classes` are what it is conditioned on, by width, number, length and number."""

    in_channels: int
    out_channels: int
    channels: int
    mult: tuple[int, ...]
    attention: tuple[int, ...]
    heads: int | None = None
    context: int = 0
    depth: int = 1
    scale_shift: bool = False
    resampling: bool = False
    layers: int = 2
    text: tuple[int, int, int, int] | None = None  # vocabulary, width, layers, tokens
    labels: int = 0
    classes: int = 0
    betas: tuple[float, float] = (0.0015, 0.0195)
    averaged: bool = True
    quantizes: bool = True
    parameters: float = 0.0  # millions, of the U-Net

    @property
    def first_levels(self) -> int:
        """Of the first stage."""
        return 4 if self.out_channels == 4 else 3


PUBLISHED = {
    "celeba256": Model(3, 3, 224, (1, 2, 3, 4), (8, 4, 2), parameters=274.1),
    "churches256": Model(4, 4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), 8, scale_shift=True, resampling=True,
                         betas=(0.0015, 0.0155), quantizes=False, parameters=295.0),
    "cin256": Model(4, 4, 256, (1, 2, 4), (4, 2, 1), context=512, labels=1000, parameters=395.0),
    "cin256-v2": Model(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), 1, context=512, labels=1001, averaged=False,
                       parameters=400.9),
    "text2img256": Model(3, 3, 192, (1, 2, 3, 5), (8, 4, 2), context=640, text=(30522, 640, 32, 77), parameters=403.6),
    "txt2img-1p4B": Model(4, 4, 320, (1, 2, 4, 4), (4, 2, 1), 8, context=1280, text=(30522, 1280, 32, 77),
                          betas=(0.00085, 0.012), averaged=False, quantizes=False, parameters=872.3),
    "layout2img": Model(3, 3, 128, (1, 2, 3, 4), (8, 4, 2), context=512, depth=3, text=(8192, 512, 16, 92),
                        betas=(0.0015, 0.0205), parameters=246.3),
    "semantic": Model(6, 3, 128, (1, 4, 8), (32, 16, 8), 8, classes=182, betas=(0.0015, 0.0205), parameters=215.2),
}  # fmt: skip


def small(name: str) -> Model:
    """A model of the same structure, two levels of it, that draws in a moment."""
    return narrowed(PUBLISHED[name])


def narrowed(full: Model) -> Model:
    """A model with few channels and two levels."""
    attention = (1,) if 1 in full.attention else (2,) if 2 in full.attention else ()
    text = full.text and (full.text[0] if full.text[3] == 92 else 120, 48, 2, full.text[3])
    return dataclasses.replace(
        full, channels=64, mult=(1, 2), attention=attention, layers=1, context=full.context and 48, text=text,
        labels=full.labels and full.labels - 990, classes=full.classes and 5,
    )  # fmt: skip


def unet_shapes(model: Model) -> Shapes:
    """The U-Net's tensors, without prefix."""
    found: Shapes = {}
    time = 4 * model.channels

    def layer(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def resnet(name: str, into: int, out: int) -> None:
        layer(f"{name}.in_layers.0", into)
        layer(f"{name}.in_layers.2", out, into, 3, 3)
        layer(f"{name}.emb_layers.1", 2 * out if model.scale_shift else out, time)
        layer(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            layer(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        if not model.context:
            layer(f"{name}.qkv", 3 * width, width, 1)
            layer(f"{name}.proj_out", width, width, 1)
            return
        layer(f"{name}.proj_in", width, width, 1, 1)
        layer(f"{name}.proj_out", width, width, 1, 1)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(model.depth)):
            for norm in ("norm1", "norm2", "norm3"):
                layer(f"{block}.{norm}", width)
            for part, read in (("attn1", width), ("attn2", model.context)):
                found[f"{block}.{part}.to_q.weight"] = (width, width)
                found[f"{block}.{part}.to_k.weight"] = found[f"{block}.{part}.to_v.weight"] = (width, read)
                layer(f"{block}.{part}.to_out.0", width, width)
            layer(f"{block}.ff.net.0.proj", 8 * width, width)
            layer(f"{block}.ff.net.2", width, 4 * width)

    layer("time_embed.0", time, model.channels)
    layer("time_embed.2", time, time)
    layer("input_blocks.0.0", model.channels, model.in_channels, 3, 3)
    skips, width, block, factor = [model.channels], model.channels, 0, 1
    for level, times in enumerate(model.mult):
        for _ in range(model.layers):
            block += 1
            resnet(f"input_blocks.{block}.0", width, times * model.channels)
            width = times * model.channels
            if factor in model.attention:
                attention(f"input_blocks.{block}.1", width)
            skips.append(width)
        if level < len(model.mult) - 1:
            block, factor = block + 1, 2 * factor
            skips.append(width)
            if model.resampling:
                resnet(f"input_blocks.{block}.0", width, width)
            else:
                layer(f"input_blocks.{block}.0.op", width, width, 3, 3)
    resnet("middle_block.0", width, width)
    attention("middle_block.1", width)
    resnet("middle_block.2", width, width)
    block = -1
    for level, times in reversed(list(enumerate(model.mult))):
        for i in range(model.layers + 1):
            block, place = block + 1, 1
            resnet(f"output_blocks.{block}.0", width + skips.pop(), times * model.channels)
            width = times * model.channels
            if factor in model.attention:
                attention(f"output_blocks.{block}.1", width)
                place = 2
            if level and i == model.layers:
                factor //= 2
                if model.resampling:
                    resnet(f"output_blocks.{block}.{place}", width, width)
                else:
                    layer(f"output_blocks.{block}.{place}.conv", width, width, 3, 3)
    layer("out.0", width)
    layer("out.2", model.out_channels, width, 3, 3)
    return found


def condition_shapes(model: Model) -> Shapes:
    """What encodes its condition, behind `cond_stage_model.`."""
    if model.labels:
        return {"embedding.weight": (model.labels, model.context)}
    if model.classes:
        return {"channel_mapper.weight": (model.in_channels - model.out_channels, model.classes, 1, 1)}
    if model.text is None:
        return {}
    vocabulary, width, layers, tokens = model.text
    found: Shapes = {"token_emb.weight": (vocabulary, width), "pos_emb.emb.weight": (tokens, width)}
    inner = 512 if width > 64 else 32
    for i in range(layers):
        attention, forward = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        for name in (attention, forward):
            found |= {f"{name}.0.weight": (width,), f"{name}.0.bias": (width,)}
        found |= {f"{attention}.1.to_{name}.weight": (inner, width) for name in "qkv"}
        found |= {f"{attention}.1.to_out.weight": (width, inner), f"{attention}.1.to_out.bias": (width,)}
        found |= {f"{forward}.1.net.0.0.weight": (4 * width, width), f"{forward}.1.net.0.0.bias": (4 * width,)}
        found |= {f"{forward}.1.net.2.weight": (width, 4 * width), f"{forward}.1.net.2.bias": (width,)}
    found |= {"norm.weight": (width,), "norm.bias": (width,)}
    found |= {"to_logits.weight": (vocabulary, width), "to_logits.bias": (vocabulary,)}
    return {f"transformer.{name}": shape for name, shape in found.items()}


def shapes_of(model: Model) -> Shapes:
    """All but the first stage."""
    unet = {f"{UNET}{name}": shape for name, shape in unet_shapes(model).items()}
    return unet | {f"cond_stage_model.{name}": shape for name, shape in condition_shapes(model).items()}


def random_weight(name: str, shape: tuple[int, ...], salt: str = "") -> Tensor:
    """The same numbers for a name wherever it is asked for, of about the size that a trained network's have."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}{name}".encode()))
    numbers = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * numbers + name.endswith("weight")
    # Matrices keep the size of what they read; embeddings, whose rows are read one at a time, are of size one.
    embeds = "emb" in name and "emb_layers" not in name and "time_embed" not in name
    return numbers if embeds else numbers / math.sqrt(math.prod(shape[1:]))


def first_stage(model: Model) -> dict[str, Tensor]:
    """The tensors of a VQ or KL autoencoder with as many levels as the published one, and a narrow resnet in each."""
    config = VAEConfig(
        latent_channels=model.out_channels, block_channels=(32,) * model.first_levels, layers_per_block=1,
        codes=CODES if model.quantizes else 0,
    )  # fmt: skip
    with torch.device("meta"):
        state = vae_state(autoencoder_of(config).state_dict())
    return {name: random_weight(name, tuple(tensor.shape)) for name, tensor in state.items()}


def schedule(model: Model) -> dict[str, Tensor]:
    """The buffers that original checkpoints carry of their noise schedule."""
    start, end = model.betas
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, dim=0).float()}


def state_of(model: Model, **own: Tensor) -> dict[str, Tensor]:
    """A random checkpoint; where the original code draws with averaged weights, the others are noise."""
    shapes = shapes_of(model)
    state = {name: random_weight(name, shape) for name, shape in shapes.items()}
    if model.averaged:
        for name in [name for name in state if name.startswith(UNET)]:
            dotless = name.removeprefix("model.").replace(".", "")
            state[f"model_ema.{dotless}"] = state[name]
            state[name] = random_weight(name, shapes[name], salt="not averaged ")
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return state | first_stage(model) | schedule(model) | own


def class_map(width: int, height: int, classes: int) -> np.ndarray:
    """A semantic map (height, width) uint8: blocks of classes, some pixels of none."""
    down, across = np.mgrid[0:height, 0:width]
    found = ((down // 9 + across // 7) % (classes + 1)).astype(np.uint8)
    return np.where(found == classes, 255, found).astype(np.uint8)


def write_model(path: Path, model: Model, state: Mapping[str, Tensor] | None = None, **own: Any) -> Path:
    """The file of a random model, and beside it a vocabulary where it reads prompts."""
    if model.text and model.text[3] == 77:
        path.with_suffix(".vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tensors = state_of(model, **own) if state is None else state
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
