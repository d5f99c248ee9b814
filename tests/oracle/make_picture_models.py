"""Makes picture_models.json beside it, with CompVis' own code: `python make_picture_models.py LATENT-DIFFUSION TAMING`,
as make_paper_models.py. Of each small model of `picture_models.py` it has latents and pixels that the original code
comes to."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from oracle import make_paper_models as paper
from oracle.make_paper_models import SEED, STEPS, Original, kept
from paper_models import UNET, state_of
from picture_models import LARGE, LATENTS, PATCH, PICTURED, low_res, small, to_fill
from torch import Tensor

RUNS: dict[str, dict[str, Any]] = {"eta": {"eta": 1.0}, "plms": {"sampler": "plms"}, "ddim": {}}


class Pictured(Original):
    """The original modules; large latents are computed by patches, as `LatentDiffusion` splits its input."""

    patch = 0

    def apply_model(self, x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        unet = self.model["diffusion_model"]
        if not self.patch:
            return unet(torch.cat([x, condition], dim=1), timesteps)
        from ldm.models.diffusion.ddpm import LatentDiffusion

        def model(x: Tensor, timesteps: Tensor, c_concat: list[Tensor]) -> Tensor:
            return unet(torch.cat([x, *c_concat], dim=1), timesteps)

        model.conditioning_key = "concat"  # type: ignore[attr-defined]
        split = {"ks": (self.patch,) * 2, "stride": (self.patch // 2,) * 2, "vqf": 4, "tie_braker": False}
        split |= {"clip_max_weight": 0.5, "clip_min_weight": 0.01, "patch_distributed_vq": True}
        own = types.SimpleNamespace(model=model, split_input_params=split, cond_stage_key="LR_image", device="cpu")
        for name in ("get_fold_unfold", "get_weighting", "delta_border", "meshgrid"):
            setattr(own, name, types.MethodType(getattr(LatentDiffusion, name), own))
        return LatentDiffusion.apply_model(own, x, timesteps, {"c_concat": [condition]})


def tensor_of(pixels: Any) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def sampled(
    original: Pictured, condition: Tensor, latents: tuple[int, int], eta: float = 0.0, sampler: str = "ddim"
) -> Tensor:
    from ldm.models.diffusion import ddim, plms

    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn((1, 3, *latents), generator=generator)
    ddim.noise_like = lambda shape, device, repeat: torch.randn(shape, generator=generator)
    kind = plms.PLMSSampler if sampler == "plms" else ddim.DDIMSampler
    kind.register_buffer = lambda self, name, attr: setattr(self, name, attr)
    found, _ = kind(original).sample(
        STEPS, 1, (3, *latents), condition, verbose=False, x_T=start, eta=eta
    )  # fmt: skip
    return found


@torch.inference_mode()
def facts_of(name: str) -> dict[str, list[float]]:
    model = small(name)
    state = state_of(model)
    for key in [key for key in state if key.startswith(UNET)]:  # as `ema_scope` does
        state[key] = state[f"model_ema.{key.removeprefix('model.').replace('.', '')}"]
    original = Pictured(model).eval()
    original.load_state_dict({key: state[key] for key in original.state_dict()}, strict=True)
    stage, found = original.first_stage_model, {}
    if name == "bsr_sr":
        for run, settings in RUNS.items():
            latents = sampled(original, tensor_of(low_res(LATENTS)), LATENTS, **settings)
            found[run] = kept(latents)
        found["decoded"] = kept(stage.decode(latents))
        original.patch = PATCH
        found["patches"] = kept(sampled(original, tensor_of(low_res(LARGE)), LARGE))
        return found
    pixels, holes = to_fill()
    image, mask = (tensor_of(pixels) + 1) / 2, torch.from_numpy(holes)[None, None].float()
    beside = stage.encode(2 * (1 - mask) * image - 1)
    condition = torch.cat([beside, torch.nn.functional.interpolate(2 * mask - 1, size=beside.shape[-2:])], dim=1)
    for run, settings in RUNS.items():
        latents = sampled(original, condition, LATENTS, **settings)
        found[run] = kept(latents)
    drawn = (stage.decode(latents) / 2 + 0.5).clamp(0, 1)
    return found | {"pixels": kept(255 * ((1 - mask) * image + mask * drawn))}


def main() -> None:
    sys.path += sys.argv[1:3]
    paper.stub_modules()
    for name in ("pytorch_lightning.utilities", "pytorch_lightning.utilities.distributed"):
        paper.stub(name, rank_zero_only=lambda function: function)
    found = {name: facts_of(name) for name in PICTURED}
    Path(__file__).with_name("picture_models.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
