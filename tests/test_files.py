"""Weight files: everything hostile is refused by name, everything sound comes back bit for bit."""

import errno
import json
import os
import resource
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
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmcli.checkpoints.files import (
    WeightFile,
    file_sha256,
    open_sharded,
    open_weights,
    read_tensors,
    write_tensors,
)
from ldmcli.checkpoints.header import MAX_HEADER_BYTES, HeaderError, parse_header
from ldmcli.errors import BadDataError, CannotCreateError, LdmError, MissingInputError, StorageError

pytestmark = pytest.mark.timeout(60)
SECONDS = 5  # bound of one refusal; they take under 0.5 s on a quiet machine

# ---- helpers ----


def container(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal(path: Path, kind: type[LdmError] = BadDataError) -> str:
    """The one-sentence message with which open_weights refuses `path`."""
    began = time.perf_counter()
    with pytest.raises(kind) as caught:
        open_weights(path)
    assert time.perf_counter() - began < SECONDS
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


# ---- paths ----


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "v1-5-pruned.safetensors").touch()
    (tmp_path / "other.txt").touch()
    path = tmp_path / "v1-5-prund.safetensors"
    message = refusal(path, MissingInputError)
    assert message == f"{path} does not exist; its folder has v1-5-pruned.safetensors."
    assert "v1-5-pruned.safetensors" in refusal(tmp_path / "qq", MissingInputError)
    assert MissingInputError.exit_code == 66


@pytest.mark.parametrize("name", ["no/such/model", "x" * 300, "a\0b", "model.safetensors/inside"])
def test_impossible_paths_are_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingInputError):
        open_weights(tmp_path / name)


def test_dangling_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    assert "link to gone" in refusal(tmp_path / "link", MissingInputError)


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "unet.safetensors").touch()
    assert "is a folder (it has unet.safetensors)" in refusal(tmp_path)


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


def test_circular_link(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "circle" in refusal(tmp_path / "a")


def test_unreadable(put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(b"x")

    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")  # root, as in containers, may read anything

    monkeypatch.setattr(os, "open", denied)
    assert "permissions" in refusal(path, MissingInputError)


def test_device_error_is_a_storage_error(put: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    path = put(b"x")
    monkeypatch.setattr(os, "open", failing)
    assert "Input/output error" in refusal(path, StorageError)


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
    assert words in refusal(put(container(header, data)))


def test_headers_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:  # 99 MB of header, as a sparse file
        file.write(struct.pack("<Q", 99_000_000) + b'{"a":')
        file.truncate(99_000_100)
    began = time.perf_counter()
    assert "header of 99000000 bytes" in refusal(path)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "header",
    [
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(500_000)) + "}",
        "{" + ",".join(f'"{i}":0' for i in range(499_000)) + "}",
        '{"a":"' + "x" * (MAX_HEADER_BYTES - 10) + '"}',
        '{"a":"' + "\\u4e00" * (MAX_HEADER_BYTES // 6 - 10) + '"}',
        '{"a":[' + "[]," * 99_000 + "0" + ",1000000" * 400_000 + "]}",
        " " * 10 + "{}",
    ],
    ids=["tensors", "pairs", "string", "escapes", "lists", "indented"],
)
def test_the_largest_headers_take_bounded_time_and_memory(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(header))
    program = (
        "import sys, time, resource; from pathlib import Path\n"
        "from ldmcli.checkpoints.files import open_weights; from ldmcli.errors import BadDataError\n"
        "began = time.process_time()\n"
        "try: open_weights(Path(sys.argv[1]))\n"
        "except BadDataError: print(time.process_time() - began, 'torch' in sys.modules)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))

    ran = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, preexec_fn=limit, timeout=50
    )
    assert ran.returncode == 0, ran.stderr
    seconds, torch_loaded = ran.stdout.split()
    assert float(seconds) < SECONDS
    assert torch_loaded == "False"


def assert_parsed_or_refused(raw: bytes, size: int) -> None:
    """parse_header either refuses or returns tensors that cover the data exactly."""
    start = 8 + len(raw)
    try:
        tensors, metadata = parse_header(raw, start, start + size)
    except HeaderError:
        return
    assert sum(info.end - info.start for info in tensors.values()) == size
    assert all(start <= info.start <= info.end <= start + size for info in tensors.values())
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)


SOUND = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry(),
        "b": entry("F32", (2, 1), (4, 12)),
        "c": entry("I64", (), (12, 20)),
        "d": entry("BF16", (0, 3), (20, 20)),
    }
).encode()


@given(st.binary(max_size=200), st.integers(0, 40))
def test_random_headers_never_crash(raw: bytes, size: int) -> None:
    assert_parsed_or_refused(raw, size)
    assert_parsed_or_refused(b"{" + raw, size)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.binary(max_size=3), st.integers(0, 3)), max_size=4))
def test_mutated_headers_never_crash(edits: list[tuple[int, bytes, int]]) -> None:
    raw = SOUND
    for at, new, cut in edits:
        raw = raw[:at] + new + raw[at + cut :]
    assert_parsed_or_refused(raw, 20)


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
def test_structured_headers_never_crash(header: dict[str, Any], size: int) -> None:
    assert_parsed_or_refused(json.dumps(header).encode(), size)


@given(st.binary(max_size=300))
def test_random_files_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadDataError):
        open_weights(path)


# ---- reading and writing ----

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]
DTYPES += [torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2], [3, 1, 0]], dtype=torch.float32).to(dtype)
    tensors = {"matrix": values, "scalar": values[0, 1].clone(), "none": values[:0].clone()}
    tensors["transposed"] = values.clone().t()
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors, {"origin": "test"})
    weights = open_weights(path)
    assert weights.metadata == {"origin": "test"}
    found = read_all(weights)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    for name, tensor in read_all(weights, torch.float32).items():
        assert tensor.dtype == (torch.float32 if dtype.is_floating_point else dtype)
        assert tensor.float().equal(tensors[name].float())
    assert list(tmp_path.iterdir()) == [path]


def test_file_order_subset_and_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {name: torch.full((3,), float(i)) for i, name in enumerate("cab")})
    weights = open_weights(path)
    order = sorted(weights.tensors, key=lambda name: weights.tensors[name].start)
    assert [name for name, _ in read_tensors(weights, reversed(order), "cpu", None)] == order
    assert [name for name, _ in read_tensors(weights, ["b", "a", "b"], "cpu", None)] == ["a", "b"]
    with pytest.raises(BadDataError, match="no tensor “z”"):
        list(read_tensors(weights, ["z"], "cpu", None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_converted_tensors_share_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {str(i): torch.full((i + 1,), float(i)) for i in (3, 9, 1, 7)}
    write_tensors(path, tensors | {"int": torch.arange(4)})
    found = read_all(open_weights(path), dtype)
    assert all(found[name].equal(tensor.to(dtype)) for name, tensor in tensors.items())
    assert found["int"].tolist() == [0, 1, 2, 3]
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32], ids=str)
def test_tensors_arrive_on_the_gpu(tmp_path: Path, dtype: torch.dtype | None) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {str(i): torch.randn(1000 * i) for i in range(1, 9)}
    write_tensors(path, tensors)
    found = dict(read_tensors(open_weights(path), tensors, "cuda", dtype))
    assert all(found[name].cpu().equal(tensor.to(dtype)) for name, tensor in tensors.items())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="writing"):
            write_tensors(path, {"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_odd_alignment(put: Callable[[bytes], Path]) -> None:
    values = torch.tensor([1.5, -2.0])
    header = json.dumps({"byte": entry("U8", [1], [0, 1]), "a": entry("F32", [2], [1, 9])})
    header += " " * (5 - len(header) % 8)
    weights = open_weights(put(container(header, b"\x07" + values.numpy().tobytes())))
    found = read_all(weights)
    assert found["a"].equal(values)
    assert found["byte"].tolist() == [7]


def test_a_bool_is_0_or_1(put: Callable[[bytes], Path]) -> None:
    weights = open_weights(put(container({"a": entry("BOOL", [3], [0, 3])}, b"\x00\x02\xff")))
    assert read_all(weights)["a"].view(torch.uint8).tolist() == [0, 1, 1]


def test_empty_model(put: Callable[[bytes], Path]) -> None:
    assert open_weights(put(container("{}"))).tensors == {}


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(1000)})
    tensor = read_all(open_weights(path))["a"]
    os.truncate(path, 0)
    assert tensor.sum() == 1000
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("at", [0, 1, 500, 1000])
def test_nan_and_infinity_are_found(tmp_path: Path, dtype: torch.dtype, value: str, at: int) -> None:
    poisoned = torch.linspace(-1, 1, 1001).to(dtype)
    poisoned[at] = -torch.tensor(float("nan")) if value == "-nan" else float(value)
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"fine": torch.linspace(-1, 1, 1001).to(dtype), "po\x1bisoned": poisoned})
    weights = open_weights(path)
    with pytest.raises(BadDataError, match=r"NaN or infinity in tensor “po\\x1bisoned”"):
        read_all(weights)
    assert dict(read_tensors(weights, ["fine"], "cpu", None))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_extremes_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0], dtype=dtype)
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": values})
    assert read_all(open_weights(path))["a"].equal(values)


@pytest.mark.parametrize("pattern", ["every fp16", "every bf16"])
def test_finiteness_agrees_with_torch_on_every_16_bit_value(tmp_path: Path, pattern: str) -> None:
    dtype = torch.float16 if "fp16" in pattern else torch.bfloat16
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    finite = values.isfinite()
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": values[finite]})
    assert len(read_all(open_weights(path))["a"]) == int(finite.sum())
    write_tensors(path, {str(i): value.reshape(1) for i, value in enumerate(values[~finite])})
    weights = open_weights(path)
    for name in list(weights.tensors)[::37]:
        with pytest.raises(BadDataError):
            list(read_tensors(weights, [name], "cpu", None))


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_overflow_of_fp16_is_named(tmp_path: Path, source: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"big": torch.tensor([1.0, -131072.0], dtype=source)})
    weights = open_weights(path)
    with pytest.raises(BadDataError, match=r"1.311e\+05 in tensor “big”, more than float16 can hold.*--dtype"):
        read_all(weights, torch.float16)
    assert read_all(weights, torch.float32)["big"].tolist() == [1, -131072]


@pytest.mark.parametrize("change", ["truncate", "rewrite", "replace", "remove", "fifo"])
def test_file_changed_after_it_was_checked(tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(100), "b": torch.ones(100)})
    weights = open_weights(path)
    if change == "truncate":
        os.truncate(path, weights.tensors["a"].start + 10)
    elif change == "rewrite":
        content = path.read_bytes()
        time.sleep(0.02)
        path.write_bytes(content)
    elif change == "replace":
        write_tensors(path, {"a": torch.ones(100), "b": torch.zeros(100)})
    else:
        path.unlink()
        if change == "fifo":
            os.mkfifo(path)
    with pytest.raises(MissingInputError if change == "remove" else BadDataError):
        read_all(weights)


def test_truncated_while_reading_without_a_stamp(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    weights = open_weights(path)
    os.truncate(path, weights.tensors["a"].start + 10)
    with pytest.raises(BadDataError, match="changed while it was read"):
        read_all(WeightFile(path, weights.tensors, weights.metadata))


def test_writing_replaces_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    with pytest.raises(CannotCreateError):
        write_tensors(tmp_path / "none" / "model.safetensors", {"a": torch.ones(1)})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        write_tensors(path, {"a": shared, "b": shared})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(put: Callable[[bytes], Path], tmp_path: Path) -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(put(b"abc")) == expected
    with pytest.raises(BadDataError):
        file_sha256(tmp_path)


# ---- sharded models ----


def shard(folder: Path, weight_map: object, **files: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        write_tensors(folder / f"{name}.safetensors", tensors)
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
    write_tensors(tmp_path / "one.safetensors", ones("a"))
    with pytest.raises((BadDataError, MissingInputError)):
        open_sharded(shard(tmp_path / "model", {"a": name}))


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": "one.safetensors", "z": "one.safetensors"}])
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


def test_linked_shards(tmp_path: Path) -> None:
    write_tensors(tmp_path / "outside.safetensors", ones("a"))
    index = shard(tmp_path / "model", {"a": "one.safetensors"}, real=ones("a"))
    link = tmp_path / "model" / "one.safetensors"
    link.symlink_to("real.safetensors")
    assert len(open_sharded(index)) == 1
    link.unlink()
    link.symlink_to("../outside.safetensors")
    with pytest.raises(BadDataError, match="leads out of the folder"):
        open_sharded(index)


@pytest.mark.parametrize("part", ["", "unet"])
def test_hub_cache_links(tmp_path: Path, part: str) -> None:
    repo, other = tmp_path / "models--me--model", tmp_path / "models--me--other"
    folder = repo / "snapshots" / "0123abcd" / part
    for root in (repo, other):
        (root / "blobs").mkdir(parents=True)
        write_tensors(root / "blobs" / "hash", ones("a"))
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


def test_written_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_tensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
