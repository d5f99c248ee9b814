"""Model families and other kinds of weight file, told apart by tensor names and shapes.

One table, first match wins. The key layouts are those of stable-diffusion, generative-models, diffusers,
sd-scripts and LyCORIS.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ldmcli.config import Defaults, UNetConfig
from ldmcli.errors import BadDataError, printable

SHAPES = Mapping[str, tuple[int, ...]]


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
class Family:
    """What a family's models share and shapes do not tell; sample sizes are in latents, that for v-prediction being
    another where given. A prediction type of None has to be found out from what the network computes."""

    name: str
    texts: tuple[TextPart, ...]
    heads: int | None = None  # attention heads on every level of the U-Net, or …
    head_dim: int = 64  # … their width
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = False
    sample_size: int = 64
    v_sample_size: int | None = None
    prediction_type: str | None = "epsilon"
    added_numbers: int = 0
    zero_empty_negative: bool = False
    defaults: Defaults = _USUAL


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
FAMILIES = (SD1, SD2, SDXL, REFINER)
READ = "Stable Diffusion 1.x, 2.x and XL"  # what can be drawn with, in errors


def family_of_unet(unet: UNetConfig) -> Family:
    """The family of a diffusers U-Net: XL adds six numbers to the time step, its refiner five; 2.x projects by linear
    layers where 1.x convolves."""
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
    ranks: tuple[tuple[str, int], ...] = ()  # (key, number of dimensions)
    sizes: tuple[tuple[str, int, int], ...] = ()  # (key, axis, size)
    at_most: int | None = None  # tensors in the file
    whole: bool = False  # a whole model, though of a family that cannot be read
    family: Family | None = None  # the family to read it as
    cure: str = "name the whole model's file or folder"
    lacks_vae: bool = False  # whole but for that


_UNET = "model.diffusion_model."
_MIDDLE = _UNET + "middle_block.1.proj_in.weight"
_FIRST = _UNET + "input_blocks.0.0.weight"  # (channels, input channels, 3, 3)
_CLIP = (
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.transformer.embeddings.token_embedding.weight",
)
_PARTS = (_UNET + "input_blocks.", _UNET + "middle_block.", "first_stage_model.decoder.")
_SD2_TEXT = "cond_stage_model.model.transformer.resblocks."
_FOLDER_UNET = ("conv_in.", "time_embedding.", "down_blocks.")
_MERGE = "this version does not apply it; name the whole model it was made for"
_NAME_VAE = "name a VAE for it with --vae"
_LORA_PARTS = (
    ".lora_down.",
    ".lora_A.",
    ".lora_a.",
    ".lora.down.",
    "_lora.down.",
    ".lora_linear_layer.",
    ".hada_w1_a",
    ".lokr_w1",
    ".oft_blocks",
)

_ORIGINAL: tuple[Kind, ...] = (
    Kind("Stable Diffusion 1.x with ControlNet", (*_PARTS, "control_model."), whole=True),
    Kind("Stable Diffusion 2.x depth", (*_PARTS, "depth_model."), whole=True),
    Kind(
        "Stable Diffusion 2.x inpainting (9 input channels)",
        (_UNET, _SD2_TEXT),
        sizes=((_FIRST, 1, 9),),
        whole=True,
    ),
    Kind("Stable Diffusion 2.x upscaler (7 input channels)", (_UNET, _SD2_TEXT), sizes=((_FIRST, 1, 7),), whole=True),
    Kind(
        "Stable Diffusion 2.x unCLIP",
        (_UNET + "label_emb.", _SD2_TEXT),
        whole=True,
    ),
    Kind(
        "Stable Diffusion 2.x checkpoint",
        (*_PARTS, _SD2_TEXT),
        sizes=((_FIRST, 1, 4),),
        whole=True,
        family=SD2,
    ),
    Kind(
        "Stable Diffusion 1.x inpainting (9 input channels)",
        _PARTS,
        keys=_CLIP,
        ranks=((_MIDDLE, 4),),
        sizes=((_FIRST, 1, 9),),
        whole=True,
    ),
    Kind(
        "instruct-pix2pix (8 input channels)",
        _PARTS,
        keys=_CLIP,
        ranks=((_MIDDLE, 4),),
        sizes=((_FIRST, 1, 8),),
        whole=True,
    ),
    Kind("GLIGEN (Stable Diffusion 1.x with boxes)", (*_PARTS, _UNET + "position_net."), whole=True),
    Kind(
        "Stable Diffusion 1.x checkpoint",
        _PARTS,
        keys=_CLIP,
        without=("conditioner.", _UNET + "label_emb."),
        ranks=((_MIDDLE, 4), (_FIRST, 4)),
        sizes=((_FIRST, 1, 4),),
        whole=True,
        family=SD1,
    ),
    Kind(
        "SDXL inpainting (9 input channels)",
        (_UNET, "conditioner.embedders.1."),
        sizes=((_FIRST, 1, 9),),
        whole=True,
    ),
    Kind(
        "SDXL instruct-pix2pix (8 input channels)",
        (_UNET, "conditioner.embedders.1."),
        sizes=((_FIRST, 1, 8),),
        whole=True,
    ),
    Kind(
        "SDXL in EDM's formulation (Playground 2.5)",
        (_UNET + "input_blocks.", "conditioner.embedders.1."),
        keys=("edm_mean", "edm_std", "edm_vpred.sigma_max"),
        whole=True,
    ),
    Kind(
        "SDXL checkpoint",
        (*_PARTS, _UNET + "label_emb.", *(text.prefix for text in _XL_TEXTS)),
        sizes=((_FIRST, 1, 4),),
        whole=True,
        family=SDXL,
    ),
    Kind(
        "SDXL refiner checkpoint",
        (*_PARTS, _UNET + "label_emb.", _REFINER_TEXTS[0].prefix),
        sizes=((_FIRST, 1, 4),),
        whole=True,
        family=REFINER,
    ),
    Kind(
        "SDXL checkpoint without its VAE",
        (_UNET + "label_emb.", "conditioner.embedders."),
        without=("first_stage_model.",),
        cure=_NAME_VAE,
        lacks_vae=True,
    ),
    Kind(
        "SDXL checkpoint without its text encoders",
        (_UNET + "label_emb.", "first_stage_model."),
        without=("conditioner.",),
    ),
    Kind(
        "Stable Diffusion 2.x checkpoint without its VAE",
        (_UNET + "input_blocks.", _SD2_TEXT),
        without=("first_stage_model.",),
        cure=_NAME_VAE,
        lacks_vae=True,
    ),
    Kind(
        "latent diffusion model with a BERT text encoder",
        (*_PARTS, "cond_stage_model.transformer.attn_layers."),
        whole=True,
    ),
    Kind("Stable Diffusion image-variations model", (*_PARTS, "cond_stage_model.model.visual."), whole=True),
    Kind(
        "Stable Diffusion 1.x checkpoint without its text encoder",
        _PARTS,
        without=("cond_stage_model.", "conditioner.", _UNET + "label_emb."),
        ranks=((_MIDDLE, 4),),
    ),
    Kind(
        "Stable Diffusion 1.x checkpoint without its VAE",
        (_UNET + "input_blocks.", "cond_stage_model.transformer."),
        without=("first_stage_model.",),
        cure=_NAME_VAE,
        lacks_vae=True,
    ),
    Kind("SDXL U-Net only (original keys)", (_UNET + "label_emb.",), without=("first_stage_model.",)),
)

_TRANSFORMERS: tuple[Kind, ...] = (
    Kind("Flux/SD3 transformer", (_UNET + "double_blocks.",), whole=True),
    Kind("Flux/SD3 transformer", (_UNET + "joint_blocks.",), whole=True),
    Kind("Flux/SD3 transformer", ("double_blocks.", "img_in."), whole=True),
    Kind("Flux/SD3 transformer", ("joint_blocks.", "x_embedder."), whole=True),
    Kind("Flux/SD3 transformer", ("transformer_blocks.", "x_embedder.", "norm_out."), whole=True),
    Kind("Flux/SD3 transformer", ("transformer_blocks.", "pos_embed.", "norm_out."), whole=True),
    Kind("video or other diffusion transformer", ("blocks.", "patch_embedding."), whole=True),
    Kind("PixArt transformer", ("transformer_blocks.", "adaln_single."), whole=True),
)

_ADAPTERS: tuple[Kind, ...] = (
    Kind("LoRA", parts=_LORA_PARTS, cure=_MERGE),
    Kind("LoRA", ("lora_unet_",), cure=_MERGE),
    Kind("LoRA", ("lora_te",), cure=_MERGE),
    Kind("ControlNet", ("control_model.",), without=("first_stage_model.",), cure=_MERGE),
    Kind("ControlNet", ("input_hint_block.", "zero_convs."), cure=_MERGE),
    Kind("ControlNet", ("controlnet_cond_embedding.",), cure=_MERGE),
    Kind("ControlNet", ("controlnet_down_blocks.",), cure=_MERGE),
    Kind("IP-Adapter", ("image_proj.", "ip_adapter."), cure=_MERGE),
    Kind("T2I-Adapter", ("adapter.body.",), cure=_MERGE),
    Kind("T2I-Adapter", ("body.0.block1.",), cure=_MERGE),
    Kind(
        "AnimateDiff motion module",
        parts=(".motion_modules.",),
        without=("conv_in.", "model.diffusion_model."),
        cure=_MERGE,
    ),
)

_PARTS_ALONE: tuple[Kind, ...] = (
    Kind("U-Net only (original keys)", (_UNET + "input_blocks.",), without=("first_stage_model.",)),
    Kind("U-Net only (original keys)", ("input_blocks.", "middle_block.", "output_blocks.")),
    Kind(
        "SDXL inpainting U-Net (9 input channels, diffusers keys)",
        (*_FOLDER_UNET, "add_embedding."),
        sizes=(("conv_in.weight", 1, 9),),
    ),
    Kind("SDXL U-Net (diffusers keys)", (*_FOLDER_UNET, "add_embedding.")),
    Kind(
        "Stable Diffusion inpainting U-Net (9 input channels, diffusers keys)",
        _FOLDER_UNET,
        sizes=(("conv_in.weight", 1, 9),),
    ),
    Kind(
        "instruct-pix2pix U-Net (8 input channels, diffusers keys)",
        _FOLDER_UNET,
        sizes=(("conv_in.weight", 1, 8),),
    ),
    Kind(
        "Stable Diffusion 2.x U-Net (diffusers keys)",
        _FOLDER_UNET,
        ranks=(("mid_block.attentions.0.proj_in.weight", 2),),
        sizes=(("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1, 1024),),
    ),
    Kind("U-Net only (diffusers keys)", _FOLDER_UNET),
    Kind("TAESD", ("taesd_",)),
    Kind("TAESD", ("encoder.layers.", "decoder.layers."), without=("text_model.",)),
    Kind("TAESD", ("3.conv.0.", "3.conv.2.")),  # taesd_decoder.safetensors, taesd_encoder.safetensors
    Kind("VAE only", ("first_stage_model.",), without=("model.", "cond_stage_model.", "conditioner.")),
    Kind("VAE only", ("encoder.conv_in.", "decoder.conv_in.")),
    Kind("VAE only", ("decoder.conv_in.", "decoder.conv_out.")),
    Kind("CLIP model (text and image encoder)", ("text_model.", "vision_model.")),
    Kind("CLIP model (text and image encoder)", ("visual.", "transformer.resblocks.")),
    Kind("CLIP text encoder only", ("text_model.encoder.", "text_model.embeddings.")),
    Kind("CLIP text encoder only", ("encoder.layers.", "embeddings.token_embedding.")),
    Kind("CLIP text encoder only", ("transformer.resblocks.", "token_embedding.")),
    Kind("CLIP text encoder only", ("cond_stage_model.",), without=("model.", "first_stage_model.")),
    Kind("safety checker", ("vision_model.", "concept_embeds")),
    Kind("CLIP image encoder only", ("vision_model.",)),
    Kind("T5 text encoder only", ("encoder.block.0.layer.0.SelfAttention.",)),
    Kind("textual-inversion embedding", keys=("emb_params", "clip_l", "clip_g"), at_most=4, cure=_MERGE),
    Kind("textual-inversion embedding", ("<",), at_most=4, cure=_MERGE),
    Kind("textual-inversion embedding", ("string_to_param",), cure=_MERGE),
)

KINDS: tuple[Kind, ...] = (*_ORIGINAL, *_TRANSFORMERS, *_ADAPTERS, *_PARTS_ALONE)


def describe_single_file(shapes: SHAPES) -> str:
    """What a weight file with these tensors is, in a few words; "unknown" where no row of KINDS fits."""
    kind = _find(shapes)
    return kind.name if kind else "unknown"


def lacks_only_vae(shapes: SHAPES) -> bool:
    """Whether a single file with these tensors is a model but for its VAE."""
    kind = _find(shapes)
    return bool(kind and kind.lacks_vae)


def require_family(shapes: SHAPES, path: Path) -> Family:
    """The family of the single file `path`. Raises BadDataError saying what it is instead, and what to do."""
    kind = _find(shapes)
    if kind and kind.family:
        return kind.family
    shown = printable(str(path), 500)
    if kind is None:
        raise BadDataError(f"{shown} is no model this version knows ({_found(shapes)}); it reads {READ}.")
    if kind.whole:
        raise BadDataError(f"{shown} looks like {kind.name}; this version reads {READ} with 4 input channels.")
    raise BadDataError(f"{shown} is {with_article(kind.name)}, not a whole model; {kind.cure}.")


def with_article(kind: str) -> str:
    """`kind` after "a" or "an"."""
    return f"an {kind}" if kind[0] in "AEIO" or kind.startswith("SDXL") else f"a {kind}"


def _found(shapes: SHAPES) -> str:
    """The first keys with their shapes, for a file of no known kind."""
    first = [f"{printable(key, 80)} {list(shape)[:8]}" for key, shape in list(shapes.items())[:5]]
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    return f"its first keys are {', '.join(first)}{more}" if first else "it has no tensors"


def _find(shapes: SHAPES) -> Kind | None:
    """The first row of KINDS that fits."""
    ordered = sorted(shapes)

    def begins(prefix: str) -> bool:
        at = bisect.bisect_left(ordered, prefix)
        return at < len(ordered) and ordered[at].startswith(prefix)

    def fits(kind: Kind) -> bool:
        return (
            all(begins(prefix) for prefix in kind.prefixes)
            and not any(begins(prefix) for prefix in kind.without)
            and (not kind.keys or any(key in shapes for key in kind.keys))
            and all(key in shapes and len(shapes[key]) == rank for key, rank in kind.ranks)
            and all(shapes.get(key, ())[axis : axis + 1] == (size,) for key, axis, size in kind.sizes)
            and (kind.at_most is None or len(shapes) <= kind.at_most)
            and (not kind.parts or any(part in key for key in ordered for part in kind.parts))
        )

    return next((kind for kind in KINDS if fits(kind)), None)
