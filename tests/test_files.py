"""Weight files: everything hostile is refused by name, everything sound comes back bit for bit."""

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import safetensors, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from weight_corpus import UNET

from ldmcli.checkpoints.files import WeightFile, open_sharded, open_weights, read_tensors
from ldmcli.checkpoints.header import HeaderError, parse_header
from ldmcli.errors import BadDataError, LdmError, MissingInputError, StorageError

pytestmark = pytest.mark.timeout(60)
# ---- helpers ----


def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path, kind: type[LdmError] = BadDataError) -> str:
    """The one-sentence message with which open_weights refuses `path`."""
    with pytest.raises(kind) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(str(path)[:100])
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < 1500
    return message


@pytest.fixture
def put(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


def read_all(weights: WeightFile, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return dict(read_tensors(weights, weights.tensors, "cpu", dtype))


# ---- paths: more of them are in weight_corpus ----


@pytest.mark.parametrize("name", ["no/such/model", "x" * 300, "a\0b", "model.safetensors/inside"])
def test_impossible_paths_are_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingInputError):
        open_weights(tmp_path / name)


def test_pipe_socket_device_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # socket paths are limited to 108 bytes
        server.bind("sock")
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
        assert "is a pipe" in refusal(tmp_path / "fifo")
        assert "is a socket" in refusal(tmp_path / "sock")
        assert "is a device" in refusal(Path("/dev/zero"))


def test_file_swapped_for_a_pipe_after_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, regular = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    regular.write_bytes(b"x")
    status = regular.stat()
    monkeypatch.setattr(os, "stat", lambda *_, **__: status)
    assert "is a pipe" in refusal(fifo)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [(errno.EACCES, MissingInputError, "permissions"), (errno.EIO, StorageError, "Input/output error")],
)
def test_what_the_system_refuses(
    put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch, code: int, kind: type[LdmError], words: str
) -> None:
    path = put(b"x")

    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code))  # root, as in containers, may read anything

    monkeypatch.setattr(os, "open", refused)
    assert words in refusal(path, kind)


# ---- what else it is ----

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 134\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"abc\x01", "only 4 bytes"),
        (b"\0" * 64, "no JSON object follows"),
        (b"\xff" * 64, str(2**64 - 1)),
        (struct.pack("<Q", 0) + b"{}", "no JSON object follows"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", str(2**64 - 1)),
        (struct.pack("<Q", 1000) + b"{}", "cut short"),
        (struct.pack("<Q", 4) + b"[[]]", "no JSON object follows"),
        (LFS, "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\xef\xbb\xbf<html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "XML"),
        (b'{"error": "Invalid credentials"}', "JSON text"),
        (b"{}", "JSON text"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "index of a sharded model"),
        (b"Entry not found", "Entry not found"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "never unpickles"),
        (b"PK\x03\x04\x00\x00\x08\x08" + b"\0" * 22 + b"archive/data.pkl", "never unpickles"),
        (b"PK\x03\x04\x14\x00\x08\x08" + b"\0" * 22 + b"readme.txt", "zip archive"),
        (b"GGUF\x03\0\0\0" + b"\0" * 20, "GGUF"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 20, "PNG"),
        (b"\x08\x07\x12\x07pytorch\x1a\x05", "ONNX"),
        (b"\x1f\x8b\x08" + b"\0" * 20, "gzip"),
        (b"name" + b"\0" * 253 + b"ustar\0", "tar archive"),
    ],
)
def test_other_files_are_named(put: Callable[[bytes], Path], content: bytes, words: str) -> None:
    assert words in refusal(put(content))


def test_real_torch_pickles_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    for zipped in (True, False):
        path = tmp_path / "model.ckpt"
        torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=zipped)
        assert "pickle" in refusal(path)
    assert not (tmp_path / "exploded").exists()


# ---- headers ----


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry()}, b"12", "cut short"),
        ({"a": entry()}, b"12345", "1 bytes after its last tensor"),
        ({}, b"x", "1 bytes after its last tensor"),
        ('{"a":1,"a":2}', b"", "names “a” twice"),
        ('{"a":{"dtype":"F16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', b"1234", "“dtype” twice"),
        ('{"__metadata__":{"k":"1","k":"2"}}', b"", "“k” twice"),
        ('{"\\u001b[31m":0,"\\u001b[31m":0}', b"", "\\x1b[31m"),
        ('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "surrogate"),
        ('{"__metadata__":{"k":"\\udfff"}}', b"", "surrogate"),
        ({"__metadata__": {"k": 1}}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
        ({"a": 1}, b"", "without dtype"),
        ({"a": {"dtype": "F16", "shape": [2]}}, b"", "without dtype"),
        ({"a": entry(dtype="F17")}, b"1234", "unknown type 'F17'"),
        ({"a": entry(dtype=["F16"])}, b"1234", "unknown type"),
        ({"a": entry(shape=[-2])}, b"1234", "impossible shape [-2]"),
        ({"a": entry(shape=[2.0])}, b"1234", "impossible shape"),
        ({"a": entry(shape=[True, 2])}, b"1234", "impossible shape"),
        ({"a": entry(shape="2")}, b"1234", "impossible shape"),
        ({"a": entry(shape=[2**63])}, b"1234", "impossible shape"),
        ({"a": entry(shape=[2**62, 4])}, b"1234", "impossibly large shape"),
        ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b"", "impossibly large shape"),
        ({"a": entry(shape=[2**62] * 100_000)}, b"1234", "impossible shape"),
        ({"a": entry(shape=[3])}, b"1234", "4 bytes where F16 [3] needs 6"),
        ({"a": entry(offsets=[4, 0])}, b"1234", "-4 bytes"),
        ({"a": entry(offsets=[-4, 0])}, b"1234", "impossible offsets"),
        ({"a": entry(offsets=[0, 4, 8])}, b"1234", "impossible offsets"),
        ({"a": entry(offsets=[0.0, 4.0])}, b"1234", "impossible offsets"),
        ({"a": entry(offsets=[False, 4])}, b"1234", "impossible offsets"),
        ({"a": entry(offsets=[0, 2**64])}, b"1234", "impossible offsets"),
        ({"a": entry(offsets=[2**62, 2**62 + 4])}, b"1234", "cut short"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456", "“a” and “b” overlapping"),
        ({"a": entry(), "b": entry()}, b"1234", "overlapping"),
        ({"a": entry(offsets=[4, 8])}, b"12345678", "hole of 4 bytes before tensor “a”"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789", "hole of 1 bytes before tensor “b”"),
        (b'{"a\xff":1}', b"", "not UTF-8"),
        ("{" + '"a":{' * 50_000, b"", "nested too deeply"),
        ('{"a":' + "[" * 100_000, b"", "nested too deeply"),
        ('{"a":' + "1" * 10_000 + "}", b"", "broken JSON"),
        ('{"a":', b"", "broken JSON"),
        ('{"a":NaN}', b"", "without dtype"),
        ("{" + '"a":1,' * 2_000_000 + '"a":1}', b"", "far beyond any model"),
        ("{" + '"a":[],' * 500_000 + '"a":1}', b"", "far beyond any model"),
        ({str(i): 0 for i in range(50_001)}, b"", "more than 50000"),
    ],
)
def test_hostile_headers(
    put: Callable[[bytes], Path], header: bytes | str | dict[str, Any], data: bytes, words: str
) -> None:
    assert words in refusal(put(safetensors(header, data)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
FIELD = st.sampled_from(["F16", "U8", "F8_E4M3", [2], [0], [], [0, 4], [4, 4], [0, 0], [1, 2]]) | JSON


@given(
    st.dictionaries(
        st.text(max_size=4) | st.just("__metadata__"),
        JSON | st.fixed_dictionaries({"dtype": FIELD, "shape": FIELD, "data_offsets": FIELD}),
        max_size=4,
    ),
    st.integers(0, 8),
)
def test_structured_headers_are_refused_or_cover_their_data(header: dict[str, Any], size: int) -> None:
    raw = json.dumps(header).encode()
    start = 8 + len(raw)
    try:
        tensors, metadata = parse_header(raw, start, start + size)
    except HeaderError:
        return
    assert sum(info.end - info.start for info in tensors.values()) == size
    assert all(start <= info.start <= info.end <= start + size for info in tensors.values())
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)


# ---- safetensors' own reader agrees ----

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


@settings(max_examples=100, deadline=None)
@given(sound_files())
def test_sound_headers_are_accepted_as_safetensors_does(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[bytes, bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "sound.safetensors"
    assert check_agreement(path, safetensors(*sound))


EDIT = st.tuples(st.floats(0, 1), st.sampled_from([*b'{}[]:,"\\0129-.eE \n', 0, 0x80, 0xED, 0xFF]) | st.none())
EDITS = st.lists(st.tuples(EDIT, st.integers(0, 2)), min_size=1, max_size=3)


@settings(max_examples=250, deadline=None)
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


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 7), st.integers(0, 255), st.integers(0, 300))
def test_any_length_field_is_bounded(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, size: int) -> None:
    """One byte of the header's length changed, and the file cut anywhere."""
    content = bytearray((tiny_model() / UNET).read_bytes()[: 8 + size])
    content[at] = byte
    path = tmp_path_factory.getbasetemp() / "length.safetensors"
    check_agreement(path, bytes(content))


# ---- reading and writing ----

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]
DTYPES += [torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> WeightFile:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return open_weights(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_to_the_bit_and_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2], [3, 1, 0]], dtype=torch.float32).to(dtype)
    tensors = {"matrix": values, "scalar": values[0, 1].clone(), "none": values[:0].clone(), "list": values[1].clone()}
    weights = write(tmp_path / "a", tensors, {"origin": "test"})
    assert weights.metadata == {"origin": "test"}
    found = read_all(weights)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    for wanted in FLOATS:
        converted = read_all(weights, wanted)
        assert {tensor.dtype for tensor in converted.values()} == {wanted if dtype.is_floating_point else dtype}
        assert all(tensor.float().equal(tensors[name].float()) for name, tensor in converted.items())
        own = {tensor.untyped_storage().data_ptr() for tensor in converted.values() if tensor.numel()}
        assert len(own) == 3, "nothing is shared"


def test_file_order_subset_and_unknown_names(tmp_path: Path) -> None:
    weights = write(tmp_path / "a", {name: torch.full((3,), float(i)) for i, name in enumerate("cab")})
    order = sorted(weights.tensors, key=lambda name: weights.tensors[name].start)
    assert [name for name, _ in read_tensors(weights, reversed(order), "cpu", None)] == order
    assert [name for name, _ in read_tensors(weights, ["b", "a", "b"], "cpu", None)] == ["a", "b"]
    with pytest.raises(BadDataError, match="no tensor “z”"):
        list(read_tensors(weights, ["z"], "cpu", None))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32], ids=str)
def test_tensors_arrive_on_the_gpu(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tensors = {str(i): torch.randn(1000 * i) for i in range(1, 9)}
    found = dict(read_tensors(write(tmp_path / "a", tensors), tensors, "cuda", dtype))
    assert all(found[name].cpu().equal(tensor.to(dtype)) for name, tensor in tensors.items())


def test_odd_alignment(put: Callable[[bytes], Path]) -> None:
    values = torch.tensor([1.5, -2.0])
    header = json.dumps({"byte": entry("U8", [1], [0, 1]), "a": entry("F32", [2], [1, 9])}).encode()
    header += b" " * (5 - len(header) % 8)
    weights = open_weights(put(safetensors(header, b"\x07" + values.numpy().tobytes())))
    found = read_all(weights)
    assert found["a"].equal(values)
    assert found["byte"].tolist() == [7]


def test_no_metadata_may_be_said_by_null(put: Callable[[bytes], Path]) -> None:
    assert open_weights(put(safetensors({"__metadata__": None}))).metadata == {}


def test_a_bool_is_0_or_1(put: Callable[[bytes], Path]) -> None:
    weights = open_weights(put(safetensors({"a": entry("BOOL", [3], [0, 3])}, b"\x00\x02\xff")))
    assert read_all(weights)["a"].view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_infinity_are_found_and_the_extremes_are_not(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0], dtype=dtype)
    fine = torch.linspace(-1, 1, 1001).to(dtype)
    nan = torch.tensor(float("nan"))
    poisoned = {}
    for value in (nan, -nan, float("inf"), float("-inf")):
        for at in (0, 1, 500, 1000):
            poisoned[f"po\x1bisoned {value} {at}"] = fine.clone()
            poisoned[f"po\x1bisoned {value} {at}"][at] = value
    weights = write(tmp_path / "a", {"extremes": extremes} | poisoned)
    assert next(read_tensors(weights, ["extremes"], "cpu", None))[1].equal(extremes)
    for name in poisoned:
        with pytest.raises(BadDataError, match=r"NaN or infinity in tensor “po\\x1bisoned"):
            list(read_tensors(weights, [name], "cpu", None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_finiteness_agrees_with_torch_on_every_16_bit_value(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    finite = values.isfinite()
    found = read_all(write(tmp_path / "a", {"a": values[finite]}))["a"]
    assert len(found) == int(finite.sum())
    weights = write(tmp_path / "b", {str(i): value.reshape(1) for i, value in enumerate(values[~finite])})
    for name in list(weights.tensors)[::37]:
        with pytest.raises(BadDataError):
            list(read_tensors(weights, [name], "cpu", None))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_overflow_of_fp16_is_named(tmp_path: Path, source: torch.dtype) -> None:
    weights = write(tmp_path / "a", {"big": torch.tensor([1.0, -131072.0], dtype=source)})
    with pytest.raises(BadDataError, match=r"1.311e\+05 in tensor “big”, more than float16 can hold.*--dtype"):
        read_all(weights, torch.float16)
    assert read_all(weights, torch.float32)["big"].tolist() == [1, -131072]


@pytest.mark.parametrize("change", ["truncate", "rewrite", "replace", "remove", "fifo"])
def test_file_changed_after_it_was_checked(tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.safetensors"
    weights = write(path, {"a": torch.ones(100), "b": torch.ones(100)})
    content = path.read_bytes()
    if change == "truncate":
        os.truncate(path, weights.tensors["a"].start + 10)
    elif change == "rewrite":
        time.sleep(0.02)
        path.write_bytes(content)
    else:
        path.unlink()
        if change == "replace":
            path.write_bytes(content)
        elif change == "fifo":
            os.mkfifo(path)
    with pytest.raises(MissingInputError if change == "remove" else BadDataError):
        read_all(weights)


# ---- sharded models ----


def shard(folder: Path, weight_map: object, **files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2) for name in names}


def test_sharded_model(tmp_path: Path) -> None:
    weight_map = {"b": "two.safetensors", "a": "one.safetensors", "c": "one.safetensors"}
    shards = open_sharded(shard(tmp_path, weight_map, one=ones("a", "c"), two=ones("b")))
    assert [(file.path.name, sorted(file.tensors)) for file in shards] == [
        ("one.safetensors", ["a", "c"]),
        ("two.safetensors", ["b"]),
    ]


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "", ".", "..", "sub/one.safetensors", "a\\b", "x\0y", 7, None]
)
def test_shard_names_stay_inside(tmp_path: Path, name: object) -> None:
    save_file(ones("a"), tmp_path / "one.safetensors")
    with pytest.raises((BadDataError, MissingInputError)):
        open_sharded(shard(tmp_path / "model", {"a": name}))


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], "x", {"a": "one.safetensors", "z": "one.safetensors"}, {str(i): f"{i}" for i in range(2000)}],
)
def test_wrong_weight_maps(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(BadDataError):
        open_sharded(shard(tmp_path, weight_map, one=ones("a")))


def test_shards_missing_doubled_or_broken(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="one"):
        open_sharded(shard(tmp_path / "missing", {"a": "one.safetensors"}))
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    with pytest.raises(BadDataError, match=r"both in one\.safetensors and in two"):
        open_sharded(shard(tmp_path / "doubled", weight_map, one=ones("a"), two=ones("a", "b")))
    index = shard(tmp_path / "broken", {})
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(BadDataError, match="“a” twice"):
        open_sharded(index)
    index.write_bytes(LFS)
    with pytest.raises(BadDataError):
        open_sharded(index)


@pytest.mark.parametrize("part", ["", "unet"])
def test_hub_cache_links(tmp_path: Path, part: str) -> None:
    repo, other = tmp_path / "models--me--model", tmp_path / "models--me--other"
    folder = repo / "snapshots" / "0123abcd" / part
    for root in (repo, other):
        (root / "blobs").mkdir(parents=True)
        save_file(ones("a"), root / "blobs" / "hash")
    index = shard(folder, {"a": "one.safetensors"})
    index.rename(repo / "blobs" / "index")
    index.symlink_to(os.path.relpath(repo / "blobs" / "index", folder))
    link = folder / "one.safetensors"
    link.symlink_to(os.path.relpath(repo / "blobs" / "hash", folder))
    assert len(open_sharded(index)) == 1
    link.unlink()
    link.symlink_to(os.path.relpath(other / "blobs" / "hash", folder))
    with pytest.raises(BadDataError, match="leads out of the folder"):
        open_sharded(index)


def test_importing_needs_no_torch() -> None:
    program = (
        "import sys, ldmcli.checkpoints.files, ldmcli.checkpoints.families\nprint({'torch', 'numpy'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
