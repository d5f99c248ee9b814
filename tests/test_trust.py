"""FIELD_NOTES §6, the rows about weights: nothing a weight file says is believed before it has been checked.

Every case of the corpus runs as `ldm info` and as `ldm txt2img`, in processes whose time and memory are measured.
"""

import contextlib
import dataclasses
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import (
    LDM,
    Result,
    assert_refused,
    copy_model,
    ldm,
    pixels,
    safetensors,
    tiny_model,
    tiny_single_file,
)
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_corpus import ALL, MARKER, UNET, Bomb, Case, rewritten

from ldmcli.checkpoints.files import open_weights
from ldmcli.errors import LdmError

pytestmark = pytest.mark.timeout(120)
CPU = 2.0  # seconds on a quiet machine, of which starting the interpreter and the command line takes …
START = 0.2
LEAN = 150 << 20  # bytes: with torch imported it would be more
WALL = 20.0  # seconds, on a machine that others use; what hangs would hang for ever
# Runs what follows its first argument, a file to which it writes their peak memory (bytes) and CPU time (seconds). A
# process inherits the peak of the one that starts it, so this one, and not pytest with its torch, must do that.
_WATCH = """
import os, sys
child = os.fork()
if not child:
    os.execv(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{used.ru_maxrss * 1024} {used.ru_utime + used.ru_stime}")
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclasses.dataclass(frozen=True)
class Watched:
    """A finished `ldm`, with its peak memory in bytes and CPU time in seconds."""

    result: Result
    memory: int
    cpu: float


def watched(folder: Path, *arguments: str | Path) -> Watched:
    """Run `ldm ARGUMENTS` in `folder`."""
    report = folder / "report"
    program = (sys.executable, "-S", "-c", _WATCH, str(report), *LDM)
    result = ldm(*arguments, program=program, cwd=folder, timeout=WALL)
    memory, cpu = report.read_text().split()
    report.unlink()
    return Watched(result, int(memory), float(cpu))


@pytest.fixture(scope="module")
def most_cpu(tmp_path_factory: pytest.TempPathFactory) -> float:
    """CPU, as much longer as starting takes here and now: seconds of processors that others use too are shorter."""
    folder = tmp_path_factory.mktemp("start")
    return CPU * max(1.0, *(watched(folder, "info", "/dev/zero").cpu / START for _ in range(3)))


# ---- the corpus ----


@pytest.mark.parametrize("command", ["info", "txt2img"])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_weights_that_are_not_what_they_should_be(tmp_path: Path, most_cpu: float, case: Case, command: str) -> None:
    """Refused (or, by `ldm info`, told) from headers alone, in bounded time and memory, leaving nothing behind."""
    (tmp_path / "built").mkdir()
    (tmp_path / "here").mkdir()
    model = case.build(tmp_path / "built")
    arguments = ["info", model] if command == "info" else ["txt2img", "x", "-m", model, "-o", "out"]
    ran = watched(tmp_path / "here", *arguments)
    if command == "info" and case.told is not None:
        assert ran.result.code == 0, ran
        assert case.told in ran.result.out.decode(), ran
        assert all(line.isprintable() for line in ran.result.out.decode().splitlines())
    else:
        sentence = assert_refused(ran.result, case.code, *case.words, seconds=WALL)
        assert len(sentence) < 1500
    assert ran.cpu < most_cpu, ran
    assert ran.memory < LEAN, ran
    assert list((tmp_path / "here").iterdir()) == [], f"something was written, perhaps {MARKER}"


def test_the_corpus_has_every_case_once() -> None:
    assert len({case.name for case in ALL}) == len(ALL)


# ---- weights that only loading can judge ----


def misshape(header: dict[str, Any], _data: bytearray) -> None:
    for name in sorted(name for name in header if name.startswith("down_blocks.0."))[:7]:
        header[f"extra\x1b.{name}"] = header.pop(name)
    header["conv_in.bias"]["shape"] = [2, 4]


def poison(value: float) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], data: bytearray) -> None:
        _, end = header["conv_out.weight"]["data_offsets"]
        data[end - 4 : end] = struct.pack("<f", value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (misshape, ("lacks tensors", "and 2 more", "extra\\x1b.down", "conv_in.bias: [2, 4] for [8]")),
        (poison(float("nan")), ("NaN", "conv_out.weight")),
        (poison(float("-inf")), ("infinity", "conv_out.weight")),
    ],
    ids=["misshapen", "nan", "infinity"],
)
def test_weights_that_only_loading_can_judge(
    tmp_path: Path, change: Callable[[dict[str, Any], bytearray], None], words: tuple[str, ...]
) -> None:
    folder = copy_model(tmp_path / "model")
    rewritten(folder / UNET, change)
    ran = watched(tmp_path, "txt2img", "x", "-m", folder, "-s", "1", "--steps", "1", "-o", "out", "--device", "cpu")
    sentence = assert_refused(ran.result, 65, *words, seconds=WALL)
    assert sentence.count("extra\\x1b") in (0, 5)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# ---- nothing stays mapped ----


def modules_of(pipeline: object) -> Iterator[Any]:
    """Every torch module that a pipeline holds, at any depth of its own objects."""
    import torch

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


# ---- the header parser and safetensors' own ----

_BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8}
_TENSOR = st.tuples(st.sampled_from(sorted(_BYTES)), st.lists(st.integers(0, 3), max_size=3))


@st.composite
def sound_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Header and data of a sound file, with any names, in any order of keys and any white space."""
    tensors = draw(
        st.dictionaries(st.text(max_size=6).filter(lambda name: name != "__metadata__"), _TENSOR, max_size=5)
    )
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = _BYTES[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    keys = draw(st.permutations(list(header)))
    shuffled = {key: header[key] for key in keys}
    raw = json.dumps(shuffled, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return raw.encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 9)), bytes(end)


def read_by_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict
        return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}


def check_agreement(path: Path, content: bytes) -> bool:
    """Whether `content` is accepted; if so, safetensors' own reader finds the same in it. No error but LdmError."""
    path.write_bytes(content)
    try:
        weights = open_weights(path)
    except LdmError:
        return False
    assert read_by_safetensors(path) == {name: (info.dtype, info.shape) for name, info in weights.tensors.items()}
    return True


@settings(max_examples=100, deadline=2000)
@given(sound_files())
def test_sound_headers_are_accepted_as_safetensors_does(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[bytes, bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    assert check_agreement(path, safetensors(*sound))


EDIT = st.tuples(st.floats(0, 1), st.sampled_from([*b'{}[]:,"\\0129-.eE \n', 0, 0x80, 0xED, 0xFF]) | st.none())
EDITS = st.lists(st.tuples(EDIT, st.integers(0, 2)), min_size=1, max_size=3)


@settings(max_examples=250, deadline=2000)
@given(sound_files(), EDITS, st.integers(-3, 3))
def test_mutated_headers_are_refused_or_safetensors_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    sound: tuple[bytes, bytes],
    edits: list[tuple[tuple[float, int | None], int]],
    longer: int,
) -> None:
    """What is accepted although it was damaged is a sound file to safetensors too, with the same tensors."""
    header, data = sound
    for (place, byte), cut in edits:
        at = int(place * len(header))
        header = header[:at] + (b"" if byte is None else bytes([byte])) + header[at + cut :]
    data = data[:longer] if longer < 0 else data + bytes(longer)
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    check_agreement(path, safetensors(header, data))


@settings(max_examples=150, deadline=2000)
@given(st.integers(0, 7), st.integers(0, 255), st.integers(0, 300))
def test_any_length_field_is_bounded(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, size: int) -> None:
    """One byte of the header's length changed, and the file cut anywhere."""
    content = bytearray((tiny_model() / UNET).read_bytes()[: 8 + size])
    content[at] = byte
    path = tmp_path_factory.getbasetemp() / "length.safetensors"
    check_agreement(path, bytes(content))


# ---- pickled models, where they are allowed ----

ALLOWED = ("--allow-pickle", "-s", "1", "--steps", "1", "--device", "cpu")


def test_an_allowed_pickle_draws_what_safetensors_draw(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    state = load_file(tiny_single_file())
    extra = {"model_ema.decay": torch.tensor(0.5), "global_step": 5}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state | extra, "epoch": 1}, path)
    told = ldm("info", "--allow-pickle", path)
    assert told.code == 0, told
    assert ldm("info", tiny_single_file()).out.splitlines()[1:] == told.out.splitlines()[1:]
    pictures = []
    small = ("--width", "64", "--height", "64")
    for model in (path, tiny_single_file()):
        drawn = ldm("txt2img", "x", "-m", model, *ALLOWED, *small, "-o", tmp_path / model.stem)
        assert drawn.code == 0, drawn
        pictures += drawn.paths
    assert (pixels(pictures[0]) == pixels(pictures[1])).all()


def test_an_allowed_pickle_in_a_folder(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = copy_model(tmp_path / "model")
    for path in sorted(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.parent.name == "text_encoder" else path.with_suffix(".bin").name
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    assert_refused(ldm("info", folder), 65, "pickle", "--allow-pickle")
    assert ldm("info", "--allow-pickle", folder).code == 0
    drawn = ldm("txt2img", "x", "-m", folder, *ALLOWED, "-o", tmp_path / "out")
    assert len(drawn.paths) == 1, drawn


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_an_allowed_pickle_runs_nothing(tmp_path: Path, most_cpu: float, zipped: bool) -> None:
    """What it wants is named, and torch is not even imported."""
    import torch

    torch.save({"state_dict": {"a\x1b": Bomb()}}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    for command in (["info", "--allow-pickle", "model.ckpt"], ["txt2img", "x", "-m", "model.ckpt", *ALLOWED]):
        ran = watched(tmp_path, *command)
        assert_refused(ran.result, 65, "model.ckpt", "__builtin__.exec", "safetensors", seconds=WALL)
        assert ran.cpu < most_cpu, ran
        assert ran.memory < LEAN, ran
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]
