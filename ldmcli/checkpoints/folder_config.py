"""A diffusers folder's configuration: its small JSON files, with anything this program cannot do refused by name."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.families import LCM_DEFAULTS
from ldmcli.config import Defaults, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.disk.opening import read_json
from ldmcli.errors import BadDataError, printable
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spec import MAX_GUIDANCE, MAX_STEPS

MAX_CONFIG_BYTES = 1 << 20
WITH_PROJECTION = "CLIPTextModelWithProjection"
_MAX_WHOLE = 1 << 24

# Fields whose other values mean a network that is not built here: {field: the values that mean "as usual"}.
_UNET_USUAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
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
    "reverse_transformer_layers_per_block": (None,),
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
    "thresholding": (False,),
}


def unet_config(path: Path, pooled_dim: int = 0) -> UNetConfig:
    """The U-Net that `unet/config.json` describes; a missing field means diffusers' default. `pooled_dim` is the width
    of the pooled prompt that the model's text encoder gives, if any."""
    fields = _Fields(path, _UNET_USUAL)
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
    guided = fields.get("time_cond_proj_dim") is not None
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
        guidance_dim=fields.whole("time_cond_proj_dim", 256, low=4) if guided else None,
        **_added(fields, pooled_dim),
    )


def _added(fields: "_Fields", pooled_dim: int) -> dict[str, int]:
    """What SDXL adds to the time step: a pooled prompt of `pooled_dim`, and six numbers or, in its refiner, five."""
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
        force_upcast=fields.flag("force_upcast", True),
    )


def text_encoder_config(path: Path, part: str, kind: str) -> TextEncoderConfig:
    """The CLIP text encoder that `config.json` describes; `kind` is its class in transformers."""
    fields = _Fields(path, {})
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


def defaults_for(path: Path, usual: Defaults, *, reads_guidance: bool) -> Defaults:
    """How a model wants to be drawn with, from its scheduler: those distilled to few steps name one that says so.

    Latent consistency models name LCMScheduler; unless the network reads the guidance scale itself, guidance is off, as
    it was distilled in. Adversarially distilled ones (SD-Turbo, SDXL-Turbo: Sauer et al. 2023)
    name Euler's or its ancestral kin with "trailing" spacing and predict noise; no other known model does.
    """
    if not path.exists():
        return usual
    fields = _Fields(path, {})
    kind = str(fields.get("_class_name"))
    if kind == "LCMScheduler":
        return LCM_DEFAULTS if reads_guidance else dataclasses.replace(LCM_DEFAULTS, guidance_scale=1.0)
    turbo = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-a"}
    trailing = fields.get("timestep_spacing") == "trailing" and not fields.get("rescale_betas_zero_snr")
    if kind in turbo and trailing and fields.get("prediction_type", "epsilon") == "epsilon":
        return Defaults(turbo[kind], steps=4, guidance_scale=1.0)
    return usual


def own_defaults(path: Path, usual: Defaults) -> Defaults:
    """`usual` with what the model's `generation_config.json` says otherwise, where there is one.

    It may give `guidance_scale` and `num_inference_steps`, as diffusers' pipelines call them, and `sampler`, by this
    program's names; null says nothing, and other keys, of which transformers has many, are not read. Raises
    BadDataError where a value is none that a request may have; whether the model's schedule has so many steps shows
    when a request takes them.
    """
    if not os.path.lexists(path):
        return usual
    fields = _Fields(path, {}, null_is_unsaid=True)
    sampler = str(fields.get("sampler", usual.sampler))
    fields.only("sampler", (sampler,), set(SAMPLERS))
    return Defaults(
        sampler=sampler,
        steps=fields.whole("num_inference_steps", usual.steps, high=MAX_STEPS),
        guidance_scale=fields.within("guidance_scale", usual.guidance_scale, 0.0, MAX_GUIDANCE),
    )


def schedule_config(path: Path) -> ScheduleConfig:
    """The schedule of `scheduler/scheduler_config.json`; where there is no such file, Stable Diffusion's constants."""
    if not path.exists():
        return ScheduleConfig()
    fields = _Fields(path, _SCHEDULER_USUAL)
    fields.require_usual()
    if str(fields.get("_class_name")).startswith(("EDM", "FlowMatch")):
        fields.refuse("_class_name", fields.get("_class_name"), "a scheduler of the noise schedules that run here")
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
        zero_terminal_snr=fields.flag("rescale_betas_zero_snr", False),
    )


class _Fields:
    """The fields of one JSON file, each read with its type checked; where `null_is_unsaid`, nulls are not there."""

    def __init__(self, path: Path, usual: Mapping[str, tuple[Any, ...]], *, null_is_unsaid: bool = False) -> None:
        self.shown = printable(str(path))
        fields = read_json(path, MAX_CONFIG_BYTES)
        self._fields = {name: v for name, v in fields.items() if v is not None} if null_is_unsaid else fields
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

    def whole(self, name: str, default: int, low: int = 1, high: int = _MAX_WHOLE) -> int:
        return self._whole(name, self._fields.get(name, default), low, high)

    def wholes(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
            self.refuse(name, value, "a list of 1 to 16 whole numbers")
        return tuple(self._whole(name, item, 1) for item in value)

    def names(self, name: str, default: tuple[str, ...], count: int) -> tuple[str, ...]:
        value = self._fields.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != count or not all(isinstance(v, str) for v in value):
            self.refuse(name, value, f"a list of {count} names")
        return tuple(value)

    def per_level(self, name: str, default: int, levels: int) -> tuple[int, ...]:
        """One number for all levels, or a list of one each."""
        value = self._fields.get(name, default)
        if isinstance(value, list) and len(value) != levels:
            self.refuse(name, value, f"one number, or a list of {levels}")
        values = value if isinstance(value, list) else [value] * levels
        return tuple(self._whole(name, item, 1) for item in values)

    def number(self, name: str, default: float) -> float:
        return self._number(name, self._fields.get(name, default))

    def within(self, name: str, default: float, low: float, high: float) -> float:
        value = self.number(name, default)
        if not low <= value <= high:
            self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """A list of `count` numbers, or None."""
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            self.refuse(name, value, f"a list of {count} numbers")
        return tuple(self._number(name, item) for item in value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return bool(value)

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            self.refuse(name, value, "a number")
        return float(value)

    def _whole(self, name: str, value: Any, low: int, high: int = _MAX_WHOLE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"a whole number from {low} to {high}")
        return int(value)

    def refuse(self, name: str, value: Any, wanted: str) -> None:
        raise BadDataError(f"{self.shown}: {name} is {printable(repr(value))}, not {wanted}.")
