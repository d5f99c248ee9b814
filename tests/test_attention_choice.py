"""Which kernel computes attention on a GPU: by a table of measurements; and how the table is made of them."""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldmcli.bench.attention_rows import Problem, Result, merged, rows_of, table_source
from ldmcli.networks.attention import ATTENTIONS, TORCH_KERNELS, math_attention, sdpa_attention, takes
from ldmcli.speed import attention_choice, attention_table
from ldmcli.speed.attention_choice import (
    MEASURED,
    TABLE,
    Choice,
    Row,
    Shape,
    attend_by_name,
    automatic,
    by_shape,
    measured,
    rows_for,
)

HOPPER = (9, 0)
CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were such a card; nothing may be computed on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    attend_by_name.cache_clear()
    yield
    attend_by_name.cache_clear()


def tensors(heads: int = 3, tokens: int = 10, keys: int = 7, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, head_dim, generator=generator) for n in (tokens, keys, keys))
    return query, key, value


# Choosing


def test_without_measurements_torch_picks_by_the_same_function(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "TABLE", ())
    assert automatic(CARD) == "sdpa"
    assert attend_by_name(MEASURED, CARD) is sdpa_attention
    other = Row("8.0", "float16", 40, 4096, 4096, 16, 256, "flash")
    monkeypatch.setattr(attention_choice, "TABLE", (other,))
    assert automatic(CARD) == "sdpa"
    assert attend_by_name("sdpa", CARD) is sdpa_attention


def test_a_card_that_was_measured_gets_the_choice(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "TABLE", (Row("9.0", "float16", 40, 4096, 4096, 16, 256, "flash"),))
    assert automatic(CARD) == MEASURED
    chosen = attend_by_name(MEASURED, CARD)
    assert isinstance(chosen, Choice)
    assert attend_by_name(MEASURED, CARD) is chosen


def test_on_a_cpu_no_table_is_read() -> None:
    assert attend_by_name(MEASURED, CPU) is sdpa_attention
    assert rows_for(None, [Row("9.0", "float16", 40, 64, 64, 1, 1, "flash")]) == []
    for name, attend in ATTENTIONS.items():
        if name not in TORCH_KERNELS:
            assert attend_by_name(name, CPU) is attend


ROWS = [
    Row("9.0", "float32", 8, 10, 7, 4, 8, "math"),
    Row("9.0", "float32", 8, 10, 7, 16, 16, "chunked"),
    Row("8.9", "float32", 8, 10, 7, 32, 64, "chunked"),
]


@pytest.mark.parametrize(
    ("shape", "right"),
    [
        *[(Shape(8, 10, 7, n, torch.float32), "math") for n in (4, 6, 8)],
        *[(Shape(8, 10, 7, n, torch.float32), "sdpa") for n in (3, 9, 15, 17, 48)],
        (Shape(8, 10, 7, 16, torch.float32), "chunked"),
        (Shape(8, 10, 7, 6, torch.float16), "sdpa"),
        (Shape(16, 10, 7, 6, torch.float32), "sdpa"),
        (Shape(8, 11, 7, 6, torch.float32), "sdpa"),
        (Shape(8, 10, 8, 6, torch.float32), "sdpa"),
    ],
)
def test_only_what_was_measured_counts(shape: Shape, right: str) -> None:
    assert measured(by_shape(rows_for(HOPPER, ROWS)), shape) == right


class Spy:
    """An attention that counts its calls, and raises what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error
        self.__name__ = "spying_attention"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return math_attention(query, key, value)


def test_a_row_is_honoured_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, asked = Spy(), []
    monkeypatch.setitem(ATTENTIONS, "math", spy)

    def pick(shape: Shape) -> str:
        asked.append(shape)
        return "math" if shape.batch_heads == 6 else "sdpa"

    choice = Choice(pick, HOPPER)
    for _ in range(3):
        assert choice(*tensors()).equal(math_attention(*tensors()))
        assert choice(*tensors(heads=1)).equal(sdpa_attention(*tensors(heads=1)))
    assert spy.calls == 3
    assert asked == [Shape(8, 10, 7, 6, torch.float32), Shape(8, 10, 7, 2, torch.float32)]


@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), ImportError("no"), ValueError("no")], ids=repr)
def test_a_kernel_that_refuses_is_not_asked_again(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy(error)
    monkeypatch.setitem(ATTENTIONS, "math", spy)
    choice = Choice(lambda shape: "math", HOPPER)
    with caplog.at_level(logging.INFO, logger="ldmcli"):
        for _ in range(3):
            assert choice(*tensors()).equal(sdpa_attention(*tensors()))
        assert spy.calls == 1
        choice(*tensors(heads=1))  # another shape: asked once more, and no other line
        choice(*tensors(heads=1))
    assert spy.calls == 2
    assert len(caplog.messages) == 1
    assert "spying_attention refused 6 heads of 8 numbers, 10 × 7 tokens (no)" in caplog.messages[0]


def test_memory_that_is_out_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(torch.OutOfMemoryError("out"))
    monkeypatch.setitem(ATTENTIONS, "math", spy)
    choice = Choice(lambda shape: "math", HOPPER)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            choice(*tensors())
    assert spy.calls == 2


def test_errors_of_torchs_own_pick_are_told() -> None:
    choice = Choice(lambda shape: "sdpa", HOPPER)
    query, key, value = tensors()
    with pytest.raises(RuntimeError):
        choice(query, key, value[:, :1, :3])


@pytest.mark.parametrize("name", ["flash", "no such kernel"])
def test_what_a_kernel_does_not_take_is_not_tried(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy()
    monkeypatch.setitem(ATTENTIONS, "flash", spy)
    choice = Choice(lambda shape: name, HOPPER)
    with caplog.at_level(logging.INFO, logger="ldmcli"):
        assert choice(*tensors()).equal(sdpa_attention(*tensors()))  # float32, or unknown
    assert not spy.calls
    assert not caplog.messages


def test_a_forced_kernel_computes_what_it_takes(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy()
    monkeypatch.setitem(ATTENTIONS, "flash", spy)
    forced = attend_by_name("flash", CARD)
    half = [tensor.half() for tensor in tensors()]
    wide = [tensor.half() for tensor in tensors(heads=1, head_dim=512)]
    assert forced(*half).equal(math_attention(*half))
    assert forced(*wide).equal(sdpa_attention(*wide))
    assert spy.calls == 1


# The table


def test_the_table_is_as_it_is_written() -> None:
    source = Path(attention_table.__file__).read_text(encoding="utf-8")
    assert source == table_source(TABLE, attention_table.MEASURED_WITH)


def test_rows_of_the_table() -> None:
    for row in TABLE:
        major, minor = map(int, row.capability.split("."))
        assert row.kernel in ATTENTIONS
        assert row.kernel not in ("sdpa", "chunked")
        assert 0 < row.least <= row.most
        assert takes(row.kernel, row.head_dim, row.keys, getattr(torch, row.dtype), (major, minor), cudnn=99999)
        assert f"{row.capability} {row.dtype}" in attention_table.MEASURED_WITH
    assert [*TABLE] == sorted(TABLE)
    for one, next_one in itertools.pairwise(TABLE):
        assert one[:5] != next_one[:5] or one.most < next_one.least


SOME = [
    Row("8.9", "float16", 40, 64, 64, 16, 16, "flash"),
    Row("9.0", "float16", 40, 4096, 77, 16, 256, "cudnn"),
]
WITH = {"9.0 float16": "a card, torch 2", "8.9 float16": "another “card”"}


def test_a_written_table_reads_back_and_is_formatted(tmp_path: Path) -> None:
    for rows, said in ((SOME, WITH), ([], {}), ([], WITH)):
        source = table_source(rows, said)
        found: dict[str, object] = {}
        exec(compile(source, "table", "exec"), found)
        assert found["ROWS"] == tuple(tuple(row) for row in rows)
        assert found["MEASURED_WITH"] == said
        assert ("empty" in str(found["__doc__"])) == (not said)
        assert max(map(len, source.splitlines())) <= 120


def result(
    batch: int, seconds: dict[str, float], errors: dict[str, float] | None = None, queries: int = 64, heads: int = 8
) -> Result:
    problem = Problem(batch, heads, queries, 64, 40, "float16")
    return Result(problem, "flash", seconds, {name: 1e-4 for name in seconds} | (errors or {}))


def test_a_kernel_must_be_faster_and_as_exact() -> None:
    assert result(2, {"sdpa": 1.0, "flash": 0.9, "cudnn": 0.8}).best == "cudnn"
    assert result(2, {"sdpa": 1.0, "flash": 0.98}).best == "sdpa"
    assert result(2, {"sdpa": 1.0, "flash": 0.9, "cudnn": 0.8}, {"cudnn": 2e-4}).best == "flash"
    assert result(2, {"sdpa": 1.0, "flash": 0.5}, {"flash": float("nan")}).best == "sdpa"
    assert result(2, {"sdpa": 1.0, "flash": 0.5}, {"sdpa": 1e-9, "flash": 9e-7}).best == "flash"
    assert result(2, {"flash": 0.5}).best == "sdpa"  # torch's own pick refused: nothing to compare with


def test_rows_reach_over_neighbours_that_agree() -> None:
    flash, cudnn, own = ({"sdpa": 1.0, name: 0.5} for name in ("flash", "cudnn", "math"))
    own["math"] = 1.0
    found = rows_of([result(2, flash), result(8, flash), result(32, cudnn), result(2, own, queries=16)], "9.0")
    assert found == [
        Row("9.0", "float16", 40, 64, 64, 16, 64, "flash"),
        Row("9.0", "float16", 40, 64, 64, 256, 256, "cudnn"),
    ]
    apart = rows_of([result(2, flash), result(8, own), result(32, flash)], "9.0")
    assert [(row.least, row.most) for row in apart] == [(16, 16), (256, 256)]
    # The same number of heads in another number of samples, where another kernel was best: none is.
    assert rows_of([result(2, flash), result(4, cudnn, heads=4)], "9.0") == []


def test_what_was_measured_again_takes_the_place_of_old_rows() -> None:
    new = [Row("9.0", "float16", 40, 64, 64, 16, 16, "cudnn")]
    again = [result(2, {"sdpa": 1.0, "cudnn": 0.5}), dataclasses.replace(result(2, {}, queries=4096))]
    old = [
        *SOME,
        Row("9.0", "float16", 40, 64, 64, 16, 256, "flash"),
        Row("9.0", "float16", 40, 4096, 64, 16, 256, "flash"),  # measured again: no kernel beats torch's pick now
    ]
    assert merged(old, new, again, "9.0") == [SOME[0], *new, SOME[1]]


# On a card


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [MEASURED, *TORCH_KERNELS])
def test_choices_on_a_gpu(name: str) -> None:
    """Also the VAE's wide heads, which two of the kernels leave to torch."""
    attend = attend_by_name(name, torch.device("cuda", torch.cuda.current_device()))
    for problem in (Problem(2, 8, 256, 77, 40, "float16"), Problem(1, 1, 100, 100, 512, "float16")):
        query, key, value = problem.tensors(torch.device("cuda"))
        right = math_attention(query.float(), key.float(), value.float())
        assert ((attend(query, key, value).float() - right).norm() / right.norm()).item() < 2e-3
