"""The embedded model's own upscaler: a Compact net that makes its 64×64 pictures 256×256, and mends what its VAE and
U-Net leave of eyes, mouths and wings.

It learns from the pairs of upscaler_pairs.py, both kinds alike, by L1 + MSE and the L1 of horizontal and vertical
differences. Killed, the same command goes on from the last checkpoint. It ends with `upscaler/model.safetensors` in the
run's folder, fp16, by the names that spandrel reads.

    python weights/recipe/upscaler_pairs.py
    python weights/recipe/train_upscaler.py
"""

import argparse
from pathlib import Path

import torch
from data import save_grid, to_float
from muon import Descent
from safetensors.torch import load_file, save_file
from spandrel.architectures.Compact import Compact
from torch import Tensor, nn
from torch.nn import functional as F
from training import Average, Clock, Team, half_precision, learning_rate, load, log, save_atomically, seed_of_step
from upscaler_pairs import FILE, KINDS, SCALE, Pairs, pairs_arguments
from vae_losses import pixel_loss

LICENCE = "OFL-1.1"
SHOWN = 11  # pictures in a row of the progress sheet


class Training:
    """The net with its optimizer and average, and where it stands."""

    def __init__(self, net: nn.Module, args: argparse.Namespace) -> None:
        self.net = net.to(memory_format=torch.channels_last)
        self.optimizer = Descent(args.optimizer, self.net, args.rate, Team())
        self.average = Average(self.net, args.average)
        self.gradient, self.step, self.seconds = args.gradient, 0, 0.0

    def learn(self, small: Tensor, large: Tensor, rate: float) -> float:
        """One step on uint8 pictures; the loss."""
        self.optimizer.zero_grad()
        with half_precision(small.device):
            found = self.net(_values(small)).float()
        loss = pixel_loss(to_float(large), found * 2 - 1, self.gradient)
        loss.backward()
        self.optimizer.step(rate)
        self.average.update(self.net)
        self.step += 1
        return loss.item()

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


def train(training: Training, pairs: Pairs, inputs: list[Tensor], args: argparse.Namespace) -> None:
    """Train for the budget; `inputs` are the small pictures of each kind."""
    checkpoint, log_file = args.out / "upscaler_checkpoint.pt", args.out / "upscaler.log"
    if checkpoint.exists():
        training.restore(load(checkpoint))
    seen = [(~pairs.held_out[: len(images)]).nonzero().flatten() for images in inputs]
    sample = pairs.held_out.nonzero().flatten()[:SHOWN]
    generator, clock, running = torch.Generator(), Clock(args.minutes, args.steps, training.seconds), None
    next_save, progress = training.seconds + 60 * args.save_minutes, clock.progress(training.step)
    while progress < 1:
        generator.manual_seed(seed_of_step(args.seed, training.step, Team()))
        kinds = [place % len(inputs) for place in range(args.batch)]
        chosen = [seen[kind][torch.randint(len(seen[kind]), (), generator=generator)].item() for kind in kinds]
        small = torch.stack([inputs[kind][index] for kind, index in zip(kinds, chosen, strict=True)])
        rate = learning_rate(args.rate, training.step, progress, warm_up=50)
        loss = training.learn(small, pairs.large(chosen), rate)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        training.seconds, progress = clock.seconds, clock.progress(training.step)
        if training.step % 50 == 0:
            minutes = training.seconds / 60
            log(f"upscaler step {training.step} minutes {minutes:.2f} loss {running:.4f}", log_file)
        if training.seconds > next_save or progress >= 1:
            save_atomically(training.state(), checkpoint)
            show(training.average.model, pairs, inputs, sample, args.out / "upscaler_progress.png")
            next_save = training.seconds + 60 * args.save_minutes


def show(net: nn.Module, pairs: Pairs, inputs: list[Tensor], sample: Tensor, path: Path) -> None:
    """Small pictures of each kind, below them what the net makes of them; last the emoji as they are."""
    rows = [to_float(pairs.large(sample.tolist()))]
    for images in inputs:
        small = to_float(images[sample])
        rows = [F.interpolate(small, scale_factor=SCALE), enlarged(net, images[sample]), *rows]
    save_grid(torch.cat(rows), path, columns=len(sample))


def main() -> None:
    parser = pairs_arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--save-minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--gradient", type=float, default=0.5, help="weight of the image gradients' L1")
    parser.add_argument("--average", type=float, default=0.995, help="how slowly the averaged weights follow")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--start", help="weights to begin with, such as those of another upscaler of this size")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    found = load(args.out / FILE)
    net = Compact(num_feat=args.channels, num_conv=args.layers, upscale=SCALE)
    if args.start:
        net.load_state_dict(load_file(args.start))
    else:
        nn.init.zeros_(net.body[-1].weight)  # begins as the small picture's pixels, repeated
        nn.init.zeros_(net.body[-1].bias)
    training = Training(net, args)
    train(training, Pairs(args), [found[kind] for kind in KINDS if len(found[kind])], args)
    (args.out / "upscaler").mkdir(exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in training.average.model.state_dict().items()}
    path = args.out / "upscaler" / "model.safetensors"
    save_file(tensors, path, {"format": "pt", "license": LICENCE})
    took = f"{training.step} steps, {training.seconds / 60:.1f} minutes"
    log(f"upscaler ended: {took} -> {path}", args.out / "upscaler.log")


if __name__ == "__main__":
    main()
