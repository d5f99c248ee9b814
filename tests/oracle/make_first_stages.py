"""Makes first_stages.json beside it, with CompVis' own code: `python make_first_stages.py LATENT-DIFFUSION TAMING`.

Both are clones of CompVis' repositories (latent-diffusion, taming-transformers); einops and PyYAML are needed too. Of
each published first stage the file has a digest of its tensors' names and shapes, and, of the same with fewer channels
and the weights of `seeded_state`, what a picture is encoded as and decoded to again.
"""

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import yaml
from seeded import seeded_pixels, seeded_state
from torch import Tensor

SIZE = 96, 64  # of the picture
NARROW = 32  # channels of the finest level
CODES = 200
KEPT = 150  # numbers of each tensor, about


def stub(name: str, **contents: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


def kept(tensor: Tensor) -> list[float]:
    return [float(f"{number:.8g}") for number in tensor.flatten()[:: stride(tensor)].tolist()]


def stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // KEPT) | 1  # odd, so that it does not go down columns


def digest(state: dict[str, Tensor]) -> str:
    lines = sorted(f"{key} {list(tensor.shape)}" for key, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def build(params: dict[str, Any], *, narrow: bool) -> Any:
    from ldm.models.autoencoder import AutoencoderKL, VQModelInterface

    config = dict(params["ddconfig"])
    if narrow:
        config["ch"] = NARROW
    shared = {"ddconfig": config, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": params["embed_dim"]}
    if "n_embed" in params:
        return VQModelInterface(**shared, n_embed=CODES if narrow else params["n_embed"])
    return AutoencoderKL(**shared)


@torch.inference_mode()
def facts_of(config: Path) -> dict[str, Any]:
    params = yaml.safe_load(config.read_text())["model"]["params"]
    with torch.device("meta"):
        full = build(params, narrow=False)
    model = build(params, narrow=True)
    model.load_state_dict(seeded_state({key: tuple(each.shape) for key, each in model.state_dict().items()}))
    pixels = seeded_pixels(*SIZE)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    encoded = model.encode(image)
    latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
    facts = {
        "digest": digest(full.state_dict()),
        "millions": round(sum(each.numel() for each in full.parameters()) / 1e6, 2),
        "params": {name: params[name] for name in ("ddconfig", "embed_dim", "n_embed") if name in params},
        "shape": list(latents.shape),
        "latents": kept(latents),
        "decoded": kept(model.decode(latents)),
    }
    if "n_embed" in params:
        numbers = model.quantize(latents)[2][2]
        facts["codes"] = numbers.flatten().tolist()
    return facts


def main() -> None:
    sys.path += sys.argv[1:3]
    stub("pytorch_lightning", LightningModule=torch.nn.Module)
    stub("taming.modules.losses.vqperceptual")
    folder = Path(sys.argv[1]) / "models" / "first_stage_models"
    found = {path.parent.name: facts_of(path) for path in sorted(folder.glob("*/config.yaml"))}
    Path(__file__).with_name("first_stages.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
