"""What a model reads: a request that lacks it, or has what the model does not read, is refused."""

from ldmcli.conditions import CONDITION_FIELDS, Label
from ldmcli.config import ClassesConfig, ImageEmbeddingConfig, LayoutConfig, ModelConfig
from ldmcli.errors import UsageError, printable
from ldmcli.spec import ENLARGING_FIELDS, MAX_NOISE_LEVEL, NOISE_LEVEL, GenerationRequest

# What a model may be conditioned on: in words, and how it is drawn with.
_READS = {
    "text": ("prompts", "txt2img"),
    "": ("nothing", "sample"),
    "label": ("a class", "sample --label CLASS"),
    "layout": ("a layout", "sample --layout FILE"),
    "map": ("a semantic map", "sample --map FILE"),
    "image_embedding": ("an embedding of a picture", "sample --image-embedding FILE"),
    "low_res": ("a picture alone", ""),
    "masked": ("a picture and a mask alone", ""),
}


def check_inputs(request: GenerationRequest, config: "ModelConfig") -> None:
    """Raise UsageError where the model lacks what it reads, as in UNetConfig, or is given what it does not."""
    reads = config.unet.reads
    if reads == "image":
        if request.image is None:
            raise UsageError("the model edits pictures; give it one, as --image of `ldm img2img`.")
        for name in ("strength", "mask"):
            if getattr(request, name) is not None:
                raise UsageError(f"{name} is not for a model that edits pictures by words; leave it out.")
    elif request.image_guidance_scale is not None:
        raise UsageError("image_guidance_scale is for a model that edits pictures by words (InstructPix2Pix), and this "
                         "is none; leave it out.")  # fmt: skip
    if reads == "depth":
        if request.image is None or request.depth is None:
            raise UsageError("the model draws on a picture and its depth map; give both, as --image and --depth of "
                             "`ldm img2img`.")  # fmt: skip
    elif request.depth is not None:
        raise UsageError("depth is for a model that reads depth maps, and this does not; leave it out.")
    _check_enlarging(request, config)
    if reads == "masked" and (request.image is None or request.mask is None):
        raise UsageError("the model fills in parts of pictures; give a picture and a mask, as --image and --mask of "
                         "`ldm img2img`.")  # fmt: skip
    if reads in ("image", "depth", "low_res", "masked") and request.hires is not None:
        raise UsageError("hires is not for a model that edits pictures, enlarges or fills them in, or reads depth "
                         "maps; enlarge with --upscale.")  # fmt: skip


def check_condition(request: GenerationRequest, config: "ModelConfig") -> None:
    """Raise UsageError where the request lacks what the model is conditioned on, or has what it does not read."""
    given = [name for name in CONDITION_FIELDS if getattr(request, name) is not None]
    if "text" not in config.conditions:
        texts = ("prompt", "negative_prompt", "embeddings", "ip_adapter")
        given += [name for name in texts if getattr(request, name)]
        given += ["clip_skip"] if request.clip_skip > 1 else []
    own = config.conditions[-1] if config.conditions else ""
    reads, command = _READS[own or config.unet.reads]
    if other := [name for name in given if name not in config.conditions]:
        cure = f"draw with `ldm {command}`" if command else "leave it out"
        raise UsageError(f"{other[0]} is not for this model, which reads {reads}; {cure}.")
    if own not in ("text", "", *given):
        raise UsageError(f"the model reads {reads}; give one, as `ldm {command}`.")
    if request.embedding_row is not None and request.image_embedding is None:
        raise UsageError("embedding_row is for a request with an image_embedding; give one, or leave it out.")
    conditioner = config.conditioner
    if not config.guidable:
        _check_unguided(request)
    if isinstance(conditioner, ClassesConfig) and request.label is not None:
        _check_label("label", request.label, conditioner.classes)
    if isinstance(conditioner, LayoutConfig):
        for i, (label, *_) in enumerate(request.layout or ()):
            _check_label(f"layout, object {i + 1}: label", label, conditioner.nothing)
        if len(request.layout or ()) > conditioner.objects:
            raise UsageError(f"layout has {len(request.layout or ())} objects; the model takes {conditioner.objects}.")


def _check_enlarging(request: GenerationRequest, config: "ModelConfig") -> None:
    if config.unet.reads != "low_res":
        embeds = ImageEmbeddingConfig.kind in config.conditions
        for name in ENLARGING_FIELDS:
            if getattr(request, name) is not None and not (embeds and name == "noise_level"):
                what = "enlarges pictures" if name == "patch" else "enlarges pictures or reads embeddings of them"
                raise UsageError(f"{name} is for a model that {what}, and this is none; leave it out.")
        if embeds and config.noising:
            _check_level(request.noise_level or 0, config.noising.training_steps - 1)
        return
    if request.image is None:
        raise UsageError("the model enlarges pictures; give it one, as `ldm upscale` does.")
    for name in ("strength", "mask"):
        if getattr(request, name) is not None:
            raise UsageError(f"{name} is not for a model that enlarges pictures; leave it out.")
    most = MAX_NOISE_LEVEL + 1
    if config.noising:
        level = NOISE_LEVEL if request.noise_level is None else request.noise_level
        _check_level(level, min(config.noising.training_steps, config.unet.classes or most, most) - 1)
    if request.noise_level is not None and config.noising is None:
        raise UsageError("noise_level is for a model that was trained on noised pictures, and this was not; leave it "
                         "out.")  # fmt: skip


def _check_level(level: int, most: int) -> None:
    if level > most:
        raise UsageError(f"noise_level {level} is over {most}, the highest that the model knows.")


def _check_unguided(request: GenerationRequest) -> None:
    asked = {
        "guidance_scale": request.guidance_scale not in (None, 1.0),
        "guidance_rescale": bool(request.guidance_rescale),
        "guidance_interval": request.guidance_interval is not None,
    }
    for name, given in asked.items():
        if given:
            raise UsageError(f"{name} is not for this model, which knows no drawing without its condition; leave it "
                             "out.")  # fmt: skip


def _check_label(what: str, label: Label, classes: int) -> None:
    if isinstance(label, str):
        said = f"{what} “{printable(label, 100)}” is a name, and no list of names is beside the model"
        raise UsageError(f"{said}; give the class's number, 0 to {classes - 1}.")
    if label >= classes:
        raise UsageError(f"{what} {label} is none of the model's classes, 0 to {classes - 1}.")
