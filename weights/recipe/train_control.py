"""Beside the model: train a small control network for it, which reads a silhouette, white on black, and has the model
draw what the prompt says into it (Zhang et al. 2023, ControlNet).

The model stays as it is. The network is no copy of its way down, as in the paper, but a narrower one of its own, so
that the file stays small; its last convolutions, which start at zero, bring its maps to the model's widths. A
silhouette is the glyph's own transparency, with details smoothed away more or less, so that it may come from another
thing than the prompt names. Shape is decided at noisy time steps, where there is little to lose in all: each loss
counts as a share of what the model alone loses there.

    python weights/recipe/train_control.py --out runs/control
"""

import argparse
import dataclasses
import random
from pathlib import Path

import numpy
import torch
from caption_table import CaptionTable
from data import DEFAULT_FONT, LARGEST, SMALLEST, load_glyphs, on_colour, placed, save_grid, shaded, stack, to_float
from emoji import BACKGROUNDS, held_out_background
from muon import Descent
from PIL import Image, ImageFilter
from presets import CPU
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training import Average, Clock, Recorded, Team, half_precision, learning_rate, load, log, save_atomically

from ldmcli.checkpoints.load import load_text_encoders, load_unet, load_vae
from ldmcli.checkpoints.source import ModelSource, embedded_model, open_model
from ldmcli.config import UNetConfig
from ldmcli.networks.control_net import ControlNet
from ldmcli.networks.unet import Residuals
from ldmcli.sampling.schedule import Schedule
from ldmcli.steering_config import ControlConfig

TEXT_DROPOUT = 0.12
LOWEST = 150  # time step from which on the network learns; below, no more than texture is decided
SMOOTHED = 3.0  # pixels over which details of a silhouette are smoothed away at the most


def control_config(unet: UNetConfig, channels: tuple[int, ...], factor: int) -> ControlConfig:
    """A control network of these widths for a U-Net whose latents are `factor` pixels a side."""
    hint = (16, 32, 64, 96)[: factor.bit_length()]
    outputs = (*unet.skip_channels, unet.block_channels[-1])
    return ControlConfig(dataclasses.replace(unet, block_channels=channels), outputs, hint_channels=hint)


def silhouette(layer: Image.Image, rng: random.Random) -> numpy.ndarray:
    """Where a frame is not transparent, uint8 (height, width), 0 or 255."""
    alpha = layer.getchannel("A")
    if (radius := rng.uniform(-1, SMOOTHED)) > 0:
        alpha = alpha.filter(ImageFilter.GaussianBlur(radius))
    return numpy.where(numpy.asarray(alpha) > 127, 255, 0).astype(numpy.uint8)


class Pictures:
    """Latents of pictures, their silhouettes and the numbers of their things and backgrounds; held-out pairs are never
    among them."""

    def __init__(self, source: ModelSource, font: Path, views: int, seed: int, device: torch.device) -> None:
        emoji, glyphs = load_glyphs(CPU, font)
        rng, size = random.Random(seed), source.config.default_size
        images, hints, labels = [], [], []
        for number, glyph in enumerate(glyphs):
            for ground, colour in enumerate(BACKGROUNDS.values()):
                for _ in range(views if ground != held_out_background(number) else 0):
                    scale, place = rng.uniform(SMALLEST - 0.15, LARGEST), (rng.random(), rng.random())
                    layer = placed(glyph, size, scale, place)
                    images.append(on_colour(layer, shaded(colour, rng)))
                    hints.append(silhouette(layer, rng))
                    labels.append((number, ground))
        self.device, self.labels = device, torch.tensor(labels, device=device)
        self.hints = torch.from_numpy(numpy.stack(hints)).to(device)
        self.table = CaptionTable(source.path / "tokenizer", emoji, str(device))
        vae = load_vae(source, device, torch.float32, decoder=False)
        with torch.no_grad():
            found = [vae.encode(to_float(batch.to(device))) for batch in stack(images).split(64)]
        self.means = torch.cat([one.mean for one in found]) * vae.config.scaling_factor
        self.deviation = (0.5 * found[0].logvar[:1, :, :1, :1]).exp() * vae.config.scaling_factor
        self.alphas_cumprod = Schedule(source.config.schedule).alphas_cumprod.to(device)

    def draw(self, count: int, seed: int) -> tuple[Tensor, ...]:
        """Noisy latents, time steps, tokens, silhouettes and the noise to predict."""
        device, generator = self.device, torch.Generator(self.device).manual_seed(seed)
        chosen = torch.randint(len(self.means), (count,), generator=generator, device=device)
        captions = self.table.draw(*self.labels[chosen].unbind(1), generator)
        captions = captions.masked_fill(torch.rand(count, generator=generator, device=device) < TEXT_DROPOUT, 0)
        strata = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
        timesteps = (LOWEST + (1000 - LOWEST) * strata).long().clamp(max=999)
        return self.noised(chosen, timesteps, captions, generator)

    def noised(
        self, chosen: Tensor, timesteps: Tensor, captions: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """As `draw`, for pictures of these numbers."""
        means = self.means[chosen]
        latents = means + self.deviation * torch.randn(means.shape, generator=generator, device=self.device)
        noise = torch.randn(means.shape, generator=generator, device=self.device)
        level = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        hints = self.hints[chosen][:, None].expand(-1, 3, -1, -1).float() / 255
        return noisy, timesteps, self.table.tokens[captions], hints, noise


class Steered(nn.Module):
    """The control network, which is trained, before the model, which is not."""

    def __init__(self, source: ModelSource, channels: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        # In a list, so that they are none of this module's parameters.
        self.frozen = [load_unet(source, device, torch.float32)]
        self.text = [load_text_encoders(source, device, torch.float32)[0].model]
        self.control = ControlNet(control_config(source.config.unet, channels, source.config.vae.factor))
        for conv in (*self.control.controlnet_down_blocks, self.control.controlnet_mid_block):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, hints: Tensor) -> Tensor:
        unet, control = self.frozen[0], self.control
        with torch.no_grad():
            context, _ = self.text[0](tokens)
            time, keys_values = unet.embed_time(timesteps), unet.project_context(context)
        *skips, middle = control(
            noisy, control.embed_time(timesteps), control.project_context(context), control.read(hints)
        )
        return unet(noisy, time, keys_values, Residuals(skips, middle))


@torch.no_grad()
def losses_alone(steered: Steered, pictures: Pictures, at: range) -> Tensor:
    """What the model loses without the network, whose last layers are still zero, at these time steps."""
    device, found = pictures.device, []
    generator = torch.Generator(device).manual_seed(1)
    for timestep in at:
        chosen = torch.randint(len(pictures.means), (128,), generator=generator, device=device)
        captions = pictures.table.draw(*pictures.labels[chosen].unbind(1), generator)
        *inputs, noise = pictures.noised(chosen, torch.full((128,), timestep, device=device), captions, generator)
        found.append(F.mse_loss(steered(*inputs), noise))
    return torch.stack(found)


def export(network: ControlNet, path: Path) -> None:
    """The network in fp16, in diffusers' names; dimensions follow from the shapes."""
    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"format": "pt", "modelspec.title": "silhouettes for tiny-emoji"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=embedded_model(), help="the model's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/control"))
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--channels", type=int, nargs="+", default=[48, 80, 80], help="of the network's levels")
    parser.add_argument("--views", type=int, default=6, help="pictures of each emoji on each background")
    parser.add_argument("--minutes", type=float, default=37.0)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--posterior", type=float, default=1.0, metavar="SHARE",
                        help="of the VAE's noise, as train_unet.py had it (default: 1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
    source, device = open_model(args.model), torch.device(args.device)
    pictures = Pictures(source, args.font, args.views, args.seed, device)
    pictures.deviation *= args.posterior
    save_grid(pictures.hints[:: len(pictures.hints) // 44][:44, None].expand(-1, 3, -1, -1) / 127.5 - 1,
              args.out / "silhouettes.png", columns=11)  # fmt: skip
    steered = Steered(source, tuple(args.channels), device).to(device, memory_format=torch.channels_last)
    grid = range(LOWEST, 1000, 80)
    alone = numpy.interp(range(1000), grid, losses_alone(steered, pictures, grid).cpu().numpy())
    share = torch.tensor(1 / alone, dtype=torch.float32, device=device)
    average = Average(steered.control, 0.998)
    descent = Descent("adamw", steered.control, args.rate, Team())

    def descend(*batch: Tensor) -> Tensor:
        *inputs, noise = batch
        with half_precision(device):
            predicted = steered(*inputs)
        loss = ((predicted.float() - noise).square().mean((1, 2, 3)) * share[inputs[1]]).mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
        return loss.detach()

    step_on = Recorded(descend, device)
    checkpoint, step, spent = args.out / "control_checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = load(checkpoint)
        steered.control.load_state_dict(state["control"])
        average.model.load_state_dict(state["average"])
        descent.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        average.updates = step
    clock, running, progress = Clock(args.minutes, args.steps, spent), None, 0.0
    next_save = spent + 60 * args.save_minutes
    while progress < 1:
        progress = clock.progress(step)
        descent.set_rate(learning_rate(args.rate, step, progress, warm_up=50))
        loss = step_on(*pictures.draw(args.batch, (args.seed << 32) + step))
        step += 1
        average.update(steered.control)
        running = loss if running is None else 0.99 * running + 0.01 * loss
        if step % 20 == 0:
            log(f"control step {step} minutes {clock.seconds / 60:.2f} loss {running:.4f}", args.out / "control.log")
        if clock.seconds > next_save or progress >= 1:
            state = {"control": steered.control.state_dict(), "average": average.model.state_dict(),
                     "optimizer": descent.state_dict(), "step": step, "seconds": clock.seconds}  # fmt: skip
            save_atomically(state, checkpoint)
            export(average.model, args.out / "model.safetensors")
            next_save = clock.seconds + 60 * args.save_minutes


if __name__ == "__main__":
    main()
