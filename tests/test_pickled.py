"""Pickled checkpoints: plain tensors are read where that is allowed, and nothing else, ever, runs or is believed."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from weight_corpus import MARKER, Bomb

import ldmcli
from ldmcli.checkpoints.files import open_sharded, open_weights, read_tensors
from ldmcli.errors import BadDataError, LdmError

pytestmark = pytest.mark.timeout(60)
LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])


def save(path: Path, value: object, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def read(path: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    weights = open_weights(path, allow_pickle=True)
    return dict(read_tensors(weights, weights.tensors, "cpu", dtype))


def refusal(path: Path) -> str:
    """The one sentence with which the file is refused."""
    with pytest.raises(BadDataError) as caught:
        open_weights(path, allow_pickle=True)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1500
    return message


def outcome(path: Path) -> str:
    """What is said of a file that is refused; "" where it is read. Any error but ours fails the test."""
    try:
        read(path)
    except LdmError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARKER).exists()


# ---- what is read ----


def state() -> "OrderedDict[str, torch.Tensor]":
    base = torch.arange(24.0)
    tensors = OrderedDict(
        half=torch.arange(6.0).reshape(2, 3).half(),
        view=base[4:10],
        transposed=base.reshape(4, 6).t(),
        parameter=torch.nn.Parameter(torch.ones(3)),
        none=torch.zeros(0, 3),
        scalar=torch.tensor(5),
        bools=torch.tensor([True, False]),
        bf16=torch.ones(2, 2, dtype=torch.bfloat16),
        channels_last=torch.arange(96.0).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last),
    )
    tensors["tied"] = tensors["half"]
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as state_dict() has it
    return tensors


@LAYOUTS
@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "plain"])
def test_plain_tensors_are_read(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    expected = state()
    value = {"state_dict": expected, "epoch": 3, "rates": [0.1, {"k": None}]} if wrapped else expected
    weights = open_weights(save(tmp_path / "model.ckpt", value, zipped), allow_pickle=True)
    assert weights.tensors.keys() == expected.keys()
    found = dict(read_tensors(weights, weights.tensors, "cpu", None))
    for name, tensor in expected.items():
        assert weights.tensors[name].shape == tuple(tensor.shape)
        assert found[name].equal(tensor)
        assert found[name].dtype == tensor.dtype
        four = tensor.ndim == 4  # weights of convolutions
        layout = torch.channels_last if four else torch.contiguous_format
        assert found[name].is_contiguous(memory_format=layout)
        assert type(found[name]) is torch.Tensor
        assert not found[name].requires_grad
    own = {t.untyped_storage().data_ptr() for t in found.values() if t.numel()}
    assert len(own) == len([t for t in found.values() if t.numel()])
    again = dict(read_tensors(weights, ["view", "scalar"], "cpu", torch.float16))
    assert again["view"].tolist() == [4, 5, 6, 7, 8, 9]
    assert again["view"].dtype == torch.float16
    assert again["scalar"].dtype == torch.int64


@LAYOUTS
def test_inner_tables_get_names_with_dots(tmp_path: Path, zipped: bool) -> None:
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4)}, "name": "cat", "step": 5}
    assert list(open_weights(save(tmp_path / "a.pt", embedding, zipped), allow_pickle=True).tensors) == [
        "string_to_param.*"
    ]
    itself: dict[str, Any] = {"a": torch.ones(1)}
    itself["again"] = itself
    assert list(read(save(tmp_path / "b.pt", itself, zipped))) == ["a"]
    assert "“a.b” twice" in refusal(save(tmp_path / "c.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, zipped))


def test_safetensors_stay_what_they_are_with_permission(tmp_path: Path) -> None:
    """Even where the length of the header reads as the beginning of a pickle."""
    path = tmp_path / "model.safetensors"
    for length in range(0x200, 0x300):
        save_file({"a": torch.ones(1)}, path, {"x": "y" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read(path)["a"].tolist() == [1]


def test_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(tmp_path / f"{name}.bin", {name: torch.ones(2)})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"one": "one.bin", "two": "two.bin"}}')
    assert [list(file.tensors) for file in open_sharded(index, allow_pickle=True)] == [["one"], ["two"]]
    with pytest.raises(BadDataError, match="--allow-pickle"):
        open_sharded(index)


def test_nan_is_found(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="NaN or infinity in tensor “bad”"):
        read(save(tmp_path / "a.ckpt", {"fine": torch.ones(3), "bad": torch.tensor([0.0, float("nan")])}))


@LAYOUTS
def test_the_file_is_read_once_for_all_its_parts(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    true_load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: asked.append(options) or true_load(file, **options))
    names = ["unet.a", "vae.a", "model_ema.a", "alphas_cumprod"]
    path = save(tmp_path / "a.ckpt", {name: torch.ones(2) for name in names}, zipped)
    weights = open_weights(path, allow_pickle=True)
    assert [options["map_location"] for options in asked] == ["meta"], "looking reads no numbers"
    for name in names[:2]:
        assert [found for found, _ in read_tensors(weights, [name], "cpu", None)] == [name]
    assert asked[1:] == [{"map_location": "cpu", "weights_only": True, "mmap": False}]
    assert weights.loader and weights.loader._tensors == {}, "what no model wants is not kept"  # noqa: PT018
    assert str(path) not in Path("/proc/self/maps").read_text()


@LAYOUTS
def test_a_file_that_changed_is_checked_again(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "a.ckpt", {"a": torch.ones(2)}, zipped)
    for change, words in (
        (lambda: save(path, {"a": Bomb()}, zipped), "exec"),
        (lambda: save(path, {"b": torch.ones(2)}, zipped), "changed while"),
        (lambda: save(path, {"a": torch.ones(3)}, zipped), "otherwise than it says"),
        (lambda: os.truncate(path, 100), "cut|broken"),
    ):
        save(path, {"a": torch.ones(2)}, zipped)
        weights = open_weights(path, allow_pickle=True)
        change()
        with pytest.raises(BadDataError, match=words):
            dict(read_tensors(weights, ["a"], "cpu", None))


def test_what_torch_still_refuses_has_no_second_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **options: object) -> None:
        assert options["weights_only"] is True
        raise pickle.UnpicklingError("Weights only load failed.\n\x1b[31mMore")

    path = save(tmp_path / "a.ckpt", {"a": torch.ones(2)})
    monkeypatch.setattr(torch, "load", refusing)
    assert "weights_only=True (Weights only load failed.); get or convert" in refusal(path)


def test_torch_load_is_called_once_and_never_unrestricted() -> None:
    source = "".join(path.read_text() for path in Path(ldmcli.__file__).parent.rglob("*.py"))
    assert source.count("torch.load(") == 1
    assert "weights_only=False" not in source


# ---- what is refused ----


@LAYOUTS
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Bomb(), "wants “__builtin__.exec”"),
        (print, "wants “__builtin__.print”"),
        (Path("x"), "wants “pathlib.PosixPath”"),
        (torch.nn.Linear(1, 1), "wants “torch.nn.modules.linear.Linear”"),
        (torch.ones(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
        (torch.ones(2, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.ones(2).expand(1 << 20, 2), "which share"),
        (bytearray(9), "bytearray"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, zipped: bool, value: object, words: str) -> None:
    assert words in refusal(save(tmp_path / "a.ckpt", {"x": value, "y": torch.ones(1)}, zipped))


def archive(path: Path, pickle_code: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """A zip as torch.save's, around any pickle; `members` by names without their folder, `data_0` for data/0."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickle_code)
        file.writestr("archive/version", b"3\n")
        for name, content in members.items():
            file.writestr(f"archive/{name.replace('_', '/')}", content)
    return path


def tensor_code(
    count: int = 1, offset: int = 0, shape: tuple[int, ...] = (1,), strides: tuple[int, ...] = (1,)
) -> bytes:
    """The pickle of {"a": one float32 tensor}, with any numbers in it."""

    def number(value: int) -> bytes:
        raw = value.to_bytes(16, "little", signed=True)
        return b"\x8a\x10" + raw

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    rest = b"\x89ccollections\nOrderedDict\n)Rt"
    tensor = b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + rest
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n" + tensor + b"Rs."


def test_the_hand_made_archive_is_sound(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.ckpt", tensor_code(2, 1), data_0=struct.pack("<2f", 5, 7))
    assert read(path)["a"].tolist() == [7]


@pytest.mark.parametrize(
    "code",
    [
        *(tensor_code(count) for count in (1 << 40, 1 << 61, -1)),
        *(tensor_code(offset=offset) for offset in (1, -1)),
        tensor_code(shape=(1 << 59,), strides=(0,)),
        tensor_code(shape=(1 << 62, 1 << 62), strides=(0, 0)),
        tensor_code(shape=(1 << 40,) * 20 + (0,), strides=(0,) * 21),
        tensor_code(shape=(1, 1), strides=(1,)),
        tensor_code(strides=(-1,)),
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.",
        b"\x80\x02}" + b"0" * 10 + b".",
    ],
)
def test_impossible_tensors_are_refused_or_nothing(tmp_path: Path, code: bytes) -> None:
    """In our words, and without memory for what a file only claims."""
    path = archive(tmp_path / "a.ckpt", code, data_0=bytes(4))
    told = outcome(path)
    assert told.isprintable()
    assert told or sum(tensor.numel() for tensor in read(path).values()) <= 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"", "broken pickle"),
        (b"\x80\x02N.", "no table of tensors"),
        (b"\x80\x02]" + b"]" * 100_000, "broken pickle"),
        (b"\x80\x02" + b"(" * 400_000 + b".", "weights_only=True"),
        (b"\x80\x02}" + b"q\0" * 1_000_000 + b".", "more than 500000 steps"),
        (b"\x80\x02}q\x01K\x01\x85q\0" + b"h\0h\0\x86q\0" * 60 + b"h\x01h\0K\x01s.", "more than 500000 steps"),
        (b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.", "more than 500000 steps"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x08\0\0\0\0\0\0\0\x10\x85R.", "builtins.bytearray"),
        (b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x10\x85R.", "wants “torch.Tensor”"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "weights_only=True"),
        (b"(S'id'\nios\nsystem\n.", "weights_only=True"),
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.", "wants “os.system”"),
        (b"\x80\x02c\x1b[31m\nx\n.", "wants “\\x1b[31m.x”"),
        (b"\x80\x02Y.", "broken pickle"),
        (b"\x80\x02cos\nsystem" + b"x" * (5 << 20), "far beyond any model"),
    ],
)  # fmt: skip
def test_hostile_pickles_in_a_zip(tmp_path: Path, code: bytes, words: str) -> None:
    assert words in refusal(archive(tmp_path / "a.ckpt", code, data_0=bytes(4)))


def test_a_small_file_makes_no_large_model(tmp_path: Path) -> None:
    """Any number of tensors may see the same data: what they are in all is bounded by what is there."""
    base = torch.ones(100_000)
    assert "which share" in refusal(save(tmp_path / "a.ckpt", {str(i): base[i:] for i in range(1000)}))


def test_hostile_archives(tmp_path: Path) -> None:
    path, code, data = tmp_path / "a.ckpt", tensor_code(), bytes(4)
    whole = archive(path, code, data_0=data).read_bytes()
    for content in (whole[:-1], whole[:100], b"PK\x03\x04"):
        path.write_bytes(content)
        assert "cut or damaged zip" in refusal(path)
    assert "compressed" in refusal(archive(path, code, zipfile.ZIP_DEFLATED, data_0=bytes(1 << 24)))
    assert "TorchScript" in refusal(archive(path, code, data_0=data, **{"constants.pkl": b""}))
    for names in (["a.txt"], ["archive/version"], ["a/data.pkl", "b/data.pkl"]):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"\x80\x02}.")
        assert "torch.save did not write" in refusal(path)


def test_hostile_bare_pickles(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", {"a": torch.ones(3)}, zipped=False)
    whole = path.read_bytes()
    for content, words in (
        (whole[:50], "broken pickle"),
        (pickle.dumps({"a": 1}, 2), "torch.save did not write"),
        (pickle.dumps(Bomb(), 2), "wants “__builtin__.exec”"),
        (b"\x80\x02" + b"}" * (10 << 20), "more than 500000 steps"),
    ):
        path.write_bytes(content)
        assert words in refusal(path)
    path.write_bytes(whole[:-1])
    assert "weights_only=True" in outcome(path)


EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 4)), max_size=4)
FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def edited(content: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    for place, new, cut in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + cut :]
    return content


@FUZZED
@given(st.booleans(), EDITS)
def test_mutated_files_are_refused_or_read(tmp_path: Path, zipped: bool, edits: list[tuple[float, bytes, int]]) -> None:
    """Whatever passes the check, torch.load reads, or refuses in our words; no other error, and nothing runs."""
    path = save(tmp_path / "a.ckpt", {"state_dict": {"a": torch.ones(2, 3), "b": torch.ones(4).half()}, "c": 1}, zipped)
    path.write_bytes(edited(path.read_bytes(), edits))
    assert outcome(path).isprintable()


@FUZZED
@given(EDITS)
def test_mutated_pickles_are_refused_or_read(tmp_path: Path, edits: list[tuple[float, bytes, int]]) -> None:
    """The same with the pickle alone mutated, inside an archive that is sound."""
    code = edited(tensor_code(6, 0, (2, 3), (3, 1)), edits)
    assert outcome(archive(tmp_path / "a.ckpt", code, data_0=bytes(24))).isprintable()
