"""Stage 2: train the denoising U-Net and the text encoder together on the latents (Rombach et al. 2022).

What makes an hour or two of a CPU enough:

- latents are computed once; a step is the text encoder and the U-Net alone. The text encoder comes from train_clip.py
  and goes on learning here;
- time steps are drawn in strata, one from each of `batch` equal shares of their density. For two thirds of the run it
  follows min-SNR-5 (Hang et al. 2023) where the signal is strong and rises a little where it is weak, since there
  objects and backgrounds are decided; the last third draws all time steps alike, which is where texture and edges come
  from;
- offset noise: 0.12 × one normal number per image and channel is added to the noise, because the schedule of Stable
  Diffusion never hides the mean of a flat background, and sampling begins where it is hidden;
- the last convolution, the second one of each residual block and each transformer's way out start at zero, so that the
  network starts as the identity (Ho et al. 2020; Dhariwal & Nichol 2021);
- an exponential average of the weights is what is kept; text is dropped 12 % of the time for classifier-free guidance.

With `--start` an exported model goes on learning, from images that are drawn anew on the device; its VAE stays. That is
for a GPU, where two minutes are some thousand large batches, which no fixed set of images would do for.

    python weights/recipe/train_unet.py
    python weights/recipe/train_unet.py --start weights/tiny-emoji --device cuda --batch 512 --minutes 2 --posterior 0
    torchrun --nproc-per-node 4 weights/recipe/train_unet.py --resume    # one thread a process: see training.Team
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from caption_table import CaptionTable
from data import DEFAULT_FONT, load_glyphs, save_grid, to_float
from emoji import BACKGROUNDS, Captions, held_out_background
from export import write_weights
from generate import generate
from muon import Descent
from PIL import Image
from presets import PRESETS, Preset, recipe_arguments
from sprites import Sprites, random_views
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from training import (
    Average,
    Clock,
    Recorded,
    Team,
    half_precision,
    known_emoji,
    learning_rate,
    load,
    log,
    save_atomically,
    seed_of_step,
)

from ldmcli.checkpoints import load as exported
from ldmcli.checkpoints.source import open_model
from ldmcli.config import ScheduleConfig, TextEncoderConfig, VAEConfig
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.layers import ResnetBlock
from ldmcli.networks.transformer import SpatialTransformer
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.sampling.schedule import Schedule

UNIFORM_FROM = 2 / 3  # the share of a run after which all time steps are alike


class Denoiser(nn.Module):
    """What stage 2 trains: noise from noisy latents, time steps and the tokens of captions."""

    def __init__(self, preset: Preset, text_config: TextEncoderConfig) -> None:
        super().__init__()
        self.text, self.unet = TextTransformer(text_config), UNet(preset.unet)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        context, _ = self.text(tokens)
        return self.unet(noisy, self.unet.embed_time(timesteps), self.unet.project_context(context))


def start_as_identity(unet: UNet) -> None:
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)


def load_vae(path: Path) -> AutoencoderKL:
    """Of stage 1's result, or of an exported model's folder."""
    if path.is_dir():
        return exported.load_vae(open_model(path), torch.device("cpu"), torch.float32).requires_grad_(False)
    state = load(path)
    vae = AutoencoderKL(VAEConfig(**state["config"]))
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, team: Team) -> tuple[Tensor, Tensor]:
    """Scaled posterior means (N, channels, height, width) of uint8 images and the standard deviation (1, channels, 1,
    1), which stage 1 made one for all. Each process of the team encodes its share."""
    scale, device = vae.config.scaling_factor, next(vae.parameters()).device
    posteriors = [vae.encode(to_float(batch).to(device)) for batch in images[team.rank :: team.size].split(64)]
    means = torch.cat([posterior.mean for posterior in posteriors]).cpu() * scale
    return team.together(means, len(images)), _deviation(posteriors[0].logvar) * scale


def _deviation(logvar: Tensor) -> Tensor:
    return (0.5 * logvar[:1, :, :1, :1]).exp().cpu()


@torch.no_grad()
def encode_views(vae: AutoencoderKL, glyphs: list[Image.Image], args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Emoji, backgrounds, scaled means (N, channels, height, width) and deviation of views drawn on the device,
    held-out pairs left out."""
    generator, size = torch.Generator(args.device).manual_seed(args.seed), PRESETS[args.preset].size
    views = random_views(len(glyphs), args.views or PRESETS[args.preset].views, size, generator)
    views = views[~views.held_out]
    sprites, found = Sprites(glyphs, size, generator.device), []
    for start in range(0, len(views), 1024):
        posterior = vae.encode(to_float(sprites.compose(views[slice(start, start + 1024)])))
        found.append(posterior.mean * vae.config.scaling_factor)
    return views.objects, views.backgrounds, torch.cat(found), _deviation(posterior.logvar) * vae.config.scaling_factor


def timestep_density(alphas_cumprod: Tensor, floor: float, boost: float) -> Tensor:
    """Probability of each training time step: min(SNR, 5) / SNR above SNR 1, but at least `floor`, and SNR ** -boost
    below. Floor 1 and boost 0 make all time steps alike."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weight = torch.where(snr > 1, (5 / snr).clamp(floor, 1.0), snr.clamp(max=1) ** -boost)
    return weight / weight.sum()


def draw_timesteps(density: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` time steps, one from each of as many equal shares of the density, in random order."""
    device = generator.device
    uniform = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    drawn = torch.searchsorted(density.cumsum(0), uniform).clamp(max=len(density) - 1)
    return drawn[torch.randperm(count, generator=generator, device=device)]


class Batches:
    """Latents of all training images and the captions that fit them, from which each step draws."""

    def __init__(self, args: argparse.Namespace, vae: AutoencoderKL, team: Team) -> None:
        if args.start:
            self.emoji, glyphs = load_glyphs(PRESETS[args.preset], args.font)
            self.objects, self.backgrounds, *latents = encode_views(vae, glyphs, args)
        else:
            dataset = load(args.out / "dataset.pt")
            seen, self.emoji = ~dataset["held_out"], known_emoji(args)
            self.objects, self.backgrounds = (dataset[key][seen].to(args.device) for key in ("objects", "backgrounds"))
            latents = _cached_latents(args.out, vae, dataset["images"][seen], team)
        self.means, deviation = (part.to(args.device) for part in latents)
        self.deviation = args.posterior * deviation
        self.table = CaptionTable((args.start or args.out) / "tokenizer", self.emoji, args.device)
        self.alphas_cumprod = Schedule(ScheduleConfig()).alphas_cumprod.to(args.device)
        self.text_dropout, self.offset = args.text_dropout, args.offset

    def draw(self, count: int, density: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, time steps, tokens and the noise to predict."""
        device = self.means.device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        chosen = torch.randint(len(self.means), (count,), generator=generator, device=device)
        means = self.means[chosen]
        latents = means + self.deviation * normal(*means.shape)
        captions = self.table.draw(self.objects[chosen], self.backgrounds[chosen], generator)
        dropped = torch.rand(count, generator=generator, device=device) < self.text_dropout
        captions = captions.masked_fill(dropped, 0)
        noise = normal(*means.shape) + self.offset * normal(*means.shape[:2], 1, 1)
        timesteps = draw_timesteps(density, count, generator)
        level = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return noisy.contiguous(memory_format=torch.channels_last), timesteps, self.table.tokens[captions], noise


def _cached_latents(out: Path, vae: AutoencoderKL, images: Tensor, team: Team) -> tuple[Tensor, Tensor]:
    cache = out / "latents.pt"
    stale = not cache.exists() or cache.stat().st_mtime < (out / "vae.pt").stat().st_mtime
    team.wait()  # until all have looked
    if stale:
        means, deviation = encode_images(vae, images, team)
        if team.rank == 0:
            save_atomically({"means": means, "deviation": deviation}, cache)
        return means, deviation
    latents = load(cache)
    return latents["means"], latents["deviation"]


def show_progress(denoiser: Denoiser, vae: AutoencoderKL, batches: Batches, args: argparse.Namespace) -> None:
    """A grid of 22 prompts at guidance 3; the second row are held-out pairs."""
    emoji = batches.emoji
    captions, spread = Captions(emoji), [i * len(emoji) // 11 for i in range(11)]
    pairs = [(o, (3 * i + 4) % len(BACKGROUNDS)) for i, o in enumerate(spread)]
    pairs += [((o + 3) % len(emoji), held_out_background((o + 3) % len(emoji))) for o in spread]
    numbers = [0, *(batches.table.number[captions.fullest(o, b)] for o, b in pairs)]
    with torch.no_grad():
        empty, context = denoiser.text(batches.table.tokens[numbers])[0].split([1, len(pairs)])
    images = generate(denoiser.unet, vae, context, empty, seeds=list(range(22)), guidance_scale=3.0, steps=20)
    save_grid(images, args.out / "unet_progress.png", columns=11, zoom=2)


def _new(preset: Preset, path: Path) -> Denoiser:
    """A U-Net that knows nothing, behind the text encoder of train_clip.py."""
    clip = load(path)
    denoiser = Denoiser(preset, TextEncoderConfig(**clip["config"]))
    start_as_identity(denoiser.unet)
    denoiser.text.load_state_dict(clip["text"])
    return denoiser


def _begun(folder: Path, preset: Preset) -> Denoiser:
    """An exported model's."""
    source, cpu = open_model(folder), torch.device("cpu")
    text = exported.load_text_encoders(source, cpu, torch.float32)[0].model
    denoiser = Denoiser(preset, text.config)
    denoiser.text.load_state_dict(text.state_dict())
    denoiser.unet.load_state_dict(exported.load_unet(source, cpu, torch.float32).state_dict())
    return denoiser


def export_beside(start: Path, denoiser: Denoiser, folder: Path) -> None:
    """The model that was begun with, but for what has learnt since."""
    shutil.copytree(start, folder, dirs_exist_ok=True)
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", denoiser.unet.state_dict())
    prefixed = {f"text_model.{key}": value for key, value in denoiser.text.state_dict().items()}
    write_weights(folder / "text_encoder" / "model.safetensors", prefixed)


class Stage2:
    """The denoiser, its average and optimizer: all that a checkpoint holds."""

    def __init__(self, preset: Preset, args: argparse.Namespace, team: Team) -> None:
        self.denoiser = _begun(args.start, preset) if args.start else _new(preset, args.out / "clip.pt")
        self.configs = {
            "unet_config": dataclasses.asdict(preset.unet),
            "text_config": dataclasses.asdict(self.denoiser.text.config),
        }
        self.denoiser.to(args.device, memory_format=torch.channels_last)
        self.average = Average(self.denoiser, args.average)
        self.optimizer = Descent(args.optimizer, self.denoiser, args.rate, team)
        self.step, self.seconds = 0, 0.0
        self._descend = Recorded(self._descent, torch.device(args.device))

    def state(self) -> dict:
        return {
            **self.configs,
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict) -> None:
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.average.updates = state["step"]
        self.seconds = state["seconds"]

    def learn(self, batch: tuple[Tensor, ...], rate: float, progress: float, team: Team) -> tuple[float, float]:
        """One step on noisy latents, time steps, tokens and their noise; the team's loss and progress."""
        self.optimizer.set_rate(rate)
        if batch[0].is_cuda:
            loss = self._descend(*batch)  # stays there: nobody waits for it
        else:
            loss, progress = team.average(self.denoiser, self._gradients(*batch).item(), progress)
            self.optimizer.step()
        self.step += 1
        self.average.update(self.denoiser)
        return loss, progress

    def _gradients(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        if noisy.is_cuda:  # all in bfloat16: autocast would keep norms and what is between layers in float32
            weights = {name: weight.bfloat16() for name, weight in self.denoiser.named_parameters()}
            predicted = functional_call(self.denoiser, weights, (noisy.bfloat16(), timesteps, tokens))
        else:
            with half_precision(noisy.device):
                predicted = self.denoiser(noisy, timesteps, tokens)
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        return loss.detach()

    def _descent(self, *batch: Tensor) -> Tensor:
        loss = self._gradients(*batch)
        self.optimizer.step()
        return loss


def train(stage: Stage2, vae: AutoencoderKL, batches: Batches, team: Team, args: argparse.Namespace) -> None:
    checkpoint, log_file = args.out / "unet_checkpoint.pt", args.out / "unet.log"
    if args.resume and checkpoint.exists():
        stage.restore(load(checkpoint))
    clock, running = Clock(args.minutes, args.steps, stage.seconds), None
    next_save, progress = stage.seconds + 60 * args.save_minutes, clock.progress(stage.step)
    by_snr = timestep_density(batches.alphas_cumprod, floor=0.1, boost=0.25)
    alike = timestep_density(batches.alphas_cumprod, floor=1.0, boost=0.0)
    while progress < 1:
        density = by_snr if progress < UNIFORM_FROM else alike
        batch = batches.draw(args.batch // team.size, density, seed_of_step(args.seed, stage.step, team))
        rate = learning_rate(args.rate, stage.step, progress, warm_up=200)
        loss, progress = stage.learn(batch, rate, clock.progress(stage.step + 1), team)
        running = loss if running is None else 0.99 * running + 0.01 * loss
        stage.seconds = clock.seconds
        if team.rank > 0:
            continue
        if stage.step % 50 == 0:
            log(f"unet step {stage.step} minutes {stage.seconds / 60:.2f} loss {running:.4f}", log_file)
        if stage.seconds > next_save or progress >= 1 or stage.step == args.save_at:
            save_atomically(stage.state(), checkpoint)
            if args.start:
                export_beside(args.start, stage.average.model, args.out / "model")
            show_progress(stage.average.model, vae, batches, args)
            next_save = stage.seconds + 60 * args.save_minutes
    if team.rank == 0:
        log(f"unet ended: {stage.step} steps, {stage.seconds / 60:.1f} minutes, {team.size} processes", log_file)


def main() -> None:
    parser = recipe_arguments(__doc__)
    parser.add_argument("--minutes", type=float, help="(default: the preset's)")
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--save-at", type=int, metavar="STEP", help="save after this step, too")
    parser.add_argument("--batch", type=int, help="(default: the preset's)")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.9985, help="decay of the averaged weights")
    parser.add_argument("--text-dropout", type=float, default=0.12)
    parser.add_argument("--offset", type=float, default=0.12, help="strength of offset noise")
    parser.add_argument("--posterior", type=float, default=1.0, metavar="SHARE",
                        help="how much of the VAE's noise latents have; 0: none (default: 1)")  # fmt: skip
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="go on with an exported model, which --out/model becomes")  # fmt: skip
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT, help="with --start: of its images")
    parser.add_argument("--views", type=int, help="with --start: of each emoji on each background")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, where there is one")
    args = parser.parse_args()

    preset, team = PRESETS[args.preset], Team()
    args.minutes, args.batch = args.minutes or preset.unet_minutes, args.batch or preset.unet_batch
    torch.manual_seed(args.seed)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
    vae = load_vae(args.start or args.out / "vae.pt").to(args.device)
    batches = Batches(args, vae, team)
    torch.manual_seed(args.seed)
    stage = Stage2(preset, args, team)
    train(stage, vae, batches, team, args)
    if team.rank == 0:
        kept = stage.average.model.cpu()
        weights = {"unet": kept.unet.state_dict(), "text": kept.text.state_dict(), "step": stage.step}
        save_atomically({**stage.configs, **weights}, args.out / "model.pt")


if __name__ == "__main__":
    main()
