"""Models of named families with random weights in their true shapes: speed can be measured without a download.

They are diffusers folders in fp16. Pictures of them are noise, and their activations stay of order one, as those of
trained networks do.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from oracle.random_families import RECIPES, Recipe, as_pipeline, build_parts
from oracle.random_model import randomise

from ldmcli.errors import UsageError, printable

_LCM = RECIPES["lcm"]
_SD15 = dataclasses.replace(
    _LCM,
    pipeline="StableDiffusionPipeline",
    unet={name: value for name, value in _LCM.unet.items() if name != "time_cond_proj_dim"},
    small_unet={name: value for name, value in _LCM.small_unet.items() if name != "time_cond_proj_dim"},
    scheduler=("PNDMScheduler", {}),
)
FAMILIES: Mapping[str, Recipe] = {"sd15": _SD15, "sd21": RECIPES["sd2-v"], "sdxl": RECIPES["sdxl"]}


def write_random_model(family: str, folder: Path, *, small: bool = False) -> Path:
    """Write a diffusers folder of one of FAMILIES, or of its `small` likeness, and return it. The index, without which
    it is no model, comes last. Raises UsageError for another name."""
    if family not in FAMILIES:
        raise UsageError(f"there are no random weights of {printable(repr(family))}; choose {', '.join(FAMILIES)}.")
    (folder / "model_index.json").unlink(missing_ok=True)
    with torch.device("meta"):
        parts = build_parts(FAMILIES[family], small=small)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for part in parts.values():
        randomise(part.half().to_empty(device="cpu"), generator)
        part.requires_grad_(False)
    # The last convolution follows SiLU, which shrinks a standard normal: this makes noise predictions of size 1.
    parts["unet"].conv_out.weight.mul_(1 / 0.596)
    as_pipeline(FAMILIES[family], parts).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_random_model(sys.argv[1], Path(sys.argv[2]))
