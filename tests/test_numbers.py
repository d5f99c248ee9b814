"""Small lists of numbers, such as a model's own noise levels, come out of weight files without torch."""

import os
import sys
from pathlib import Path

import pytest
import torch

from ldmcli.checkpoints.files import open_weights, read_numbers, write_tensors
from ldmcli.errors import BadDataError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "bare"])
def test_numbers_are_read_without_torch(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"list": torch.tensor([0.9991, 0.5, -1e-3]).to(dtype), "one": torch.tensor(0.25, dtype=dtype)}
    values |= {"none": torch.zeros(0, dtype=dtype), "tail": torch.arange(4).to(dtype)[2:]}
    path = tmp_path / "a"
    if kind == "safetensors":
        write_tensors(path, values)
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    monkeypatch.setitem(sys.modules, "torch", None)
    weights = open_weights(path, allow_pickle=True)
    assert read_numbers(weights, "list") == values["list"].tolist()
    assert read_numbers(weights, "one") == [0.25]
    assert read_numbers(weights, "none") == []
    assert read_numbers(weights, "tail") == [2, 3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(5), "up to 4 numbers"),
        (torch.ones(2, 2), "up to 4 numbers"),
        (torch.ones(2, dtype=torch.int64), "I64"),
        (torch.arange(6.0)[::3], "up to 4 numbers"),
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
