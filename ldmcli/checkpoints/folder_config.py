"""A diffusers folder's configuration: its small JSON files, with anything this program cannot do refused by name."""

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldmcli.config import Defaults, ImageEmbeddingConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.disk.opening import read_json, shown
from ldmcli.errors import BadDataError, printable
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spec import MAX_GUIDANCE, MAX_STEPS

_log = logging.getLogger(__name__)
WITH_PROJECTION = "CLIPTextModelWithProjection"
MAX_CONFIG_BYTES = 1 << 20
_MAX_WHOLE = 1 << 24

# Fields whose other values mean a network that is not built here: {field: the values that mean "as usual"}.
_UNET_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("center_input_sample", "dual_cross_attention"), (False,)),
    **dict.fromkeys(("encoder_hid_dim_type", "timestep_post_act"), (None,)),
    "class_embed_type": (None, "projection"),
    **dict.fromkeys(("attention_type", "resnet_time_scale_shift"), ("default",)),
    **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "downsample_padding": (1,),
    "dropout": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_type": ("positional",),
}
PLAIN_UNET = "UNet2DModel"
_PLAIN_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("center_input_sample", "dropout"), (False, 0)),
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "num_train_timesteps"), (None,)),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "time_embedding_type": ("positional",),
}
_PLAIN_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_PLAIN_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_VAE_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_VAE_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
VQ_CLASS = "VQModel"
_VAE_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_post_quant_conv", "use_quant_conv"), (True,)),
    "act_fn": ("silu", "swish"),
    "lookup_from_codebook": (False,),
    "norm_type": ("group",),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
}


_PROCESSOR_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), (True, None)),
    "image_mean": ([0.48145466, 0.4578275, 0.40821073],),
    "image_std": ([0.26862954, 0.26130258, 0.27577711],),
    "resample": (3,),
}


class Fields:
    """The fields of one JSON file, each read with its type checked: what is no value of its kind is refused by name.
    `values` are the file's where they were read before."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None) -> None:
        self.shown = shown(path)
        self._values = read_json(path, MAX_CONFIG_BYTES) if values is None else values

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it stands."""
        return self._values.get(name, default)

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise BadDataError(f"{self.shown}: {name} is {printable(repr(value))}, not {wanted}.")

    def require(self, usual: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise BadDataError where one of these fields has another value than these."""
        for name, values in usual.items():
            if name in self._values and self._values[name] not in values:
                value = printable(json.dumps(self._values[name]))
                raise BadDataError(f"{self.shown}: {name} is {value}, which this version cannot run.")

    def whole(self, name: str, default: int, low: int = 1, high: int = _MAX_WHOLE) -> int:
        """A whole number within these bounds."""
        return self._whole(name, self.get(name, default), low, high)

    def wholes(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._list(name, default, range(1, 17), "a list of 1 to 16 whole numbers")
        return tuple(self._whole(name, item) for item in value)

    def per_level(self, name: str, default: int, levels: int) -> tuple[int, ...]:
        """One number for all levels, or a list of one each."""
        value = self.get(name, default)
        if isinstance(value, list):
            value = self._list(name, value, range(levels, levels + 1), f"one number, or a list of {levels}")
        return tuple(self._whole(name, item) for item in (value if isinstance(value, list) else [value] * levels))

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.get(name, default))

    def within(self, name: str, default: float, low: float, high: float) -> float:
        value = self.number(name, default)
        if not low <= value <= high:
            self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """A list of `count` numbers, or None."""
        if self.get(name) is None:
            return None
        value = self._list(name, None, range(count, count + 1), f"a list of {count} numbers")
        return tuple(self._number(name, item) for item in value)

    def choice(self, name: str, default: str, known: Sequence[str]) -> str:
        """One of the words that are known."""
        value = str(self.get(name, default))
        self._known(name, (value,), known)
        return value

    def names(self, name: str, default: tuple[str, ...], known: Sequence[str]) -> tuple[str, ...]:
        """As many known words as the default has."""
        count = len(default)
        value = self._list(name, default, range(count, count + 1), f"a list of {count} names")
        self._known(name, value, known)
        return tuple(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def _list(self, name: str, default: Any, counts: range, wanted: str) -> Sequence[Any]:
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or len(value) not in counts:
            self.refuse(name, value, wanted)
        return value

    def _known(self, name: str, found: Sequence[Any], known: Sequence[str]) -> None:
        for value in found:
            if value not in known:
                raise BadDataError(
                    f"{self.shown}: {name} holds {printable(repr(value))}, which this version cannot run; it knows "
                    f"{', '.join(sorted(known))}."
                )

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            self.refuse(name, value, "a number")
        return float(value)

    def _whole(self, name: str, value: Any, low: int = 1, high: int = _MAX_WHOLE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"a whole number from {low} to {high}")
        return int(value)


def unet_config(path: Path, pooled_dim: int = 0, *, mended: bool = False) -> UNetConfig:
    """The U-Net that `unet/config.json` describes; a missing field means diffusers' default. `pooled_dim` is the width
    of the pooled prompt that the model's text encoder gives, if any. `mended` takes sizes below 64, which files of
    diffusers before 0.9 give by mistake, for 64, as its Stable Diffusion pipelines do."""
    fields = Fields(path)
    in_channels = fields.whole("in_channels", 4)
    if in_channels not in (3, 4, 5, 7, 8, 9):
        raise BadDataError(
            f"{fields.shown} describes another kind of U-Net ({in_channels} input channels); this version draws with "
            "4, with 9 for inpainting, 8 for editing by words, 7 for enlarging and 5 for depth maps."
        )
    fields.require(_UNET_USUAL)
    channels = fields.wholes("block_out_channels", (320, 640, 1280, 1280))
    levels = len(channels)
    attending, plain = _DOWN
    down = fields.names("down_block_types", (*[attending] * (levels - 1), plain), _DOWN)
    attending, plain = _UP
    up = fields.names("up_block_types", (plain, *[attending] * (levels - 1)), _UP)
    attends = [kind.startswith("CrossAttn") for kind in down]
    if attends != [kind.startswith("CrossAttn") for kind in reversed(up)]:
        raise BadDataError(f"{fields.shown}: down_block_types and up_block_types do not mirror each other.")
    depths = fields.per_level("transformer_layers_per_block", 1, levels)
    # diffusers' attention_head_dim is the number of heads, unless num_attention_heads is given as well.
    heads_field = "num_attention_heads" if fields.get("num_attention_heads") is not None else "attention_head_dim"
    guided = fields.get("time_cond_proj_dim") is not None
    sample_size = fields.whole("sample_size", 64)
    if mended and sample_size < 64 and re.match(r"0\.[0-8](\D|$)", str(fields.get("_diffusers_version"))):
        _log.debug("%s: sample_size %d is taken for 64", fields.shown, sample_size)
        sample_size = 64
    return UNetConfig(
        in_channels=in_channels,
        out_channels=fields.whole("out_channels", 4),
        sample_size=sample_size,
        block_channels=channels,
        layers_per_block=fields.whole("layers_per_block", 2),
        attention=tuple(d if attend else 0 for d, attend in zip(depths, attends, strict=True)),
        middle_attention=depths[-1],
        heads=fields.per_level(heads_field, 8, levels),
        context_dim=fields.whole("cross_attention_dim", 1280),
        norm_groups=fields.whole("norm_num_groups", 32),
        norm_eps=fields.number("norm_eps", 1e-5),
        linear_projection=fields.flag("use_linear_projection", False),
        flip_sin_to_cos=fields.flag("flip_sin_to_cos", True),
        freq_shift=fields.number("freq_shift", 0),
        guidance_dim=fields.whole("time_cond_proj_dim", 256, low=4) if guided else None,
        only_cross_attention=_only_cross(fields, attends),
        classes=fields.whole("num_class_embeds", 1) if fields.get("num_class_embeds") is not None else 0,
        joins="low_res" if in_channels == 7 else None,
        **_added(fields, pooled_dim),
    )


def _only_cross(fields: Fields, attends: list[bool]) -> tuple[bool, ...]:
    """Which levels attend to the context alone; of those that attend."""
    said = fields.get("only_cross_attention", False)
    values = said if isinstance(said, list) else [said] * len(attends)
    if len(values) != len(attends) or not all(isinstance(value, bool) for value in values):
        fields.refuse("only_cross_attention", said, f"true or false, or a list of {len(attends)} of them")
    found = tuple(one and attend for one, attend in zip(values, attends, strict=True))
    if any(found) and (said is True or fields.get("mid_block_only_cross_attention")):
        fields.refuse("only_cross_attention", said, "a list, with a middle that attends to itself")
    return found if any(found) else ()


def plain_unet_config(path: Path) -> UNetConfig:
    """The U-Net without a context, diffusers' UNet2DModel, that `unet/config.json` describes."""
    fields = Fields(path)
    fields.require(_PLAIN_USUAL | {"attn_norm_num_groups": (None, fields.get("norm_num_groups", 32))})
    channels = fields.wholes("block_out_channels", (224, 448, 672, 896))
    levels = len(channels)
    down = fields.names("down_block_types", ("DownBlock2D", *["AttnDownBlock2D"] * (levels - 1)), _PLAIN_DOWN)
    up = fields.names("up_block_types", (*["AttnUpBlock2D"] * (levels - 1), "UpBlock2D"), _PLAIN_UP)
    attends = [kind.startswith("Attn") for kind in down]
    if attends != [kind.startswith("Attn") for kind in reversed(up)]:
        raise BadDataError(f"{fields.shown}: down_block_types and up_block_types do not mirror each other.")
    # Whether resnets change the size is in the kind of levels without attention; of the others, in a field.
    ways = set()
    for name, kinds in (("downsample_type", down), ("upsample_type", up)):
        own = fields.choice(name, "conv", ("conv", "resnet")) == "resnet"
        ways |= {kind.startswith("Resnet") or (own and kind.startswith("Attn")) for kind in kinds[:-1]}
    if len(ways) > 1:
        raise BadDataError(f"{fields.shown}: its levels change the size in different ways, which cannot be run.")
    each = fields.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=fields.whole("in_channels", 3),
        out_channels=fields.whole("out_channels", 3),
        sample_size=fields.whole("sample_size", 64),
        block_channels=channels,
        layers_per_block=fields.whole("layers_per_block", 2),
        attention=tuple(map(int, attends)),
        heads=tuple(
            1 if each is None else max(1, width // fields.whole("attention_head_dim", 8)) for width in channels
        ),
        context_dim=0,
        norm_groups=fields.whole("norm_num_groups", 32),
        norm_eps=fields.number("norm_eps", 1e-5),
        flip_sin_to_cos=fields.flag("flip_sin_to_cos", True),
        freq_shift=fields.number("freq_shift", 0),
        scale_shift=fields.choice("resnet_time_scale_shift", "default", ("default", "scale_shift")) == "scale_shift",
        resnet_resampling=True in ways,
    )


def bert_config(path: Path) -> TextEncoderConfig:
    """The paper's text encoder, diffusers' LDMBertModel, that `bert/config.json` describes."""
    fields = Fields(path)
    return TextEncoderConfig(
        layout="bert",
        vocab_size=fields.whole("vocab_size", 30522),
        hidden_size=fields.whole("d_model", 1280),
        intermediate_size=fields.whole("encoder_ffn_dim", 5120),
        layers=fields.whole("encoder_layers", 32),
        heads=fields.whole("encoder_attention_heads", 8),
        max_length=fields.whole("max_position_embeddings", 77),
        activation=str(fields.get("activation_function", "gelu")),
        head_dim=fields.whole("head_dim", 64),
        causal=False,
        attention_bias=False,
    )


def _added(fields: Fields, pooled_dim: int) -> dict[str, Any]:
    """What SDXL adds to the time step: a pooled prompt of `pooled_dim`, and six numbers or, in its refiner, five; what
    unCLIP does: an embedding, and a noise level in as many numbers."""
    if fields.get("class_embed_type") is not None:
        dim, odd = divmod(fields.whole("projection_class_embeddings_input_dim", 2048, low=2), 2)
        if odd or fields.get("addition_embed_type") is not None:
            raise BadDataError(f"{fields.shown}: its class embedding is not that of an unCLIP model.")
        return {"pooled_dim": dim, "added_numbers": 1, "added_number_dim": dim}
    if fields.get("addition_embed_type") is None:
        return {}
    width = fields.whole("projection_class_embeddings_input_dim", 2816)
    dim = fields.whole("addition_time_embed_dim", 256)
    count, rest = divmod(width - pooled_dim, dim)
    if rest or count not in (5, 6) or not pooled_dim:
        raise BadDataError(
            f"{fields.shown}: projection_class_embeddings_input_dim {width} is not the last text encoder's "
            f"projection_dim ({pooled_dim}) and 5 or 6 times addition_time_embed_dim ({dim}): not of one model."
        )
    return {"pooled_dim": pooled_dim, "added_numbers": count, "added_number_dim": dim}


def vae_config(path: Path) -> VAEConfig:
    """The autoencoder, diffusers' AutoencoderKL or VQModel, that `config.json` describes."""
    fields = Fields(path)
    fields.require(_VAE_USUAL)
    quantizes = fields.get("_class_name") == VQ_CLASS
    channels = fields.wholes("block_out_channels", (64,))
    levels = len(channels)
    down = fields.names("down_block_types", (_VAE_DOWN[0],) * levels, _VAE_DOWN)
    up = fields.names("up_block_types", (_VAE_UP[0],) * levels, _VAE_UP)
    attention = tuple(kind == _VAE_DOWN[1] for kind in down)
    if attention != tuple(kind == _VAE_UP[1] for kind in reversed(up)):
        raise BadDataError(f"{fields.shown}: down_block_types and up_block_types do not mirror each other.")
    inner = fields.whole("latent_channels", 3 if quantizes else 4)
    latents = fields.whole("vq_embed_dim", inner) if quantizes and fields.get("vq_embed_dim") is not None else inner
    return VAEConfig(
        in_channels=fields.whole("in_channels", 3),
        out_channels=fields.whole("out_channels", 3),
        latent_channels=latents,
        block_channels=channels,
        layers_per_block=fields.whole("layers_per_block", 1),
        norm_groups=fields.whole("norm_num_groups", 32),
        scaling_factor=fields.number("scaling_factor", 1.0 if quantizes else 0.18215),
        force_upcast=fields.flag("force_upcast", not quantizes),
        attention=attention if any(attention) else (),
        middle_attention=fields.flag("mid_block_add_attention", True),
        codes=fields.whole("num_vq_embeddings", 256) if quantizes else 0,
        inner_channels=0 if inner == latents else inner,
    )


def text_encoder_config(path: Path, part: str, kind: str) -> TextEncoderConfig:
    """The CLIP text encoder that `config.json` describes; `kind` is its class in transformers."""
    fields = Fields(path)
    return TextEncoderConfig(
        part=part,
        vocab_size=fields.whole("vocab_size", 49408),
        hidden_size=fields.whole("hidden_size", 512),
        intermediate_size=fields.whole("intermediate_size", 2048),
        layers=fields.whole("num_hidden_layers", 12),
        heads=fields.whole("num_attention_heads", 8),
        max_length=fields.whole("max_position_embeddings", 77),
        activation=str(fields.get("hidden_act", "quick_gelu")),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        bos_token_id=fields.whole("bos_token_id", 49406, low=0),
        eos_token_id=fields.whole("eos_token_id", 49407, low=0),
        projection_dim=fields.whole("projection_dim", 512) if kind == WITH_PROJECTION else None,
    )


def image_embedding_config(path: Path) -> ImageEmbeddingConfig:
    """How embeddings are scaled, as an image normalizer's `config.json` describes it."""
    return ImageEmbeddingConfig(Fields(path).whole("embedding_dim", 768), statistics=True)


def check_processor(path: Path, size: int) -> None:
    """Raise BadDataError where a folder's `preprocessor_config.json`, if it has one, has pictures come to an image
    encoder otherwise than CLIP's do: their middle squares of `size` pixels a side."""
    if os.path.lexists(path):
        sides: tuple[Any, ...] = (size, {"shortest_edge": size}, {"height": size, "width": size})
        Fields(path).require(_PROCESSOR_USUAL | {"size": sides, "crop_size": sides})


def own_defaults(path: Path, usual: Defaults, *, reads_guidance: bool = False) -> Defaults:
    """`usual` with what the model's `generation_config.json` says otherwise, where there is one.

    It may give `guidance_scale` and `num_inference_steps`, as diffusers' pipelines call them, and `sampler`, by this
    program's names; null says nothing, and other keys, of which transformers has many, are not read. Raises
    BadDataError where a value is none that a request may have; whether the model's schedule has so many steps shows
    when a request takes them. A guidance scale of up to 1 means unguided there, unless the network reads it.
    """
    if not os.path.lexists(path):
        return usual
    said = read_json(path, MAX_CONFIG_BYTES)
    fields = Fields(path, {name: value for name, value in said.items() if value is not None})
    guidance_scale = fields.within("guidance_scale", usual.guidance_scale, 0.0, MAX_GUIDANCE)
    return Defaults(
        sampler=fields.choice("sampler", usual.sampler, list(SAMPLERS)),
        steps=fields.whole("num_inference_steps", usual.steps, high=MAX_STEPS),
        guidance_scale=guidance_scale if reads_guidance else max(guidance_scale, 1.0),
    )
