"""Stage 1, continued: the decoder alone learns on, from the latents that stage 2 is trained on.

Once stage 2 has begun, the encoder must not change; the decoder may. It is what draws every edge that anyone sees, so
it gets time of its own, with the critic from the start. Its latents are a little off (a normal number of 0.1 × their
width), as those of stage 2 are, so that it learns to draw flat colours and clean edges from them all the same. It can
run beside stage 2 and needs only vae.pt.

    python weights/recipe/train_decoder.py
    torchrun --nproc-per-node 4 weights/recipe/train_decoder.py --resume
"""

import dataclasses

import torch
from presets import PRESETS
from train_unet import load_vae
from train_vae import Stage1, how_near, train, vae_arguments, weights_of
from training import Team, load, log, save_atomically


def main() -> None:
    parser = vae_arguments(__doc__)
    parser.set_defaults(adversarial_start=0.0, rate=6e-4)
    parser.add_argument("--off", type=float, default=0.1, help="how far latents are off, in widths")
    args = parser.parse_args()
    preset, team = PRESETS[args.preset], Team()
    args.minutes, args.batch = args.minutes or preset.decoder_minutes, args.batch or preset.vae_batch
    torch.manual_seed(args.seed)
    dataset = load(args.out / "dataset.pt")
    seen, unseen = dataset["images"][~dataset["held_out"]], dataset["images"][dataset["held_out"]]
    vae = load_vae(args.out / "vae.pt").to(args.device)
    before = how_near(vae, unseen) if team.rank == 0 else ""
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    stage = Stage1(vae, args, weights_of(args), team)
    stage.noise = args.off / vae.config.scaling_factor
    vae = train(stage, seen, unseen[:: max(1, len(unseen) // 12)], team, args)
    if team.rank == 0:
        log(
            f"decoder ended: {stage.step} steps, {stage.seconds / 60:.1f} minutes, {team.size} processes; held-out "
            f"pairs: {how_near(vae, unseen)} (before {before})",
            args.out / "decoder.log",
        )
        save_atomically(
            {"config": dataclasses.asdict(vae.config), "model": vae.cpu().state_dict()}, args.out / "decoder.pt"
        )


if __name__ == "__main__":
    main()
