"""The sizes of the embedded model: `cpu`, for two hours of two cores, and `gpu`, for twenty minutes of one card; and
`smoke`, too small to draw anything, to see within a minute that every stage runs.

Everything that differs between them stands here; the scripts read it through `--preset` and name no size themselves.
"""

import argparse
import dataclasses
from pathlib import Path

from ldmcli.config import UNetConfig, VAEConfig

RUNS = Path("runs/recipe")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of images and parts, and what each stage may cost. Budgets are minutes of wall time, so that learning rates
    reach their end on a busy machine too; batches are of the whole team of processes."""

    name: str
    size: int  # pixels along each side of an image
    every_emoji: bool  # beyond the list in emoji.py, all that the font and Python's Unicode tables know
    views: int  # images of each emoji on each background
    vae: VAEConfig
    vae_minutes: float
    vae_batch: int
    decoder_minutes: float
    text_width: int
    text_steps: int
    text_batch: int
    unet: UNetConfig
    unet_minutes: float
    unet_batch: int


CPU = Preset(
    name="cpu",
    size=64,
    every_emoji=False,
    views=24,
    vae=VAEConfig(latent_channels=4, block_channels=(32, 64, 64), layers_per_block=1, norm_groups=8),
    vae_minutes=24.0,
    vae_batch=16,
    decoder_minutes=10.0,
    text_width=128,
    text_steps=400,
    text_batch=256,
    unet=UNetConfig(
        sample_size=16,
        block_channels=(64, 128, 176),
        layers_per_block=1,
        attention=(0, 1, 1),  # with attention on the finest level, too, a step takes half as long again
        heads=(4, 4, 4),
        context_dim=128,
        norm_groups=16,
    ),
    unet_minutes=75.0,
    unet_batch=64,
)

GPU = Preset(
    name="gpu",
    size=128,
    every_emoji=True,
    views=6,  # 1,100 emoji: 3 GB of images
    vae=VAEConfig(latent_channels=4, block_channels=(32, 64, 128, 128), layers_per_block=1, norm_groups=8),
    vae_minutes=6.0,
    vae_batch=64,
    decoder_minutes=2.0,
    text_width=192,
    text_steps=1500,
    text_batch=1024,
    unet=UNetConfig(
        sample_size=16,
        block_channels=(64, 128, 176),
        layers_per_block=1,
        attention=(0, 1, 1),
        heads=(4, 4, 4),
        context_dim=192,
        norm_groups=16,
    ),
    unet_minutes=13.0,
    unet_batch=384,
)

SMOKE = Preset(
    name="smoke",
    size=32,
    every_emoji=False,
    views=1,
    vae=VAEConfig(latent_channels=4, block_channels=(8, 16, 16), layers_per_block=1, norm_groups=4),
    vae_minutes=0.1,
    vae_batch=8,
    decoder_minutes=0.1,
    text_width=32,
    text_steps=4,
    text_batch=16,
    unet=UNetConfig(
        sample_size=8,
        block_channels=(16, 32),
        layers_per_block=1,
        attention=(0, 1),
        heads=(2, 2),
        context_dim=32,
        norm_groups=8,
    ),
    unet_minutes=0.1,
    unet_batch=8,
)

PRESETS = {preset.name: preset for preset in (CPU, GPU, SMOKE)}


def recipe_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every stage takes: which preset, where its files go, on which device, from which seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="the model's size (default: cpu)")
    parser.add_argument("--out", type=Path, default=RUNS, help="folder of the run (default: runs/recipe)")
    parser.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="muon", help="of stages 1 and 2 (default: muon)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    return parser
