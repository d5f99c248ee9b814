"""What is asked for, typed and checked once: one picture's request, the model, and where and how to compute.

Everything that draws, the command line, prompt files, other processes and Python, says it in these words. Imports
nothing heavy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ldmcli.checks import (
    MAX_NAME_BYTES,
    check_choice,
    check_number,
    check_text,
    check_whole,
    checked_interval,
    checked_names,
    checked_path,
    checked_picture,
)
from ldmcli.conditions import CONDITION_FIELDS, Box, Label, read_label, read_layout
from ldmcli.control import CONTROL_FIELDS, read_control
from ldmcli.errors import BadDataError, UsageError, printable
from ldmcli.frozen import frozen
from ldmcli.hires import UPSCALERS, read_hires, read_upscaler
from ldmcli.image_prompt import IP_ADAPTER_FIELDS, read_ip_adapter
from ldmcli.lora import LoRA, read_loras
from ldmcli.sampling.catalogue import check_spacing, sampler_named
from ldmcli.sampling.names import sampler_of, schedule_of

# Of networks that steer, and pictures that are prompts: what reads each field.
STEERING = dict.fromkeys(CONTROL_FIELDS, read_control) | dict.fromkeys(IP_ADAPTER_FIELDS, read_ip_adapter)
# Of these, those that name files: networks, then pictures.
STEERING_NETWORKS = "control_net", "ip_adapter"
STEERING_PICTURES = "control_image", "ip_adapter_image", "ip_adapter_mask"
STEERING_FILES = STEERING_NETWORKS + STEERING_PICTURES
MAX_SEED = 2**64 - 1
MAX_STEPS = 999
MAX_SIZE = 1 << 17
MAX_GUIDANCE = 1000.0
MAX_CLIP_SKIP = 128
MAX_EMBEDDINGS = 256
REFINER_START = 0.8  # where a refiner takes over unless asked: its authors' choice
PROMPT_SYNTAXES = ("plain", "weighted")
LONG_PROMPTS = ("warn", "error", "chunk")
KERNELS = ("auto", "triton", "torch")
PICTURES = ("image", "mask", "depth", "map")  # fields that name a picture
INPUT_FILES = (*PICTURES, "image_embedding")  # … or another file that says what to draw
ENLARGING_FIELDS = ("noise_level", "patch")  # of models that enlarge pictures
# Fields that only a mask gives a meaning, and all that say what is drawn on, and how.
MASK_FIELDS = ("invert_mask", "mask_blur", "masked_content", "inpaint_area", "mask_padding", "paste_back")
IMAGE_FIELDS = (
    *("image", "mask", "depth", "strength", "resize", "image_guidance_scale"), *ENLARGING_FIELDS, *MASK_FIELDS,
)  # fmt: skip
HIRES_FIELDS = ("hires", "hires_strength", "hires_steps", "hires_upscaler")
NOISE_LEVEL, MAX_NOISE_LEVEL = 20, 350  # training steps of noise on a picture that is enlarged: its authors' numbers
MAX_TRAINING_STEPS = 10_000
MAX_ROWS = 100_000  # of a file of embeddings
MIN_PATCH = 16
PATCH = 128  # latents a side that are computed at once unless asked, of a picture that is enlarged
STRENGTH = 0.75  # how much of a given picture is drawn anew unless asked
IMAGE_GUIDANCE = 1.5  # how closely an edited picture is kept to unless asked: InstructPix2Pix's authors' choice
RESIZES = ("stretch", "crop", "fill")
MASKED_CONTENTS = ("original", "fill", "noise", "zero")
INPAINT_AREAS = ("whole", "masked")
ALPHA = "alpha"  # as a mask: the picture's own transparency
MAX_PADDING = 1 << 12
MAX_BLUR = 512.0

# What fields may be: from the first to the second, whole where these are; or one of some words.
RANGES: dict[str, tuple[int, int] | tuple[float, float]] = {
    "seed": (0, MAX_SEED), "steps": (1, MAX_STEPS), "guidance_scale": (0.0, MAX_GUIDANCE), "width": (1, MAX_SIZE),
    "height": (1, MAX_SIZE), "eta": (0.0, 1.0), "guidance_rescale": (0.0, 1.0), "clip_skip": (1, MAX_CLIP_SKIP),
    "original_width": (1, MAX_SIZE), "original_height": (1, MAX_SIZE), "crop_left": (0, MAX_SIZE),
    "crop_top": (0, MAX_SIZE), "refiner_start": (0.0, 1.0), "strength": (0.0, 1.0),
    "image_guidance_scale": (0.0, MAX_GUIDANCE), "noise_level": (0, MAX_TRAINING_STEPS - 1), "patch": (0, MAX_SIZE),
    "mask_blur": (0.0, MAX_BLUR), "mask_padding": (0, MAX_PADDING), "hires_strength": (0.0, 1.0),
    "hires_steps": (1, MAX_STEPS), "embedding_row": (0, MAX_ROWS - 1),
}  # fmt: skip
CHOICES = {
    "prompt_syntax": PROMPT_SYNTAXES,
    "on_long_prompt": LONG_PROMPTS,
    "resize": RESIZES,
    "masked_content": MASKED_CONTENTS,
    "inpaint_area": INPAINT_AREAS,
}


@frozen
class GenerationRequest:
    """What to draw, as asked; None means the model's own, which `fit_to_model` fills in. Sizes are in pixels.

    `seed` belongs to this one image: it seeds the image's own CPU generator, so the picture does not depend on what
    else is drawn beside it. `guidance_interval` is in noise levels sigma. The original size and crop are what SDXL
    reads of the picture. `refiner_start` is the share of the noise schedule after which a refiner takes over. `loras`
    are merged into the model in this order. `embeddings` are files or names of the hub, FILE or FILE:WORD each, of
    textual-inversion embeddings, whose words stand for vectors in the prompts.

    Models that draw no prompts read a `label`, the number or the name of a class; a `layout`, classes and boxes, see
    ldmcli/conditions.py; or a `map`, the path or bytes of a picture that has a class number for each pixel. unCLIP
    models read an `image_embedding` beside the prompt, the path of a safetensors file, of which it is the
    `embedding_row`, noised up to the training step `noise_level`.

    `image` is the path of a picture to start from, or the bytes of its file; `strength` how much of it is drawn anew, 1
    all; `resize` how it comes to the size. `mask`, a path or bytes too, or "alpha" for the picture's own transparency,
    is white where the picture is repainted, or black where `invert_mask`; `mask_blur` softens its edge, in pixels.
    `masked_content` is what repainting starts from. `inpaint_area` "masked" draws the mask's surroundings,
    `mask_padding` pixels of them, at the full size. `paste_back` leaves all else of the picture as it was.

    `depth`, a path or bytes too, is the picture's depth map for models that read one, nearer being brighter.
    `image_guidance_scale` is how closely models that edit pictures by words keep to the picture. Models that enlarge
    the picture may add noise to it first, up to the training step `noise_level`, and compute a large one by overlapping
    patches of `patch` of its pixels a side, 0 as a whole.

    `hires`, a scale or WIDTHxHEIGHT, enlarges what is drawn and draws `hires_strength` of it anew, in `hires_steps`.
    `hires_upscaler` is "latent", "lanczos", "embedded" or an upscaler's file.

    `control_net` are networks, files or names of the hub, that have the picture follow those in `control_image`, paths
    or bytes; without any, `image`. The fields after them, and `canny`, thresholds LOW,HIGH or "off", say how: one entry
    for all networks, or one for each; see ldmcli/control.py. `ip_adapter` are such networks that read the pictures in
    `ip_adapter_image` as prompts, and the fields after them say how; see ldmcli/image_prompt.py.

    Raises UsageError when a field is out of range, naming field, value and range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    eta: float = 0.0
    schedule: str | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    clip_skip: int = 1
    prompt_syntax: str = "plain"
    on_long_prompt: str = "warn"
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int = 0
    crop_top: int = 0
    refiner_start: float | None = None
    loras: tuple[LoRA, ...] = ()
    embeddings: tuple[str, ...] = ()
    label: Label | None = None
    layout: tuple[Box, ...] | None = None
    map: str | bytes | None = None
    image_embedding: str | None = None
    embedding_row: int | None = None
    image: str | bytes | None = None
    strength: float | None = None
    resize: str = "stretch"
    image_guidance_scale: float | None = None
    depth: str | bytes | None = None
    noise_level: int | None = None
    patch: int | None = None
    mask: str | bytes | None = None
    invert_mask: bool = False
    mask_blur: float = 0.0
    masked_content: str = "original"
    inpaint_area: str = "whole"
    mask_padding: int = 32
    paste_back: bool = True
    hires: str | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    hires_upscaler: str | None = None
    control_net: tuple[str, ...] = ()
    control_image: tuple[str | bytes, ...] = ()
    control_strength: tuple[float, ...] = ()
    control_start: tuple[float, ...] = ()
    control_end: tuple[float, ...] = ()
    control_mode: tuple[str, ...] = ()
    control_type: tuple[str, ...] = ()
    canny: tuple[str, ...] = ()
    ip_adapter: tuple[str, ...] = ()
    ip_adapter_image: tuple[str | bytes, ...] = ()
    ip_adapter_strength: tuple[float, ...] = ()
    ip_adapter_mask: tuple[str | bytes, ...] = ()
    ip_adapter_blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        check_text("negative_prompt", self.negative_prompt)
        self._check_ranges()
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", checked_interval(self.guidance_interval))
        if self.loras != ():
            object.__setattr__(self, "loras", read_loras(self.loras))
        if self.embeddings != ():
            object.__setattr__(self, "embeddings", checked_names("embeddings", self.embeddings, MAX_EMBEDDINGS))
        for name, read in STEERING.items():
            if getattr(self, name) != ():
                object.__setattr__(self, name, read(name, getattr(self, name)))
        self._check_sampler()
        self._check_inputs()
        self._check_hires()

    def _check_ranges(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:
                continue  # the model's own
            if isinstance(low, int) and isinstance(high, int):
                check_whole(name, value, low, high)
            else:
                check_number(name, value, low, high)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    def _check_sampler(self) -> None:
        """Sampler and schedule by the names they have here; both take those of other programs."""
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", schedule_of(self.schedule) or self.schedule)
        elif self.schedule is not None:
            raise UsageError(
                f"schedule {printable(repr(self.schedule), 100)} is not the name of one; see `ldm samplers`."
            )
        if self.sampler is None:
            return
        if isinstance(self.sampler, str) and (named := sampler_of(self.sampler)):
            if None not in (named[1], self.schedule) and named[1] != self.schedule:
                raise UsageError(f"sampler {printable(self.sampler)} says its schedule; leave out {self.schedule}.")
            object.__setattr__(self, "sampler", named[0])
            object.__setattr__(self, "schedule", self.schedule or named[1])
        sampler = sampler_named(self.sampler)
        check_spacing(sampler, self.schedule)
        if self.eta != 0 and not sampler.takes_eta:
            raise UsageError(f"eta {self.eta} does not go with sampler {sampler.name}; use --sampler ddim or --eta 0.")

    def _check_inputs(self) -> None:
        if self.label is not None:
            object.__setattr__(self, "label", read_label(self.label))
        if self.layout is not None:
            object.__setattr__(self, "layout", read_layout(self.layout))
        for name in PICTURES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_picture(name, getattr(self, name)))
        if self.image_embedding is not None:
            object.__setattr__(self, "image_embedding", checked_path("image_embedding", self.image_embedding))
        if self.patch is not None and 0 < self.patch < MIN_PATCH:
            raise UsageError(f"patch {self.patch} is less than {MIN_PATCH}; 0 takes the whole picture at once.")
        for name in ("invert_mask", "paste_back"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} {printable(repr(getattr(self, name)))} is neither true nor false.")

    def _check_hires(self) -> None:
        if self.hires is not None:
            object.__setattr__(self, "hires", read_hires(self.hires))
        if self.hires_upscaler is not None:
            check_text("hires_upscaler", self.hires_upscaler, MAX_NAME_BYTES)
            if not self.hires_upscaler:
                raise UsageError(f"hires_upscaler is empty; choose from {', '.join(UPSCALERS)}, or name a file.")
            object.__setattr__(self, "hires_upscaler", read_upscaler(self.hires_upscaler))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, those about pictures where there is one, those about a second pass where
        one is asked for, LoRAs, embeddings and what steers where there is any; - stands for a picture that was given as
        bytes."""
        given = {name: "-" for name in PICTURES if isinstance(getattr(self, name), bytes)}
        parts = ((self.image, IMAGE_FIELDS), (self.hires, HIRES_FIELDS))
        left_out = {name for part, names in parts if part is None for name in names}
        left_out -= {"noise_level"}  # which embeddings have too
        maybe = (*CONDITION_FIELDS, "embedding_row", *ENLARGING_FIELDS)
        left_out |= {name for name in maybe if getattr(self, name) is None}
        if self.control_net or self.ip_adapter_mask:
            left_out -= {"resize"}
        said = {name: value for name, value in vars(self).items() if name not in left_out}
        lists = {"loras": [dataclasses.asdict(lora) for lora in self.loras], "embeddings": list(self.embeddings)}
        for name in STEERING:
            lists[name] = ["-" if isinstance(value, bytes) else value for value in getattr(self, name)]
        return {name: value for name, value in (said | given | lists).items() if value or name not in lists}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GenerationRequest":
        """The request that `to_dict` wrote. Raises BadDataError on an unknown or missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise BadDataError(
                f"the request has unknown fields ({printable(', '.join(unknown))}); it may come from a newer version."
            )
        if "prompt" not in fields:
            raise BadDataError("the request has no prompt.")
        return cls(**fields)


@frozen
class ModelSpec:
    """Which weights: a diffusers folder, a .safetensors file or a name of the hub each; `model` None is the embedded
    one. `vae` stands in place of the model's own. `prediction_type` overrides what the files say. `allow_pickle` lets
    torch's restricted unpickler read .ckpt and .bin files. `lora_dir` is a folder in which LoRAs are found by name,
    `embedding_dir` one of embeddings for all requests, each called by its file's name. `upscaler` is the
    network that makes pictures larger once they are drawn: a file, or "embedded", the model's own where its folder has
    one, else the general one that comes along. `image_encoder` reads pictures for IP-Adapters that have none beside
    them."""

    model: str | None = None
    vae: str | None = None
    refiner: str | None = None
    prediction_type: str | None = None
    allow_pickle: bool = False
    lora_dir: str | None = None
    embedding_dir: str | None = None
    upscaler: str | None = None
    image_encoder: str | None = None

    @property
    def weights(self) -> "ModelSpec":
        """The same, without what changes nothing of the networks that draw."""
        return dataclasses.replace(self, lora_dir=None, embedding_dir=None, upscaler=None)


@frozen
class RuntimeSpec:
    """Where and how to compute, as asked for. `threads` None computes on a CPU with as many as suit the model, one a
    core at most; `cores` None may be all there are. `kernels`: this program's own (`triton` on a GPU; on a CPU
    convolutions in fewer multiplications), or torch's alone; `auto` takes the former where they work. `cuda_graph`:
    record a step once and replay it. `compile`: run the U-Net through torch.compile. `low_vram`: only the part at work
    is on the GPU. `vae_tiling`: decode strip by strip. `cache`: keep hashes of weight files from run to run."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    kernels: str = "auto"
    threads: int | None = None
    cores: int | None = None
    cuda_graph: bool = True
    compile: bool = False
    low_vram: bool = False
    vae_tiling: bool = False
    cache: bool = True
