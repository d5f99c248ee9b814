"""Model families: rows of what their models share and shapes do not tell."""

import dataclasses
from collections.abc import Mapping

from ldmcli.config import COSINE, Defaults, ScheduleConfig, UNetConfig
from ldmcli.frozen import frozen

Shapes = Mapping[str, tuple[int, ...]]
_USUAL = Defaults()
# Latent consistency models that read the guidance scale themselves: as their authors draw with them.
LCM_DEFAULTS = Defaults("lcm", steps=4, guidance_scale=8.0)


@frozen
class TextPart:
    """One text encoder of a family: where a single file keeps it, in whose layout, and what of it the U-Net reads."""

    part: str
    prefix: str
    layout: str = "clip"
    skipped_layers: int = 0
    final_norm: bool = True
    layers: int | None = None  # of the full-size tower: with one less, converters have left out the one not read


@frozen
class ConditionPart:
    """What encodes a family's conditions other than prompts: the kind of its configuration, and where a single file
    keeps it."""

    kind: str
    part: str
    prefix: str = "cond_stage_model."


@frozen
class Noising:
    """How a picture to be enlarged, or the embedding of one, is noised: by this schedule, unless levels behind `prefix`
    in a single file, or the scheduler in this `folder` of diffusers, say otherwise."""

    schedule: ScheduleConfig
    prefix: str = "low_scale_model."
    folder: str = "low_res_scheduler"


@frozen
class Family:
    """What a family's models share and shapes do not tell; sample sizes are in latents, that for v-prediction being
    another where given. A prediction type of None has to be found out from what the network computes; a scaling factor
    of None stands in the file, or is 1. `averaged`: drawn with weights averaged over training, where the file has
    them. `joins` is as in UNetConfig, and `betas` those of the first and the last training step."""

    name: str
    texts: tuple[TextPart, ...]
    heads: int | None = None  # attention heads on every level of the U-Net, or …
    head_dim: int = 64  # … their width
    norm_groups: int = 32
    scaling_factor: float | None = 0.18215
    force_upcast: bool = False
    sample_size: int = 64
    v_sample_size: int | None = None
    prediction_type: str | None = "epsilon"
    added_numbers: int = 0
    zero_empty_negative: bool = False
    defaults: Defaults = _USUAL
    conditioner: ConditionPart | None = None
    averaged: bool = False
    joins: str | None = None
    betas: tuple[float, float] = (0.00085, 0.012)
    noising: Noising | None = None

    @property
    def enlarges(self) -> bool:
        """Whether its models draw pictures larger: `ldm upscale` takes them beside upscalers."""
        return self.joins == "low_res"


_CLIP_L = TextPart("text_encoder", "cond_stage_model.transformer.")
_VIT_H = TextPart("text_encoder", "cond_stage_model.model.", "openclip", skipped_layers=1, layers=24)
_XL_TEXTS = (
    TextPart("text_encoder", "conditioner.embedders.0.transformer.", skipped_layers=1, final_norm=False),
    TextPart("text_encoder_2", "conditioner.embedders.1.model.", "openclip", skipped_layers=1, final_norm=False),
)
_REFINER_TEXTS = (dataclasses.replace(_XL_TEXTS[1], prefix="conditioner.embedders.0.model."),)
_XL_DEFAULTS = Defaults(sampler="euler", guidance_scale=5.0)

SD1 = Family("Stable Diffusion 1.x", (_CLIP_L,), heads=8)
SD2 = Family("Stable Diffusion 2.x", (_VIT_H,), v_sample_size=96, prediction_type=None)
SDXL = Family(
    "Stable Diffusion XL",
    _XL_TEXTS,
    scaling_factor=0.13025,
    force_upcast=True,
    sample_size=128,
    added_numbers=6,
    zero_empty_negative=True,
    defaults=_XL_DEFAULTS,
)
REFINER = dataclasses.replace(
    SDXL, name="Stable Diffusion XL refiner", texts=_REFINER_TEXTS, added_numbers=5, zero_empty_negative=False
)
SD2_NOISE = dataclasses.replace(SD2, prediction_type="epsilon")  # as those for inpainting and for depth were trained
# They are noised as karlo's are (Lee et al. 2022).
UNCLIP = dataclasses.replace(
    SD2,
    name="Stable Diffusion 2.x unCLIP",
    sample_size=96,
    v_sample_size=None,
    prediction_type="v_prediction",
    added_numbers=1,
    defaults=Defaults(steps=20, guidance_scale=10.0),
    conditioner=ConditionPart("image_embedding", "image_normalizer", "noise_augmentor.data_"),
    noising=Noising(ScheduleConfig(beta_schedule=COSINE), "noise_augmentor.", "image_noising_scheduler"),
)
# The models of the latent diffusion paper (Rombach et al. 2022, appendix).
_BERT = TextPart("text_encoder", "cond_stage_model.transformer.", "bert")
_UNGUIDED = Defaults(guidance_scale=1.0)
TEXT_LDM = Family("text-to-image latent diffusion (1.45B)", (_BERT,), heads=8, sample_size=32,
                  defaults=Defaults(guidance_scale=5.0))  # fmt: skip
_LDM = Family(
    "unconditional latent diffusion",
    (),
    head_dim=32,
    scaling_factor=None,
    averaged=True,
    betas=(0.0015, 0.0195),
    defaults=_UNGUIDED,
)
_CLASSES = ConditionPart("label", "class_embedder")
PAPER = (
    TEXT_LDM,
    dataclasses.replace(_LDM, name="text-to-image latent diffusion (256)", texts=(_BERT,)),
    _LDM,
    dataclasses.replace(
        _LDM, name="unconditional latent diffusion (scale-shift)", heads=8, sample_size=32, betas=(0.0015, 0.0155)
    ),
    dataclasses.replace(_LDM, name="class-conditional latent diffusion", sample_size=32, conditioner=_CLASSES),
    dataclasses.replace(_LDM, name="class-conditional latent diffusion (v2)", heads=1, averaged=False,
                        conditioner=_CLASSES, defaults=Defaults(guidance_scale=3.0)),
    dataclasses.replace(_LDM, name="layout-to-image latent diffusion", betas=(0.0015, 0.0205),
                        conditioner=ConditionPart("layout", "layout_encoder", "cond_stage_model.transformer.")),
    dataclasses.replace(_LDM, name="semantic synthesis latent diffusion", heads=8, joins="map", betas=(0.0015, 0.0205),
                        conditioner=ConditionPart("map", "map_encoder")),
)  # fmt: skip
TEXT_256, UNCONDITIONAL, SCALE_SHIFT, CLASS, CLASS_V2, LAYOUT, SEMANTIC = PAPER[1:]
SUPER_RESOLUTION = dataclasses.replace(
    _LDM,
    name="super-resolution latent diffusion",
    joins="low_res",
    betas=(0.0015, 0.0155),
    defaults=Defaults(steps=100, guidance_scale=1.0),
)
INPAINTING = dataclasses.replace(
    _LDM, name="inpainting latent diffusion", heads=8, joins="masked", betas=(0.0015, 0.0205)
)
SD_UPSCALER = dataclasses.replace(
    SD2,
    name="Stable Diffusion x4 upscaler",
    heads=8,
    scaling_factor=0.08333,
    force_upcast=True,
    sample_size=128,
    v_sample_size=None,
    prediction_type="v_prediction",
    defaults=Defaults(steps=75, guidance_scale=9.0),
    joins="low_res",
    betas=(1e-4, 0.02),
    noising=Noising(ScheduleConfig(beta_start=1e-4, beta_end=0.02)),
)
FAMILIES = (SD1, SD2, UNCLIP, SDXL, REFINER, *PAPER, SUPER_RESOLUTION, SD_UPSCALER, INPAINTING)
# By the width of the text that cross-attention reads.
CONTEXTS = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name, 1280: REFINER.name}


def family_of_unet(unet: UNetConfig, *, bert: bool = False) -> Family:
    """The family of a diffusers U-Net: XL adds six numbers to the time step, its refiner five, unCLIP one; 2.x projects
    by linear layers where 1.x convolves. `bert`: it reads the text of the paper's transformer; of its two models, the
    smaller has latents of three channels."""
    if not unet.context_dim:
        return SCALE_SHIFT if unet.scale_shift else UNCONDITIONAL
    if bert:
        return TEXT_256 if unet.out_channels == 3 else TEXT_LDM
    added = {family.added_numbers: family for family in (SDXL, REFINER, UNCLIP)}
    return added.get(unet.added_numbers) or (SD2 if unet.linear_projection else SD1)
