"""How near upscalers come to emoji on held-out backgrounds: PSNR and SSIM of Lanczos, of the general network and of the
embedded model's own, as a table in Markdown, on the pairs of upscaler_pairs.py.

    python weights/recipe/measure_upscaler.py
    python weights/recipe/measure_upscaler.py --net runs/recipe/upscaler/model.safetensors --sheet sheet.png
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import save_grid, stack, to_float
from measures import peak_signal_to_noise, structural_similarity
from PIL import Image
from torch import Tensor
from training import load
from upscaler_pairs import FILE, KINDS, SCALE, Pairs, pairs_arguments

from ldmcli.checkpoints.layout import UPSCALER
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.policy import choose_runtime
from ldmcli.upscaling.upscaler import EMBEDDED_UPSCALER, Upscaler, open_upscaler

Enlarge = Callable[[np.ndarray], np.ndarray]
MEASURES = (peak_signal_to_noise, structural_similarity)
SHOWN = 11  # pictures in a row of the sheet


def by_lanczos(pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) four times as large."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.LANCZOS))


def by_network(name: str) -> Enlarge:
    """What `ldm upscale -m NAME --dtype fp32` does."""
    return Upscaler(open_upscaler(name), choose_runtime(RuntimeSpec(device="cpu", dtype="fp32"))).enlarged


def enlarged(images: Tensor, enlarge: Enlarge) -> Tensor:
    """uint8 pictures, four times as large."""
    return stack([enlarge(image.permute(1, 2, 0).numpy()) for image in images])


def main() -> None:
    parser = pairs_arguments(__doc__)
    parser.add_argument("--net", type=Path, help="the model's own network (default: that in its folder)")
    parser.add_argument("--count", type=int, help="at most so many pictures of each kind (default: all)")
    parser.add_argument("--sheet", type=Path, help="a PNG of some: as they are, by each of the three, and the emoji")
    args = parser.parse_args()
    pairs, found = Pairs(args), load(args.out / FILE)
    ways = {
        "Lanczos": by_lanczos,
        "realesr-animevideov3": by_network(EMBEDDED_UPSCALER),
        "its own": by_network(str(args.net or args.folder / UPSCALER)),
    }
    rows = {name: f"| {name} |" for name in ways}
    sheet = []
    for kind in KINDS:
        chosen = pairs.held_out[: len(found[kind])].nonzero().flatten()[: args.count]
        small, large = found[kind][chosen], pairs.large(chosen)
        print(f"{len(chosen)} pictures {kind}", flush=True)
        sheet.append(enlarged(small[:SHOWN], lambda pixels: pixels.repeat(SCALE, 0).repeat(SCALE, 1)))
        for name, enlarge in ways.items():
            images = enlarged(small, enlarge)
            quality = [measure(to_float(large), to_float(images)) for measure in MEASURES]
            rows[name] += " {:.2f} dB | {:.3f} |".format(*quality)
            sheet.append(images[:SHOWN])
        sheet.append(large[:SHOWN])
    print("| enlarged by |" + "".join(f" {kind}: PSNR | SSIM |" for kind in KINDS))
    print("| --- |" + " --- |" * (2 * len(KINDS)))
    print("\n".join(rows.values()))
    if args.sheet:
        save_grid(to_float(torch.cat(sheet)), args.sheet, columns=min(SHOWN, len(sheet[0])))


if __name__ == "__main__":
    main()
