"""FIELD_NOTES §6, the rows about weights: nothing a weight file says is believed before it has been checked.

Every case of the corpus runs as `ldm info` and as `ldm txt2img`, in processes whose time and memory are measured.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import assert_refused, copy_model, ldm_here, pixels, tiny_single_file
from conftest import load
from fork_server import LEAN, quick
from safetensors.torch import load_file
from weight_corpus import ALL, MARKER, UNET, Bomb, Case, rewritten

pytestmark = pytest.mark.timeout(120)
CPU = 10.0  # seconds of CPU time, of which one takes at most 1 on a quiet machine


# ---- the corpus ----


@pytest.mark.parametrize("command", ["info", "txt2img"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_weights_that_are_not_what_they_should_be(tmp_path: Path, case: Case, command: str) -> None:
    """Refused (or, by `ldm info`, told) from headers alone, in bounded time and memory, leaving nothing behind."""
    (tmp_path / "built").mkdir()
    (tmp_path / "here").mkdir()
    model = case.build(tmp_path / "built")
    arguments = ["info", model] if command == "info" else ["txt2img", "x", "-m", model, "-o", "out"]
    result = quick(*arguments, cwd=tmp_path / "here")
    if command == "info" and case.info is not None:
        assert result.code == 0, result
        assert case.info in result.out.decode(), result
        assert all(line.isprintable() for line in result.out.decode().splitlines())
    else:
        assert len(assert_refused(result, case.code, *case.words)) < 1500
    assert result.seconds < CPU
    assert result.peak < LEAN
    assert list((tmp_path / "here").iterdir()) == [], f"something was written, perhaps {MARKER}"


def test_the_corpus_has_every_case_once() -> None:
    assert len({case.name for case in ALL}) == len(ALL)


# ---- weights that only loading can judge ----


def misshape(header: dict[str, Any], _data: bytearray) -> None:
    for name in sorted(name for name in header if name.startswith("down_blocks.0."))[:7]:
        header[f"extra\x1b.{name}"] = header.pop(name)
    header["conv_in.bias"]["shape"] = [2, 4]


def poison(header: dict[str, Any], data: bytearray) -> None:
    _, end = header["conv_out.weight"]["data_offsets"]
    data[end - 4 : end] = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (misshape, ("lacks tensors", "and 2 more", "extra\\x1b.down", "conv_in.bias: [2, 4] for [8]")),
        (poison, ("NaN", "conv_out.weight")),
    ],
)
def test_weights_that_only_loading_can_judge(
    tmp_path: Path, change: Callable[[dict[str, Any], bytearray], None], words: tuple[str, ...]
) -> None:
    folder = copy_model(tmp_path / "model")
    rewritten(folder / UNET, change)
    arguments = ("-s", "1", "--steps", "1", "-o", "out", "--device", "cpu")
    sentence = assert_refused(ldm_here("txt2img", "x", "-m", folder, *arguments, cwd=tmp_path), 65, *words)
    assert sentence.count("extra\\x1b") in (0, 5)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# ---- nothing stays mapped ----


def modules_of(pipeline: object) -> Iterator[Any]:
    """Every torch module that a pipeline holds, at any depth of its own objects."""
    todo, seen = [pipeline], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            yield item
        elif isinstance(item, list | tuple):
            todo += item
        elif type(item).__module__.startswith("ldmcli."):
            todo += getattr(item, "__dict__", {}).values()


def test_no_mapping_survives_loading(tmp_path: Path) -> None:
    """A mapped file that shrinks kills the process (SIGBUS): here all shrink to nothing, and no weight changes."""
    folder = copy_model(tmp_path / "model")
    weights = sorted(folder.rglob("*.safetensors"))
    for path in weights:
        content = path.read_bytes()
        path.unlink()  # it is a link to a file that all tests share
        path.write_bytes(content)
    pipeline = load(folder)
    tensors = [tensor for module in modules_of(pipeline) for tensor in module.state_dict().values()]
    assert len(tensors) > 100
    before = [tensor.double().sum().item() for tensor in tensors]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    with contextlib.suppress(FileNotFoundError):
        opened = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        assert not [path for path in opened if path.startswith(str(tmp_path))]
    for path in weights:
        os.truncate(path, 0)
    assert [tensor.double().sum().item() for tensor in tensors] == before
    for path in weights:
        path.unlink()
    assert [tensor.double().sum().item() for tensor in tensors] == before


# ---- pickled models, where they are allowed ----

ALLOWED = ("--allow-pickle", "-s", "1", "--steps", "1", "--device", "cpu")


def test_an_allowed_pickle_draws_what_safetensors_draw(tmp_path: Path) -> None:
    state = load_file(tiny_single_file())
    extra = {"model_ema.decay": torch.tensor(0.5), "global_step": 5}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state | extra, "epoch": 1}, path)
    told = quick("info", "--allow-pickle", path)
    assert quick("info", tiny_single_file()).out.splitlines()[1:] == told.out.splitlines()[1:]
    pictures = []
    small = ("--width", "64", "--height", "64")
    for model in (path, tiny_single_file()):
        pictures += ldm_here("txt2img", "x", "-m", model, *ALLOWED, *small, "-o", tmp_path / model.stem).paths
    assert (pixels(pictures[0]) == pixels(pictures[1])).all()


def test_an_allowed_pickle_in_a_folder(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    for path in sorted(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.parent.name == "text_encoder" else path.with_suffix(".bin").name
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    assert_refused(quick("info", folder), 65, "pickle", "--allow-pickle")
    assert quick("info", "--allow-pickle", folder).code == 0
    assert len(ldm_here("txt2img", "x", "-m", folder, *ALLOWED, "-o", tmp_path / "out").paths) == 1


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_an_allowed_pickle_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    """What it wants is named, and torch is not even imported."""
    torch.save({"state_dict": {"a\x1b": Bomb()}}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    for command in (["info", "--allow-pickle", "model.ckpt"], ["txt2img", "x", "-m", "model.ckpt", *ALLOWED]):
        result = quick(*command, cwd=tmp_path)
        assert_refused(result, 65, "model.ckpt", "__builtin__.exec", "safetensors")
        assert result.peak < LEAN
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]
