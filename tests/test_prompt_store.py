"""Encoded prompts kept on disk: what is stored is what would be computed, and nothing odd is taken for it."""

import dataclasses
import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmcli.checkpoints import identity
from ldmcli.checkpoints.identity import FileHashes
from ldmcli.checkpoints.load import load_text_encoders
from ldmcli.checkpoints.source import open_model
from ldmcli.checkpoints.stored_text import Remembered, stored_encoders
from ldmcli.conditioning.prompt_store import PromptStore, RowKind
from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.conditioning.stored import Encoding, StoredEncoder
from ldmcli.config import TextEncoderConfig
from ldmcli.disk.cache import EntryStore

CPU = torch.device("cpu")
CONFIG = TextEncoderConfig(hidden_size=6, max_length=4, projection_dim=3)


class FakeEncoder:
    """Answers that depend on everything an encoder's may, and a list of what it was asked."""

    def __init__(self, config: TextEncoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer: Any = None
        self.asked: list[tuple[list[list[int]], int]] = []
        self.loads = 0
        self._config, self._dtype = config, dtype

    def load(self) -> "FakeEncoder":
        self.loads += 1
        return self

    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        self.asked.append((ids.tolist(), clip_skip))
        states = ids[:, :, None] * torch.arange(1.0, self._config.hidden_size + 1) / (7 * clip_skip)
        pooled = states.sum(1)[:, : self._config.projection_dim] if self._config.projection_dim else None
        # As a neighbour in the batch may change the last bits.
        return (states * (1 + len(ids) / 64)).to(self._dtype), pooled if pooled is None else pooled.to(self._dtype)


def known(weights: str = "ab" * 32) -> "Future[str]":
    future: Future[str] = Future()
    future.set_result(weights)
    return future


def entry_store(folder: Path) -> EntryStore:
    return EntryStore(folder / "ldmcli" / "prompts", max_bytes=1 << 20)


def stored(
    folder: Path,
    fake: FakeEncoder,
    *,
    config: TextEncoderConfig = CONFIG,
    dtype: torch.dtype = torch.float32,
    weights: "Future[str] | None" = None,
) -> tuple[StoredEncoder, PromptStore]:
    store = PromptStore(entry_store(folder))
    weights = known() if weights is None else weights
    return StoredEncoder(fake.load, fake.tokenizer, Encoding(config, CPU, dtype), weights, store), store


def row(*ids: int) -> Tensor:
    return torch.tensor([ids], dtype=torch.long)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "ldmcli" / "prompts").iterdir())


def same(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


# Hits and misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, projection_dim=None)], ids=["pooled", "bare"])
def test_a_stored_row_is_bit_for_bit_what_was_computed(
    tmp_path: Path, config: TextEncoderConfig, dtype: torch.dtype
) -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    first = FakeEncoder(config, dtype)
    encoder, store = stored(tmp_path, first, config=config, dtype=dtype)
    computed = encoder.encode(ids)
    store.flush()
    second = FakeEncoder(config, dtype)
    read = stored(tmp_path, second, config=config, dtype=dtype)[0].encode(ids)
    assert same(computed, read)
    assert read[0].shape == (2, 4, 6)
    assert (first.loads, second.loads) == (1, 0)


def test_rows_are_encoded_one_at_a_time_by_an_encoder_loaded_once(tmp_path: Path) -> None:
    fake = FakeEncoder()
    encoder, store = stored(tmp_path, fake)
    together = encoder.encode(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), clip_skip=2)
    alone = stored(tmp_path / "other", FakeEncoder())[0].encode(row(5, 6, 7, 8), clip_skip=2)
    assert fake.asked == [([[1, 2, 3, 4]], 2), ([[5, 6, 7, 8]], 2)]
    assert torch.equal(together[0][1], alone[0][0])
    store.flush()
    # A hit beside a miss.
    fresh = FakeEncoder()
    mixed = stored(tmp_path, fresh)[0].encode(torch.tensor([[9, 9, 9, 9], [5, 6, 7, 8]]), clip_skip=2)
    assert fresh.asked == [([[9, 9, 9, 9]], 2)]
    assert torch.equal(mixed[0][1], alone[0][0])
    assert fake.loads == 1


def test_each_thing_that_may_change_a_row_makes_it_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(config: TextEncoderConfig = CONFIG, dtype: torch.dtype = torch.float32, weights: str = "a" * 64) -> str:
        return Encoding(config, CPU, dtype).key(weights, [1, 2, 3, 4], 1)

    encoding = Encoding(CONFIG, CPU, torch.float32)
    keys = [
        key(),
        key(weights="b" * 64),
        key(dtype=torch.bfloat16),
        encoding.key("a" * 64, [1, 2, 3, 5], 1),
        encoding.key("a" * 64, [1, 2, 3, 4], 2),
        *(
            key(dataclasses.replace(CONFIG, **{field.name: changed}))
            for field in dataclasses.fields(CONFIG)
            for changed in [_other(getattr(CONFIG, field.name))]
        ),
    ]
    keys.append(Encoding(CONFIG, CPU, torch.float32, pooled=False).key("a" * 64, [1, 2, 3, 4], 1))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
    keys.append(key())
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "1.0")
    keys.append(key())
    monkeypatch.undo()
    assert key() == keys[0]
    assert len(set(keys)) == len(keys)


def _other(value: Any) -> Any:
    return value + "x" if isinstance(value, str) else not value if isinstance(value, bool) else (value or 0) + 1


def test_nothing_of_a_prompt_is_told_by_names(tmp_path: Path) -> None:
    encoder, store = stored(tmp_path, FakeEncoder())
    encoder.encode(row(1, 2, 3, 4))
    store.flush()
    (path,) = files(tmp_path)
    assert len(path.name) == 64
    head = path.read_bytes()[47:].split(b"\n")[0]
    assert head == b'{"dtype": "torch.float32", "states": [4, 6], "pooled": 3}'


# Identities that come late, or never


def test_an_identity_that_is_not_known_yet_delays_nothing(tmp_path: Path) -> None:
    late: Future[str] = Future()
    fake = FakeEncoder()
    encoder, store = stored(tmp_path, fake, weights=late)
    computed = encoder.encode(row(1, 2, 3, 4))
    store.flush(timeout=0)
    assert not (tmp_path / "ldmcli").exists()
    late.set_result("ab" * 32)
    store.flush()
    assert same(stored(tmp_path, FakeEncoder())[0].encode(row(1, 2, 3, 4)), computed)
    assert len(files(tmp_path)) == 1


def test_the_next_call_stores_what_the_last_could_not(tmp_path: Path) -> None:
    late: Future[str] = Future()
    encoder, _ = stored(tmp_path, FakeEncoder(), weights=late)
    encoder.encode(row(1, 2, 3, 4))
    late.set_result("ab" * 32)
    encoder.encode(row(5, 6, 7, 8))
    assert len(files(tmp_path)) == 1


def test_without_an_identity_rows_are_encoded_and_not_kept(tmp_path: Path) -> None:
    failed: Future[str] = Future()
    failed.set_exception(RuntimeError("gone"))
    fake = FakeEncoder()
    encoder, store = stored(tmp_path, fake, weights=failed)
    for _ in range(2):
        encoder.encode(row(1, 2, 3, 4))
        store.flush()
    disabled = PromptStore(EntryStore(None, max_bytes=1 << 20))
    bare = StoredEncoder(fake.load, fake.tokenizer, Encoding(CONFIG, CPU, torch.float32), None, disabled)
    bare.encode(row(1, 2, 3, 4))
    disabled.flush()
    assert len(fake.asked) == 3
    assert not (tmp_path / "ldmcli").exists()


def test_a_failed_load_is_told_and_tried_again(tmp_path: Path) -> None:
    fake = FakeEncoder()
    failures = [RuntimeError("no memory")]

    def load() -> FakeEncoder:
        if failures:
            raise failures.pop()
        return fake

    store = PromptStore(entry_store(tmp_path))
    encoder = StoredEncoder(load, None, Encoding(CONFIG, CPU, torch.float32), known(), store)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no memory"):
        encoder.encode(row(1, 2, 3, 4))
    assert encoder.encode(row(1, 2, 3, 4))[0].shape == (1, 4, 6)


# What may lie in the store


KIND = RowKind(4, 6, 3, torch.float32)
KEY = "c" * 64


def put(folder: Path, payload: bytes) -> PromptStore:
    entries = entry_store(folder)
    entries.write(KEY, payload)
    return PromptStore(entries)


def numbers(*values: float) -> bytes:
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


GOOD = KIND.head() + numbers(*range(27))


def test_a_good_entry_is_read(tmp_path: Path) -> None:
    found = put(tmp_path, GOOD).get(KEY, KIND)
    assert found is not None
    assert found[0].tolist() == torch.arange(24.0).reshape(4, 6).tolist()
    assert found[1] is not None
    assert found[1].tolist() == [24, 25, 26]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        KIND.head(),
        GOOD[:-1],
        GOOD + b"\0",
        RowKind(6, 4, 3, torch.float32).head() + numbers(*range(27)),
        RowKind(4, 6, None, torch.float32).head() + numbers(*range(24)),
        RowKind(4, 6, 3, torch.int32).head() + numbers(*range(27)),
        KIND.head() + numbers(*range(26), float("nan")),
        KIND.head() + numbers(float("inf"), *range(26)),
    ],
    ids=["empty", "head", "short", "long", "shape", "bare", "type", "nan", "infinity"],
)
def test_another_kind_of_entry_is_a_miss_and_goes(tmp_path: Path, payload: bytes) -> None:
    assert put(tmp_path, payload).get(KEY, KIND) is None
    assert not files(tmp_path)


def test_a_damaged_entry_is_encoded_again_and_mended(tmp_path: Path) -> None:
    encoder, store = stored(tmp_path, FakeEncoder())
    computed = encoder.encode(row(1, 2, 3, 4))
    store.flush()
    (path,) = files(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-4] + bytes(4))
    fake = FakeEncoder()
    encoder, store = stored(tmp_path, fake)
    assert same(encoder.encode(row(1, 2, 3, 4)), computed)
    store.flush()
    assert fake.loads == 1
    assert path.read_bytes() == good


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(tmp_path: Path, value: float) -> None:
    store = PromptStore(entry_store(tmp_path))
    store.add(known(KEY), lambda weights: weights, KIND, (torch.full((4, 6), value), torch.zeros(3)))
    store.add(known("d" * 64), lambda weights: weights, KIND, (torch.zeros(4, 6), torch.full((3,), value)))
    store.flush()
    assert not (tmp_path / "ldmcli").exists()


def test_what_is_not_of_the_kind_is_not_kept(tmp_path: Path) -> None:
    store = PromptStore(entry_store(tmp_path))
    for states, pooled in (
        (torch.zeros(4, 5), torch.zeros(3)),
        (torch.zeros(4, 6), None),
        (torch.zeros(4, 6).half(), torch.zeros(3)),
    ):
        store.add(known(KEY), lambda weights: weights, KIND, (states, pooled))
    store.flush()
    assert not (tmp_path / "ldmcli").exists()


def test_a_folder_that_cannot_be_used_changes_nothing_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ldmcli").write_text("in the way")
    fake = FakeEncoder()
    encoder, store = stored(tmp_path, fake)
    with caplog.at_level(logging.DEBUG):
        first = encoder.encode(row(1, 2, 3, 4))
        store.flush()
        assert same(encoder.encode(row(1, 2, 3, 4)), first)
        store.flush()
    assert len(caplog.records) == 1
    assert fake.loads == 1


def test_a_run_adds_no_more_than_its_budget(tmp_path: Path) -> None:
    store = PromptStore(entry_store(tmp_path), budget=1000)
    fake = FakeEncoder()
    encoder = StoredEncoder(fake.load, fake.tokenizer, Encoding(CONFIG, CPU, torch.float32), known(), store)
    for number in range(50):
        encoder.encode(row(number, 0, 0, 0))
    store.flush()
    assert len(files(tmp_path)) == 1000 // (27 * 4)
    assert len(fake.asked) == 50


def test_rows_on_their_way_hold_no_more_than_the_budget(tmp_path: Path) -> None:
    late: Future[str] = Future()
    store = PromptStore(entry_store(tmp_path), budget=1000)
    for number in range(50):
        store.add(late, lambda weights, number=number: f"{number:064x}", KIND, (torch.zeros(4, 6), torch.zeros(3)))
    late.set_result("")
    store.flush()
    assert len(files(tmp_path)) == 1000 // (27 * 4)


# With a real model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(identity, "_TICK_NS", -(10**18))  # a model unpacked just now is old enough
    return []


def real(model: Path, cache: Path, loads: list[str], dtype: torch.dtype = torch.float32) -> Any:
    """A model's stored encoders as the program wires them, and its store."""
    source = open_model(model)
    whole = once(lambda: load_text_encoders(source, CPU, dtype))

    def load(text: TextEncoderConfig, tokenizer: Any) -> Any:
        loads.append(text.part)
        return whole().encoders[[t.part for t in source.config.text_encoders].index(text.part)]

    hashes = FileHashes(EntryStore(cache / "ldmcli" / "hashes", max_bytes=1 << 20))
    store = PromptStore(entry_store(cache))
    return stored_encoders(source, load, CPU, dtype, Remembered(hashes, store)), store


def once(build: Any) -> Any:
    held: list[Any] = []

    def get() -> Any:
        if not held:
            held.append(build())
        return held[0]

    return get


PROMPTS = ["", "a red apple on a blue background", "a (red:1.3) apple " * 30]


def encode(encoder: PromptEncoder) -> list[Any]:
    return encoder.encode(PROMPTS, syntax="weighted", chunked=True, clip_skip=2)


def test_the_embedded_models_prompts_need_no_encoder_the_second_time(
    embedded_folder: Path, tmp_path: Path, loads: list[str], one_thread: None
) -> None:
    encoder, store = real(embedded_folder, tmp_path, loads)
    first = encode(encoder)
    store.flush()
    assert loads == ["text_encoder"]
    again, _ = real(embedded_folder, tmp_path, loads)
    second = encode(again)
    assert loads == ["text_encoder"]
    assert all(torch.equal(a.context, b.context) for a, b in zip(first, second, strict=True))
    direct = encode(load_text_encoders(open_model(embedded_folder), CPU, torch.float32))
    for a, b in zip(first, direct, strict=True):
        torch.testing.assert_close(a.context, b.context)


def test_both_encoders_of_xl_are_stored(family_models: Any, tmp_path: Path, loads: list[str]) -> None:
    model = family_models.path("sdxl")
    encoder, store = real(model, tmp_path, loads)
    first = encode(encoder)
    store.flush()
    second = encode(real(model, tmp_path, loads)[0])
    assert loads == ["text_encoder", "text_encoder_2"]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.context, b.context)
        assert torch.equal(a.pooled, b.pooled)


def test_changed_weights_are_another_encoder(
    embedded_folder: Path, tmp_path: Path, loads: list[str], one_thread: None
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(embedded_folder, tmp_path / "model"))
    encoder, store = real(model, tmp_path, loads)
    first = encode(encoder)
    store.flush()
    path = model / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({key: tensor * 1.5 for key, tensor in state.items()}, path)
    second = encode(real(model, tmp_path, loads)[0])
    assert loads == ["text_encoder"] * 2
    assert not torch.equal(first[1].context, second[1].context)


def test_a_projection_that_nobody_reads_is_no_part_of_a_row(embedded_folder: Path, tmp_path: Path) -> None:
    source = open_model(embedded_folder)
    (text,) = source.config.text_encoders
    config = dataclasses.replace(source.config, text_encoders=(dataclasses.replace(text, projection_dim=5),))
    source = dataclasses.replace(source, config=config)
    store = PromptStore(entry_store(tmp_path))
    memory = Remembered(FileHashes(), store)
    encoder = stored_encoders(source, lambda *_: FakeEncoder(text), CPU, torch.float32, memory)
    assert encoder.encode(["a rose"])[0].pooled is None
    store.flush()
    assert len(files(tmp_path)) == 1


def test_an_encoders_weights_are_ordinary_tensors(tmp_path: Path) -> None:
    fake, seen = FakeEncoder(), []

    def load() -> FakeEncoder:
        seen.append(torch.is_inference_mode_enabled())
        return fake

    store = PromptStore(entry_store(tmp_path))
    encoder = StoredEncoder(load, None, Encoding(CONFIG, CPU, torch.float32), known(), store)  # type: ignore[arg-type]
    with torch.inference_mode():
        encoder.encode(row(1, 2, 3, 4))
    assert seen == [False]


def test_a_disabled_store_hashes_nothing(embedded_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmcli.checkpoints.stored_text.part_sha256", None)
    store = PromptStore(EntryStore(None, max_bytes=1 << 20))
    source = open_model(embedded_folder)
    memory = Remembered(FileHashes(), store)
    encoder = stored_encoders(source, lambda *_: FakeEncoder(), CPU, torch.float32, memory)
    assert len(encoder.encoders) == 1


def test_a_process_killed_before_the_flush_loses_only_its_prompts(tmp_path: Path) -> None:
    code = """
import os, sys
from concurrent.futures import Future
from pathlib import Path
import torch
from ldmcli.disk.cache import EntryStore
from ldmcli.conditioning.prompt_store import PromptStore, RowKind
store = PromptStore(EntryStore(Path(sys.argv[1]), max_bytes=1 << 20))
for number in range(2):
    identity = Future()
    if not number:
        identity.set_result("")
    store.add(identity, lambda _, n=number: f"{n:064x}", RowKind(4, 6, None, torch.float32), (torch.ones(4, 6), None))
store.flush(0)
os.kill(os.getpid(), 9)
"""
    folder = tmp_path / "ldmcli" / "prompts"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert os.listdir(folder) == ["0" * 64]
    found = PromptStore(entry_store(tmp_path)).get("0" * 64, RowKind(4, 6, None, torch.float32))
    assert found is not None
    assert torch.equal(found[0], torch.ones(4, 6))
