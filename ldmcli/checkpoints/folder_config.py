"""A diffusers folder's configuration: its config.json files, with anything this program cannot do refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmcli.config import ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.errors import BadDataError, printable
from ldmcli.opening import read_json

MAX_CONFIG_BYTES = 1 << 20
_MAX_WHOLE = 1 << 24

# Fields whose other values mean a network that is not built here: {field: the values that mean "as usual"}.
_UNET_USUAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_VAE_USUAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_SCHEDULER_USUAL: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
}


def unet_config(path: Path) -> UNetConfig:
    """The U-Net that `unet/config.json` describes; a missing field means diffusers' default."""
    fields = _Fields(path, _UNET_USUAL)
    if fields.get("addition_embed_type") == "text_time":
        raise BadDataError(f"{fields.shown} describes an SDXL U-Net; this version reads Stable Diffusion 1.x.")
    in_channels = fields.whole("in_channels", 4)
    if in_channels != 4:
        kind = {9: "an inpainting", 8: "an instruct-pix2pix"}.get(in_channels, "another kind of")
        raise BadDataError(
            f"{fields.shown} describes {kind} U-Net ({in_channels} input channels); txt2img needs one with 4."
        )
    fields.require_usual()
    channels = fields.wholes("block_out_channels", (320, 640, 1280, 1280))
    levels = len(channels)
    down = fields.names("down_block_types", ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",), levels)
    up = fields.names("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1), levels)
    fields.only("down_block_types", down, {"CrossAttnDownBlock2D", "DownBlock2D"})
    fields.only("up_block_types", up, {"CrossAttnUpBlock2D", "UpBlock2D"})
    attends = [kind.startswith("CrossAttn") for kind in down]
    if attends != [kind.startswith("CrossAttn") for kind in reversed(up)]:
        raise BadDataError(f"{fields.shown}: down_block_types and up_block_types do not mirror each other.")
    depths = fields.per_level("transformer_layers_per_block", 1, levels)
    # diffusers' attention_head_dim is the number of heads, unless num_attention_heads is given as well.
    heads_field = "num_attention_heads" if fields.get("num_attention_heads") is not None else "attention_head_dim"
    return UNetConfig(
        in_channels=in_channels,
        out_channels=fields.whole("out_channels", 4),
        sample_size=fields.whole("sample_size", 64),
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
    )


def vae_config(path: Path) -> VAEConfig:
    """The autoencoder that `vae/config.json` describes."""
    fields = _Fields(path, _VAE_USUAL)
    fields.require_usual()
    channels = fields.wholes("block_out_channels", (64,))
    levels = len(channels)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        fields.only(name, fields.names(name, (kind,) * levels, levels), {kind})
    return VAEConfig(
        in_channels=fields.whole("in_channels", 3),
        out_channels=fields.whole("out_channels", 3),
        latent_channels=fields.whole("latent_channels", 4),
        block_channels=channels,
        layers_per_block=fields.whole("layers_per_block", 1),
        norm_groups=fields.whole("norm_num_groups", 32),
        scaling_factor=fields.number("scaling_factor", 0.18215),
    )


def text_encoder_config(path: Path) -> TextEncoderConfig:
    """The CLIP text encoder that `text_encoder/config.json` describes."""
    fields = _Fields(path, {})
    return TextEncoderConfig(
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
    )


def schedule_config(path: Path) -> ScheduleConfig:
    """The schedule of `scheduler/scheduler_config.json`; where there is no such file, Stable Diffusion's constants."""
    if not path.exists():
        return ScheduleConfig()
    fields = _Fields(path, _SCHEDULER_USUAL)
    fields.require_usual()
    usual = ScheduleConfig()
    prediction_type = str(fields.get("prediction_type", usual.prediction_type))
    fields.only("prediction_type", (prediction_type,), {"epsilon", "v_prediction", "sample"})
    spacing = str(fields.get("timestep_spacing", usual.spacing))
    fields.only("timestep_spacing", (spacing,), {"leading", "linspace", "trailing"})
    beta_schedule = str(fields.get("beta_schedule", usual.beta_schedule))
    fields.only("beta_schedule", (beta_schedule,), {"linear", "scaled_linear"})
    training_steps = fields.whole("num_train_timesteps", usual.training_steps)
    return ScheduleConfig(
        training_steps=training_steps,
        beta_start=fields.number("beta_start", usual.beta_start),
        beta_end=fields.number("beta_end", usual.beta_end),
        beta_schedule=beta_schedule,
        betas=fields.numbers("trained_betas", training_steps),
        steps_offset=fields.whole("steps_offset", usual.steps_offset, low=0),
        set_alpha_to_one=fields.flag("set_alpha_to_one", usual.set_alpha_to_one),
        spacing=spacing,
        prediction_type=prediction_type,
    )


class _Fields:
    """The fields of one config.json, each read with its type checked."""

    def __init__(self, path: Path, usual: Mapping[str, tuple[Any, ...]]) -> None:
        self.shown = printable(str(path))
        self._fields = read_json(path, MAX_CONFIG_BYTES)
        self._usual = usual

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def require_usual(self) -> None:
        for name, values in self._usual.items():
            if name in self._fields and self._fields[name] not in values:
                shown = printable(json.dumps(self._fields[name]))
                raise BadDataError(f"{self.shown}: {name} is {shown}, which this version cannot run.")

    def only(self, name: str, found: tuple[str, ...], known: set[str]) -> None:
        for value in found:
            if value not in known:
                raise BadDataError(
                    f"{self.shown}: {name} holds {printable(repr(value))}, which this version cannot run; it knows "
                    f"{', '.join(sorted(known))}."
                )

    def whole(self, name: str, default: int, low: int = 1) -> int:
        return self._whole(name, self._fields.get(name, default), low)

    def wholes(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
            self._refuse(name, value, "a list of 1 to 16 whole numbers")
        return tuple(self._whole(name, item, 1) for item in value)

    def names(self, name: str, default: tuple[str, ...], count: int) -> tuple[str, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != count or not all(isinstance(v, str) for v in value):
            self._refuse(name, value, f"a list of {count} names")
        return tuple(value)

    def per_level(self, name: str, default: int, levels: int) -> tuple[int, ...]:
        """One number for all levels, or a list of one each."""
        value = self._fields.get(name, default)
        if isinstance(value, list) and len(value) != levels:
            self._refuse(name, value, f"one number, or a list of {levels}")
        values = value if isinstance(value, list) else [value] * levels
        return tuple(self._whole(name, item, 1) for item in values)

    def number(self, name: str, default: float) -> float:
        return self._number(name, self._fields.get(name, default))

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """A list of `count` numbers, or None."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            self._refuse(name, value, f"a list of {count} numbers")
        return tuple(self._number(name, item) for item in value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return bool(value)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            self._refuse(name, value, "a number")
        return float(value)

    def _whole(self, name: str, value: Any, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MAX_WHOLE:
            self._refuse(name, value, f"a whole number from {low} to {_MAX_WHOLE}")
        return int(value)

    def _refuse(self, name: str, value: Any, wanted: str) -> None:
        raise BadDataError(f"{self.shown}: {name} is {printable(repr(value))}, not {wanted}.")
