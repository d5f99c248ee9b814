"""Models of named families with random weights in their true shapes: speed can be measured without a download.

They are diffusers folders in fp16. Pictures of them are noise, and their activations stay of order one, as those of
trained networks do. A vocabulary of single bytes needs nothing installed.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from oracle.random_families import RECIPES, Recipe
from oracle.random_model import SCHEDULER
from safetensors.torch import save_file
from torch import Tensor

from ldmcli.checkpoints.folder_config import text_encoder_config, unet_config, vae_config
from ldmcli.checkpoints.load import on_meta
from ldmcli.conditioning.tokenizer import _byte_alphabet
from ldmcli.errors import UsageError, printable
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL

_log = logging.getLogger(__name__)
_SPREAD = 0.1  # standard deviation of biases, and of norm weights around 1
# The last convolution follows SiLU, which shrinks a standard normal to 0.596: this makes noise predictions of size 1.
_LAST_GAIN = 1 / 0.596
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"

_LCM = RECIPES["lcm"]
_SD15 = dataclasses.replace(
    _LCM,
    pipeline="StableDiffusionPipeline",
    unet={name: value for name, value in _LCM.unet.items() if name != "time_cond_proj_dim"},
    vae=_LCM.vae | {"force_upcast": False},
    scheduler=("PNDMScheduler", {}),
)
_SD21 = dataclasses.replace(RECIPES["sd2-v"], vae=_SD15.vae)
FAMILIES: Mapping[str, Recipe] = {"sd15": _SD15, "sd21": _SD21, "sdxl": RECIPES["sdxl"]}


def write_random_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a diffusers folder of one of FAMILIES and return it. Memory: that of its largest part.

    Raises UsageError for another name.
    """
    if family not in FAMILIES:
        raise UsageError(f"there are no random weights of {printable(repr(family))}; choose {', '.join(FAMILIES)}.")
    return write_recipe(FAMILIES[family], folder, seed)


def write_recipe(recipe: Recipe, folder: Path, seed: int = 0) -> Path:
    """As `write_random_model`, for any recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model_index.json"
    index.unlink(missing_ok=True)  # written last: a folder without it is no model
    write_configurations(recipe, folder)
    shapes = model_shapes(recipe, folder)
    size = 2 * sum(math.prod(shape) for part in shapes.values() for shape in part.values())
    _log.info("%.1f GB of random weights into %s", size / 1e9, folder)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    for part, of_part in shapes.items():
        name = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(dict(_drawn(part, of_part, generator)), folder / part / f"{name}.safetensors", {"format": "pt"})
    _write_json(index, _model_index(recipe))
    return folder


def model_shapes(recipe: Recipe, folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every tensor of every part that `folder` describes, by its name on disk."""
    unet, vae = unet_config(folder / "unet/config.json", _pooled(recipe)), vae_config(folder / "vae/config.json")
    modules = {"unet": on_meta(lambda: UNet(unet)), "vae": on_meta(lambda: AutoencoderKL(vae))}
    for part in recipe.texts:
        config = text_encoder_config(folder / part / "config.json", part, _text_class(part))
        modules[part] = on_meta(lambda config=config: TextTransformer(config))
    return {
        part: {_on_disk(part, key): tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        for part, module in modules.items()
    }


def write_configurations(recipe: Recipe, folder: Path) -> None:
    """Write all small files but the index."""
    kind, settings = recipe.scheduler
    _write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **recipe.unet})
    _write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL", **recipe.vae})
    _write_json(folder / "scheduler/scheduler_config.json", {"_class_name": kind, **SCHEDULER, **settings})
    letters = _byte_alphabet()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    for part, text in recipe.texts.items():
        more = {"architectures": [_text_class(part)], "model_type": "clip_text_model"}
        _write_json(folder / part / "config.json", {**text, **more})
        unused = [f"<unused{i}>" for i in range(len(words), text["vocab_size"] - 2)]
        ids = {word: i for i, word in enumerate([*words, *unused, _BEGIN, _END])}
        tokenizer = folder / part.replace("text_encoder", "tokenizer")
        pad = words[0] if text["hidden_act"] == "gelu" else _END  # OpenCLIP's fill prompts up with token 0
        marks = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": pad}
        _write_json(tokenizer / "vocab.json", ids)
        (tokenizer / "merges.txt").write_text("#version: 0.2\n")
        _write_json(tokenizer / "special_tokens_map.json", marks)
        about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        _write_json(tokenizer / "tokenizer_config.json", about | marks)


def _drawn(
    part: str, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor, with the mean and deviation that hand a signal of size one on as such."""
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator, device=generator.device)
        if len(shape) == 1:
            numbers.mul_(_SPREAD).add_(float(name.endswith(".weight")))
        elif not name.endswith("_embedding.weight"):
            gain = _LAST_GAIN if (part, name) == ("unet", "conv_out.weight") else 1.0
            numbers.mul_(gain * math.prod(shape[1:]) ** -0.5)
        yield name, numbers.half().cpu()


def _model_index(recipe: Recipe) -> dict[str, Any]:
    parts = {part: ["transformers", _text_class(part)] for part in recipe.texts}
    parts |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in recipe.texts}
    parts |= {
        "scheduler": ["diffusers", recipe.scheduler[0]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    unused = {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    return {"_class_name": recipe.pipeline, **parts, **(recipe.extras or unused)}


def _on_disk(part: str, key: str) -> str:
    bare = not part.startswith("text_encoder") or key.startswith(("text_projection.", "text_model."))
    return key if bare else f"text_model.{key}"


def _text_class(part: str) -> str:
    return "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"


def _pooled(recipe: Recipe) -> int:
    text = recipe.texts.get("text_encoder_2")
    return text["projection_dim"] if text else 0


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_random_model(sys.argv[1], Path(sys.argv[2]))
