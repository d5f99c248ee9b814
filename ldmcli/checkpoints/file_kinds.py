"""Kinds of weight file, recognised by tensor names and shapes: whole models of a family, parts, adapters and others.

One table, first match wins. The key layouts are those of stable-diffusion, generative-models, latent-diffusion,
diffusers, sd-scripts and LyCORIS.
"""

import bisect
import dataclasses
from pathlib import Path

from ldmcli.checkpoints.families import (
    CLASS,
    CLASS_V2,
    INPAINTING,
    LAYOUT,
    REFINER,
    SCALE_SHIFT,
    SD1,
    SD2,
    SD2_NOISE,
    SD_UPSCALER,
    SDXL,
    SEMANTIC,
    SUPER_RESOLUTION,
    TEXT_256,
    TEXT_LDM,
    UNCLIP,
    UNCONDITIONAL,
    Family,
    Shapes,
)
from ldmcli.errors import BadDataError, printable

EMBEDDING = "textual-inversion embedding"
# What steers by pictures: named with --control-net.
CONTROL_NET, CONTROL_LORA, CONTROL_UNION, T2I_ADAPTER = "ControlNet", "Control-LoRA", "ControlNet Union", "T2I-Adapter"
IP_ADAPTER = "IP-Adapter"  # named with --ip-adapter
STEERING = (CONTROL_NET, CONTROL_LORA, CONTROL_UNION, T2I_ADAPTER)
KL_AUTOENCODER, VQ_AUTOENCODER = "VAE only", "VQ autoencoder only"
AUTOENCODERS = (KL_AUTOENCODER, VQ_AUTOENCODER)
EMBEDS = ("image_embeds", "image_embedding")  # what files of image embeddings call them
READ = "Stable Diffusion 1.x, 2.x and XL and the latent diffusion paper's models"  # what can be drawn with, in errors


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
    Kind(UNCLIP.name, (*_PARTS, *_SD2, f"{_LABEL}0."), channels=4, family=UNCLIP),
    Kind("Stable Diffusion 2.x checkpoint", (*_PARTS, *_SD2), channels=4, family=SD2),
    Kind("Stable Diffusion 1.x inpainting (9 input channels)", _PARTS, keys=_CLIP, channels=9, linear=False,
         without=("conditioner.", _LABEL), family=SD1),
    Kind("instruct-pix2pix (8 input channels)", _PARTS, keys=_CLIP, channels=8, linear=False,
         without=("conditioner.", _LABEL), family=SD1),
    Kind("GLIGEN (Stable Diffusion 1.x with boxes)", (*_PARTS, f"{_UNET}position_net."), whole=True),
    Kind("Stable Diffusion 1.x checkpoint", _PARTS, keys=_CLIP, without=("conditioner.", _LABEL), channels=4,
         linear=False, family=SD1),
    Kind("SDXL inpainting (9 input channels)", (*_PARTS, _LABEL, *(text.prefix for text in SDXL.texts)), channels=9,
         family=SDXL),
    Kind("SDXL in EDM's formulation (Playground 2.5, CosXL)", _XL, keys=("edm_mean", "edm_std", "edm_vpred.sigma_max"),
         whole=True),
    Kind("SDXL instruct-pix2pix (8 input channels)", (*_PARTS, _LABEL, *(text.prefix for text in SDXL.texts)),
         channels=8, family=SDXL),
    Kind("SDXL checkpoint", (*_PARTS, _LABEL, *(text.prefix for text in SDXL.texts)), channels=4, family=SDXL),
    Kind("SDXL refiner checkpoint", (*_PARTS, _LABEL, REFINER.texts[0].prefix), channels=4, family=REFINER),
    Kind("SDXL checkpoint without its VAE", (_LABEL, "conditioner.embedders."), without=(_VAE,), cure=_NAME_VAE,
         lacks_vae=True),
    Kind("SDXL checkpoint without its text encoders", (_LABEL, _VAE), without=("conditioner.",)),
    Kind("Stable Diffusion 2.x checkpoint without its VAE", _SD2, without=(_VAE,), cure=_NAME_VAE, lacks_vae=True),
    Kind(TEXT_LDM.name, _BERTS, channels=4, rows=_PROMPT, family=TEXT_LDM),
    Kind(TEXT_256.name, _BERTS, joined=0, rows=_PROMPT, family=TEXT_256),
    Kind(LAYOUT.name, _BERTS, joined=0, family=LAYOUT),
    Kind(CLASS_V2.name, _PARTS, keys=_CLASS_KEYS, channels=3, family=CLASS_V2),
    Kind(CLASS.name, _PARTS, keys=_CLASS_KEYS, joined=0, family=CLASS),
    Kind(SEMANTIC.name, (*_PARTS, "cond_stage_model.channel_mapper."), keys=_PLAIN, family=SEMANTIC),
    Kind(SCALE_SHIFT.name, _PARTS, keys=_PLAIN, without_parts=(".0.op.",), joined=0,
         without=_UNCONDITIONED, family=SCALE_SHIFT),
    Kind(UNCONDITIONAL.name, _PARTS, keys=_PLAIN, joined=0, without=_UNCONDITIONED, family=UNCONDITIONAL),
    Kind(SUPER_RESOLUTION.name, _PARTS, keys=_PLAIN, joined=3, without=_UNCONDITIONED, family=SUPER_RESOLUTION),
    Kind(INPAINTING.name, _PARTS, keys=_PLAIN, joined=4,
         without=("cond_stage_model.model.", "cond_stage_model.transformer.", "conditioner.", _LABEL),
         family=INPAINTING),
    Kind("retrieval-augmented latent diffusion (RDM)", _PARTS, channels=16, without=_UNCONDITIONED, whole=True),
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
    Kind(
        "file of image embeddings", keys=EMBEDS, at_most=1, cure="name an unCLIP model, and this with --image-embedding"
    ),
    Kind("file of latents", keys=("latents", "codes"), at_most=2, cure="ldm vae decode makes pictures of it"),
)

KINDS = (*_ORIGINAL, *_TRANSFORMERS, *_ADAPTERS, *_PARTS_ALONE)


def family_named(kind: str) -> Family | None:
    """The family that a file of this kind, by its row's name, is read as."""
    return next((row.family for row in KINDS if row.name == kind), None)


def describe_single_file(shapes: Shapes) -> str:
    """What a weight file with these tensors is, in a few words; "unknown" where no row of KINDS fits."""
    kind = _find(shapes)
    return kind.name if kind else "unknown"


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
