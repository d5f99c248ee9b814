"""Small lists of numbers, such as a model's own noise levels, come out of weight files without torch."""

import os
import sys
from pathlib import Path

import pytest
import torch

from ldmcli.checkpoints.files import open_weights, read_numbers, write_tensors
from ldmcli.checkpoints.header import DTYPES, FLOATING
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
