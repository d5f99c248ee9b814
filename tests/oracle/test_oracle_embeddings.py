"""Prompts with textual-inversion embeddings give diffusers' pictures, with one vector or several, in either prompt."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import noise, write
from conftest import open_session
from oracle.comparing import pixels_apart
from oracle.family_models import FamilyModels, draw_theirs
from torch import Tensor

from ldmcli import GenerationRequest

EOS = 49407
WIDTHS = {"sd1": (64,), "sd2": (128,), "sdxl": (64, 128)}


@pytest.fixture(params=WIDTHS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def model_of(family: str, models: FamilyModels, random_model: Any, model_folder: Path) -> tuple[Any, Path]:
    """diffusers' pipeline with text encoders and tokenizers of its own, which may be changed, and the folder."""
    theirs, folder = (
        (random_model, model_folder) if family == "sd1" else (models.diffusers(family), models.path(family))
    )
    parts = dict(theirs.components)
    texts = [
        name for name, part in parts.items() if part is not None and name.startswith(("text_encoder", "tokenizer"))
    ]
    changed = type(theirs)(**parts | {name: copy.deepcopy(parts[name]) for name in texts}, **_extras(theirs))
    changed.set_progress_bar_config(disable=True)
    return changed, folder


def _extras(pipeline: Any) -> dict[str, Any]:
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    return {name: pipeline.config[name] for name in names if name in pipeline.config}


def embed(pipeline: Any, token: str, vectors: Mapping[str, Tensor]) -> None:
    """Have diffusers read `token` as these vectors by part."""
    for part, tensor in vectors.items():
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, part.replace("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion({token: tensor}, token=token, text_encoder=encoder, tokenizer=tokenizer)
        # Else it pools at the highest id, which is a vector's where the prompt has the token.
        encoder.config.eos_token_id = EOS
        getattr(encoder, "text_model", encoder).eos_token_id = EOS


def saved(path: Path, vectors: Mapping[str, Tensor]) -> Path:
    """The vectors by part as a file."""
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    if len(vectors) == 1:
        return write(path, {"emb_params": vectors["text_encoder"]})
    return write(path, {names[part]: tensor for part, tensor in vectors.items()})


def random_vectors(family: str, count: int, seed: int) -> dict[str, Tensor]:
    parts = ("text_encoder", "text_encoder_2")
    return {
        part: noise(count, width, seed=seed + i, scale=1.0)
        for i, (part, width) in enumerate(zip(parts, WIDTHS[family], strict=False))
    }


def test_pictures_with_two_embeddings_are_diffusers(
    family: str, family_models: FamilyModels, random_model: Any, model_folder: Path, tmp_path: Path
) -> None:
    theirs, folder = model_of(family, family_models, random_model, model_folder)
    one, three = random_vectors(family, 1, 1), random_vectors(family, 3, 5)
    embed(theirs, "<toy>", one)
    embed(theirs, "badhands", three)
    files = (
        f"{saved(tmp_path / 'learned.safetensors', one)}:<toy>",
        str(saved(tmp_path / "badhands.safetensors", three)),
    )
    settings: dict[str, Any] = {
        "seed": 3, "steps": 4, "sampler": "ddim", "guidance_scale": 5.0, "width": 96, "height": 96,
    }  # fmt: skip
    with open_session(folder) as session:
        drawn = []
        for prompt, negative in (
            ("a photo of <toy>, on a badhands table", "blurry"),
            ("a photo of a cat", "badhands, <toy>, blurry"),
        ):
            request = GenerationRequest(prompt, negative, embeddings=files, **settings)
            (picture,) = session.draw([request])
            _, expected = draw_theirs(theirs, [request])
            assert pixels_apart(picture.pixels()[None], expected) <= 1
            (plain,) = session.draw([GenerationRequest(prompt, negative, **settings)])
            assert pixels_apart(plain.pixels()[None], expected) > 10
            drawn.append(expected)
        assert not np.array_equal(*drawn)


def test_a_refiner_reads_its_part_of_an_embedding(family_models: FamilyModels, tmp_path: Path) -> None:
    """The same two vectors for the second encoder as rows of the refiner's own table."""
    table = family_models.diffusers("refiner").text_encoder_2.get_input_embeddings().weight
    vectors = {"text_encoder": noise(2, 64), "text_encoder_2": table[[2368, 1929]].clone()}
    file = str(saved(tmp_path / "zoomtoy.safetensors", vectors))
    settings: dict[str, Any] = {"seed": 3, "steps": 2, "width": 96, "height": 96, "refiner_start": 0.0}
    with open_session(family_models.path("sdxl"), refiner=str(family_models.path("refiner"))) as session:
        requests = [
            GenerationRequest("a zoomtoy", embeddings=(file,), **settings),
            GenerationRequest("a cat dog", **settings),
        ]
        ours, plain = (next(session.draw([request])).pixels() for request in requests)
    assert np.array_equal(ours, plain)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_states_and_pooled_prompts_are_diffusers(
    clip_skip: int, family_models: FamilyModels, random_model: Any, model_folder: Path, tmp_path: Path
) -> None:
    theirs, folder = model_of("sdxl", family_models, random_model, model_folder)
    vectors = random_vectors("sdxl", 3, 1)
    embed(theirs, "zoomtoy", vectors)
    file = str(saved(tmp_path / "zoomtoy.safetensors", vectors))
    request = GenerationRequest("a zoomtoy on a table", "", clip_skip=clip_skip, embeddings=(file,), steps=2, seed=1)
    with open_session(folder) as session:
        fitted = session.fit(request)
        session.load([fitted])
        assert session._drawer is not None
        prompts = session._drawer.pipeline.model.prompts
        (ours,) = prompts.encode([request.prompt], clip_skip=clip_skip, words=prompts.words(fitted))
        (plain,) = prompts.encode([request.prompt], clip_skip=clip_skip)
    with torch.inference_mode():
        found = theirs.encode_prompt([request.prompt], device="cpu", clip_skip=clip_skip - 1 or None)
    torch.testing.assert_close(ours.context, found[0], rtol=1e-4, atol=1e-5)
    assert ours.pooled is not None
    torch.testing.assert_close(ours.pooled, found[2], rtol=1e-4, atol=1e-5)
    assert plain.pooled is not None
    assert not torch.allclose(plain.pooled, ours.pooled, atol=1e-2)
