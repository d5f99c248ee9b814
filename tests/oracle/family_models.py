"""The small models of `random_families` in every layout, and diffusers drawing with them."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from oracle.comparing import as_pixels, call_diffusers, diffusers_scheduler, scaled_as_ours, their_arguments
from oracle.original_layout import original_state, with_extras, write
from oracle.random_families import RECIPES, random_family, same_networks, with_scheduler
from oracle.random_model import save
from torch import Tensor

from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.spec import GenerationRequest


class FamilyModels:
    """Models by the name of their recipe, each made once and not to be changed.

    Layouts: `folder`, `fp16` (a folder with nothing else), `sharded`, `file`, and `crowded`: the file with all that
    training leaves in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[str, str], Any] = {}

    def _once(self, name: str, kind: str, make: Callable[[], Any]) -> Any:
        if (name, kind) not in self._made:
            self._made[name, kind] = make()
        return self._made[name, kind]

    def diffusers(self, name: str) -> Any:
        """diffusers' pipeline. Recipes that differ in their noise schedule alone share their networks."""
        alike = same_networks(name)
        if alike == name:
            return self._once(name, "diffusers", lambda: random_family(name))
        return self._once(name, "diffusers", lambda: with_scheduler(self.diffusers(alike), name))

    def parts(self, name: str) -> dict[str, Any]:
        """Its networks by part."""
        return {part: getattr(self.diffusers(name), part) for part in ("unet", "vae", *RECIPES[name].texts)}

    def path(self, name: str, layout: str = "folder") -> Path:
        """The model on disk."""
        makers: Mapping[str, Callable[[Path], Path]] = {
            "folder": lambda path: self._save(name, path),
            "fp16": lambda path: _save_half(random_family(name), path),
            "sharded": lambda path: _save_sharded(self.diffusers(name), path),
            "file": lambda path: write(original_state(self.parts(name)), path.with_suffix(".safetensors")),
            "crowded": lambda path: write(
                with_extras(original_state(self.parts(name))), path.with_suffix(".safetensors")
            ),
        }
        return self._once(name, layout, lambda: makers[layout](self._root / f"{name}-{layout}"))

    def _save(self, name: str, path: Path) -> Path:
        alike = same_networks(name)
        if alike == name:
            return save(self.diffusers(name), path)
        shutil.copytree(self.path(alike), path, copy_function=os.link, ignore=shutil.ignore_patterns("scheduler"))
        scheduler = self.diffusers(name).scheduler
        scheduler.save_pretrained(path / "scheduler")
        index = json.loads((path / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (path / "model_index.json").unlink()  # a link: the other model keeps its own
        (path / "model_index.json").write_text(json.dumps(index))
        return path

    def ours(self, name: str, layout: str = "folder", refiner: str | None = None) -> Pipeline:
        """This program's pipeline of it, on the CPU in float32; with a refiner of the same layout."""
        return self._once(name, f"ours {layout} {refiner}", lambda: self._load(name, layout, refiner))

    def _load(self, name: str, layout: str, refiner: str | None) -> Pipeline:
        from conftest import loaded, open_session

        wanted = RECIPES[name].scheduler[1].get("prediction_type", "epsilon")
        told = wanted if layout in ("file", "crowded") else None  # a file of 2.x does not say
        second = str(self.path(refiner, layout)) if refiner else None
        pipeline = loaded(open_session(self.path(name, layout), refiner=second, prediction_type=told))
        assert pipeline.config.schedule.prediction_type == wanted
        return pipeline


def _save_half(pipeline: Any, path: Path) -> Path:
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(path, safe_serialization=True, variant="fp16")
    assert list(path.glob("unet/*.safetensors")) == [path / "unet" / "diffusion_pytorch_model.fp16.safetensors"]
    return path


def _save_sharded(pipeline: Any, path: Path) -> Path:
    pipeline.save_pretrained(path, safe_serialization=True, max_shard_size="12MB")
    assert len(list(path.glob("unet/*-of-*.safetensors"))) > 2
    return path


def draw_theirs(
    reference: Any, requests: Sequence[GenerationRequest], refiner: Any = None, **schedule: Any
) -> tuple[list[Tensor], np.ndarray]:
    """diffusers' latents after each step, as ours are scaled, and its pictures; `schedule` replaces settings of the
    noise schedule. A refiner takes over where the requests say."""
    settings = requests[0]
    assert settings.sampler is not None
    scheduler = diffusers_scheduler(settings.sampler, reference.scheduler.config, **schedule)
    common = their_arguments(requests)
    with mock.patch.object(reference, "scheduler", scheduler):
        if refiner is None:
            latents, images = call_diffusers(reference, common)
        else:
            share = settings.refiner_start
            latents, handed = call_diffusers(reference, common | {"output_type": "latent", "denoising_end": share})
            following = diffusers_scheduler(settings.sampler, refiner.scheduler.config, **schedule)
            with mock.patch.object(refiner, "scheduler", following):
                more, images = call_diffusers(refiner, common | {"image": handed, "denoising_start": share})
            latents += more
    return scaled_as_ours(latents, settings.sampler, scheduler), as_pixels(images)


def their_prompts(reference: Any, prompts: list[str], clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
    """Context and, for XL, pooled prompts as diffusers encodes them."""
    if hasattr(reference, "text_encoder_2"):
        found = reference.encode_prompt(prompts, device="cpu", clip_skip=clip_skip - 1 or None)
        return found[0], found[2]
    # Its own clip_skip for version 2 fails with a CLIPTextModel of transformers 5.6 and later: written out here.
    ids = reference.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    states = reference.text_encoder(ids.input_ids, output_hidden_states=True).hidden_states[-clip_skip]
    return reference.text_encoder.final_layer_norm(states), None


def their_negative(reference: Any) -> tuple[Tensor, Tensor | None]:
    """What diffusers takes where no negative prompt is given: context and, for XL, the pooled prompt."""
    asked = {"prompt": ["a"], "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    found = reference.encode_prompt(**asked)
    return found[1], found[3] if len(found) == 4 else None
