"""A control network or T2I-Adapter on disk: looked at without torch, in every layout that is around, and checked to be
for the model."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.families import CONTEXTS, SDXL, Shapes
from ldmcli.checkpoints.file_kinds import describe_single_file, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights
from ldmcli.checkpoints.folder_config import Fields
from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.single_file import count_of, named_shape_errors, unet_from_shapes
from ldmcli.checkpoints.source import PartSource, list_keys, open_part
from ldmcli.config import ModelConfig, UNetConfig
from ldmcli.control import TYPES
from ldmcli.disk.opening import bad_file
from ldmcli.steering_config import AdapterConfig, ControlConfig

NAME = "control network"
PREFIX = "control_model."
LORA, DIFFERENCE = "lora_controlnet", "difference"
_CURE = "name a ControlNet or T2I-Adapter of Stable Diffusion 1.x, 2.x or XL"
_OTHER = "use one that was made for it"
_HINT = "input_hint_block."
_NAMELESS = ("model", "diffusion_pytorch_model")  # what files are called whose folder tells
_CLASSES = ("ControlNetModel", "ControlNetUnionModel", "T2IAdapter")
_MAX_LEVELS = 16
# Fields of config.json whose other values mean a network that is not built here.
_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("only_cross_attention",), (False,)),
    **dict.fromkeys(("class_embed_type", "encoder_hid_dim_type"), (None,)),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "controlnet_conditioning_channel_order": ("rgb",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_time_scale_shift": ("default",),
}


@dataclasses.dataclass(frozen=True)
class ControlSource:
    """A network of `part`. `base` says what of the model's own U-Net it builds on: "" nothing; "lora", all that is not
    in the file, and factors over it; "difference", what the file's weights are added to."""

    path: Path
    part: PartSource[ControlConfig | AdapterConfig]
    base: str = ""

    @property
    def config(self) -> ControlConfig | AdapterConfig:
        return self.part.config

    @property
    def name(self) -> str:
        """What it is called: its file's name without the ending, or its folder's where that says nothing."""
        if os.path.isdir(self.path):
            return self.path.name
        folder = self.path.parent.name if self.path.stem in _NAMELESS else ""
        return folder or self.path.stem

    @property
    def types(self) -> int:
        """Of how many types of pictures it is told."""
        return self.config.types if isinstance(self.config, ControlConfig) else 0

    @property
    def kind(self) -> str:
        if isinstance(self.config, AdapterConfig):
            return "light T2I-Adapter" if self.config.light else "T2I-Adapter"
        return {"lora": "Control-LoRA", "difference": "ControlNet (difference to its model)"}.get(
            self.base, "ControlNet Union" if self.types else "ControlNet"
        )


def is_control_folder(path: Path) -> bool:
    """Whether a folder says that it is a network of this kind."""
    return os.path.isfile(path / "config.json") and str(Fields(path / "config.json").get("_class_name")) in _CLASSES


def control_facts(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What can be said of such a file or folder without its model, as JSON values. Raises as `open_control` does."""
    files = tuple(open_part(path, NAME)) if os.path.isdir(path) else (open_weights(path, allow_pickle=allow_pickle),)
    tensors = {key.removeprefix(PREFIX): tensor for file in files for key, tensor in file.tensors.items()}
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    width = next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    width = width or next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.down")), None)
    levels = sum(bool(re.fullmatch(r"(zero_convs|controlnet_down_blocks)\.\d+\.(0\.)?weight", key)) for key in shapes)
    types = shapes.get("task_embedding", ())
    return {
        "is": describe_single_file(shapes),
        "family": None if width is None else CONTEXTS.get(width, f"text of {width} numbers a token"),
        "residuals": levels + 1 if levels else None,
        "types": sorted({name for name, number in TYPES.items() if number < types[0]}) if types else None,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "dtype": ", ".join(sorted({tensor.dtype for tensor in tensors.values()})),
        "tensors": len(shapes),
    }


def open_control(path: Path, model: ModelConfig, *, allow_pickle: bool = False) -> ControlSource:
    """Look at a network that is to steer `model`; every header is validated. Raises MissingInputError (nothing there)
    or BadDataError (what it is instead, or why it does not fit)."""
    fields = None
    if os.path.isdir(path):
        fields = _folder_fields(path)
        files = tuple(open_part(path, NAME, allow_pickle=allow_pickle))
    else:
        files = (open_weights(path, allow_pickle=allow_pickle),)
    source = _source(path, files, model, fields)
    if isinstance(source.config, AdapterConfig):
        _check_adapter(source.path, source.config, model)
    else:
        _check_control(source.path, source.config, model)
    return source


def _folder_fields(path: Path) -> Fields:
    if not os.path.lexists(path / "config.json"):
        raise bad_file(path, "is a folder without config.json, so no ControlNet", _CURE)
    fields = Fields(path / "config.json")
    kind = str(fields.get("_class_name", "ControlNetModel"))
    if kind not in _CLASSES:
        raise bad_file(path, f"is {with_article(kind)}, not a ControlNet that can be read", _CURE)
    if fields.get("controlnet_conditioning_channel_order", "rgb") == "rgb":
        fields.require(_USUAL)
        return fields
    raise bad_file(path, "reads pictures in blue, green, red, which this version cannot give it", _CURE)


def _source(path: Path, files: tuple[WeightFile, ...], model: ModelConfig, fields: Fields | None) -> ControlSource:
    shapes = {key: tensor.shape for file in files for key, tensor in file.tensors.items()}
    prefix = PREFIX if any(key.startswith(PREFIX) for key in shapes) else ""
    bare = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    if any(re.match(r"(adapter\.)?body\.0\.(resnets|block1|in_conv|body)\.", key) for key in bare):
        original = not any(key.startswith("adapter.") for key in bare)
        config: ControlConfig | AdapterConfig = _adapter_config(path, bare, model, fields)
        return ControlSource(path, PartSource("T2I-Adapter", path, config, files, prefix, original))
    original = f"{_HINT}0.weight" in bare
    if not original and "controlnet_cond_embedding.conv_in.weight" not in bare:
        kind = describe_single_file(shapes)
        if kind == "unknown":
            raise bad_file(path, list_keys("is no ControlNet that this version knows", list(shapes)), _CURE)
        raise bad_file(path, f"is {with_article(kind)}, no ControlNet that can be used here", _CURE)
    base = "lora" if LORA in bare else DIFFERENCE if DIFFERENCE in bare or DIFFERENCE in shapes else ""
    config = _control_config(path, bare, model, fields, original=original, base=base)
    return ControlSource(path, PartSource(NAME, path, config, files, prefix, original), base)


def _control_config(
    path: Path, shapes: Shapes, model: ModelConfig, fields: Fields | None, *, original: bool, base: str
) -> ControlConfig:
    with named_shape_errors(path, "ControlNet"):
        names = shapes if original else _in_original_names(shapes)
        hints = [f"{_HINT}{2 * i}.weight" for i in range(count_of(names, rf"{re.escape(_HINT)}(\d+)\.weight", 2))]
        channels = (names[hints[0]][0], *(names[hint][0] for hint in hints[2:-1:2]))
        if base == "lora":
            unet = model.unet
            encoder = dataclasses.replace(unet, in_channels=unet.out_channels, guidance_dim=None)
        else:
            encoder = _encoder(names, model.unet, fields)
        count = count_of(names, r"zero_convs\.(\d+)\.")
        outputs = [names[f"zero_convs.{i}.0.weight"][0] for i in range(count)]
        types, task = 0, shapes.get("task_embedding", ())
        if task:
            types = task[0]
            if not 1 <= types <= 64:
                raise ValueError(f"{types} types")
        return ControlConfig(
            encoder=encoder,
            outputs=(*outputs, names["middle_block_out.0.weight"][0]),
            hint_planes=names[hints[0]][1],
            hint_channels=channels,
            types=types,
            type_dim=shapes["control_add_embedding.linear_1.weight"][1] // types if types else 0,
            union_layers=count_of(shapes, r"transformer_layes\.(\d+)\.") if types else 0,
            pooled=fields.flag("global_pool_conditions") if fields else "shuffle" in path.name.lower(),
        )


def _encoder(names: Shapes, unet: UNetConfig, fields: Fields | None) -> UNetConfig:
    """The network's own way down: dimensions from shapes, and what those do not tell from its config.json, or as in the
    model's U-Net."""
    found = unet_from_shapes(names, unet.added_numbers if "label_emb.0.0.weight" in names else 0)
    widths = found.block_channels
    if len(set(unet.heads)) == 1:
        heads = unet.heads[:1] * len(widths)
    else:
        of_one = max(1, unet.block_channels[-1] // unet.heads[-1])
        heads = tuple(max(1, width // of_one) for width in widths)
    same = ("norm_groups", "norm_eps", "flip_sin_to_cos", "freq_shift", "sample_size")
    own: dict[str, Any] = {name: getattr(unet, name) for name in same} | {"heads": heads}
    if fields:
        stated = "num_attention_heads" if fields.get("num_attention_heads") is not None else "attention_head_dim"
        own |= {
            "norm_groups": fields.whole("norm_num_groups", 32),
            "norm_eps": fields.number("norm_eps", 1e-5),
            "flip_sin_to_cos": fields.flag("flip_sin_to_cos", True),
            "freq_shift": fields.number("freq_shift", 0),
            "heads": fields.per_level(stated, 8, len(widths)),
        }
    added = names["label_emb.0.0.weight"][1] if found.added_numbers else 0
    own["pooled_dim"], own["added_number_dim"] = 0, unet.added_number_dim
    if added:
        own["pooled_dim"] = added - found.added_numbers * unet.added_number_dim
    encoder = dataclasses.replace(found, **own)
    for width, count in zip(encoder.block_channels, encoder.heads, strict=True):
        if width < 1 or width % encoder.norm_groups or width % count:
            raise ValueError(f"{width} channels, {encoder.norm_groups} norm groups, {count} heads")
    if encoder.freq_shift >= encoder.block_channels[0] // 2 or not 0 < encoder.norm_eps < 1:
        raise ValueError(f"freq_shift {encoder.freq_shift:g}, norm_eps {encoder.norm_eps:g}")
    return encoder


def _in_original_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes under diffusers' names by the original ones, in which dimensions are read."""
    levels = max(1, count_of(shapes, r"down_blocks\.(\d+)\."))
    layers = max(1, count_of(shapes, r"down_blocks\.0\.resnets\.(\d+)\."))
    hints = count_of(shapes, r"controlnet_cond_embedding\.blocks\.(\d+)\.") // 2
    # Of a network's numbers, names follow from these alone.
    unet = UNetConfig(block_channels=(0,) * levels, layers_per_block=layers, attention=(1,) * levels)
    stub = ControlConfig(unet, (), hint_channels=(0,) * (hints + 1))
    return {names[0]: shapes[key] for key, names in disk_names(shapes, stub, original=True).items()}


def _adapter_config(path: Path, shapes: Shapes, model: ModelConfig, fields: Fields | None) -> AdapterConfig:
    bare = {key.removeprefix("adapter."): shape for key, shape in shapes.items()}
    with named_shape_errors(path, "T2I-Adapter"):
        light = "body.0.out_conv.weight" in bare
        resnet = "body.0.body" if "body.0.body.0.block1.weight" in bare else "body.0.resnets"
        if f"{resnet}.0.block1.weight" in bare:
            levels, resnets = count_of(bare, r"body\.(\d+)\."), count_of(bare, rf"{re.escape(resnet)}\.(\d+)\.")
            last = "out_conv.weight" if light else resnet.removeprefix("body.0.") + ".0.block1.weight"
            channels = tuple(bare[f"body.{level}.{last}"][0] for level in range(levels))
        else:  # one number counts the resnets of all levels, of which each but the first of a width keeps it
            resnets = fields.whole("num_res_blocks", 2) if fields else 2
            levels = count_of(bare, r"body\.(\d+)\.") // resnets
            channels = tuple(bare[f"body.{level * resnets}.block1.weight"][0] for level in range(levels))
        if not 1 <= levels <= _MAX_LEVELS:
            raise ValueError(f"{levels} levels")
        larger = levels > len(model.unet.block_channels)  # SDXL's: the last map is for the middle
        if fields:
            larger = fields.get("adapter_type") == "full_adapter_xl"
        unshuffle = (fields.whole("downscale_factor", 8) if fields else 0) or model.vae.factor * (1 + larger)
        planes = bare["body.0.in_conv.weight" if light else "conv_in.weight"][1]
        if planes not in (unshuffle**2, 3 * unshuffle**2):
            raise ValueError(f"{planes} input channels")
        halving = (2,) if larger else tuple(range(1, levels))
        return AdapterConfig(channels, planes // unshuffle**2, unshuffle, resnets, halving, light)


def _check_control(path: Path, config: ControlConfig, model: ModelConfig) -> None:
    """Raise BadDataError where the network is not for the model."""
    unet, own = model.unet, config.encoder
    if own.context_dim != unet.context_dim:
        family = CONTEXTS.get(own.context_dim, "a model")
        what = f"is for {family} with text of {own.context_dim} numbers a token, and the model is {model.family} with "
        raise bad_file(path, f"{what}{unet.context_dim}", _OTHER)
    if own.in_channels != unet.out_channels:
        what = f"reads {own.in_channels} latent channels, and the model has {unet.out_channels}"
        raise bad_file(path, what, _OTHER)
    if config.outputs != (*unet.skip_channels, unet.block_channels[-1]) or len(own.skip_channels) != len(
        unet.skip_channels
    ):
        raise bad_file(path, f"has {len(config.outputs)} residuals of other widths than this {model.family} model",
                       _OTHER)  # fmt: skip
    if (own.pooled_dim, own.added_numbers) != (unet.pooled_dim, unet.added_numbers):
        raise bad_file(path, f"reads other sizes and pooled prompts than this {model.family} model", _OTHER)
    if config.factor != model.vae.factor:
        raise bad_file(path, f"shrinks pictures {config.factor} times, and the model {model.vae.factor}", _OTHER)
    if config.hint_planes != 3:
        raise bad_file(path, f"reads pictures of {config.hint_planes} channels, not red, green and blue", _CURE)


def _check_adapter(path: Path, config: AdapterConfig, model: ModelConfig) -> None:
    widths = model.unet.block_channels
    wanted = (*widths, widths[-1]) if model.unet.added_numbers == SDXL.added_numbers else widths
    if config.channels != wanted:
        what = f"gives maps of {', '.join(map(str, config.channels))} channels, and this {model.family} model takes "
        raise bad_file(path, what + ", ".join(map(str, wanted)), _OTHER)
