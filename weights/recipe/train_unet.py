"""Stage 2c: train the denoising U-Net on the latents, with frozen text (Rombach et al. 2022; Ho et al. 2020).

What makes an hour of two cores enough:

- latents and text contexts are computed once; a step is the U-Net alone;
- time steps are drawn in strata, one from each of `batch` equal shares of their density, which follows
  min-SNR-5 (Hang et al. 2023) where the signal is strong and rises a little where it is weak, since there
  objects and backgrounds are decided; once those are right, the last third of the run draws all time steps
  alike, which is where texture and edges come from;
- offset noise: 0.12 × one normal number per image and channel is added to the noise, because the schedule
  of Stable Diffusion never hides the mean of a flat background, and sampling begins where it is hidden;
- the last convolution, the second one of each residual block and each transformer's way out start at zero,
  so that the network starts as the identity (Ho et al. 2020; Dhariwal & Nichol 2021);
- an exponential average of the weights is what is kept; text is dropped 10 % of the time for
  classifier-free guidance.

    python weights/recipe/train_unet.py --minutes 60 --compile              # stop it after two thirds, then
    python weights/recipe/train_unet.py --minutes 60 --compile --resume --density-floor 1 --density-boost 0
    torchrun --nproc-per-node 2 weights/recipe/train_unet.py --compile      # one thread a process: see Team
"""

import argparse
import dataclasses
import random
from pathlib import Path

import torch
from data import caption, held_out_background, save_grid, to_float
from generate import generate
from torch import Tensor, nn
from torch.nn import functional as F
from train_text import CaptionTable
from training import Average, Clock, Team, learning_rate, load, log, save_atomically, set_learning_rate

from ldmcli.config import ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.models.layers import ResnetBlock
from ldmcli.models.text import TextTransformer
from ldmcli.models.transformer import SpatialTransformer
from ldmcli.models.unet import UNet
from ldmcli.models.vae import AutoencoderKL
from ldmcli.sampling.schedule import Schedule

CONFIG = UNetConfig(
    sample_size=16,
    block_channels=(64, 128, 160),
    layers_per_block=1,
    attention=(1, 1, 1),
    heads=(4, 4, 4),
    context_dim=128,
    norm_groups=16,
)


def load_vae(path: Path) -> AutoencoderKL:
    state = load(path)
    vae = AutoencoderKL(VAEConfig(**state["config"]))
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


def load_text_encoder(path: Path) -> TextTransformer:
    state = load(path)
    text_encoder = TextTransformer(TextEncoderConfig(**state["config"]))
    text_encoder.load_state_dict(state["model"])
    return text_encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled posterior means (N, 4, 16, 16) and the standard deviation (1, 4, 1, 1), which whitening made
    one for all."""
    scale = vae.config.scaling_factor
    posteriors = [vae.encode(to_float(batch)) for batch in images.split(64)]
    means = torch.cat([posterior.mean for posterior in posteriors]) * scale
    return means, (0.5 * posteriors[0].logvar[:1, :, :1, :1]).exp() * scale


@torch.no_grad()
def encode_texts(text_encoder: TextTransformer, table: CaptionTable) -> Tensor:
    """Contexts (captions, tokens, dim) of all captions; number 0 is the empty one."""
    return torch.cat([text_encoder(tokens)[0] for tokens in table.tokens.split(256)])


def start_as_identity(unet: UNet) -> None:
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)


def timestep_density(alphas_cumprod: Tensor, floor: float, boost: float) -> Tensor:
    """Probability of each training time step: min(SNR, 5) / SNR above SNR 1, but at least `floor`, and
    SNR ** -boost below. Floor 1 and boost 0 make all time steps alike."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = torch.where(snr > 1, (5 / snr).clamp(floor, 1.0), snr.clamp(max=1) ** -boost)
    return weight / weight.sum()


def draw_timesteps(density: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` time steps, one from each of as many equal shares of the density, in random order."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    drawn = torch.searchsorted(density.cumsum(0), uniform).clamp(max=len(density) - 1)
    return drawn[torch.randperm(count, generator=generator)]


@dataclasses.dataclass(frozen=True)
class Batches:
    """Everything a step needs, in memory: latents, their labels, the contexts of all captions."""

    means: Tensor
    deviation: Tensor
    objects: Tensor
    backgrounds: Tensor
    contexts: Tensor
    table: CaptionTable
    alphas_cumprod: Tensor
    density: Tensor

    def draw(
        self, count: int, text_dropout: float, offset: float, generator: torch.Generator, rng: random.Random
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, time steps, contexts and the noise to predict."""
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        means = self.means[chosen]
        latents = means + self.deviation * torch.randn(means.shape, generator=generator)
        captions = self.table.draw(self.objects[chosen], self.backgrounds[chosen], rng)
        captions[torch.rand(count, generator=generator) < text_dropout] = 0
        noise = torch.randn(means.shape, generator=generator)
        noise = noise + offset * torch.randn((*means.shape[:2], 1, 1), generator=generator)
        timesteps = draw_timesteps(self.density, count, generator)
        level = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return noisy.contiguous(memory_format=torch.channels_last), timesteps, self.contexts[captions], noise


def prepare(args: argparse.Namespace, vae: AutoencoderKL, team: Team) -> Batches:
    dataset = load(args.data)
    seen = ~dataset["held_out"]
    cache = args.out / "latents.pt"
    stale = not cache.exists() or cache.stat().st_mtime < (args.out / "vae.pt").stat().st_mtime
    if stale and team.rank == 0:
        means, deviation = encode_images(vae, dataset["images"][seen])
        save_atomically({"means": means, "deviation": deviation}, cache)
    team.wait()
    latents = load(cache)
    table = CaptionTable(args.out / "tokenizer")
    contexts = encode_texts(load_text_encoder(args.out / "text.pt"), table)
    alphas_cumprod = Schedule(ScheduleConfig()).alphas_cumprod
    return Batches(
        latents["means"],
        latents["deviation"],
        dataset["objects"][seen],
        dataset["backgrounds"][seen],
        contexts,
        table,
        alphas_cumprod,
        timestep_density(alphas_cumprod, args.density_floor, args.density_boost),
    )


def training_loss(unet: UNet, noisy: Tensor, timesteps: Tensor, context: Tensor, noise: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, unet.embed_time(timesteps), unet.project_context(context))
    return F.mse_loss(predicted.float(), noise)


def show_progress(unet: UNet, vae: AutoencoderKL, batches: Batches, path: Path) -> None:
    """A grid of 20 prompts; the second row are held-out pairs."""
    pairs = [(6 * i, (3 * i + 4) % 10) for i in range(10)]
    pairs += [(i, held_out_background(i)) for i in range(1, 60, 6)]
    texts = [batches.table.texts.index(caption(o, b)) for o, b in pairs]
    context = batches.contexts[texts]
    images = generate(unet, vae, context, batches.contexts[:1], seeds=list(range(20)), guidance_scale=3.0, steps=20)
    save_grid(images, path, zoom=2)


def train(unet: UNet, vae: AutoencoderKL, batches: Batches, team: Team, args: argparse.Namespace) -> None:
    checkpoint, log_file = args.out / "unet_checkpoint.pt", args.out / "unet.log"
    average = Average(unet, 0.9985)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent = 0, 0.0
    if args.resume and checkpoint.exists():
        state = load(checkpoint)
        unet.load_state_dict(state["model"])
        average.model.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, average.updates = state["step"], state["seconds"], state["step"]
    seed = args.seed + step * team.size + team.rank
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    compute = torch.compile(training_loss) if args.compile else training_loss
    clock, running, next_save = Clock(args.minutes, spent), None, spent + 60 * args.save_minutes

    def save() -> None:
        state = {"model": unet.state_dict(), "average": average.model.state_dict(), "step": step}
        state |= {
            "optimizer": optimizer.state_dict(),
            "seconds": clock.seconds,
            "config": dataclasses.asdict(CONFIG),
        }
        save_atomically(state, checkpoint)

    progress = clock.progress
    while progress < 1:
        batch = batches.draw(args.batch // team.size, args.text_dropout, args.offset, generator, rng)
        loss = compute(unet, *batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mean_loss, progress = team.average(unet, loss.item(), clock.progress)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        set_learning_rate(optimizer, learning_rate(args.rate, step, progress, warm_up=200))
        optimizer.step()
        step += 1
        if team.rank > 0:
            continue
        average.update(unet)
        running = mean_loss if running is None else 0.99 * running + 0.01 * mean_loss
        if step % 50 == 0:
            log(f"unet step {step} minutes {clock.seconds / 60:.2f} loss {running:.4f}", log_file)
        if clock.seconds > next_save:
            save()
            show_progress(average.model, vae, batches, args.out / "unet_progress.png")
            next_save = clock.seconds + 60 * args.save_minutes
    if team.rank > 0:
        return
    save()
    show_progress(average.model, vae, batches, args.out / "unet_progress.png")
    log(
        f"unet ended: {step} steps of {args.batch}, {clock.seconds / 60:.1f} minutes, loss {running}",
        log_file,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/recipe/dataset.pt"))
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="holds vae.pt, text.pt and tokenizer/")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--text-dropout", type=float, default=0.1)
    parser.add_argument("--offset", type=float, default=0.12, help="strength of offset noise")
    parser.add_argument("--density-floor", type=float, default=0.1, help="least share of weak-noise steps")
    parser.add_argument("--density-boost", type=float, default=0.25, help="exponent for strong-noise steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = load_vae(args.out / "vae.pt")
    team = Team()
    batches = prepare(args, vae, team)
    unet = UNet(CONFIG)
    start_as_identity(unet)
    train(unet.to(memory_format=torch.channels_last), vae, batches, team, args)


if __name__ == "__main__":
    main()
