"""Model families and other kinds of weight file, recognised by tensor names and shapes.

One table, first match wins. The key layouts are those of stable-diffusion, generative-models, diffusers,
sd-scripts and LyCORIS.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ldmcli.config import Defaults, UNetConfig
from ldmcli.errors import BadDataError, printable

Shapes = Mapping[str, tuple[int, ...]]
_USUAL = Defaults()
# Latent consistency models that read the guidance scale themselves: as their authors draw with them.
LCM_DEFAULTS = Defaults("lcm", steps=4, guidance_scale=8.0)


@dataclasses.dataclass(frozen=True)
class TextPart:
    """One text encoder of a family: where a single file keeps it, in whose layout, and what of it the U-Net reads."""

    part: str
    prefix: str
    layout: str = "clip"
    skipped_layers: int = 0
    final_norm: bool = True
    layers: int | None = None  # of the full-size tower: with one less, converters have left out the one not read


@dataclasses.dataclass(frozen=True)
class ConditionPart:
    """What encodes a family's conditions other than prompts: the kind of its configuration, and where a single file
    keeps it."""

    kind: str
    part: str
    prefix: str = "cond_stage_model."


@dataclasses.dataclass(frozen=True)
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
    noising: tuple[float, float] | None = None  # betas of what noises a picture to be enlarged


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
_TEXT_256, _UNCONDITIONAL, _SCALE_SHIFT, _CLASS, _CLASS_V2, _LAYOUT, _SEMANTIC = PAPER[1:]
SUPER_RESOLUTION = dataclasses.replace(
    _LDM,
    name="super-resolution latent diffusion",
    joins="low_res",
    betas=(0.0015, 0.0155),
    defaults=Defaults(steps=100, guidance_scale=1.0),
)
_INPAINTING = dataclasses.replace(
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
    noising=(1e-4, 0.02),
)
ENLARGING = (SUPER_RESOLUTION, SD_UPSCALER)  # what `ldm upscale` takes beside upscalers
FAMILIES = (SD1, SD2, SDXL, REFINER, *PAPER, *ENLARGING, _INPAINTING)
# By the width of the text that cross-attention reads.
CONTEXTS = {768: SD1.name, 1024: SD2.name, 2048: SDXL.name, 1280: REFINER.name}
EMBEDDING = "textual-inversion embedding"
# What steers by pictures: named with --control-net.
CONTROL_NET, CONTROL_LORA, CONTROL_UNION, T2I_ADAPTER = "ControlNet", "Control-LoRA", "ControlNet Union", "T2I-Adapter"
IP_ADAPTER = "IP-Adapter"  # named with --ip-adapter
STEERING = (CONTROL_NET, CONTROL_LORA, CONTROL_UNION, T2I_ADAPTER)
KL_AUTOENCODER, VQ_AUTOENCODER = "VAE only", "VQ autoencoder only"
AUTOENCODERS = (KL_AUTOENCODER, VQ_AUTOENCODER)
READ = "Stable Diffusion 1.x, 2.x and XL and the latent diffusion paper's models"  # what can be drawn with, in errors


def family_of_unet(unet: UNetConfig, *, bert: bool = False) -> Family:
    """The family of a diffusers U-Net: XL adds six numbers to the time step, its refiner five; 2.x projects by linear
    layers where 1.x convolves. `bert`: it reads the text of the paper's transformer; of its two models, the smaller has
    latents of three channels."""
    if not unet.context_dim:
        return _SCALE_SHIFT if unet.scale_shift else _UNCONDITIONAL
    if bert:
        return _TEXT_256 if unet.out_channels == 3 else TEXT_LDM
    added = {family.added_numbers: family for family in (SDXL, REFINER)}
    return added.get(unet.added_numbers) or (SD2 if unet.linear_projection else SD1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row: what a file is called, and what all has to hold of its tensors for it to be that."""

    name: str
    prefixes: tuple[str, ...] = ()  # each begins some key
    parts: tuple[str, ...] = ()  # one of these is inside some key
    keys: tuple[str, ...] = ()  # one of these is a key
    without: tuple[str, ...] = ()  # none of these begins a key
    without_parts: tuple[str, ...] = ()  # none of these is inside any key
    channels: int | None = None  # that the U-Net takes
    linear: bool | None = None  # whether its attention projects by linear layers; else by 1×1 convolutions
    at_most: int | None = None  # tensors in the file
    whole: bool = False  # a whole model, though of a family that cannot be read
    family: Family | None = None  # the family to read it as
    cure: str = "name the whole model's file or folder"
    lacks_vae: bool = False  # whole but for that
    joined: int | None = None  # channels that the U-Net takes beyond those it gives
    rows: tuple[str, int] | None = None  # a tensor and how many rows it has


def _kinds(*rows: tuple[str, ...], whole: bool = False, cure: str = Kind.cure) -> tuple[Kind, ...]:
    """Kinds that are known by prefixes alone: each row is a name and what begins some key."""
    return tuple(Kind(name, tuple(prefixes), whole=whole, cure=cure) for name, *prefixes in rows)


_UNET = "model.diffusion_model."
_FIRST = (f"{_UNET}input_blocks.0.0.weight", "conv_in.weight")  # (channels, input channels, 3, 3), in either layout
_LAST = f"{_UNET}out.2.weight"
_MIDDLE = (f"{_UNET}middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight")
_CLIP = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.transformer.embeddings.token_embedding.weight",
)
_VAE, _VAE_DECODER = "first_stage_model.", "first_stage_model.decoder."
_PARTS = (f"{_UNET}input_blocks.", f"{_UNET}middle_block.", _VAE_DECODER)
_SD2 = (_UNET, "cond_stage_model.model.transformer.resblocks.")
_LABEL = f"{_UNET}label_emb."
_XL = (_UNET, "conditioner.embedders.1.")
_BERTS = (*_PARTS, "cond_stage_model.transformer.attn_layers.")
_PROMPT = ("cond_stage_model.transformer.pos_emb.emb.weight", 77)  # layouts have other numbers of tokens
_CLASS_KEYS = ("cond_stage_model.embedding.weight",)
_PLAIN = (f"{_UNET}middle_block.1.qkv.weight",)  # attention that reads no context
_UNCONDITIONED = ("cond_stage_model.", "conditioner.", _LABEL)
_FOLDER_UNET = ("conv_in.", "time_embedding.", "down_blocks.")
_FOLDER_XL = (*_FOLDER_UNET, "add_embedding.")
_MERGE = "this version does not apply it; name the whole model it was made for"
_APPLY = "name the model it was made for with --model, and this with --lora"
_EMBED = "name the model it was made for with --model, and this with --embedding"
_SHOW = "name the model it was made for with --model, and this with --ip-adapter"
_STEER = "name the model it was made for with --model, and this with --control-net"
_NAME_VAE = "name a VAE for it with --vae"
_LORA = (
    *(".lora_down.", ".lora_A.", ".lora_a.", ".lora.down.", "_lora.down.", ".lora_linear_layer."),
    *(".hada_w1_a", ".lokr_w1", ".oft_blocks"),
)

_ORIGINAL = (
    Kind("Stable Diffusion 1.x with ControlNet", (*_PARTS, "control_model."), whole=True),
    Kind("Stable Diffusion 2.x depth (5 input channels)", (*_PARTS, *_SD2), channels=5, family=SD2_NOISE),
    Kind("Stable Diffusion 2.x inpainting (9 input channels)", (*_PARTS, *_SD2), channels=9, family=SD2_NOISE),
    Kind("Stable Diffusion 2.x upscaler (7 input channels)", (*_PARTS, *_SD2), channels=7, family=SD_UPSCALER),
    Kind("Stable Diffusion 2.x unCLIP", (*_SD2, _LABEL), whole=True),
    Kind("Stable Diffusion 2.x checkpoint", (*_PARTS, *_SD2), channels=4, family=SD2),
    Kind("Stable Diffusion 1.x inpainting (9 input channels)", _PARTS, keys=_CLIP, channels=9, linear=False,
         without=("conditioner.", _LABEL), family=SD1),
    Kind("instruct-pix2pix (8 input channels)", _PARTS, keys=_CLIP, channels=8, linear=False,
         without=("conditioner.", _LABEL), family=SD1),
    Kind("GLIGEN (Stable Diffusion 1.x with boxes)", (*_PARTS, f"{_UNET}position_net."), whole=True),
    Kind("Stable Diffusion 1.x checkpoint", _PARTS, keys=_CLIP, without=("conditioner.", _LABEL), channels=4,
         linear=False, family=SD1),
    Kind("SDXL inpainting (9 input channels)", (*_PARTS, _LABEL, *(text.prefix for text in _XL_TEXTS)), channels=9,
         family=SDXL),
    Kind("SDXL in EDM's formulation (Playground 2.5, CosXL)", _XL, keys=("edm_mean", "edm_std", "edm_vpred.sigma_max"),
         whole=True),
    Kind("SDXL instruct-pix2pix (8 input channels)", (*_PARTS, _LABEL, *(text.prefix for text in _XL_TEXTS)),
         channels=8, family=SDXL),
    Kind("SDXL checkpoint", (*_PARTS, _LABEL, *(text.prefix for text in _XL_TEXTS)), channels=4, family=SDXL),
    Kind("SDXL refiner checkpoint", (*_PARTS, _LABEL, _REFINER_TEXTS[0].prefix), channels=4, family=REFINER),
    Kind("SDXL checkpoint without its VAE", (_LABEL, "conditioner.embedders."), without=(_VAE,), cure=_NAME_VAE,
         lacks_vae=True),
    Kind("SDXL checkpoint without its text encoders", (_LABEL, _VAE), without=("conditioner.",)),
    Kind("Stable Diffusion 2.x checkpoint without its VAE", _SD2, without=(_VAE,), cure=_NAME_VAE, lacks_vae=True),
    Kind(TEXT_LDM.name, _BERTS, channels=4, rows=_PROMPT, family=TEXT_LDM),
    Kind(_TEXT_256.name, _BERTS, joined=0, rows=_PROMPT, family=_TEXT_256),
    Kind(_LAYOUT.name, _BERTS, joined=0, family=_LAYOUT),
    Kind(_CLASS_V2.name, _PARTS, keys=_CLASS_KEYS, channels=3, family=_CLASS_V2),
    Kind(_CLASS.name, _PARTS, keys=_CLASS_KEYS, joined=0, family=_CLASS),
    Kind(_SEMANTIC.name, (*_PARTS, "cond_stage_model.channel_mapper."), keys=_PLAIN, family=_SEMANTIC),
    Kind(_SCALE_SHIFT.name, _PARTS, keys=_PLAIN, without_parts=(".0.op.",), joined=0,
         without=_UNCONDITIONED, family=_SCALE_SHIFT),
    Kind(_UNCONDITIONAL.name, _PARTS, keys=_PLAIN, joined=0, without=_UNCONDITIONED, family=_UNCONDITIONAL),
    Kind(SUPER_RESOLUTION.name, _PARTS, keys=_PLAIN, joined=3, without=_UNCONDITIONED, family=SUPER_RESOLUTION),
    Kind(_INPAINTING.name, _PARTS, keys=_PLAIN, joined=4,
         without=("cond_stage_model.model.", "cond_stage_model.transformer.", "conditioner.", _LABEL),
         family=_INPAINTING),
    Kind("Stable Diffusion image-variations model", (*_PARTS, "cond_stage_model.model.visual."), whole=True),
    Kind("Stable Diffusion 1.x checkpoint without its text encoder", _PARTS,
         without=("cond_stage_model.", "conditioner.", _LABEL), linear=False),
    Kind("Stable Diffusion 1.x checkpoint without its VAE", (_PARTS[0], "cond_stage_model.transformer."),
         without=(_VAE,), cure=_NAME_VAE, lacks_vae=True),
    Kind("SDXL U-Net only (original keys)", (_LABEL,), without=(_VAE,)),
)  # fmt: skip

_TRANSFORMERS = _kinds(
    ("Flux/SD3 transformer", f"{_UNET}double_blocks."),
    ("Flux/SD3 transformer", f"{_UNET}joint_blocks."),
    ("Flux/SD3 transformer", "double_blocks.", "img_in."),
    ("Flux/SD3 transformer", "joint_blocks.", "x_embedder."),
    ("Flux/SD3 transformer", "transformer_blocks.", "x_embedder.", "norm_out."),
    ("Flux/SD3 transformer", "transformer_blocks.", "pos_embed.", "norm_out."),
    ("video or other diffusion transformer", "blocks.", "patch_embedding."),
    ("PixArt transformer", "transformer_blocks.", "adaln_single."),
    whole=True,
)

_ADAPTERS = (
    Kind("IP-Adapter FaceID", ("image_proj.", "ip_adapter."), parts=("_lora.",), cure=_MERGE),
    Kind(IP_ADAPTER, ("image_proj.", "ip_adapter."), cure=_SHOW),
    Kind("LoRA", parts=_LORA, cure=_APPLY),
    Kind("ControlNet-LLLite", ("lllite_",), cure=_MERGE),
    Kind("Stable Diffusion 3 ControlNet", ("controlnet_blocks.", "transformer_blocks."), cure=_MERGE),
    Kind("Flux ControlNet", ("controlnet_blocks.",), cure=_MERGE),
    Kind("ControlNet-XS", ("ctrl_to_base.",), cure=_MERGE),
    Kind("T2I-Adapter for styles", ("ln_post.", "transformer_layes."), cure=_MERGE),
    Kind(CONTROL_LORA, keys=("lora_controlnet",), cure=_STEER),
    Kind(CONTROL_UNION, ("task_embedding", "control_add_embedding."), cure=_STEER),
    Kind(CONTROL_NET, ("control_model.",), without=(_VAE,), cure=_STEER),
    *_kinds(("LoRA", "lora_unet_"), ("LoRA", "lora_te"), ("LoRA", "unet:"), ("LoRA", "text_encoder:"), cure=_APPLY),
    *_kinds(
        (CONTROL_NET, "input_hint_block.", "zero_convs."),
        (CONTROL_NET, "controlnet_cond_embedding."),
        (CONTROL_NET, "controlnet_down_blocks."),
        (T2I_ADAPTER, "adapter.body."),
        (T2I_ADAPTER, "body.0.block1."),
        (T2I_ADAPTER, "body.0.body.", "body.0.in_conv."),
        cure=_STEER,
    ),
    Kind("AnimateDiff motion module", parts=(".motion_modules.",), without=("conv_in.", _UNET), cure=_MERGE),
)

_WITHOUT_MODEL = ("model.", "cond_stage_model.", "conditioner.")
_PARTS_ALONE = (
    Kind("U-Net only (original keys)", (_PARTS[0],), without=(_VAE,)),
    Kind("SDXL inpainting U-Net (9 input channels, diffusers keys)", _FOLDER_XL, channels=9),
    Kind("SDXL U-Net (diffusers keys)", _FOLDER_XL),
    Kind("Stable Diffusion inpainting U-Net (9 input channels, diffusers keys)", _FOLDER_UNET, channels=9),
    Kind("instruct-pix2pix U-Net (8 input channels, diffusers keys)", _FOLDER_UNET, channels=8),
    Kind("Stable Diffusion 2.x U-Net (diffusers keys)", _FOLDER_UNET, linear=True),
    Kind(VQ_AUTOENCODER, (f"{_VAE}quantize.embedding.", _VAE_DECODER), without=_WITHOUT_MODEL),
    Kind(VQ_AUTOENCODER, ("quantize.embedding.", "decoder.conv_in.")),
    Kind("TAESD", ("encoder.layers.", "decoder.layers."), without=("text_model.",)),
    Kind(KL_AUTOENCODER, (_VAE,), without=_WITHOUT_MODEL),
    Kind("CLIP text encoder only", ("cond_stage_model.",), without=("model.", _VAE)),
    *_kinds(
        ("U-Net only (original keys)", "input_blocks.", "middle_block.", "output_blocks."),
        ("U-Net only (diffusers keys)", *_FOLDER_UNET),
        ("TAESD", "taesd_"),
        ("TAESD", "3.conv.0.", "3.conv.2."),  # taesd_decoder.safetensors, taesd_encoder.safetensors
        (KL_AUTOENCODER, "encoder.conv_in.", "decoder.conv_in."),
        (KL_AUTOENCODER, "decoder.conv_in.", "decoder.conv_out."),
        ("CLIP model (text and image encoder)", "text_model.", "vision_model."),
        ("CLIP model (text and image encoder)", "visual.", "transformer.resblocks."),
        ("CLIP text encoder only", "text_model.encoder.", "text_model.embeddings."),
        ("CLIP text encoder only", "encoder.layers.", "embeddings.token_embedding."),
        ("CLIP text encoder only", "transformer.resblocks.", "token_embedding."),
        ("safety checker", "vision_model.", "concept_embeds"),
        ("CLIP image encoder only", "vision_model."),
        ("T5 text encoder only", "encoder.block.0.layer.0.SelfAttention."),
    ),
    Kind(EMBEDDING, keys=("emb_params", "clip_l", "clip_g"), at_most=4, cure=_EMBED),
    Kind(EMBEDDING, ("<",), at_most=4, cure=_EMBED),
    Kind(EMBEDDING, ("string_to_param",), cure=_EMBED),
)

KINDS = (*_ORIGINAL, *_TRANSFORMERS, *_ADAPTERS, *_PARTS_ALONE)


def describe_single_file(shapes: Shapes) -> str:
    """What a weight file with these tensors is, in a few words; "unknown" where no row of KINDS fits."""
    kind = _find(shapes)
    return kind.name if kind else "unknown"


def family_named(kind: str) -> Family | None:
    """The family that a file of this kind, by its row's name, is read as."""
    return next((row.family for row in KINDS if row.name == kind), None)


def require_family(shapes: Shapes, path: Path, *, own_vae: bool = True) -> Family:
    """The family of the single file `path`; without `own_vae`, it may lack that. Raises BadDataError saying what it is
    instead, and what to do."""
    kind = _find(shapes)
    if kind and kind.lacks_vae and not own_vae:
        kind = _find({**shapes, _VAE_DECODER: ()})
    if kind and kind.family:
        return kind.family
    shown = printable(str(path), 500)
    if kind is None:
        raise BadDataError(f"{shown} is no model this version knows ({_first_keys(shapes)}); it reads {READ}.")
    if kind.whole:
        raise BadDataError(f"{shown} looks like {kind.name}; this version reads {READ}.")
    raise BadDataError(f"{shown} is {with_article(kind.name)}, not a whole model; {kind.cure}.")


def with_article(kind: str) -> str:
    """`kind` after "a" or "an"."""
    return f"an {kind}" if kind[0] in "AEIOaeiou" or kind.startswith(("SDXL", "LCM")) else f"a {kind}"


def _first_keys(shapes: Shapes) -> str:
    """The first keys with their shapes, for a file of no known kind."""
    first = [f"{printable(key, 80)} {list(shape)[:8]}" for key, shape in list(shapes.items())[:5]]
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    return f"its first keys are {', '.join(first)}{more}" if first else "it has no tensors"


def _find(shapes: Shapes) -> Kind | None:
    """The first row of KINDS that fits."""
    ordered = sorted(shapes)
    first = next((shapes[key] for key in _FIRST if key in shapes), ())
    middle = next((shapes[key] for key in _MIDDLE if key in shapes), ())

    def begins(prefix: str) -> bool:
        at = bisect.bisect_left(ordered, prefix)
        return at < len(ordered) and ordered[at].startswith(prefix)

    def fits(kind: Kind) -> bool:
        return (
            all(begins(prefix) for prefix in kind.prefixes)
            and not any(begins(prefix) for prefix in kind.without)
            and (not kind.keys or any(key in shapes for key in kind.keys))
            and (kind.channels is None or first[1:2] == (kind.channels,))
            and (kind.joined is None or first[1:2] == (shapes.get(_LAST, (-1,))[0] + kind.joined,))
            and (kind.rows is None or shapes.get(kind.rows[0], ())[:1] == kind.rows[1:])
            and (kind.linear is None or len(middle) == (2 if kind.linear else 4))
            and (kind.at_most is None or len(shapes) <= kind.at_most)
            and (not kind.parts or any(part in key for key in ordered for part in kind.parts))
            and not any(part in key for key in ordered for part in kind.without_parts)
        )

    return next((kind for kind in KINDS if fits(kind)), None)
