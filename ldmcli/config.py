"""Frozen descriptions of a model's parts: what config.json says, or what tensor shapes tell."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ldmcli.condition_config import ClassesConfig, ImageEmbeddingConfig, MapConfig
from ldmcli.frozen import frozen
from ldmcli.spacings import RESPACED

if TYPE_CHECKING:
    from torch import Tensor

COSINE = "squaredcos_cap_v2"  # diffusers' name for the schedule of Nichol & Dhariwal 2021
BETA_SCHEDULES = ("linear", "scaled_linear", COSINE)
UNDECIDED = "undecided"  # a prediction type that only the network itself can tell


class CrossAttention(NamedTuple):
    """One of a U-Net's: the transformer that it is in, on which level, 0 the finest, its channels and heads."""

    transformer: str
    level: int
    channels: int
    heads: int


@frozen
class UNetConfig:
    """A U-Net. Levels run from the finest to the coarsest; `attention[i]` is the number of transformer layers in each
    attention of level i (0: none), `heads[i]` the number of attention heads there; the middle, which has the coarsest
    level's width and heads, always attends, with `middle_attention` layers. With a `context_dim` of 0 there is nothing
    to attend to but the map itself: each attention is then one plain layer. Where `only_cross_attention`, both
    attentions of a level's transformer layers are to the context."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[int, ...] = (1, 1, 1, 0)
    middle_attention: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    norm_groups: int = 32
    norm_eps: float = 1e-5
    linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    pooled_dim: int = 0  # width of the pooled prompt (SDXL) or image (unCLIP) added to the time embedding; 0: none is
    added_numbers: int = 0  # sizes and the like that are added with it, each as `added_number_dim` sinusoids
    added_number_dim: int = 256
    guidance_dim: int | None = None  # sinusoids of the guidance scale, for models distilled to read it (LCM)
    only_cross_attention: tuple[bool, ...] = ()  # of each level; (): of none
    scale_shift: bool = False  # the time step scales and shifts the second norm of a resnet, instead of being added
    resnet_resampling: bool = False  # resnets halve and double the size, instead of a convolution each
    classes: int = 0  # how many class labels have an embedding that is added to the time embedding
    joins: str | None = None  # what it reads behind the latents, where numbers of channels do not tell

    @property
    def reads(self) -> str:
        """What it reads in input channels behind the latents: "" nothing; "mask" a mask and the latents of the rest, to
        inpaint; "masked" the latents of the rest and a mask; "image" the latents of a picture, to edit it; "low_res" a
        picture, to enlarge it; "depth" a depth map; "map" a semantic map; "unknown" something else."""
        kinds = {0: "", self.out_channels + 1: "mask", self.out_channels: "image", 1: "depth"}
        return kinds.get(self.in_channels - self.out_channels, "unknown") if self.joins is None else self.joins

    @property
    def reads_sizes(self) -> bool:
        """Whether sizes are among the numbers that are added (SDXL); unCLIP has one, a noise level."""
        return self.added_numbers > 1

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """The channels of what is kept for the way up, from the finest on."""
        found = [self.block_channels[0]]
        for level, width in enumerate(self.block_channels):
            last = level == len(self.block_channels) - 1
            found += [width] * (self.layers_per_block + (not last))
        return tuple(found)

    @property
    def cross_attentions(self) -> tuple[CrossAttention, ...]:
        """Every one, in the order of diffusers' attention processors: the way down, the way up, the middle."""
        if not self.context_dim:
            return ()
        found: list[CrossAttention] = []
        levels = range(len(self.block_channels))
        for way, order, count in (
            ("down", levels, self.layers_per_block),
            ("up", levels[::-1], self.layers_per_block + 1),
        ):
            for block, level in enumerate(order):
                width, heads = self.block_channels[level], self.heads[level]
                for i, _ in itertools.product(range(count), range(self.attention[level])):
                    found.append(CrossAttention(f"{way}_blocks.{block}.attentions.{i}", level, width, heads))
        last = len(levels) - 1
        middle = CrossAttention("mid_block.attentions.0", last, self.block_channels[last], self.heads[last])
        return (*found, *[middle] * self.middle_attention)


class LatentScale:
    """How an autoencoder's own latents and those that are diffused belong together."""

    scaling_factor: float
    shift_factor: float = 0.0

    def scaled(self, latents: "Tensor") -> "Tensor":
        """The autoencoder's latents as they are diffused: of unit variance."""
        return (latents - self.shift_factor if self.shift_factor else latents) * self.scaling_factor

    def unscaled(self, latents: "Tensor") -> "Tensor":
        """Diffused latents as the autoencoder decodes them."""
        latents = latents / self.scaling_factor
        return latents + self.shift_factor if self.shift_factor else latents


@frozen
class VAEConfig(LatentScale):
    """An autoencoder; it shrinks each side by 2 ** (len(block_channels) - 1). `attention` says which levels attend,
    from the finest on (none where it is empty). `codes` is the size of the codebook of a VQ autoencoder, 0 for a KL
    one. Encoder and decoder have `inner_channels` where these are not the latents' (0)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    force_upcast: bool = False  # its activations overflow fp16
    attention: tuple[bool, ...] = ()
    middle_attention: bool = True
    codes: int = 0
    inner_channels: int = 0

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_channels) - 1)


@frozen
class TinyVAEConfig(LatentScale):
    """TAESD's decoder: `blocks[i]` blocks at each resolution, from the latents' to the pixels', all of one width.

    It takes latents as they are diffused, hence the scaling factor of 1.
    """

    out_channels: int = 3
    latent_channels: int = 4
    channels: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    force_upcast: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.blocks) - 1)


@frozen
class TextEncoderConfig:
    """A CLIP text transformer, and what of it the U-Net reads: the states `skipped_layers` before the last layer, with
    or without the final norm; and, where there is a `projection_dim`, the projected state of the end mark."""

    part: str = "text_encoder"  # its folder in a diffusers model
    layout: str = "clip"  # whose keys its weights have on disk: transformers' ("clip") or OpenCLIP's ("openclip")
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    layers: int = 12
    heads: int = 12
    max_length: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    skipped_layers: int = 0
    final_norm: bool = True
    projection_dim: int | None = None
    head_dim: int | None = None  # where it is not the width's share of each head
    causal: bool = True  # tokens attend to none behind them
    attention_bias: bool = True  # of queries, keys and values


@frozen
class LayoutConfig(TextEncoderConfig):
    """A transformer over the tokens of a layout, of which there are `max_length`: objects and their corners."""

    kind: ClassVar[str] = "layout"
    part: str = "layout_encoder"

    @property
    def nothing(self) -> int:
        """The token that stands for no object; those below are classes, or places."""
        return self.vocab_size - 1

    @property
    def objects(self) -> int:
        """How many there may be: each takes three tokens, and two say what of the whole picture is drawn."""
        return (self.max_length - 2) // 3


ConditionerConfig = LayoutConfig | ClassesConfig | MapConfig | ImageEmbeddingConfig


@frozen
class Walk:
    """How a sampler computes on the steps it is given, where it can in more than one way; the usual is the default.

    `order` and `solver` are those of multistep solvers ("" is "midpoint", UniPC's "bh2"; "heun", "bh1"). `clip` bounds
    the predicted image; `threshold` is a quantile and a bound for dynamic thresholding (Saharia et al. 2022, section
    2.3). UniPC leaves the steps in `uncorrected` as they are. PLMS combines raw outputs where `mixes_velocities`. The
    boundary conditions of LCM multiply the timestep with `timestep_scaling`.
    """

    order: int = 2
    solver: str = ""
    clip: float | None = None
    threshold: tuple[float, float] | None = None
    uncorrected: tuple[int, ...] = ()
    mixes_velocities: bool = False
    timestep_scaling: float = 10.0


def cosine_betas(count: int) -> list[float]:
    """So many betas whose signal falls as a cosine squared (Nichol & Dhariwal 2021, section 3.2)."""

    def level(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)]


@frozen
class ScheduleConfig:
    """The training noise schedule and where sampling steps sit on it.

    `alphas_cumprod`, one level per training step, is a file's own schedule and stands in place of any betas.
    `zero_terminal_snr` rescales whichever there is so that the last training step is pure noise (Lin et al. 2023).
    `sigmas` respaces the noise levels between those of `spacing`'s first and last step ("karras", "exponential", "lu",
    "beta"; "log" takes the whole schedule's, evenly in the logarithm), `sigma_min` and `sigma_max` being other ends; a
    run ends without noise, or at the first training step's level where not `ends_clean`. `lower_order_final` and
    `euler_at_final` lower a multistep solver's order in the last steps. Where `refused` says why, no run can be made;
    `note` is what a user should know of one. `xl`: of Stable Diffusion XL, whose steps of "ays" sit elsewhere.
    `variants` are the schedules of the samplers, by name, that read the model's configuration otherwise.
    """

    training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    betas: tuple[float, ...] | None = None
    alphas_cumprod: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    spacing: str = "leading"
    prediction_type: str = "epsilon"
    sigmas: str = ""
    sigma_min: float | None = None
    sigma_max: float | None = None
    ends_clean: bool = True
    lower_order_final: bool = True
    euler_at_final: bool = False
    distilled_steps: int = 50
    walk: Walk = Walk()
    refused: str = ""
    note: str = ""
    xl: bool = False
    variants: "tuple[tuple[str, ScheduleConfig], ...]" = ()

    @property
    def starts_without_signal(self) -> bool:
        """Whether the noisiest level is pure noise, ᾱ = 0."""
        return self.zero_terminal_snr or (self.alphas_cumprod is not None and self.alphas_cumprod[-1] == 0)

    def of(self, sampler: str) -> "ScheduleConfig":
        """The schedule as the sampler of this name reads it."""
        own = next((schedule for name, schedule in self.variants if name == sampler), None)
        return self if own is None else dataclasses.replace(own, prediction_type=self.prediction_type, xl=self.xl)

    def timesteps(self, steps: int, grid: str = "ddim", spacing: str | None = None) -> list[float] | None:
        """Where `steps` sampling steps sit, noisiest first; None where they do not fit. `spacing`: the model's own, if
        None; one of those of Lin et al. 2023, table 2. "leading", SD's own: a whole stride from 0 on, plus the offset.
        "trailing": from the last training step down. "linspace": from the last to the first.

        Samplers disagree about the ends. With grid "ddim" (DDIM, PLMS) the steps are whole and the last is on the
        grid; "euler" (Euler, Heun) does not round; "dpm" (DPM-Solver++, UniPC) has one point more, of which the last,
        where noise ends, is no step; "lcm" takes some of the levels that it was distilled at. All as diffusers does.
        """
        if not 1 <= steps <= self.training_steps:
            return None
        timesteps = self._lcm(steps) if grid == "lcm" else self._spaced(steps, grid, spacing or self.spacing)
        fits = len(set(timesteps)) == steps and timesteps[-1] >= 0 and timesteps[0] < self.training_steps
        return timesteps if fits else None

    def fits(self, steps: int, grid: str = "ddim", spacing: str | None = None) -> bool:
        """Whether so many steps can be taken. Respaced noise levels need no training step each."""
        spacing, _, sigmas = (spacing or self.spacing).partition(" ")
        if grid == "lcm" or not (sigmas or spacing in RESPACED):
            return self.timesteps(steps, grid, spacing) is not None
        whole = grid == "dpm" or spacing in RESPACED  # they lie between the schedule's own ends
        return 1 <= steps <= self.training_steps > 1 and (whole or self.timesteps(steps, grid, spacing) is not None)

    def _spaced(self, steps: int, grid: str, spacing: str) -> list[float]:
        count, more = self.training_steps, int(grid == "dpm")
        if spacing == "trailing":
            stride = count - (count - count / steps)  # as numpy's arange has it, to round the same halves up
            return [round(count - i * stride) - 1 for i in range(steps)]
        if spacing == "linspace":
            stride = (count - 1) / max(steps - 1 + more, 1)
            exact = [min(i * stride, count - 1) for i in reversed(range(more, steps + more))]
            return exact if grid == "euler" else [round(timestep) for timestep in exact]
        return [i * (count // (steps + more)) + self.steps_offset for i in reversed(range(more, steps + more))]

    def _lcm(self, steps: int) -> list[float]:
        distilled = self.distilled_steps
        stride = self.training_steps // distilled
        return [(distilled - i * distilled // steps) * stride - 1 for i in range(steps)]


@frozen
class Defaults:
    """How a model is drawn with where the request does not say: its family's way, unless its folder says another."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5


@frozen
class ModelConfig:
    """Everything needed to build a model before any weight is read."""

    family: str
    unet: UNetConfig
    vae: VAEConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    schedule: ScheduleConfig
    zero_empty_negative: bool = False  # an empty negative prompt is zeros, not the encoded empty text
    defaults: Defaults = Defaults()
    notes: tuple[str, ...] = ()  # what whoever draws with it should hear once
    noising: ScheduleConfig | None = None  # how a picture to be enlarged, or its embedding, is noised; None: not
    conditioner: ConditionerConfig | None = None  # of what it is conditioned on beside prompts

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a request says for it: "text"; "label", "layout", "map" or "image_embedding", which has to be there."""
        return (*["text"] * bool(self.text_encoders), *([self.conditioner.kind] if self.conditioner else []))

    @property
    def guidable(self) -> bool:
        """Whether it can be drawn with without its condition, which guidance leads away from."""
        return "text" in self.conditions or getattr(self.conditioner, "null", None) is not None

    def pools(self, text: TextEncoderConfig) -> bool:
        """Whether `text`, one of the text encoders, gives the pooled prompts that the U-Net reads: the last does."""
        return self.unet.reads_sizes and text.part == self.text_encoders[-1].part

    @property
    def enlarges(self) -> int:
        """How many times as large as the picture that it is given each side of what it draws is."""
        return self.vae.factor if self.unet.reads == "low_res" else 1

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for."""
        return self.unet.sample_size * self.vae.factor

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this: one latent is the smallest unit."""
        return self.vae.factor
