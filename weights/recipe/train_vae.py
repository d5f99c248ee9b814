"""Stage 1: train the KL autoencoder (Rombach et al. 2022, section 3.1), then make its latents uncorrelated.

Loss: L1 + MSE, and four terms that options weigh or switch off (0): image gradients, a perceptual distance, the
posterior's KL divergence and a patch discriminator that joins after half of the run. vae_losses.py explains each,
`ablate_vae.py` measures what each buys.

The KL weight is per latent value while errors are per pixel value: 1e-3 here is 1.2e-2 in the paper's sums at 64 × 64,
far above its 1e-6. With 1,024 latent values and an hour of stage 2 a smooth latent space is worth more than the last
decibel.

At the end the latents' covariance over the training images is folded into quant_conv and post_quant_conv, so that the
channels are uncorrelated and equally wide; the scaling factor is one over that width, measured.

    python weights/recipe/train_vae.py
    torchrun --nproc-per-node 4 weights/recipe/train_vae.py --resume    # one thread a process: see training.Team
"""

import argparse
import dataclasses

import torch
from data import save_grid, to_float
from measures import peak_signal_to_noise, structural_similarity
from muon import Descent
from presets import PRESETS, recipe_arguments
from torch import Tensor
from train_clip import ImageEncoder
from training import (
    Average,
    Clock,
    Team,
    half_precision,
    learning_rate,
    load,
    log,
    save_atomically,
    seed_of_step,
    set_learning_rate,
)
from vae_losses import PatchDiscriminator, Weights, balanced, perceptual_loss, pixel_loss

from ldmcli.networks.vae import AutoencoderKL


class Stage1:
    """The autoencoder, its critic, their optimizers: one step of training and all that a checkpoint holds."""

    def __init__(self, vae: AutoencoderKL, args: argparse.Namespace, weights: Weights, team: Team) -> None:
        self.device, self.weights = torch.device(args.device), weights
        self.vae = vae.to(self.device, memory_format=torch.channels_last)
        self.encoder_learns = next(vae.encoder.parameters()).requires_grad
        self.critic = PatchDiscriminator().to(self.device)
        self.eyes = ImageEncoder(PRESETS[args.preset].text_width).to(self.device).requires_grad_(False)
        self.eyes.load_state_dict(load(args.out / "clip.pt")["image"])
        self.average = Average(self.vae, 0.995)
        self.optimizer = Descent(args.optimizer, self.vae, args.rate, team)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=args.rate, betas=(0.5, 0.9))
        self.noise = 0.0  # noise added to latents before they are decoded, beyond the posterior's
        self.step, self.seconds = 0, 0.0

    def state(self) -> dict:
        parts = ("vae", "critic", "optimizer", "critic_optimizer")
        return {name: getattr(self, name).state_dict() for name in parts} | {
            "average": self.average.model.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict) -> None:
        for name in ("vae", "critic", "optimizer", "critic_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.average.model.load_state_dict(state["average"])
        self.step = self.average.updates = state["step"]
        self.seconds = state["seconds"]

    def backward(self, images: Tensor, adversarial: bool, generator: torch.Generator) -> tuple[float, Tensor]:
        """Leave the autoencoder's gradients in place; the loss without the critic's term, and the decoded images."""
        with half_precision(self.device), torch.set_grad_enabled(self.encoder_learns):
            posterior = self.vae.encode(images)
        latents = posterior.sample(generator)
        if self.noise:
            latents = latents + self.noise * torch.randn(latents.shape, generator=generator).to(latents)
        kl = posterior.kl().float().mean() / latents[0].numel()
        with half_precision(self.device):
            decoded = self.vae.decode(latents)
        seen = decoded.detach().float().requires_grad_()
        loss = pixel_loss(images, seen, self.weights.gradient)
        if self.weights.perceptual:
            loss = loss + self.weights.perceptual * perceptual_loss(self.eyes, images, seen)
        (gradient,) = torch.autograd.grad(loss, seen)
        if adversarial:
            (fooling,) = torch.autograd.grad(-self.critic(seen).mean(), seen)
            gradient = balanced(gradient, fooling, self.weights.adversarial)
        ends, gradients = [decoded], [gradient.to(decoded.dtype)]
        if self.encoder_learns:
            ends, gradients = [*ends, self.weights.kl * kl], [*gradients, torch.ones_like(kl)]
        torch.autograd.backward(ends, gradients)
        return loss.item() + self.weights.kl * kl.item(), decoded.detach().float()

    def learn(
        self,
        images: Tensor,
        rate: float,
        progress: float,
        team: Team,
        generator: torch.Generator,
        *,
        adversarial: bool,
    ) -> tuple[float, float]:
        """One step of both on a batch in [-1, 1]; the team's loss and progress."""
        self.optimizer.zero_grad()
        loss, decoded = self.backward(images, adversarial, generator)
        loss, progress = team.average(self.vae, loss, progress)
        self.optimizer.set_rate(rate)
        self.optimizer.step()
        if adversarial:
            self.critic_optimizer.zero_grad(set_to_none=True)
            self.critic.loss(images, decoded).backward()
            team.average(self.critic, 0.0, 0.0)
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
            set_learning_rate(self.critic_optimizer, rate / 2)
            self.critic_optimizer.step()
        self.step += 1
        self.average.update(self.vae)
        return loss, progress


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 images as the autoencoder gives them back from its posteriors' means, in [-1, 1]."""
    device = next(vae.parameters()).device
    batches = [to_float(batch).to(device) for batch in images.split(64)]
    return torch.cat([vae.decode(vae.encode(batch).mean).clamp(-1, 1) for batch in batches])


def how_near(vae: AutoencoderKL, images: Tensor) -> str:
    """PSNR and SSIM of uint8 images' reconstructions, in words."""
    decoded, real = reconstruct(vae, images).cpu(), to_float(images)
    return f"PSNR {peak_signal_to_noise(real, decoded):.2f} dB, SSIM {structural_similarity(real, decoded):.4f}"


@torch.no_grad()
def straighten(vae: AutoencoderKL, images: Tensor) -> tuple[AutoencoderKL, float]:
    """Fold a linear map into the 1 × 1 convolutions around the latents, so that channels (with their noise, which is
    taken as uncorrelated) are uncorrelated, have mean 0 and one width, that of the raw latents; the posterior's
    variance becomes its average, the same for all images.
    Returns the autoencoder with its measured scaling factor, and by how many nats per image latents were bound."""
    device = next(vae.parameters()).device
    posteriors = [vae.encode(to_float(batch).to(device)) for batch in images.split(64)]
    means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1).double()
    variances = torch.cat([p.logvar.exp() for p in posteriors]).transpose(0, 1).flatten(1).double()
    centre = means.mean(dim=1)
    covariance = torch.cov(means) + variances.mean(dim=1).diag()
    width = covariance.diagonal().mean().sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    # the symmetric root keeps each new channel as near as can be to the old one
    forward = vectors @ (values.rsqrt() * width).diag() @ vectors.T
    backward = torch.linalg.inv(forward)
    spread = (forward @ variances.mean(dim=1).diag() @ forward.T).diagonal()

    channels = vae.config.latent_channels
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:channels, :, 0, 0].double(), quant.bias[:channels].double()
    quant.weight[:channels, :, 0, 0] = (forward @ weight).float()
    quant.bias[:channels] = (forward @ (bias - centre)).float()
    quant.weight[channels:] = 0.0
    quant.bias[channels:] = spread.log().float()
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ centre).float()
    post.weight[:, :, 0, 0] = (weight @ backward).float()

    measured = AutoencoderKL(dataclasses.replace(vae.config, scaling_factor=round(1 / width.item(), 5))).to(device)
    measured.load_state_dict(vae.state_dict())
    return measured, float(torch.cat([p.kl() for p in posteriors]).mean())


def train(stage: Stage1, images: Tensor, sample: Tensor, team: Team, args: argparse.Namespace) -> AutoencoderKL:
    """Train for the budget and return the averaged model. `sample` are uint8 images for the progress grid."""
    name = "vae" if stage.encoder_learns else "decoder"
    checkpoint, log_file = args.out / f"{name}_checkpoint.pt", args.out / f"{name}.log"
    if args.resume and checkpoint.exists():
        stage.restore(load(checkpoint))
    generator = torch.Generator()
    clock, running = Clock(args.minutes, args.steps, stage.seconds), None
    next_save, progress = stage.seconds + 60 * args.save_minutes, clock.progress(stage.step)
    while progress < 1:
        generator.manual_seed(seed_of_step(args.seed, stage.step, team))
        chosen = torch.randint(len(images), (args.batch // team.size,), generator=generator)
        batch = to_float(images[chosen]).to(stage.device).contiguous(memory_format=torch.channels_last)
        rate = learning_rate(args.rate, stage.step, progress, warm_up=50)
        adversarial = stage.weights.adversarial > 0 and progress >= args.adversarial_start
        progress = clock.progress(stage.step + 1)
        loss, progress = stage.learn(batch, rate, progress, team, generator, adversarial=adversarial)
        running = loss if running is None else 0.98 * running + 0.02 * loss
        stage.seconds = clock.seconds
        if team.rank > 0:
            continue
        if stage.step % 50 == 0:
            log(f"{name} step {stage.step} minutes {stage.seconds / 60:.2f} loss {running:.4f}", log_file)
        if stage.seconds > next_save or progress >= 1:
            save_atomically(stage.state(), checkpoint)
            grid = torch.cat([to_float(sample), reconstruct(stage.average.model, sample).cpu()])
            save_grid(grid, args.out / f"{name}_progress.png", columns=len(sample), zoom=2)
            next_save = stage.seconds + 60 * args.save_minutes
    return stage.average.model


def vae_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = recipe_arguments(description)
    parser.add_argument("--minutes", type=float, help="(default: the preset's)")
    parser.add_argument("--steps", type=int, help="end after so many steps instead")
    parser.add_argument("--save-minutes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, help="(default: the preset's)")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--gradient", type=float, default=0.5, help="weight of the image gradients' L1")
    parser.add_argument("--perceptual", type=float, default=0.5, help="weight of the perceptual distance")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term, per latent value")
    parser.add_argument("--adversarial", type=float, default=0.2, help="the critic's gradient beside the others'")
    parser.add_argument("--adversarial-start", type=float, default=0.45, help="share of the run without it")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, where there is one")
    return parser


def weights_of(args: argparse.Namespace) -> Weights:
    return Weights(args.gradient, args.perceptual, args.kl, args.adversarial)


def main() -> None:
    args = vae_arguments(__doc__).parse_args()
    preset, team = PRESETS[args.preset], Team()
    args.minutes, args.batch = args.minutes or preset.vae_minutes, args.batch or preset.vae_batch
    torch.manual_seed(args.seed)
    dataset = load(args.out / "dataset.pt")
    seen, unseen = dataset["images"][~dataset["held_out"]], dataset["images"][dataset["held_out"]]
    stage = Stage1(AutoencoderKL(preset.vae), args, weights_of(args), team)
    vae = train(stage, seen, unseen[:: max(1, len(unseen) // 12)], team, args)
    if team.rank > 0:
        return

    before = how_near(vae, unseen)
    vae, nats = straighten(vae, seen[::5])
    log(
        f"vae ended: {stage.step} steps, {stage.seconds / 60:.1f} minutes, {team.size} processes; held-out pairs: "
        f"{how_near(vae, unseen)} (before straightening {before}); KL {nats:.0f} nats, scaling factor "
        f"{vae.config.scaling_factor}",
        args.out / "vae.log",
    )
    save_atomically({"config": dataclasses.asdict(vae.config), "model": vae.cpu().state_dict()}, args.out / "vae.pt")


if __name__ == "__main__":
    main()
