"""The embedded model's own upscaler: a Compact net that makes its 64×64 pictures 256×256, and cleans what its VAE and
U-Net leave of edges and backgrounds.

It begins as realesr-animevideov3, which knows edges already, and learns from the pairs of upscaler_pairs.py, both kinds
alike, by L1 + MSE and the L1 of horizontal and vertical differences. Killed, the same command goes on from the last
checkpoint. It ends with `upscaler/model.safetensors` in the run's folder, fp16, by the names that spandrel reads.

    python weights/recipe/upscaler_pairs.py
    python weights/recipe/train_upscaler.py
    python weights/recipe/train_upscaler.py --device cuda --batch 64 --minutes 1    # makes its pairs itself
"""

import argparse
from pathlib import Path

import torch
from data import save_grid, to_float
from export import write_weights
from muon import Descent
from safetensors.torch import load_file
from spandrel.architectures.Compact import Compact
from torch import Tensor, nn
from torch.nn import functional as F
from training import (
    Average,
    Clock,
    Recorded,
    Team,
    half_precision,
    learning_rate,
    load,
    log,
    save_atomically,
    seed_of_step,
)
from upscaler_pairs import FILE, KINDS, SCALE, Pairs, PairsOnDevice, pairs_arguments
from vae_losses import pixel_loss

START = Path("weights/realesr-animevideov3/model.safetensors")
LICENCE = {"license": "OFL-1.1 AND BSD-3-Clause", "source": "began as Real-ESRGAN's realesr-animevideov3 x4"}
SHOWN = 11  # pictures in a row of the progress sheet


class Training:
    """The net with its optimizer and average, and where it stands."""

    def __init__(self, net: nn.Module, args: argparse.Namespace) -> None:
        self.net = net.to(args.device, memory_format=torch.channels_last)
        self.optimizer = Descent(args.optimizer, self.net, args.rate, Team())
        self.average = Average(self.net, args.average)
        self.gradient, self.step, self.seconds = args.gradient, 0, 0.0
        self._descend = Recorded(self._descent, torch.device(args.device))

    def learn(self, small: Tensor, large: Tensor, rate: float) -> Tensor:
        """One step on uint8 pictures; the loss."""
        self.optimizer.set_rate(rate)
        loss = self._descend(small, large)
        self.average.update(self.net)
        self.step += 1
        return loss

    def _descent(self, small: Tensor, large: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with half_precision(small.device):
            found = self.net(_values(small)).float()
        loss = pixel_loss(to_float(large), found * 2 - 1, self.gradient)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict:
        parts = {"net": self.net, "average": self.average.model, "optimizer": self.optimizer}
        found = {name: part.state_dict() for name, part in parts.items()}
        return found | {"step": self.step, "seconds": self.seconds, "updates": self.average.updates}

    def restore(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.average.updates = state["step"], state["seconds"], state["updates"]


def _values(images: Tensor) -> Tensor:
    """uint8 pictures as the net reads them, in [0, 1]."""
    return images.float().div(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def enlarged(net: nn.Module, images: Tensor) -> Tensor:
    """uint8 pictures by the net, in [-1, 1]."""
    return torch.cat([net(_values(batch)).clamp(0, 1) * 2 - 1 for batch in images.split(8)])


def train(training: Training, pairs: Pairs | PairsOnDevice, inputs: list[Tensor], args: argparse.Namespace) -> None:
    """Train for the budget; `inputs` are the small pictures of each kind."""
    checkpoint, log_file = args.out / "upscaler_checkpoint.pt", args.out / "upscaler.log"
    if checkpoint.exists():
        training.restore(load(checkpoint))
    seen = [(~pairs.held_out[: len(images)]).nonzero().flatten() for images in inputs]
    sample = pairs.held_out.nonzero().flatten()[:SHOWN]
    generator, clock, running = torch.Generator(args.device), Clock(args.minutes, args.steps, training.seconds), None
    next_save, progress = training.seconds + 60 * args.save_minutes, clock.progress(training.step)
    while progress < 1:
        generator.manual_seed(seed_of_step(args.seed, training.step, Team()))
        chosen = [
            views[torch.randint(len(views), (args.batch // len(seen),), generator=generator, device=views.device)]
            for views in seen
        ]
        small = torch.cat([images[views] for images, views in zip(inputs, chosen, strict=True)])
        rate = learning_rate(args.rate, training.step, progress, warm_up=50)
        loss = training.learn(small, pairs.large(torch.cat(chosen)), rate)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        training.seconds, progress = clock.seconds, clock.progress(training.step)
        if training.step % 50 == 0:
            minutes = training.seconds / 60
            log(f"upscaler step {training.step} minutes {minutes:.2f} loss {running:.4f}", log_file)
        if training.seconds > next_save or progress >= 1:
            save_atomically(training.state(), checkpoint)
            show(training.average.model, pairs, inputs, sample, args.out / "upscaler_progress.png")
            next_save = training.seconds + 60 * args.save_minutes


def show(net: nn.Module, pairs: Pairs | PairsOnDevice, inputs: list[Tensor], sample: Tensor, path: Path) -> None:
    """Small pictures of each kind, below them what the net makes of them; last the emoji as they are."""
    rows = [to_float(pairs.large(sample))]
    for images in inputs:
        small = to_float(images[sample])
        rows = [F.interpolate(small, scale_factor=SCALE), enlarged(net, images[sample]), *rows]
    save_grid(torch.cat(rows), path, columns=len(sample))


def main() -> None:
    parser = pairs_arguments(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, which makes its pairs itself (default: cpu)")
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--gradient", type=float, default=0.5, help="weight of the image gradients' L1")
    parser.add_argument("--average", type=float, default=0.995, help="how slowly the averaged weights follow")
    parser.add_argument("--channels", type=int, default=64, help="of a net that begins from nothing")
    parser.add_argument("--layers", type=int, default=16, help="of such a net")
    parser.add_argument(
        "--start", type=Path, default=START, help=f"what it begins as; none: nothing (default: {START})"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    pairs = Pairs(args) if device.type == "cpu" else PairsOnDevice(args, device)
    found = load(args.out / FILE) if isinstance(pairs, Pairs) else pairs.drawn(args.folder)
    anew = str(args.start) == "none"
    training = Training(new_net(args.channels, args.layers) if anew else net_of(args.start), args)
    train(training, pairs, [found[kind] for kind in KINDS if len(found[kind])], args)
    path = args.out / "upscaler" / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"license": "OFL-1.1"} if anew else LICENCE | {"notice": (START.parent / "LICENSE").read_text()}
    write_weights(path, training.average.model.state_dict(), metadata)
    took = f"{training.step} steps, {training.seconds / 60:.1f} minutes"
    log(f"upscaler ended: {took} -> {path}", args.out / "upscaler.log")


def new_net(channels: int, layers: int) -> nn.Module:
    """A net that begins by repeating the small picture's pixels."""
    net = Compact(num_feat=channels, num_conv=layers, upscale=SCALE)
    nn.init.zeros_(net.body[-1].weight)
    nn.init.zeros_(net.body[-1].bias)
    return net


def net_of(path: Path) -> nn.Module:
    """The net in a file, of whatever size."""
    state = load_file(path)
    net = Compact(num_feat=len(state["body.0.bias"]), num_conv=(max(map(_number, state)) - 2) // 2, upscale=SCALE)
    net.load_state_dict(state)
    return net


def _number(name: str) -> int:
    return int(name.split(".")[1])


if __name__ == "__main__":
    main()
