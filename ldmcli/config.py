"""Frozen descriptions of a model's parts: what config.json says, or what tensor shapes tell."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A cross-attention U-Net. Levels run from the finest to the coarsest; `attention[i]` is the number of transformer
    layers in each attention of level i (0: none), `heads[i]` the number of attention heads there; the middle, which has
    the coarsest level's width and heads, always attends, with `middle_attention` layers."""

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


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """A KL autoencoder; it shrinks each side by 2 ** (len(block_channels) - 1)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_channels) - 1)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """A CLIP text transformer."""

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


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The training noise schedule and where sampling steps sit on it."""

    training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    betas: tuple[float, ...] | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    spacing: str = "leading"
    prediction_type: str = "epsilon"

    def timesteps(self, steps: int) -> list[int] | None:
        """Where `steps` sampling steps sit, noisiest first; None where they do not fit.

        "leading", SD's own: a whole stride from 0 on, plus the offset. "trailing": from the last training step down.
        "linspace": from the last to the first (Lin et al. 2023, table 2).
        """
        last = self.training_steps - 1
        if not 1 <= steps <= self.training_steps:
            return None
        if self.spacing == "trailing":
            return [round(self.training_steps * (1 - i / steps)) - 1 for i in range(steps)]
        if self.spacing == "linspace":
            return [round(last * i / max(steps - 1, 1)) for i in reversed(range(steps))]
        stride = self.training_steps // steps
        timesteps = [i * stride + self.steps_offset for i in reversed(range(steps))]
        return timesteps if timesteps[0] <= last else None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a model before any weight is read."""

    family: str
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    schedule: ScheduleConfig

    @property
    def default_size(self) -> int:
        """Width and height in pixels when none are asked for."""
        return self.unet.sample_size * self.vae.factor

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this: one latent is the smallest unit."""
        return self.vae.factor
