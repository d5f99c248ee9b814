"""Number types: small lists come out of weight files without torch, and weights that are none are refused by name."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import assert_refused, ldm, tiny_single_file
from safetensors.torch import load_file

from ldmcli.checkpoints import load as loading
from ldmcli.checkpoints.files import open_weights, read_numbers, write_tensors
from ldmcli.checkpoints.header import DTYPES, FLOATING
from ldmcli.checkpoints.source import model_of_file
from ldmcli.errors import BadDataError


@pytest.mark.parametrize("dtype", sorted(FLOATING))
@pytest.mark.parametrize("kind", ["safetensors", "zip", "bare"])
def test_numbers_are_read(tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of safetensors without torch; those of 8 bits are in no pickle that is read."""
    if kind != "safetensors" and dtype.startswith("F8"):
        return
    dtype = getattr(torch, DTYPES[dtype][0])
    values = {"list": torch.tensor([0.9991, 0.5, -1e-3]).to(dtype), "one": torch.tensor(0.25, dtype=dtype)}
    values |= {"none": torch.zeros(0, dtype=dtype), "tail": torch.arange(4).to(dtype)[2:].clone()}
    path = tmp_path / "a"
    if kind == "safetensors":
        write_tensors(path, values)
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    weights = open_weights(path, allow_pickle=True)
    assert read_numbers(weights, "list") == values["list"].tolist()
    assert read_numbers(weights, "one") == [0.25]
    assert read_numbers(weights, "none") == []
    assert read_numbers(weights, "tail") == [2, 3]
    monkeypatch.undo()


def test_every_float8_is_read(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for name in (name for name in FLOATING if name.startswith("F8")):
        values = codes.view(getattr(torch, DTYPES[name][0]))
        finite = codes[values.float().isfinite()].view(values.dtype)
        write_tensors(tmp_path / "a", {"a": finite})
        assert read_numbers(open_weights(tmp_path / "a"), "a") == finite.double().tolist(), name


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
    write_tensors(path, {"a": torch.ones(9)})
    weights = open_weights(path)
    os.truncate(path, 80)
    with pytest.raises(BadDataError, match="changed"):
        read_numbers(weights, "a")


# ---- every tensor of a model, in every type and shape ----

SHAPES = [(), (0,), (1, 1), (0, 0, 0, 0), (1,) * 5, (1 << 30, 1)]


class Accepted(Exception):
    """Raised in place of reading what headers do not speak against."""


def accept(*_: object) -> None:
    raise Accepted


def test_any_type_and_shape_of_any_tensor_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """From headers alone, by its name; no other error comes of it."""
    file = open_weights(tiny_single_file())
    monkeypatch.setattr(loading, "_read", accept)
    build, built = loading.on_meta, {}  # building a network takes longer than all else

    def build_once(make: Any) -> Any:
        key = part + repr(source.config)
        built[key] = built.get(key) or build(make)
        return built[key]

    monkeypatch.setattr(loading, "on_meta", build_once)
    loaders = {"unet": loading.load_unet, "vae": loading.load_vae}
    dtypes = list(DTYPES)
    for number, (name, info) in enumerate(file.tensors.items()):
        shape = SHAPES[number % len(SHAPES)]
        other = dataclasses.replace(info, dtype=dtypes[number % len(dtypes)])
        for changed in (other, dataclasses.replace(info, shape=shape)):
            try:
                source = model_of_file(dataclasses.replace(file, tensors=file.tensors | {name: changed}))
                part = next(part for part, prefix in source.prefixes.items() if name.startswith(prefix))
                loaders.get(part, loading.load_text_encoders)(source, torch.device("cpu"), torch.float32)
            except Accepted:
                assert changed.dtype in FLOATING, (name, changed)
                assert changed.shape == info.shape, (name, changed)
            except BadDataError:
                sound = changed.dtype in FLOATING and changed.shape == info.shape
                if sound:
                    raise


@pytest.mark.parametrize("beginning", ["cond_stage_model.", "first_stage_model.", "model.diffusion_model."])
def test_whole_numbers_are_refused_in_one_sentence(tmp_path: Path, beginning: str) -> None:
    state = load_file(tiny_single_file())
    key = next(key for key, tensor in state.items() if key.startswith(beginning) and tensor.ndim >= 2)
    write_tensors(tmp_path / "a.safetensors", state | {key: state[key].int()})
    drawn = ldm("txt2img", "x", "-m", tmp_path / "a.safetensors", "-s", "1", "-o", tmp_path / "out")
    assert_refused(drawn, 65, f"no floating numbers ({key}: I32)")
