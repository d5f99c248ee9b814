"""What each term of stage 1's loss buys: from one common start, as many steps again with each term left out in turn.

The start is a short run with all terms but the critic's, or the checkpoint that --start names (the critic of a finished
run has shaped its autoencoder already: a start from early in a run tells more). All variants see the same batches and
the same posterior noise. Measured are the averaged weights on held-out pairs:

- PSNR and SSIM of the reconstruction;
- edges: the root mean square of the reconstruction's image gradients over that of the images; below 1 is blurred (their
  mean length would not tell: an edge spread over three pixels adds up to the same);
- noise: the posterior's standard deviation over that of the latents; near 0 the encoder gives single points;
- PSNR with every latent off by a normal number of 0.2 × the latents' standard deviation: how smooth the latent space
  is, which decides what stage 2's small errors do to a picture.

Results go to the run's folder, ablation/: table.md, one JSON a variant, variants.png (a row for the originals, then one
for each variant). Variants that are done are not done again.

    python weights/recipe/ablate_vae.py --steps 1500
"""

import argparse
import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from data import save_grid, to_float
from measures import peak_signal_to_noise, structural_similarity
from presets import PRESETS, Preset, recipe_arguments
from torch import Tensor
from train_vae import Stage1, reconstruct, vae_arguments, weights_of
from training import Team, learning_rate, load, log, save_atomically, seed_of_step
from vae_losses import Weights

from ldmcli.config import VAEConfig
from ldmcli.networks.vae import AutoencoderKL

OFF = 0.2  # how far latents are moved, in standard deviations
COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "edges": "edges",
    "noise": "noise",
    "psnr_off": f"PSNR, latents off by {OFF}",
}


def paper_weight(config: VAEConfig, pixel_channels: int = 3) -> float:
    """The weight per latent value that the paper's 1e-6 means: its errors and divergences are sums over an image, ours
    means over its values."""
    side = 2 ** (len(config.block_channels) - 1)
    return 1e-6 * config.latent_channels / (pixel_channels * side**2)


def variants(everything: Weights, config: VAEConfig) -> dict[str, Weights]:
    left_out = {
        name: dataclasses.replace(everything, **{name: 0.0}) for name in ("gradient", "perceptual", "adversarial")
    }
    return {
        "all terms": everything,
        **{f"without {name}": weights for name, weights in left_out.items()},
        "KL 1e-6 as in the paper": dataclasses.replace(everything, kl=paper_weight(config)),
        "a fifth of the KL": dataclasses.replace(everything, kl=everything.kl / 5),
    }


def run(stage: Stage1, images: Tensor, steps: int, args: argparse.Namespace, name: str) -> None:
    """Train for `steps` steps with the terms of `stage.weights`, the critic from the first on; the learning rate falls
    over them."""
    generator, team, first = torch.Generator(), Team(), stage.step
    for done in range(steps):
        generator.manual_seed(seed_of_step(args.seed, stage.step, team))
        chosen = torch.randint(len(images), (args.batch,), generator=generator)
        batch = to_float(images[chosen]).to(stage.device).contiguous(memory_format=torch.channels_last)
        rate = learning_rate(args.rate, stage.step, done / steps, warm_up=50)
        adversarial = stage.weights.adversarial > 0
        loss, _ = stage.learn(batch, rate, 0.0, team, generator, adversarial=adversarial)
        if (done + 1) % 50 == 0 or done + 1 == steps:
            line = f"ablation, {name}: step {first} + {done + 1} loss {loss:.4f}"
            log(line, args.out / "ablation" / "ablation.log")


def common_start(preset: Preset, everything: Weights, images: Tensor, args: argparse.Namespace) -> dict:
    """The state all variants go on from: --start's, or that of a run without critic."""
    if args.start is not None:
        return load(args.start)
    path = args.out / "ablation" / "start.pt"
    asked = {"steps": args.start_steps, "batch": args.batch, "seed": args.seed, "rate": args.rate}
    if path.exists() and load(path)["asked"] == asked:
        return load(path)
    torch.manual_seed(args.seed)
    stage = Stage1(AutoencoderKL(preset.vae), args, dataclasses.replace(everything, adversarial=0.0), Team())
    run(stage, images, args.start_steps, args, "start")
    save_atomically({**stage.state(), "asked": asked}, path)
    return load(path)


def edge_strength(images: Tensor) -> float:
    """Root mean square of differences to the right and down, of images (N, 3, height, width)."""
    across = images[..., :-1, 1:] - images[..., :-1, :-1]
    down = images[..., 1:, :-1] - images[..., :-1, :-1]
    return float((across.square() + down.square()).mean().sqrt())


@torch.no_grad()
def measure(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """COLUMNS' figures on uint8 images."""
    device = next(vae.parameters()).device
    posteriors = [vae.encode(to_float(batch).to(device)) for batch in images.split(64)]
    means, variances = (torch.cat(parts) for parts in zip(*((p.mean, p.logvar.exp()) for p in posteriors), strict=True))
    spread = (means.var(dim=(0, 2, 3)) + variances.mean(dim=(0, 2, 3))).sqrt()
    moved = torch.randn(means.shape, generator=torch.Generator().manual_seed(0)).to(device) * spread[:, None, None]

    def decoded(latents: Tensor) -> Tensor:
        return torch.cat([vae.decode(batch).clamp(-1, 1).cpu() for batch in latents.split(64)])

    real, exact = to_float(images), decoded(means)
    return {
        "psnr": peak_signal_to_noise(real, exact),
        "ssim": structural_similarity(real, exact),
        "edges": edge_strength(exact) / edge_strength(real),
        "noise": float(variances.mean().sqrt() / spread.square().mean().sqrt()),
        "psnr_off": peak_signal_to_noise(real, decoded(means + OFF * moved)),
    }


def identity(state: dict) -> str:
    """A short name of a start, by its weights."""
    digest = hashlib.sha256()
    for tensor in state["vae"].values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def outcome(name: str, weights: Weights, stage: Stage1, data: dict[str, Tensor], args: argparse.Namespace) -> dict:
    """A variant's figures and its pictures of the sample, from its files or by training it; `stage` stands at the
    common start, and is left as it is."""
    asked = {"start": args.identity, "steps": args.steps, "batch": args.batch, "seed": args.seed, "rate": args.rate}
    asked |= {"weights": dataclasses.asdict(weights), "images": len(data["unseen"])}
    folder = args.out / "ablation"
    file = folder / f"{name.replace(' ', '-')}.json"
    pictures = file.with_suffix(".pt")
    if file.exists() and (found := json.loads(file.read_text(encoding="utf-8")))["asked"] == asked:
        return {**found, "pictures": load(pictures)["pictures"]}
    stage = copy.deepcopy(stage)
    stage.weights = weights
    run(stage, data["seen"], args.steps, args, name)
    vae = stage.average.model
    drawn = reconstruct(vae, data["sample"]).cpu()
    save_atomically({"pictures": drawn}, pictures)
    found = {"asked": asked, **measure(vae, data["unseen"])}
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")  # last: it says that the variant is done
    return {**found, "pictures": drawn}


def table(outcomes: dict[str, dict]) -> str:
    head = ["terms", *COLUMNS.values()]
    rows = [
        [name, *(f"{found[key]:.{2 if 'psnr' in key else 3}f}" for key in COLUMNS)] for name, found in outcomes.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def main() -> None:
    usual = vae_arguments(None).parse_args([])
    parser = recipe_arguments(__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of each variant (default: 600)")
    parser.add_argument("--batch", type=int, help="(default: the preset's)")
    parser.add_argument("--rate", type=float, default=usual.rate)
    parser.add_argument("--start", type=Path, help="a checkpoint of train_vae.py (default: a short run)")
    parser.add_argument("--start-steps", type=int, default=600, help="of that short run (default: 600)")
    parser.add_argument("--images", type=int, default=528, help="held-out images to measure on (default: 528)")
    args = parser.parse_args()

    preset = PRESETS[args.preset]
    args.batch = args.batch or preset.vae_batch
    dataset = load(args.out / "dataset.pt")
    unseen = dataset["images"][dataset["held_out"]]
    data = {
        "seen": dataset["images"][~dataset["held_out"]],
        "unseen": unseen[:: max(1, len(unseen) // args.images)],
        "sample": unseen[:: max(1, len(unseen) // 12)][:12],
    }
    everything = weights_of(usual)
    start = common_start(preset, everything, data["seen"], args)
    args.identity = identity(start)
    stage = Stage1(AutoencoderKL(preset.vae), args, everything, Team())
    stage.restore(start)
    outcomes: dict[str, dict] = {}
    for name, weights in variants(everything, preset.vae).items():
        outcomes[name] = outcome(name, weights, stage, data, args)
        rows = [to_float(data["sample"]), *(found["pictures"] for found in outcomes.values())]
        save_grid(torch.cat(rows), args.out / "ablation" / "variants.png", columns=len(data["sample"]), zoom=3)
        (args.out / "ablation" / "table.md").write_text(table(outcomes), encoding="utf-8")
    print(table(outcomes), end="")


if __name__ == "__main__":
    main()
