"""The text transformer computes what is read of it, and nothing else is imported, built or computed for it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.family_models import FamilyModels
from safetensors.torch import load_file, save_file

from ldmcli.checkpoints import buildable
from ldmcli.checkpoints.load import load_text_encoders, on_meta
from ldmcli.checkpoints.source import open_model
from ldmcli.conditioning.prompts import TextEncoder
from ldmcli.config import TextEncoderConfig
from ldmcli.networks.clip import ACTIVATIONS, TextTransformer, quick_gelu

CONFIG = TextEncoderConfig(vocab_size=50, hidden_size=16, intermediate_size=24, layers=4, heads=2, eos_token_id=49)
IDS = torch.tensor([[48, 3, 4, 49, 49], [48, 3, 5, 6, 49]])
STATES_ONLY = dataclasses.replace(CONFIG, max_length=5)
WITH_PROJECTION = dataclasses.replace(STATES_ONLY, projection_dim=6)


def computed_layers(config: TextEncoderConfig, **settings: Any) -> list[int]:
    """Which layers a call runs."""
    model, called = TextTransformer(config).eval(), []
    for number, layer in enumerate(model.encoder["layers"]):  # type: ignore[arg-type]
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    with torch.inference_mode():
        model(IDS, **settings)
    return called


def test_layers_that_nobody_reads_are_not_computed() -> None:
    skipping = dataclasses.replace(WITH_PROJECTION, skipped_layers=1)
    assert computed_layers(STATES_ONLY) == [0, 1, 2, 3]
    assert computed_layers(STATES_ONLY, clip_skip=3) == [0, 1]
    assert computed_layers(skipping) == [0, 1, 2, 3]  # the pooled prompt is the last layer's
    assert computed_layers(skipping, pooled=False) == [0, 1, 2]
    assert computed_layers(skipping, clip_skip=2, pooled=False) == [0, 1]


def test_more_layers_skipped_than_there_are() -> None:
    model = TextTransformer(STATES_ONLY)
    with torch.inference_mode():
        assert torch.equal(model(IDS, clip_skip=5)[0], model.final_layer_norm(model.embeddings(IDS)))
    with pytest.raises(ValueError, match="clip_skip 6"):
        model(IDS, clip_skip=6)


def test_a_token_does_not_see_those_after_it() -> None:
    model = TextTransformer(STATES_ONLY).eval()
    changed = IDS.clone()
    changed[:, 3] = 7
    with torch.inference_mode():
        before, after = model(IDS)[0], model(changed)[0]
    assert torch.equal(before[:, :3], after[:, :3])
    assert ((before - after)[:, 3:].abs().amax(dim=-1) > 1e-4).all()


def test_quick_gelu() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert torch.allclose(quick_gelu(x), x / (1 + (-1.702 * x).exp()), rtol=1e-12)
    assert (quick_gelu(x) - torch.nn.functional.gelu(x)).abs().max() < 0.021


def test_every_activation_that_is_let_through_can_be_computed() -> None:
    assert set(buildable.ACTIVATIONS) == set(ACTIVATIONS)


def test_the_encoder_gives_a_pooled_prompt_where_asked() -> None:
    model = TextTransformer(WITH_PROJECTION).eval()
    for asked in (True, False):
        states, pooled = TextEncoder(model, None, pooled=asked).encode(IDS)  # type: ignore[arg-type]
        assert states.shape == (2, 5, 16)
        assert (pooled is not None) == asked
        assert pooled is None or pooled.shape == (2, 6)


@pytest.mark.parametrize("layout", ["folder", "file"])
@pytest.mark.parametrize(("name", "pooled"), [("sd2", [False]), ("sdxl", [False, True]), ("refiner", [True])])
def test_pooled_prompts_are_computed_for_networks_that_read_them(
    family_models: FamilyModels, name: str, layout: str, pooled: list[bool]
) -> None:
    """A file of version 2 has a projection, too, which nothing reads."""
    source = open_model(family_models.path(name, layout))
    if (name, layout) == ("sd2", "file"):
        assert source.config.text_encoders[0].projection_dim
    found = []
    encoders = load_text_encoders(source, torch.device("cpu"), torch.float32)
    for encoder, tokenizer in zip(encoders, source.tokenizers, strict=True):
        _, projected = encoder.encode(torch.tensor([tokenizer.framed([5])]))
        found.append(projected is not None)
    assert found == pooled


def test_the_first_of_two_encoders_pools_for_nobody(family_models: FamilyModels, tmp_path: Path) -> None:
    folder = shutil.copytree(family_models.path("sdxl", "folder"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    weights = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(weights) | {"text_projection.weight": torch.ones(768, 64)}, weights)
    source = open_model(folder)
    assert source.config.text_encoders[0].projection_dim == 768
    encoder = load_text_encoders(source, torch.device("cpu"), torch.float32)[0]
    assert encoder.encode(torch.tensor([source.tokenizers[0].framed([5])]))[1] is None


def test_building_on_meta_initializes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so holds no state that a checkpoint lacks: every tensor is a weight."""
    touched: list[str] = []

    def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **settings: Any) -> Any:
            touched.append(name)
            return original(*args, **settings)

        return method

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, spy(name, getattr(torch.Tensor, name)))
    TextTransformer(STATES_ONLY)
    assert set(touched) == {"normal_", "uniform_"}  # the spies were in place
    touched.clear()
    model = on_meta(lambda: TextTransformer(WITH_PROJECTION))
    assert touched == []
    assert not list(model.buffers())
    assert all(weight.is_meta for weight in model.parameters())
