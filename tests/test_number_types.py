"""Number types: small lists come out of weight files without torch, and weights that are none are refused by name."""

import dataclasses
import functools
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from cli_support import assert_refused, ldm_here, tiny_single_file
from safetensors.torch import load_file, save_file

from ldmcli.checkpoints import load as loading
from ldmcli.checkpoints.files import open_weights, read_numbers
from ldmcli.checkpoints.header import DTYPES, FLOATING
from ldmcli.checkpoints.source import model_of_file
from ldmcli.errors import BadDataError
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL


@pytest.mark.parametrize("dtype", sorted(FLOATING))
@pytest.mark.parametrize("kind", ["safetensors", "zip", "bare"])
def test_numbers_are_read(tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual types of safetensors without torch; those of 8 bits are in no pickle that is read."""
    if kind != "safetensors" and dtype.startswith("F8"):
        return
    of_torch = getattr(torch, DTYPES[dtype][0])
    values = {"list": torch.tensor([0.9991, 0.5, -1e-3]).to(of_torch), "one": torch.tensor(0.25, dtype=of_torch)}
    values |= {"none": torch.zeros(0, dtype=of_torch), "tail": torch.arange(4).to(of_torch)[2:].clone()}
    path = tmp_path / "a"
    if kind == "safetensors":
        save_file(values, path)
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    weights = open_weights(path, allow_pickle=True)
    if kind == "safetensors" and dtype in ("F16", "F32", "F64"):
        monkeypatch.setitem(sys.modules, "torch", None)
    found = {name: read_numbers(weights, name) for name in values}
    monkeypatch.undo()
    assert found == {name: tensor.flatten().tolist() for name, tensor in values.items()}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(5), "up to 4 numbers"),
        (torch.ones(2, 2), "up to 4 numbers"),
        (torch.ones(2, dtype=torch.int64), "I64"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]).bfloat16(), "NaN or infinity"),
    ],
)
def test_other_tensors_are_no_numbers(tmp_path: Path, value: torch.Tensor, words: str) -> None:
    torch.save({"a": value}, tmp_path / "a.ckpt")
    weights = open_weights(tmp_path / "a.ckpt", allow_pickle=True)
    with pytest.raises(BadDataError, match=words):
        read_numbers(weights, "a", limit=4)
    with pytest.raises(BadDataError, match="no tensor “z”"):
        read_numbers(weights, "z")


def test_numbers_of_a_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(9)}, path)
    weights = open_weights(path)
    os.truncate(path, 80)
    with pytest.raises(BadDataError, match="changed"):
        read_numbers(weights, "a")


# ---- every tensor of a model, in every type and shape ----

SHAPES = [(), (0,), (1, 1), (0, 0, 0, 0), (1,) * 5, (1 << 30, 1)]


class Accepted(Exception):
    """Raised in place of reading what headers do not speak against."""


def test_any_type_and_shape_of_any_tensor_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """From headers alone, by its name; no other error comes of it."""
    file = open_weights(tiny_single_file())
    monkeypatch.setattr(loading, "read_all", mock.Mock(side_effect=Accepted))
    modules = functools.cache(lambda make, config: loading.on_meta(lambda: make(config)))
    loaders = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextTransformer}
    dtypes = list(DTYPES)
    for number, (name, info) in enumerate(file.tensors.items()):
        other = dataclasses.replace(info, dtype=dtypes[number % len(dtypes)])
        for changed in (other, dataclasses.replace(info, shape=SHAPES[number % len(SHAPES)])):
            sound = changed.dtype in FLOATING and changed.shape == info.shape
            try:
                source = model_of_file(dataclasses.replace(file, tensors=file.tensors | {name: changed}))
                part = next(source.part(part) for part, prefix in source.prefixes.items() if name.startswith(prefix))
                module = modules(loaders[part.name], part.config)  # building one takes longer than all else
                loading.fill(module, part, torch.device("cpu"), torch.float32)
            except Accepted:
                assert sound, (name, changed)
            except BadDataError:
                assert not sound, (name, changed)


def test_whole_numbers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    state = load_file(tiny_single_file())
    key = next(key for key, tensor in state.items() if key.startswith("cond_stage_model.") and tensor.ndim >= 2)
    save_file(state | {key: state[key].int()}, tmp_path / "a.safetensors")
    drawn = ldm_here("txt2img", "x", "-m", tmp_path / "a.safetensors", "-s", "1", "-o", tmp_path / "out")
    assert_refused(drawn, 65, f"no floating numbers ({key}: I32)")
