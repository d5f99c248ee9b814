"""Stage 1: train the KL autoencoder (Rombach et al. 2022, section 3.1), then whiten its latents.

Loss: L1 + MSE + 0.5 · L1 of the image gradients + 1e-3 · mean KL. There is no adversarial or perceptual
term: flat-shaded glyphs at 64 × 64 do not need one. At the end the latents' covariance over the training
images is folded into quant_conv and post_quant_conv, so that the four channels are uncorrelated and latents
· 0.18215 have mean 0 and variance 1: the scaling factor of Stable Diffusion 1 is then true of this model
too.

    python weights/recipe/train_vae.py --minutes 15          # about 3,000 steps on two cores
    python weights/recipe/train_vae.py --minutes 15 --resume # after a stop
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from data import save_grid, to_float
from torch import Tensor
from training import Average, Clock, learning_rate, load, log, save_atomically, set_learning_rate

from ldmcli.config import VAEConfig
from ldmcli.models.vae import AutoencoderKL

CONFIG = VAEConfig(latent_channels=4, block_channels=(32, 64, 64), layers_per_block=1, norm_groups=8)


def reconstruction_loss(images: Tensor, decoded: Tensor) -> Tensor:
    """L1 + MSE + 0.5 · L1 between horizontal and vertical differences, which keeps edges sharp."""
    difference = decoded.float() - images
    across = difference[..., 1:] - difference[..., :-1]
    down = difference[..., 1:, :] - difference[..., :-1, :]
    return difference.abs().mean() + difference.square().mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def training_loss(vae: AutoencoderKL, images: Tensor, kl_weight: float) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images)
    latents = posterior.sample()
    kl = posterior.kl().float().mean() / latents[0].numel()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = vae.decode(latents)
    return reconstruction_loss(images, decoded) + kl_weight * kl


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderKL, images: Tensor) -> float:
    """Decibels of the reconstruction from posterior means, over uint8 images."""
    errors = []
    for batch in images.split(64):
        batch = to_float(batch)
        errors.append((vae.decode(vae.encode(batch).mean).clamp(-1, 1) - batch).square().mean(dim=(1, 2, 3)))
    return float(10 * torch.log10(4 / torch.cat(errors).mean()))


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a linear map into the 1 × 1 convolutions around the latents: uncorrelated channels, mean 0, the
    standard deviation that `scaling_factor` claims. The posterior's variance becomes its average, the same
    for all images."""
    posteriors = [vae.encode(to_float(batch)) for batch in images.split(64)]
    means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1).double()
    variances = torch.cat([p.logvar.exp() for p in posteriors]).transpose(0, 1).flatten(1).double()
    centre = means.mean(dim=1)
    covariance = torch.cov(means) + variances.mean(dim=1).diag()
    values, vectors = torch.linalg.eigh(covariance)
    # the symmetric root keeps each new channel as near as can be to the old one
    forward = vectors @ (values.rsqrt() / vae.config.scaling_factor).diag() @ vectors.T
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


def train(vae: AutoencoderKL, images: Tensor, sample: Tensor, args: argparse.Namespace) -> AutoencoderKL:
    """Train for the budget and return the averaged model. `sample` are images for the progress grid."""
    checkpoint = args.out / "vae_checkpoint.pt"
    average = Average(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent = 0, 0.0
    if args.resume and checkpoint.exists():
        state = load(checkpoint)
        vae.load_state_dict(state["model"])
        average.model.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, average.updates = state["step"], state["seconds"], state["step"]
    generator = torch.Generator().manual_seed(args.seed + step)
    compute = torch.compile(training_loss) if args.compile else training_loss
    clock, running = Clock(args.minutes, spent), None
    while clock.progress < 1:
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        batch = to_float(images[chosen]).contiguous(memory_format=torch.channels_last)
        set_learning_rate(optimizer, learning_rate(args.rate, step, clock.progress, warm_up=50))
        loss = compute(vae, batch, args.kl)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            log(f"vae step {step} minutes {clock.seconds / 60:.2f} loss {running:.4f}", args.out / "vae.log")
        if step % 300 == 0:
            with torch.no_grad():
                shown = average.model.decode(average.model.encode(sample).mean)
            save_grid(torch.cat([sample, shown]), args.out / "vae_progress.png", columns=len(sample), zoom=2)
            state = {"model": vae.state_dict(), "average": average.model.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": clock.seconds}
            save_atomically(state, checkpoint)
    log(f"vae ended: {step} steps, {clock.seconds / 60:.1f} minutes, loss {running}", args.out / "vae.log")
    return average.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/recipe/dataset.pt"))
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dataset = load(args.data)
    seen, unseen = dataset["images"][~dataset["held_out"]], dataset["images"][dataset["held_out"]]
    vae = AutoencoderKL(CONFIG).to(memory_format=torch.channels_last)
    vae = train(vae, seen, to_float(unseen[5::96]), args)

    before = peak_signal_to_noise(vae, unseen[::2])
    whiten(vae, seen[::2])
    after = peak_signal_to_noise(vae, unseen[::2])
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_float(batch)).mean for batch in seen[::7].split(64)])
    deviations = (latents * CONFIG.scaling_factor).std(dim=(0, 2, 3)).tolist()
    posterior = (0.5 * vae.quant_conv.bias[4:]).exp() * CONFIG.scaling_factor
    log(
        f"held-out PSNR {before:.2f} dB, after whitening {after:.2f} dB; scaled deviations of the means "
        f"{[round(d, 3) for d in deviations]}, of the posterior {[round(p, 3) for p in posterior.tolist()]}",
        args.out / "vae.log",
    )
    save_atomically({"config": dataclasses.asdict(CONFIG), "model": vae.state_dict()}, args.out / "vae.pt")


if __name__ == "__main__":
    main()
