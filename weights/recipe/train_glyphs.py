"""Two small models in the layouts of the latent diffusion paper (Rombach et al. 2022): an emoji from the number of its
class, and a picture from a semantic map.

Both have the embedded model's autoencoder, of which a file keeps the decoder, and learn on the means of its latents. A
map's classes are the emoji, in the order of emoji.py, and after them the backgrounds: where an emoji is, the map has
its number, elsewhere the background's. Shapes are the glyphs' own with details smoothed away more or less, so that a
map may be drawn by hand; every second batch is of two pictures beside each other, since a map may have several.
Where only a class is given, emoji are large in the frame, since nothing says where to put them.

    python weights/recipe/train_glyphs.py map --out runs/map
    python weights/recipe/train_glyphs.py class --start runs/map/checkpoint.pt --views 24 --out runs/class
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from data import DEFAULT_FONT, load_glyphs, to_float
from emoji import BACKGROUND_NAMES
from export import write_weights
from muon import Descent
from presets import CPU
from sprites import Sprites, Views, random_views
from torch import Tensor, nn
from torch.nn import functional as F
from train_unet import draw_timesteps, start_as_identity, timestep_density
from training import Average, Clock, Recorded, Team, half_precision, learning_rate, load, log, save_atomically

from ldmcli.checkpoints.families import CLASS, SEMANTIC, Family
from ldmcli.checkpoints.key_map import UNET_PREFIX, VAE_PREFIX, NetworkConfig, disk_names, stacked_heads
from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import CLASS_NAMES_ENDING, embedded_model, open_model
from ldmcli.config import ClassesConfig, MapConfig, ScheduleConfig, UNetConfig
from ldmcli.networks.conditioners import ClassEmbedder, MapEncoder
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.sampling.schedule import Schedule

CONTEXT, MAP_CHANNELS = 32, 32
WIDTHS = (40, 64, 56)
DROPOUT = 0.1  # of classes, for guidance
LARGE = 0.88  # an emoji's least share of the frame where only its class is given
SMOOTHED = (1, 3, 5, 7)  # pixels over which a shape is averaged


class Glyphs(nn.Module):
    """The U-Net and what encodes its condition: a class or a map of them."""

    def __init__(self, family: Family, emoji: int, groups: int) -> None:
        super().__init__()
        by_map, grounds = family is SEMANTIC, len(BACKGROUND_NAMES)
        self.condition: ClassesConfig | MapConfig = (
            MapConfig(emoji + grounds, MAP_CHANNELS, 2) if by_map else ClassesConfig(emoji + 1, CONTEXT, emoji)
        )
        self.encoder = MapEncoder(self.condition) if by_map else ClassEmbedder(self.condition)
        self.unet = UNet(
            UNetConfig(
                in_channels=4 + MAP_CHANNELS * by_map,
                block_channels=WIDTHS,
                layers_per_block=1,
                attention=(0, 0, 1),
                heads=tuple(family.heads or max(1, width // family.head_dim) for width in WIDTHS),
                context_dim=0 if by_map else CONTEXT,
                norm_groups=groups,
            )
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        encoded, by_map = self.encoder(condition), condition.ndim > 1
        keys_values = self.unet.project_context(None if by_map else encoded)
        noisy = torch.cat([noisy, encoded], 1) if by_map else noisy
        return self.unet(noisy, self.unet.embed_time(timesteps), keys_values)


def smoothed(opacity: Tensor, window: int) -> Tensor:
    """Where pictures (N, height, width) of opacities, 0 … 255, are more than half opaque, averaged over a window."""
    return F.avg_pool2d(opacity[:, None].float(), window, 1, window // 2)[:, 0] > 127


def class_maps(sprites: Sprites, views: Views, window: int, emoji: int) -> Tensor:
    """The classes (N, height, width) of views: an emoji's number where it is, elsewhere its background's."""
    black, white = (
        sprites.compose(dataclasses.replace(views, colours=torch.full_like(views.colours, level))).int().amax(1)
        for level in (0.0, 255.0)
    )
    inside = smoothed(255 - (white - black), window)
    return torch.where(inside, views.objects[:, None, None], emoji + views.backgrounds[:, None, None])


@torch.no_grad()
def learnt_from(vae: AutoencoderKL, args: argparse.Namespace) -> tuple[Tensor, Tensor, list[str]]:
    """Scaled latents (N, channels, height, width), the condition of each, and the names of the emoji."""
    emoji, pictures = load_glyphs(CPU, args.font)
    generator, count = torch.Generator(args.device).manual_seed(args.seed), len(pictures)
    views = random_views(count, args.views, CPU.size, generator)
    if args.kind == "class":
        views = views[views.sides >= LARGE * CPU.size]
    sprites, latents, maps = Sprites(pictures, CPU.size, generator.device), [], []
    for number, start in enumerate(range(0, len(views), 256)):
        some = views[slice(start, start + 256)]
        with half_precision(generator.device):
            latents.append(vae.encode(to_float(sprites.compose(some))).mean.float() * vae.config.scaling_factor)
        if args.kind == "map":
            maps.append(class_maps(sprites, some, SMOOTHED[number % len(SMOOTHED)], count))
    return torch.cat(latents), torch.cat(maps).short() if maps else views.objects, [one.name for one in emoji]


def begin(glyphs: Glyphs, weights: dict[str, Tensor]) -> None:
    """Take over what has a name and a shape of the network's own."""
    own = glyphs.state_dict()
    fitting = {key: weight for key, weight in weights.items() if key in own and own[key].shape == weight.shape}
    glyphs.load_state_dict(own | fitting)


def side_by_side(pictures: Tensor) -> Tensor:
    """Every two of (N, …, height, width) as one, twice as wide."""
    return torch.cat([pictures[::2], pictures[1::2]], -1)


class Batches:
    """What each step draws: noisy latents, time steps, conditions and the noise to predict."""

    def __init__(self, vae: AutoencoderKL, family: Family, args: argparse.Namespace) -> None:
        self.latents, self.conditions, self.names = learnt_from(vae, args)
        start, end = family.betas
        levels = Schedule(ScheduleConfig(beta_start=start, beta_end=end)).alphas_cumprod
        self.alphas_cumprod = levels.to(args.device)
        self.density = timestep_density(self.alphas_cumprod, floor=0.3, boost=0.0)

    def draw(self, count: int, seed: int, *, pairs: bool) -> tuple[Tensor, ...]:
        """`pairs`: half as many, each of two pictures beside each other."""
        device = self.latents.device
        generator = torch.Generator(device).manual_seed(seed)
        chosen = torch.randint(len(self.latents), (count,), generator=generator, device=device)
        latents, condition = self.latents[chosen], self.conditions[chosen].long()
        if condition.ndim == 1:
            dropped = torch.rand(count, generator=generator, device=device) < DROPOUT
            condition = condition.masked_fill(dropped, len(self.names))
        if pairs:
            latents, condition = side_by_side(latents), side_by_side(condition)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        timesteps = draw_timesteps(self.density, len(latents), generator)
        level = self.alphas_cumprod[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        return noisy.contiguous(memory_format=torch.channels_last), timesteps, condition, noise


def original(module: nn.Module, config: NetworkConfig, prefix: str) -> dict[str, Tensor]:
    """A network's weights in the original layout: stacked where that has one tensor for several, and 1×1 convolutions
    where it has them for matrices."""
    state, together = module.state_dict(), {}
    for key, names in disk_names(state, config, prefix, original=True).items():
        together.setdefault(names[0], []).append(key)
    found = {}
    for name, keys in together.items():
        heads = stacked_heads(keys[0], config) if len(keys) > 1 else 1
        parts = [state[key].unflatten(0, (heads, -1)) for key in keys]
        found[name] = torch.cat(parts, 1).flatten(0, 1)
        if ".attn_1." in name and found[name].ndim == 2:
            found[name] = found[name][:, :, None, None]
        elif ".qkv." in name and found[name].ndim == 2:
            found[name] = found[name][:, :, None]
    return found


def export(glyphs: Glyphs, vae: AutoencoderKL, names: list[str], path: Path) -> None:
    """One file, whose header says how many groups its norms have, since the paper's own have 32, and how large its
    latents are; and beside it the names of its classes, a line each."""
    state = original(glyphs.unet, glyphs.unet.config, UNET_PREFIX)
    state |= original(glyphs.encoder, glyphs.condition, "cond_stage_model.")
    decoder = original(vae, vae.config, VAE_PREFIX).items()
    state |= {name: weight for name, weight in decoder if ".encoder." not in name and ".quant_conv." not in name}
    state["scale_factor"] = torch.tensor(vae.config.scaling_factor)
    size = CPU.size // vae.config.factor
    write_weights(path, state, {"norm_groups": str(vae.config.norm_groups), "sample_size": str(size)})
    grounds = [f"{name} background" for name in BACKGROUND_NAMES if isinstance(glyphs.condition, MapConfig)]
    path.with_suffix(CLASS_NAMES_ENDING).write_text("\n".join([*names, *grounds]) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("class", "map"))
    parser.add_argument("--out", type=Path, default=Path("runs/glyphs"))
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--views", type=int, default=6, help="of each emoji on each background")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="begin with what fits of another's")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device, family = torch.device(args.device), SEMANTIC if args.kind == "map" else CLASS
    vae = load_vae(open_model(embedded_model()), device, torch.float32)
    batches = Batches(vae, family, args)
    torch.manual_seed(args.seed)
    glyphs = Glyphs(family, len(batches.names), vae.config.norm_groups).to(device, memory_format=torch.channels_last)
    start_as_identity(glyphs.unet)
    if args.kind == "map":
        nn.init.normal_(glyphs.encoder.channel_mapper.weight)  # classes count as much as latents from the first step
    if args.start:
        begin(glyphs, load(args.start)["average"])
    average, descent = Average(glyphs, 0.995), Descent("muon", glyphs, args.rate, Team())

    def descend(*batch: Tensor) -> Tensor:
        *inputs, noise = batch
        with half_precision(device):
            predicted = glyphs(*inputs)
        loss = F.mse_loss(predicted.float(), noise)
        descent.zero_grad()
        loss.backward()
        descent.step()
        return loss.detach()

    step_on = [Recorded(descend, device) for _ in range(2)]  # one for each size
    checkpoint, step, spent = args.out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = load(checkpoint)
        glyphs.load_state_dict(state["glyphs"])
        average.model.load_state_dict(state["average"])
        descent.load_state_dict(state["optimizer"])
        step, spent = average.updates, _ = state["step"], state["seconds"]
    clock, running, progress = Clock(args.minutes, args.steps, spent), None, 0.0
    next_save = spent + 60 * args.save_minutes
    while progress < 1:
        progress = clock.progress(step + 1)
        descent.set_rate(learning_rate(args.rate, step, progress, warm_up=50))
        pairs = args.kind == "map" and step % 2 == 1
        loss = step_on[pairs](*batches.draw(args.batch, (args.seed << 32) + step, pairs=pairs))
        step += 1
        average.update(glyphs)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 20 == 0:
            line = f"{args.kind} step {step} minutes {clock.seconds / 60:.2f} loss {running:.4f}"
            log(line, args.out / "glyphs.log")
        if clock.seconds > next_save or progress >= 1:
            state = {"glyphs": glyphs.state_dict(), "average": average.model.state_dict(),
                     "optimizer": descent.state_dict(), "step": step, "seconds": clock.seconds}  # fmt: skip
            save_atomically(state, checkpoint)
            export(average.model, vae, batches.names, args.out / "model.safetensors")
            next_save = clock.seconds + 60 * args.save_minutes


if __name__ == "__main__":
    main()
