"""What FIELD_NOTES §6 knows of weights that are not what they should be, as files and folders to be built by tests.

Each case says what `ldm txt2img -m` must answer, and `ldm info` too unless it can tell what the file is.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli_support import copy_model, empty_tensors, read_safetensors, replace, safetensors, tiny_single_file

UNET = "unet/diffusion_pytorch_model.safetensors"
JUNK = b"\x1b[31m\xe2\x80\xae"  # colours the terminal, and turns what follows around
MARKER = "unpickled"  # the file that a pickled bomb makes in the working folder
Shapes = dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Case:
    """`build` makes it in an empty folder and says what to give to --model; `info` is in what `ldm info` prints where
    that is no error."""

    name: str
    build: Callable[[Path], Path]
    words: tuple[str, ...]
    code: int = 65
    info: str | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


class Bomb:
    """Pickled, it writes MARKER when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (f"open({MARKER!r}, 'w')",)


def rewritten(path: Path, change: Callable[[dict[str, Any], bytearray], object]) -> None:
    """Put a changed weight file in place of `path`; `change` is done to its header and data."""
    header, data = read_safetensors(path)
    body = bytearray(data)
    change(header, body)
    replace(path, safetensors(header, bytes(body)))


# ---- paths ----


def _neighbour(folder: Path) -> Path:
    (folder / "lighthouse-v2.safetensors").touch()
    return folder / "lighthouse-v1.safetensors"


def _link(target: str, make: Callable[[Path], object] = lambda target: None) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        make(folder / target)
        (folder / "link").symlink_to(target)
        return folder / "link"

    return build


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):  # a socket's name is short
        listener.bind("s")
    return folder / "s"


def _circle(folder: Path) -> Path:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a"


def _folder(*inside: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "folder").mkdir()
        for name in inside:
            (folder / "folder" / name).touch()
        return folder / "folder"

    return build


PATHS = [
    Case("missing file", _neighbour, ("not exist", "lighthouse-v2.safetensors"), 66),
    Case("missing folder", lambda folder: folder / "no" / "such" / "folder.safetensors", ("nor does its folder",), 66),
    Case("endless name", lambda folder: folder / ("n" * 300), ("not exist",), 66),
    Case("dangling link", _link("gone"), ("link", "gone"), 66),
    Case("circle of links", _circle, ("circle",)),
    Case("link to itself", _link("link"), ("circle",)),
    Case("pipe", _fifo, ("pipe",)),
    Case("link to a pipe", _link("fifo", os.mkfifo), ("pipe",)),
    Case("socket", _socket, ("socket",)),
    Case("endless device", lambda _: Path("/dev/zero"), ("device",)),
    Case("terminal", lambda _: Path("/dev/tty"), ("device",)),
    Case("own memory", lambda _: Path("/proc/self/mem"), ("empty",)),
    Case("kernel log", lambda _: Path("/proc/kmsg"), ("empty",)),
    Case("folder without index", _folder(), ("model_index.json",)),
    Case("folder with a model", _folder("v1.safetensors"), ("did you mean", "v1.safetensors")),
]


# ---- files that are no weights: more of them are in test_files ----


def _file(content: bytes | Callable[[], bytes], name: str = "model.safetensors") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        return replace(folder / name, content if isinstance(content, bytes) else content())

    return build


def _zip_bomb() -> bytes:
    """A pickle in a zip, as torch writes them, that runs code."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb(), 2))
    return raw.getvalue()


OTHER_FILES = [
    Case("web page", _file(b"<!DOCTYPE html><html>" + JUNK + b"</html>"), ("web page", "download")),
    Case("bare pickle", _file(lambda: pickle.dumps(Bomb(), 2), "a.ckpt"), ("pickle", "convert", "--allow-pickle")),
    Case("new pickle", _file(lambda: pickle.dumps(Bomb(), 5), "a.bin"), ("pickle", "convert", "--allow-pickle")),
    Case("pickle in a zip", _file(_zip_bomb, "a.pt"), ("pickle", "convert", "--allow-pickle")),
    Case("pickle named safetensors", _file(_zip_bomb), ("pickle", "convert", "--allow-pickle")),
    Case("junk", _file(JUNK * 20), ("no safetensors",)),
]


# ---- headers that are large, or claim to be: others are in test_files ----


def _header(make: Callable[[], bytes]) -> Callable[[Path], Path]:
    return _file(lambda: safetensors(make(), bytes(4)))


def _empty_entries(count: int) -> bytes:
    empty = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{i}":{empty}' for i in range(count)) + "}").encode()


def _numbers() -> bytes:
    return b"{" + b",".join(b'"%d":0' % i for i in range(499_000)) + b"}"


def _many(count: int, cut: int | None = None) -> Callable[[Path], Path]:
    """A header of `count` tensors without a number in them; only `cut` bytes of it."""
    return _file(lambda: safetensors(_empty_entries(count)[:cut]))


def _sparse(header: bytes, length: int, size: int) -> Callable[[Path], Path]:
    """A file of `size` bytes, most of them holes, whose header claims `length`."""

    def build(folder: Path) -> Path:
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", length) + header)
            file.truncate(size)
        return folder / "model.safetensors"

    return build


def _one_tensor(count: int) -> bytes:
    return json.dumps({"a": {"dtype": "F16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()


_BIG = _one_tensor(1 << 35)
HEADERS = [
    Case("header of 2^64", _file(struct.pack("<Q", 2**64 - 1) + b"{}"), ("claim",)),
    Case("header of 99 MB", _sparse(b"{", 99 << 20, 100 << 20), ("claim",)),
    Case("million tensors", _many(1_000_000), ("claim",)),
    Case("half a million tensors", _many(500_000), ("far beyond any model",)),
    Case("fifty thousand tensors", _many(50_000), ("no model",), info="unknown"),
    Case("half a million numbers", _header(_numbers), ("more",)),
    Case("half a header", _many(50_000, -1_000_000), ("broken JSON",)),
    Case("deep header", _header(lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ("deep",)),
    Case("many lists", _header(lambda: b'{"a":[' + b"[]," * 99_000 + b"0" + b",10000" * 400_000 + b"]}"), ("dtype",)),
    Case("endless number", _header(lambda: b'{"a":' + b"9" * 1_000_000 + b"}"), ("broken JSON",)),
    Case("name of 30 MB", _header(lambda: b'{"' + b"x" * (30 << 20) + b'":0}'), ("without dtype",)),
    Case("escapes of 32 MB", _header(lambda: b'{"a":"' + b"\\u4e00" * 5_592_000 + b'"}'), ("without dtype",)),
    Case("key twice", _header(lambda: b'{"a\\u001b":0,"a\\u001b":0}'), ("twice", "a\\x1b")),
    Case("no tensors", _file(safetensors({})), ("no tensors",), info="unknown"),
    Case("64 GB", _sparse(_BIG, len(_BIG), 8 + len(_BIG) + (1 << 36)), ("no model",), info="68719476736"),
]


# ---- sound files that are another kind of thing: more kinds are in test_families ----


def _tensors(shapes: Shapes) -> Callable[[Path], Path]:
    return _file(lambda: empty_tensors(shapes))


def _changed(changes: Callable[[Shapes], Shapes | None]) -> Callable[[Path], Path]:
    """The random model in one file, all zeros, with tensors of other shapes."""

    def build(folder: Path) -> Path:
        header, _ = read_safetensors(tiny_single_file())
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        return replace(folder / "model.safetensors", empty_tensors(shapes | (changes(shapes) or {})))

    return build


def _wider(shapes: Shapes) -> Shapes:
    return {name: [33, *shape[1:]] for name, shape in shapes.items() if name.endswith("out_layers.3.weight")}


def _without(name: str) -> Callable[[Shapes], None]:
    def change(shapes: Shapes) -> None:
        del shapes[name]

    return change


_POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
_BOXES = "model.diffusion_model.position_net.weight"
_BLOCKS = {f"model.diffusion_model.input_blocks.{i}.x": [0] for i in range(20_000)}
_POST = "post_quant_conv.weight"
OTHER_KINDS = [
    Case("lora", _tensors({"lora_unet_mid.lora_down.weight": [4, 8], "lora_unet_mid.alpha": []}), ("LoRA",),
         info="LoRA"),
    Case("unknown kind", _tensors({f"some\x1b[31m.{i}": [2] for i in range(9)}),
         ("no model", "some\\x1b[31m.0", "4 more"), info="unknown"),
    Case("model of boxes", _changed(lambda _: {_BOXES: [1]}), ("GLIGEN",), info="GLIGEN"),
    Case("odd widths", _changed(_wider), ("33 channels", "32 norm groups"), info="Stable Diffusion 1"),
    Case("endless width", _changed(lambda _: {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight":
         [1 << 50, 0]}), ("dimension of 1125899906842624",), info="Stable Diffusion 1"),
    Case("one token", _changed(lambda _: {_POSITIONS: [1, 64]}), ("1 tokens",), info="Stable Diffusion 1"),
    Case("20000 blocks", _changed(lambda _: _BLOCKS), ("fit no Stable Diffusion",), info="Stable Diffusion 1"),
    Case("tensor missing", _changed(_without(f"first_stage_model.{_POST}")), (_POST, "missing"),
         info="Stable Diffusion 1"),
]  # fmt: skip


# ---- folders: those with shards are in test_files ----


def _part(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """A copy of the random model, with `change` done to the U-Net's weight file."""

    def build(folder: Path) -> Path:
        model = copy_model(folder / "model")
        change(model / UNET)
        return model

    return build


def _cut_in_half(weights: Path) -> None:
    whole = weights.read_bytes()
    replace(weights, whole[: len(whole) // 2])


def _only_pickled(weights: Path) -> None:
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(), 2))


def _into_a_pipe(weights: Path) -> None:
    weights.unlink()
    os.mkfifo(weights)


FOLDERS = [
    Case("part cut short", _part(_cut_in_half), ("cut short",)),
    Case("part missing", _part(os.unlink), ("no diffusion_pytorch_model.safetensors",), 66),
    Case("part a pipe", _part(_into_a_pipe), ("pipe",)),
    Case("part a circle", _part(lambda weights: (weights.unlink(), weights.symlink_to(weights.name))), ("circle",)),
    Case("part pickled", _part(_only_pickled), ("pickle", "convert")),
]

ALL = [*PATHS, *OTHER_FILES, *HEADERS, *OTHER_KINDS, *FOLDERS]
