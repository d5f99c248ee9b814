"""Embeddings of every trainer give vectors for each text encoder; a wrong file names what it is for."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import noise, write
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldmcli.adapters.adapter import open_adapter
from ldmcli.adapters.embeddings import Embedding, bundled_embeddings, open_embedding
from ldmcli.checkpoints.files import open_weights
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError, MissingInputError

CLIP_L = TextEncoderConfig()
VIT_H = TextEncoderConfig(hidden_size=1024)
BIG_G = TextEncoderConfig(part="text_encoder_2", hidden_size=1280)
SD1, SD2, SDXL, REFINER = (CLIP_L,), (VIT_H,), (CLIP_L, BIG_G), (BIG_G,)
ONE, TWO = noise(3, 768, seed=1), noise(3, 1280, seed=2)


def vectors_of(embedding: Embedding, encoders: tuple[TextEncoderConfig, ...]) -> dict[str, Tensor]:
    """The vectors by the part of each text encoder of a model that the embedding is for."""
    embedding.check(encoders, "the model")
    found = {encoder.part: embedding.of_part(encoder.part) for encoder in encoders}
    assert {len(tensor) for tensor in found.values()} == {embedding.count}
    return found


def tensors(**content: Tensor) -> Callable[[Path], Path]:
    return lambda folder: write(folder / "word.safetensors", content)


def pickled(content: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        torch.save(content, folder / "word.pt")
        return folder / "word.pt"

    return build


def picture(text: str | None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        info = PngImagePlugin.PngInfo()
        if text is not None:
            info.add_text("sd-ti-embedding", text)
        Image.new("RGB", (4, 4)).save(folder / "word.png", pnginfo=info)
        return folder / "word.png"

    return build


def encoded(vectors: Any) -> str:
    content = {"name": "other", "string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": vectors}}}
    return base64.b64encode(json.dumps(content).encode()).decode()


A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": ONE}, "name": "x", "step": 5, "sd_checkpoint": None}


@pytest.mark.parametrize(
    "build",
    [
        tensors(emb_params=ONE),
        tensors(**{"<cat>": ONE}),
        tensors(**{"string_to_param.*": ONE}),
        tensors(emb_params=ONE.half().float()),
        pickled(A1111),
        pickled(A1111 | {"string_to_param": {"*": ONE.clone().requires_grad_()}}),
        pickled({"<cat>": ONE}),
        pickled([{"<cat>": ONE}]),
        picture(encoded(ONE.tolist())),
    ],
)
def test_vectors_for_one_text_encoder(build: Callable[[Path], Path], tmp_path: Path) -> None:
    embedding = open_embedding(build(tmp_path), allow_pickle=True)
    assert embedding.word == "word"
    assert embedding.family == "Stable Diffusion 1.x"
    found = vectors_of(embedding, SD1)
    assert list(found) == ["text_encoder"]
    assert found["text_encoder"].dtype == torch.float32
    assert torch.allclose(found["text_encoder"], ONE, rtol=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        tensors(clip_l=ONE, clip_g=TWO),
        tensors(clip_g=TWO, clip_l=ONE, t5xxl=noise(3, 4096)),
        tensors(text_encoders_0=ONE, text_encoders_1=TWO),
        pickled({"clip_l": ONE, "clip_g": TWO}),
        pickled([A1111, A1111 | {"string_to_param": {"*": TWO}}]),
        pickled([{"<cat>": ONE}, {"<cat>": TWO}]),
    ],
)
def test_vectors_for_two_text_encoders(build: Callable[[Path], Path], tmp_path: Path) -> None:
    embedding = open_embedding(build(tmp_path), allow_pickle=True)
    assert embedding.family == "Stable Diffusion XL"
    found = vectors_of(embedding, SDXL)
    assert torch.equal(found["text_encoder"], ONE)
    assert torch.equal(found["text_encoder_2"], TWO)
    assert torch.equal(vectors_of(embedding, REFINER)["text_encoder_2"], TWO)


def test_a_lone_vector_and_few_bits(tmp_path: Path) -> None:
    embedding = open_embedding(tensors(**{"<cat>": noise(1024).to(torch.bfloat16)})(tmp_path))
    found = vectors_of(embedding, SD2)["text_encoder"]
    assert found.shape == (1, 1024)
    assert torch.equal(found[0], noise(1024).to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("content", "encoders", "words"),
    [
        ({"emb_params": ONE}, SDXL, "for Stable Diffusion 1.x, and the model is the model"),
        ({"emb_params": ONE}, SD2, "for Stable Diffusion 1.x, and the model is the model"),
        ({"emb_params": noise(1, 1024)}, SD1, "for Stable Diffusion 2.x, and the model is the model"),
        ({"clip_l": ONE, "clip_g": TWO}, SD1, "for Stable Diffusion XL, and the model is the model"),
        ({"emb_params": noise(1, 55)}, SD1, "for a model with text of 55 numbers, and the model is the model"),
    ],
)
def test_another_family_is_named_with_the_models(
    content: dict[str, Tensor], encoders: tuple[TextEncoderConfig, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(BadDataError, match=words):
        open_embedding(tensors(**content)(tmp_path)).check(encoders, "the model")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tensors(a=noise(1, 2), b=noise(1, 2)), "holds no embedding"),
        (
            tensors(**{"lora_unet_x.lora_up.weight": ONE, "x": ONE}),
            "is a LoRA, not an embedding",
        ),
        (tensors(clip_l=ONE, clip_g=TWO[:2]), "holds 3 and 2 vectors"),
        (tensors(emb_params=noise(76, 768)), "holds 76 vectors, not 1 to 75"),
        (tensors(emb_params=noise(2, 2, 2)), r"holds \[2, 2, 2\] numbers, not vectors"),
        (tensors(emb_params=noise(0, 768)), r"holds \[0, 768\] numbers"),
        (tensors(emb_params=torch.ones(2, 768, dtype=torch.int64)), "not vectors"),
        (tensors(emb_params=torch.full((1, 768), float("nan"))), "NaN or infinity"),
        (pickled([1, 2]), "holds no embedding"),
        (pickled("text"), "holds no table of tensors"),
        (picture(None), "is a picture without the text sd-ti-embedding"),
        (picture("no base64 !"), "has a damaged sd-ti-embedding"),
        (picture(base64.b64encode(b"[" * 100000).decode()), "has a damaged sd-ti-embedding"),
        (picture(base64.b64encode(b'{"string_to_param": 1}').decode()), "has a damaged sd-ti-embedding"),
        (picture(encoded([[1.0], [1.0, 2.0]])), "has a damaged sd-ti-embedding"),
        (picture(encoded([[float("nan")]])), "has NaN or infinity"),
        (picture(encoded("text")), "has a damaged sd-ti-embedding"),
    ],
)
def test_a_damaged_file_is_one_sentence(build: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=words) as caught:
        open_embedding(build(tmp_path), allow_pickle=True).vectors  # noqa: B018  to read it
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="is a pickle"):
        open_embedding(pickled(A1111)(tmp_path))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        open_embedding(tmp_path / "word.safetensors")


def test_embeddings_that_come_with_a_lora(tmp_path: Path) -> None:
    name = "lora_unet_conv_in"
    content = {
        f"{name}.lora_up.weight": noise(320, 1, 1, 1),
        f"{name}.lora_down.weight": noise(1, 4, 3, 3),
        "bundle_emb.cat.string_to_param.*": ONE,
        "bundle_emb.dog.clip_l": ONE,
        "bundle_emb.dog.clip_g": TWO,
        "bundle_emb.cow.emb_params": ONE[:1],
    }
    path = write(tmp_path / "lora.safetensors", content)
    assert len(open_adapter(path).bundled) == 4
    found: dict[str, Embedding] = {embedding.word: embedding for embedding in bundled_embeddings(open_weights(path))}
    assert set(found) == {"cat", "dog", "cow"}
    assert torch.equal(vectors_of(found["cat"], SD1)["text_encoder"], ONE)
    assert torch.equal(vectors_of(found["dog"], SDXL)["text_encoder_2"], TWO)
    assert len(vectors_of(found["cow"], SD1)["text_encoder"]) == 1


def test_a_bundled_one_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", {"bundle_emb.cat.a": ONE, "bundle_emb.cat.b": ONE})
    with pytest.raises(BadDataError, match="bundled embedding “cat”"):
        bundled_embeddings(open_weights(path))
