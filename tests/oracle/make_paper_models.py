"""Makes paper_models.json beside it, with CompVis' own code: `python make_paper_models.py LATENT-DIFFUSION TAMING`.

Both are clones of CompVis' repositories (latent-diffusion, taming-transformers); einops is needed too. Of each small
model of `paper_models.py`, which the original modules load strictly, the file has latents that the original samplers
walk to and pixels that the first stage makes of them. `PYTHONPATH` has `tests` and this program.
"""

import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paper_models import CODES, LAYOUT, PROMPT, PUBLISHED, UNET, VOCABULARY, Model, class_map, small, state_of
from torch import Tensor, nn

LATENTS = 6, 10  # height and width
STEPS, SEED, LABEL, SCALE = 5, 3, 4, 2.5
KEPT = 48  # numbers of each tensor
RUNS: dict[str, dict[str, Any]] = {
    "ddim": {}, "eta": {"eta": 1.0}, "plms": {"sampler": "plms"}, "guided": {"guidance_scale": SCALE},
}  # fmt: skip


def runs_of(name: str) -> list[str]:
    text = PUBLISHED[name].text
    guided = name == "cin256-v2" or (text is not None and text[3] == 77)
    return [run for run in RUNS if run != "guided" or guided]


def kept(tensor: Tensor) -> list[float]:
    stride = max(1, tensor.numel() // KEPT) | 1  # odd, so that it does not go down columns
    return [float(f"{number:.6g}") for number in tensor.flatten()[::stride].tolist()]


def stub(name: str, **contents: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


class Original(nn.Module):
    """The original modules of a model, as its samplers call them."""

    def __init__(self, model: Model) -> None:
        from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.modules.encoders.modules import ClassEmbedder, SpatialRescaler, TransformerEmbedder

        super().__init__()
        transformer = {"use_spatial_transformer": True, "transformer_depth": model.depth, "context_dim": model.context}
        heads = {"num_heads": model.heads} if model.heads else {"num_head_channels": 32}
        unet = UNetModel(
            image_size=32, in_channels=model.in_channels, out_channels=model.out_channels, num_res_blocks=model.layers,
            model_channels=model.channels, attention_resolutions=model.attention, channel_mult=model.mult,
            use_scale_shift_norm=model.scale_shift, resblock_updown=model.resampling, use_checkpoint=False,
            **heads, **(transformer if model.context else {}),
        )  # fmt: skip
        self.model = nn.ModuleDict({"diffusion_model": unet})
        channels = model.out_channels
        config = {
            "double_z": not model.quantizes, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1] * model.first_levels, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        }  # fmt: skip
        shared: dict[str, Any] = {
            "ddconfig": config, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": channels,
        }  # fmt: skip
        quantizing = VQModelInterface(**shared, n_embed=CODES) if model.quantizes else None
        self.first_stage_model = quantizing or AutoencoderKL(**shared)
        if model.labels:
            self.cond_stage_model = ClassEmbedder(model.context, model.labels)
        elif model.classes:
            self.cond_stage_model = SpatialRescaler(2, in_channels=model.classes, out_channels=3)
        elif model.text:
            vocabulary, width, layers, tokens = model.text
            self.cond_stage_model = TransformerEmbedder(width, layers, vocabulary, tokens, "cpu")
        betas = torch.linspace(model.betas[0] ** 0.5, model.betas[1] ** 0.5, 1000, dtype=torch.float64) ** 2
        levels = torch.cumprod(1 - betas, 0).float()
        self.betas, self.alphas_cumprod, self.num_timesteps = betas.float(), levels, 1000
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), levels[:-1]])
        self.device, self.joins = torch.device("cpu"), bool(model.classes)

    def apply_model(self, x: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        unet = self.model["diffusion_model"]
        if self.joins:
            assert condition is not None
            return unet(torch.cat([x, condition], dim=1), timesteps)
        return unet(x, timesteps, context=condition)


def conditions(model: Model, original: Original) -> tuple[Tensor | None, Tensor | None]:
    """What the original code makes of the condition, and of none."""
    encode: Callable[..., Tensor] = getattr(original, "cond_stage_model", None)  # type: ignore[assignment]
    if model.labels:
        labels = torch.tensor([LABEL, model.labels - 1])
        found = encode({"class": labels})
        return found[:1], found[1:]
    if model.classes:
        maps = torch.from_numpy(class_map(LATENTS[1] * 4, LATENTS[0] * 4, model.classes)).long()
        one_hot = torch.nn.functional.one_hot(maps, 256)[..., : model.classes]
        return encode(one_hot.permute(2, 0, 1)[None].float()), None
    if model.text is None:
        return None, None
    if model.text[3] == 92:
        from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder

        builder = ObjectsBoundingBoxConditionalBuilder(600, 30, model.text[0], True, False, False)
        objects = [types.SimpleNamespace(category_no=label, bbox=(a, b, c - a, d - b)) for label, a, b, c, d in LAYOUT]
        tokens = [one for three in builder._make_object_descriptors(objects) for one in three]
        return encode(torch.tensor([[*tokens, *builder._crop_encoder((0.0, 0.0, 1.0, 1.0))]])), None
    from transformers import BertTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_text("\n".join(VOCABULARY) + "\n")
        tokenizer = BertTokenizerFast(str(path), do_lower_case=True)
    read = tokenizer(
        [PROMPT, ""], truncation=True, max_length=77, padding="max_length", return_tensors="pt"
    )  # fmt: skip
    found = encode(read["input_ids"])
    return found[:1], found[1:]


@torch.inference_mode()
def facts_of(name: str) -> dict[str, list[float]]:
    from ldm.models.diffusion import ddim, plms

    model = small(name)
    state = state_of(model)
    if model.averaged:  # as `ema_scope` does
        for key in [key for key in state if key.startswith(UNET)]:
            state[key] = state[f"model_ema.{key.removeprefix('model.').replace('.', '')}"]
    original = Original(model).eval()
    wanted = set(original.state_dict())
    original.load_state_dict({key: state[key] for key in state if key in wanted}, strict=True)
    condition, nothing = conditions(model, original)
    found = {}
    for run in runs_of(name):
        settings = RUNS[run]
        generator = torch.Generator().manual_seed(SEED)
        shape = (1, model.out_channels, *LATENTS)
        start = torch.randn(shape, generator=generator)
        ddim.noise_like = lambda shape, device, repeat, generator=generator: torch.randn(shape, generator=generator)
        kind = plms.PLMSSampler if settings.get("sampler") == "plms" else ddim.DDIMSampler
        kind.register_buffer = lambda self, name, attr: setattr(self, name, attr)
        scale = settings.get("guidance_scale", 1.0)
        latents, _ = kind(original).sample(
            STEPS, 1, shape[1:], condition, verbose=False, x_T=start, eta=settings.get("eta", 0.0),
            unconditional_guidance_scale=scale, unconditional_conditioning=nothing if scale != 1 else None,
        )  # fmt: skip
        found[run] = kept(latents)
    scale = {"txt2img-1p4B": 0.18215}.get(name, 1.0)
    found["decoded"] = kept(original.first_stage_model.decode(latents / scale))
    return found


def stub_modules() -> None:
    """What the original code imports and these models do not need."""
    stub("pytorch_lightning", LightningModule=nn.Module)
    stub("taming.modules.losses.vqperceptual")
    stub("omegaconf")
    stub("taming.data.image_transforms", convert_pil_to_tensor=None)
    stub("omegaconf.listconfig", ListConfig=tuple)
    for name in ("clip", "kornia", "more_itertools", "more_itertools.recipes"):
        stub(name, grouper=None)


def main() -> None:
    sys.path += sys.argv[1:3]
    stub_modules()
    narrow_attention_width()
    found = {name: facts_of(name) for name in PUBLISHED}
    Path(__file__).with_name("paper_models.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def narrow_attention_width() -> None:
    """The small models' transformers have eight heads that are four wide, where the published ones' have 64."""
    from ldm.modules import x_transformer

    usual = x_transformer.Attention.__init__

    def narrow(self: Any, *args: Any, **settings: Any) -> None:
        usual(self, *args, **settings | {"dim_head": 4})

    x_transformer.Attention.__init__ = narrow


if __name__ == "__main__":
    main()
