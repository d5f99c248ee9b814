"""A single file's configuration, which carries no config.json: dimensions from the shapes of its tensors; the noise
schedule from marks among them, words in its header and a .yaml beside it."""

import contextlib
import dataclasses
import itertools
import logging
import math
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.buildable import betas_of
from ldmcli.checkpoints.families import LCM_DEFAULTS, ConditionPart, Family, Noising, Shapes, TextPart
from ldmcli.checkpoints.files import WeightFile, read_numbers
from ldmcli.checkpoints.key_map import UNET_PREFIX, VAE_PREFIX
from ldmcli.config import (
    UNDECIDED,
    ClassesConfig,
    ConditionerConfig,
    ImageEmbeddingConfig,
    LayoutConfig,
    MapConfig,
    ModelConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from ldmcli.disk.opening import bad_file, read_text, shown
from ldmcli.errors import BadDataError, printable

_log = logging.getLogger(__name__)
_AGAIN = "download or convert it again"
_NUMBER_DIM = 256  # sinusoids for each of SDXL's added numbers
_IMAGENET = 1000  # classes; a table of any other number has one more, which stands for none
_BERT_HEADS = 8
_VIT_L = 768  # numbers of its embeddings, in units of whose deviation its model was trained; that of ViT-H was not
_NO_STATISTICS = (
    "the file has no statistics of its embeddings, in units of which they are noised: each number is taken to have "
    "mean 0 and deviation 1, which changes pictures a little, and more with --noise-level."
)
_MAX_BLOCKS = 64  # Stable Diffusion's U-Net has 12; the time to look at a file grows with their number
# Where each layout of a text encoder has its tokens, its layers and in each the wider one, and its positions.
_CLIP_NAMES = (
    "embeddings.token_embedding.weight", "encoder.layers.", "mlp.fc1.weight", "embeddings.position_embedding.weight",
)  # fmt: skip
_OPENCLIP_NAMES = ("token_embedding.weight", "transformer.resblocks.", "mlp.c_fc.weight", "positional_embedding")
_MAX_YAML_BYTES = 1 << 18  # a second to parse; real ones have 4 kB
_MAX_YAML_BRACKETS = 1000  # a dozen is usual; to find keys among them takes the square of the time
_YAML_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# What trainers and ModelSpec write in a header's metadata.
_TYPE_KEYS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "ss_prediction_type")
_TYPES = _YAML_TYPES | {
    "epsilon": "epsilon",
    "noise": "epsilon",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v_pred": "v_prediction",
    "vpred": "v_prediction",
    "velocity": "v_prediction",
    "x": "sample",
    "sample": "sample",
}
_VELOCITY_KEYS = ("ss_v_parameterization", "v_parameterization", "v_pred", "modelspec.v_pred")
_ZERO_SNR_KEYS = ("ss_zero_terminal_snr", "zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr", "modelspec.ztsnr")
_GROUPS_KEY, _SIZE_KEY = "norm_groups", "sample_size"
_LEVELS, _SIGNALS = "alphas_cumprod", "sqrt_alphas_cumprod"
_SCALE, _SCALE_ROUNDING = "scale_factor", 4e-3  # of the coarsest type, bfloat16
# How far from the usual schedule levels stored in a type may lie and still be it, rounded: a share, and at least.
_ROUNDING = {"F16": (2e-3, 0.0), "BF16": (1e-2, 0.0)}
_ROUNDING |= {"F8_E4M3": (0.07, 1e-3), "F8_E4M3FNUZ": (0.07, 1e-3), "F8_E5M2": (0.13, 0.0), "F8_E5M2FNUZ": (0.13, 0.0)}
_SAME = (1e-5, 0.0)


def config_of_file(file: WeightFile, shapes: Shapes, family: Family) -> ModelConfig:
    """The configuration of a checkpoint in the original layout, whose tensors have these `shapes`; what they cannot
    tell (head counts; groups and size unless its header does) is the family's, as is a VAE that the file lacks.

    Raises BadDataError naming the tensor that is missing or of an unexpected rank.
    """
    unet, vae = _under(shapes, UNET_PREFIX), _under(shapes, VAE_PREFIX)
    groups, size = _number(file, _GROUPS_KEY, family.norm_groups), _number(file, _SIZE_KEY, family.sample_size)
    family = dataclasses.replace(family, norm_groups=groups, sample_size=size)
    usual_vae = VAEConfig(
        norm_groups=family.norm_groups,
        scaling_factor=scaling_of_file(file, family),
        force_upcast=family.force_upcast,
    )
    schedule = schedule_of_file(file, family)
    with named_shape_errors(file.path, f"{family.name} model"):
        config = _unet(unet, family)
        conditioner = _conditioner(shapes, family.conditioner) if family.conditioner else None
        return ModelConfig(
            family=family.name,
            unet=config,
            vae=vae_from_shapes(vae, usual_vae) if vae else usual_vae,
            text_encoders=tuple(_text(_under(shapes, text.prefix), text) for text in family.texts),
            schedule=dataclasses.replace(schedule, xl=config.reads_sizes),
            zero_empty_negative=family.zero_empty_negative,
            defaults=family.defaults if config.guidance_dim is None else LCM_DEFAULTS,
            noising=_noising(file, family.noising) if family.noising else None,
            conditioner=conditioner,
            notes=(_NO_STATISTICS,) if conditioner == ImageEmbeddingConfig(_VIT_L, statistics=False) else (),
        )


def _number(file: WeightFile, name: str, usual: int) -> int:
    """What the header's metadata say of that name. Raises BadDataError where it is no number above 0."""
    word = file.metadata.get(name, str(usual)).strip()
    if re.fullmatch(r"[1-9][0-9]{0,5}", word):
        return int(word)
    raise bad_file(file.path, f"has {name} {printable(word, 100)} in its header, no number above 0", _AGAIN)


def scaling_of_file(file: WeightFile, family: Family) -> float:
    """The scale of a family's latents: what the file's model was trained with (CompVis' `scale_by_std`) where it says
    so, unless that is the family's, rounded. Raises BadDataError where it is none."""
    usual = 1.0 if family.scaling_factor is None else family.scaling_factor
    if _SCALE not in file.tensors:
        return usual
    scale = read_numbers(file, _SCALE, 1)
    if len(scale) != 1 or not 0 < scale[0] < math.inf:
        raise bad_file(file.path, f"has a {_SCALE} that is no number above 0", _AGAIN)
    return usual if math.isclose(scale[0], usual, rel_tol=_SCALE_ROUNDING) else scale[0]


@contextlib.contextmanager
def named_shape_errors(path: Path, what: str) -> Iterator[None]:
    """Turns what comes of reading dimensions out of shapes that lack some, or have others, into BadDataError."""
    try:
        yield
    except KeyError as error:
        raise bad_file(path, f"is an incomplete {what}: the tensor {error.args[0]} is missing", _AGAIN) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise bad_file(path, f"has tensors of shapes that fit no {what} ({error})", _AGAIN) from None


def _under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def count_of(shapes: Shapes, pattern: str, step: int = 1) -> int:
    """How many different numbers `pattern`'s one group takes, counting from 0 by `step` without a gap."""
    found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if len(found) > _MAX_BLOCKS:
        raise ValueError(f"{len(found)} blocks in one place")
    return next(i for i in range(len(found) + 1) if step * i not in found)


def _unet(shapes: Shapes, family: Family) -> UNetConfig:
    found = unet_from_shapes(shapes, family.added_numbers)
    return dataclasses.replace(
        found,
        out_channels=shapes["out.2.weight"][0],
        joins=family.joins,
        sample_size=family.sample_size,
        heads=tuple(family.heads or max(1, width // family.head_dim) for width in found.block_channels),
        norm_groups=family.norm_groups,
    )


def unet_from_shapes(shapes: Shapes, added_numbers: int) -> UNetConfig:
    """A U-Net's dimensions from the tensors of its way down and middle in the original layout, without prefix; what
    they do not tell is as usual. Raises as `named_shape_errors` expects it."""
    channels: list[int] = []
    depths: list[int] = []
    cross: list[bool] = []
    level_done = True
    blocks = count_of(shapes, r"input_blocks\.(\d+)\.")
    doubling = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", key)]
    each = blocks // (1 + len(doubling)) if doubling else 0  # blocks a level, where the first of the next halves
    for block in range(1, blocks):
        if f"input_blocks.{block}.0.op.weight" in shapes or (each and block % each == 0):
            level_done = True
            continue
        if level_done:
            channels.append(shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0])
            depths.append(_depth(shapes, f"input_blocks.{block}.1."))
            first = shapes.get(f"input_blocks.{block}.1.transformer_blocks.0.attn1.to_k.weight", channels[-1:] * 2)
            cross.append(first[1] != channels[-1])
            level_done = False
    plain = "middle_block.1.qkv.weight" in shapes
    added = shapes["label_emb.0.0.weight"][1] if added_numbers else 0
    number_dim = added // 2 if added_numbers == 1 else _NUMBER_DIM  # an embedding and its noise level are as wide
    guidance = shapes.get("time_embed.cond_proj.weight")
    time_rows = shapes.get("middle_block.0.emb_layers.1.weight", channels[-1:])[0]
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        block_channels=tuple(channels),
        layers_per_block=blocks // len(channels) - 1,
        attention=tuple(depths),
        middle_attention=_depth(shapes, "middle_block.1."),
        context_dim=0 if plain else shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=not plain and len(shapes["middle_block.1.proj_in.weight"]) == 2,
        pooled_dim=added - added_numbers * number_dim if added else 0,
        added_numbers=added_numbers,
        added_number_dim=number_dim,
        guidance_dim=guidance[1] if guidance else None,
        only_cross_attention=tuple(cross) if any(cross) else (),
        scale_shift=time_rows != channels[-1],
        resnet_resampling=bool(doubling),
        classes=shapes.get("label_emb.weight", (0,))[0],
    )


def _depth(shapes: Shapes, attention: str) -> int:
    """How many layers an attention has: transformer layers, or one of its own kind."""
    return (
        1 if f"{attention}qkv.weight" in shapes else count_of(_under(shapes, attention), r"transformer_blocks\.(\d+)\.")
    )


def vae_from_shapes(shapes: Shapes, usual: VAEConfig) -> VAEConfig:
    """An autoencoder's dimensions from its decoder's tensors in the original layout, without prefix; an encoder may be
    missing, and what shapes do not tell is as in `usual`. Raises as `named_shape_errors` expects it."""
    levels = count_of(shapes, r"decoder\.up\.(\d+)\.")
    inner, channels = shapes["post_quant_conv.weight"][:2]
    attention = tuple(f"decoder.up.{i}.attn.0.q.weight" in shapes for i in range(levels))
    codes = shapes.get("quantize.embedding.weight", (0,))[0]
    return dataclasses.replace(
        usual,
        in_channels=shapes["encoder.conv_in.weight"][1] if "encoder.conv_in.weight" in shapes else 3,
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=channels,
        block_channels=tuple(shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=count_of(shapes, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        attention=attention if any(attention) else (),
        middle_attention="decoder.mid.attn_1.q.weight" in shapes,
        codes=codes,
        inner_channels=0 if inner == channels else inner,
    )


def _conditioner(shapes: Shapes, part: ConditionPart) -> ConditionerConfig:
    own = _under(shapes, part.prefix)
    if part.kind == ImageEmbeddingConfig.kind:
        return ImageEmbeddingConfig(shapes[f"{UNET_PREFIX}label_emb.0.0.weight"][1] // 2, statistics="std" in own)
    if part.kind == LayoutConfig.kind:
        return LayoutConfig(part=part.part, **_bert(own))
    if part.kind == ClassesConfig.kind:
        classes, width = own["embedding.weight"]
        return ClassesConfig(classes, width, classes - 1 if classes != _IMAGENET else None)
    levels = count_of(_under(shapes, VAE_PREFIX), r"decoder\.up\.(\d+)\.")
    channels, classes = own["channel_mapper.weight"][:2]
    return MapConfig(classes, channels, levels - 1)


def _bert(shapes: Shapes) -> dict[str, Any]:
    """The dimensions of a transformer as in the `x-transformers` package, which has eight heads."""
    layers = count_of(shapes, r"attn_layers\.layers\.(\d+)\.")
    vocab_size, hidden = shapes["token_emb.weight"]
    return {
        "layout": "bert",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": shapes["attn_layers.layers.1.1.net.0.0.weight"][0],
        "layers": layers // 2,
        "heads": _BERT_HEADS,
        "max_length": shapes["pos_emb.emb.weight"][0],
        "activation": "gelu",
        "head_dim": shapes["attn_layers.layers.0.1.to_q.weight"][0] // _BERT_HEADS,
        "causal": False,
        "attention_bias": False,
    }


def _text(shapes: Shapes, text: TextPart) -> TextEncoderConfig:
    if text.layout == "bert":
        return TextEncoderConfig(part=text.part, **_bert(shapes))
    shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    openclip = text.layout == "openclip"
    embeddings, layer, up, positions = _OPENCLIP_NAMES if openclip else _CLIP_NAMES
    vocab_size, hidden = shapes[embeddings]
    layers = count_of(shapes, rf"{re.escape(layer)}(\d+)\.")
    return TextEncoderConfig(
        part=text.part,
        layout=text.layout,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shapes[f"{layer}0.{up}"][0],
        layers=layers,
        heads=max(1, hidden // 64),  # every CLIP text model has heads of 64
        max_length=shapes[positions][0],
        activation="gelu" if openclip else "quick_gelu",
        skipped_layers=text.skipped_layers - (text.layers is not None and layers == text.layers - 1),
        final_norm=text.final_norm,
        projection_dim=shapes["text_projection"][1] if openclip and "text_projection" in shapes else None,
    )


def schedule_of_file(file: WeightFile, family: Family) -> ScheduleConfig:
    """The schedule of a checkpoint in the original layout: the usual one, but for what the file says otherwise.

    Marks named `v_pred` and `ztsnr` tell v-prediction and zero terminal SNR (Lin et al. 2023); so do words in the
    header's metadata (ModelSpec's and trainers'), and a .yaml of the same name beside the file, as the original code
    has it. Where nothing does and the family has both kinds, the type is UNDECIDED. Levels stored under
    `alphas_cumprod` are used as they are, unless they are the usual ones but for rounding. Raises BadDataError where
    the levels are none, or the .yaml cannot be read.
    """
    marked = "v_prediction" if "v_pred" in file.tensors else None
    written = _from_metadata(file.metadata, file.path)
    beside = _from_yaml(file.path.with_suffix(".yaml"))
    usual = ScheduleConfig(
        beta_start=family.betas[0],
        beta_end=family.betas[1],
        prediction_type=marked or written or beside or family.prediction_type or UNDECIDED,
        zero_terminal_snr="ztsnr" in file.tensors or any(_is_true(file.metadata.get(key)) for key in _ZERO_SNR_KEYS),
    )
    return _with_levels(usual, file, read_numbers(file, _LEVELS), _LEVELS) if _LEVELS in file.tensors else usual


def _noising(file: WeightFile, noising: Noising) -> ScheduleConfig:
    """How pictures to be enlarged, or their embeddings, are noised: as the file's levels say, else as is usual."""
    signals = noising.prefix + _SIGNALS
    if signals not in file.tensors:
        return noising.schedule
    return _with_levels(noising.schedule, file, [signal**2 for signal in read_numbers(file, signals)], signals)


def _from_metadata(metadata: Mapping[str, str], path: Path) -> str | None:
    """The prediction type that the header's metadata name, if they do."""
    for key in _TYPE_KEYS:
        word = metadata.get(key, "").strip().lower()
        if word in _TYPES:
            return _TYPES[word]
        if word:
            _log.warning("%s: %s %s is not known and passed over", shown(path), key, printable(word, 100))
    return "v_prediction" if any(_is_true(metadata.get(key)) for key in _VELOCITY_KEYS) else None


def _is_true(word: str | None) -> bool:
    return word is not None and word.strip().lower() in ("true", "1", "yes")


def _with_levels(usual: ScheduleConfig, file: WeightFile, levels: list[float], name: str) -> ScheduleConfig:
    """The schedule with these levels, from the tensor of this name, unless they are the usual ones."""
    expected = list(itertools.accumulate((1 - beta for beta in betas_of(usual)), operator.mul))
    share, least = _ROUNDING.get(file.tensors[name].dtype, _SAME)
    if len(levels) == len(expected) and all(
        abs(a - b) <= max(share * b, least) for a, b in zip(levels, expected, strict=True)
    ):
        return usual
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if len(levels) < 2 or not falling or not 0 <= levels[-1] <= levels[0] < 1:
        raise BadDataError(f"{shown(file.path)}: its {name} do not fall from below 1 to no less than 0.")
    return dataclasses.replace(
        usual, training_steps=len(levels), alphas_cumprod=tuple(levels), zero_terminal_snr=levels[-1] == 0
    )


def _from_yaml(path: Path) -> str | None:
    """The prediction type that the original code's configuration gives, if there is one and it does."""
    if not path.is_file():
        return None
    import yaml

    text = read_text(path, _MAX_YAML_BYTES)
    if text.count("[") + text.count("{") > _MAX_YAML_BRACKETS:
        raise BadDataError(f"{shown(path)} is not valid YAML of a model (it has thousands of brackets).")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few could stand for any number
            raise BadDataError(f"{shown(path)} has aliases, which no configuration of a model needs.")
        tables = list(_tables(yaml.safe_load(text)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = printable(" ".join(str(error).split()), 200)
        raise BadDataError(f"{shown(path)} is not valid YAML ({said}).") from None
    found = next((table["parameterization"] for table in tables if "parameterization" in table), None)
    if found is None:
        is_model = tables and "model" in tables[0] and any("params" in table for table in tables)
        return "epsilon" if is_model else None
    if not isinstance(found, str) or found not in _YAML_TYPES:
        known = ", ".join(_YAML_TYPES)
        raise BadDataError(f"{shown(path)}: parameterization {printable(str(found), 100)} is none of {known}.")
    return _YAML_TYPES[found]


def _tables(value: Any) -> Iterator[Mapping[Any, Any]]:
    """The tables in what a YAML file holds, outer ones first."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(inner)
