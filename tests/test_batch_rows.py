"""Prompt files of every format become pictures to draw, or sentences on each row that cannot."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import environment, ldm_here, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmcli.batch.fields import as_fields
from ldmcli.batch.items import BadRow, Item
from ldmcli.batch.lines import MAX_LINE_BYTES, Digest, continues
from ldmcli.batch.reading import FORMATS, RawRow, open_rows
from ldmcli.batch.settings import checked_grid, parse_grid
from ldmcli.batch.survey import derived_seed, items, survey
from ldmcli.errors import BadDataError, LdmError, MissingInputError, UsageError
from ldmcli.spec import MAX_SEED, GenerationRequest

COMMON = GenerationRequest("", steps=4, width=64, height=64, sampler="ddim", guidance_scale=2.0)
LEAN = 120 << 10  # KiB: with a million rows too; Python alone takes a sixth of it
SEED_RANGE = f"0 to {MAX_SEED}"


def raw(path: Path, content: bytes, **options: Any) -> list[RawRow]:
    path.write_bytes(content)
    return list(open_rows(path, **options))


def checked(rows: Any, **options: Any) -> list[Item | BadRow]:
    return list(items(rows, COMMON, **{"seed": 1} | options))


def rows_of(*fields: dict[str, Any]) -> list[RawRow]:
    named = [as_fields((name, name, value) for name, value in one.items())[0] for one in fields]
    return [RawRow(i, i, one) for i, one in enumerate(named, 1)]


def drawn(rows: Any, **options: Any) -> list[Item]:
    found = checked(rows, **options)
    assert all(isinstance(one, Item) for one in found), found
    return found  # type: ignore[return-value]


def bad(rows: Any, **options: Any) -> BadRow:
    (found,) = (one for one in checked(rows, **options) if isinstance(one, BadRow))
    return found


def prompts(rows: list[RawRow]) -> list[str]:
    return [row.fields["prompt"] for row in rows if row.fields is not None]


# ---- formats ----


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "end"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_plain_text(tmp_path: Path, end: str, last: str, bom: bytes, pack: Any) -> None:
    lines = ["first", "", "# a comment", "   ", "  # another", " kept as it is ", "ä#b\u2028\x0b"]
    content = bom + end.join(lines).encode() + (end.encode() if last else b"")
    path = tmp_path / "prompts.txt"
    found = raw(path, pack(content))
    assert prompts(found) == ["first", " kept as it is ", "ä#b\u2028\x0b"]
    assert [(row.row, row.line) for row in found] == [(1, 1), (2, 6), (3, 7)]
    reader = open_rows(path)
    assert len(list(reader)) == 3
    assert reader.digest().sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "A.CSV", "a.csv.gz", "a.b.tsv.GZ"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\r\n\n", gzip.compress(b"", mtime=0)])
def test_nothing_is_no_rows(tmp_path: Path, name: str, content: bytes) -> None:
    assert raw(tmp_path / name, content) == []
    assert survey(items([], COMMON, seed=1), 5).rows == 0


def test_a_public_list(tmp_path: Path) -> None:
    """The columns of PartiPrompts, whose cells are not quoted and hold quotes that mean themselves."""
    content = (
        "Prompt\tCategory\tChallenge\tNote\n"
        "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
        "peace\tAbstract\tBasic\t\n"
        'a wall. The words "Fly an airplane" are written on it.\tOutdoor Scenes\tComplex\t\n'
        '"Hello" on a sign\tWorld Knowledge\tWriting & Symbols\t\n'
        '"never closed\tArts\tBasic\t\n'
        "Salvador Dalí\tPeople\tBasic\t\n"
    )
    reader = open_rows(_write(tmp_path / "PartiPrompts.tsv", content))
    found = drawn(reader)
    assert [item.request.prompt for item in found] == [line.split("\t")[0] for line in content.splitlines()[1:]]
    assert [item.line for item in found] == [2, 3, 4, 5, 6, 7]
    assert found[0].extra == {
        "Category": "Abstract",
        "Challenge": "Basic",
        "Note": "Biology-inspired concepts with multiple meanings",
    }
    assert reader.hints == []
    by_name = drawn(open_rows(tmp_path / "PartiPrompts.tsv", prompt_column="category"))
    assert by_name[0].request.prompt == "Abstract"
    assert by_name[0].extra["Prompt"] == "bond"


def _write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("delimiter", ",;|\t")
def test_quoted_text(tmp_path: Path, delimiter: str) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(
        [["ID", "Prompt", "Guidance Scale", "negative-prompt", ""], ["x", 'a,b;\t|"c"\r\nd', " 5 ", "", "kept"]]
    )
    (item,) = drawn(open_rows(_write(tmp_path / "p.csv", out.getvalue() + ",;|\t\n"[:0] + "\n" + delimiter * 4 + "\n")))
    assert (item.id, item.line, item.request.prompt) == ("x", 2, 'a,b;\t|"c"\r\nd')
    assert (item.request.guidance_scale, item.extra) == (5.0, {"column 5": "kept"})


def test_a_quote_that_does_not_close_spoils_its_own_row_only(tmp_path: Path) -> None:
    content = 'id,prompt\na,fine\nb,"open\nc,fine\nd,"bad" quote\ne,fine, but\nf,fine\n'
    found = list(open_rows(_write(tmp_path / "p.csv", content)))
    assert [(row.line, row.fields is None) for row in found] == [
        (2, False), (3, True), (4, False), (5, True), (6, True), (7, False),
    ]  # fmt: skip
    assert "quotes do not match" in found[1].problem
    assert "3 fields" in found[4].problem
    assert "header has 2" in found[4].problem


def test_a_long_column_of_lines(tmp_path: Path) -> None:
    """An open quote takes neither the file nor the memory."""
    many = 'prompt,id\n"open\n' + "line\n" * 3000
    found = list(open_rows(_write(tmp_path / "p.csv", many)))
    assert len(found) == 3001
    assert "1000 lines" in found[0].problem
    text = "x" * (1 << 20)
    assert drawn(open_rows(_write(tmp_path / "p.csv", f'prompt,id\n"{text}",1\n')))[0].request.prompt == text
    assert csv.field_size_limit() == 1 << 17


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    for header, options, kind, words in (
        ("text,seed", {}, BadDataError, ("no column is called prompt", "'text', 'seed'", "--prompt-column")),
        ("text,seed", {"prompt_column": "txt"}, UsageError, ("'txt'", "'text', 'seed'")),
        ("prompt,Seed,seed", {}, BadDataError, ("'seed' twice",)),
        ("prompt,a,a", {}, BadDataError, ("'a' twice",)),
        ("Prompt,PROMPT", {}, BadDataError, ("more than one column",)),
        ("prompt\0,x", {}, BadDataError, ("line 1", "NUL")),
        ('prompt,"x', {}, BadDataError, ("line 1", "quotes")),
        ("prompt\x1b[31m\u202e,x" * 3000, {}, BadDataError, ("\\x1b",)),
    ):
        with pytest.raises(kind) as error:
            raw(path, f"{header}\na,b\n".encode(), **options)
        assert all(word in str(error.value) for word in words), error.value
        assert len(str(error.value)) < 2500
        assert str(error.value).isprintable()
    reader = open_rows(_write(path, "prompt,guidence scale,custom-id\na,7,x\n"))
    (item,) = drawn(reader)
    assert item.extra == {"guidence scale": "7"}
    assert item.id == "x"
    assert len(reader.hints) == 1
    assert reader.hints[0].startswith("column 'guidence scale' is no field of a request; did you mean guidance_scale")
    (item,) = drawn(open_rows(_write(path, "prompt,custom_id,id\na,7,x\n")))
    assert (item.id, item.extra) == ("x", {"custom_id": "7"})
    (item,) = drawn(open_rows(_write(path, "caption,prompt\na,b\n"), prompt_column="Caption"))
    assert (item.request.prompt, item.extra) == ("a", {"prompt": "b"})


def test_json_lines(tmp_path: Path) -> None:
    record = {"prompt": "ä", "custom_id": 7, "seed": 3, "guidance_interval": [1, 2], "steps": None, "count": 2}
    lines = [json.dumps(record | {"extra": {"a": 1, "b": "x"}, "metadata": {"c": [1]}}), "", '{"prompt": ""}']
    found = drawn(open_rows(_write(tmp_path / "p.jsonl", "\r\n".join(lines))))
    assert [(item.number, item.row, item.line, item.id) for item in found] == [
        (0, 1, 1, "7"), (1, 1, 1, "7"), (2, 2, 3, "2"),
    ]  # fmt: skip
    assert [item.request.seed for item in found] == [3, 4, derived_seed(1, "2")]
    assert found[0].request.guidance_interval == (1.0, 2.0)
    assert found[0].request.steps == COMMON.steps
    assert found[0].extra == {"a": "1", "b": "x", "c": "[1]"}
    (item,) = drawn(open_rows(_write(tmp_path / "p.jsonl", '{"caption":"x"}'), prompt_column="caption"))
    assert item.request.prompt == "x"


def test_hostile_json(tmp_path: Path) -> None:
    lines = {
        b'{"prompt": "a" "b"}': "not valid JSON: Expecting ',' delimiter at character 16.",
        b"[1]": "not a JSON object",
        b'"x"': "not a JSON object",
        b'{"prompt": "a", "prompt": "b"}': "'prompt' is there twice",
        b"[" * 100_000: "not valid JSON",
        b'{"prompt":"x","steps":' + b"[" * 900 + b"]" * 900 + b"}": "steps",
        b'{"prompt":"x","seed":' + b"9" * 5000 + b"}": "not valid JSON",
        b'{"prompt":"x","seed":' + b"9" * 4000 + b"}": SEED_RANGE,
        b'{"prompt":"caf\xe9"}': "not UTF-8 text (byte 0xe9 at 14); save the file as UTF-8, or convert it: iconv",
        b'{"prompt":"a\0"}': "NUL",
        b'{"prompt":"\\u0000"}': "NUL",
        b'{"prompt":"\\ud800"}': "lone surrogate",
        b'{"prompt":"x","id":"\\ud800"}': "lone surrogate",
        b'{"prompt":"x","id":"a\\u0000"}': "NUL",
        b'{"prompt":"x","id":""}': "1 to 256",
        b'{"prompt":"x","id":"%s"}' % (b"x" * 10_000): "1 to 256",
        b'{"prompt":"x","id":1.5}': "id 1.5 is neither",
        b'{"prompt":"x","id":true}': "id True is neither",
        b'{"prompt":"x","extra":{"a":"\\ud800"}}': "surrogate",
        b'{"prompt":"x","extra":[1]}': "extra [1]",
        b'{"prompt":7}': "prompt must be text",
        b'{"prompt":null}': "no prompt",
        b'{"prompts":"x"}': "unknown field 'prompts': did you mean prompt",
        b'{"prompt":"x","upscale":"embedded"}': "unknown field 'upscale': rows cannot choose it",
        b'{"prompt":"x","\\u001b[31m":1}': "\\x1b[31m",
        b'{"prompt":"x","guidance_scale":NaN}': "guidance_scale nan is not a number from 0 to 1000",
        b'{"prompt":"x","guidance_scale":1e999}': "guidance_scale inf",
        b'{"prompt":"x","seed":"7"}': f"seed '7' is not a whole number from {SEED_RANGE}",
        b'{"prompt":"x","seed":-2}': f"seed -2 is not a whole number from {SEED_RANGE}",
        b'{"prompt":"x","steps":true}': "steps True",
        b'{"prompt":"x","count":0}': "count 0 is not a whole number from 1 to",
        b'{"prompt":"x","sampler":["a"]}': "sampler",
        b'{"prompt":"x","schedule":"bogus"}': "schedule 'bogus'",
        b'{"prompt":"x","guidance_interval":{"a":1}}': "guidance_interval",
        b'{"prompt":"x","seed":%d,"count":2}' % MAX_SEED: "past",
        b"x" * (MAX_LINE_BYTES + 1): "4 MiB",
    }
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(lines) + b'\n{"prompt":"fine"}')
    found = checked(open_rows(path))
    assert isinstance(found[-1], Item)
    assert len(found) == len(lines) + 1
    for line, (row, words) in enumerate(zip(found, lines.values(), strict=False), 1):
        assert isinstance(row, BadRow), (words, row)
        assert (row.row, row.line) == (line, line)
        assert any(words in problem for problem in row.problems), row
        assert all(text.isprintable() and len(text) < 1000 and text.endswith((".", "?")) for text in row.problems), row
    # A row with many unknown fields is not reported at length.
    wide = bad(rows_of({"prompt": "x"} | {f"field {i}": i for i in range(100_000)}))
    assert len(wide.problems) <= 21


def test_every_problem_of_a_row(tmp_path: Path) -> None:
    content = "id,prompt,seed,steps,guidance_scale,width,eta,count\n1,x,abc,0,nan,1e3,2,x\n"
    row = bad(open_rows(_write(tmp_path / "p.csv", content)))
    assert row.id == "1"
    assert row.line == 2
    for words in (
        f"seed 'abc' is not a whole number from {SEED_RANGE}",
        "steps 0 is not a whole number from 1 to 999",
        "guidance_scale nan is not a number from 0 to 1000",
        "width '1e3' is not a whole number from 1 to",
        "eta 2.0 is not a number from 0 to 1",
        "count 'x' is not a whole number from 1 to",
    ):
        assert sum(words in problem for problem in row.problems) == 1, row.problems
    assert len(row.problems) == 6


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("seed", " 7 ", 7), ("seed", "+7", 7), ("seed", str(MAX_SEED), MAX_SEED), ("seed", str(2**65), None),
        ("seed", "1e3", None), ("seed", "0x10", None), ("seed", "1_0", None), ("seed", "٣", None), ("seed", "-2", None),
        ("seed", "7.0", 7), ("seed", "7.5", None), ("seed", "1e16", None), ("seed", "9007199254740993.0", None),
        ("steps", "20.", 20), ("seed", "9" * 5000, None), ("steps", "", 4), ("steps", "  ", 4), ("steps", "999", 999),
        ("guidance_scale", "1e1", 10.0), ("guidance_scale", ".5", 0.5), ("guidance_scale", "7", 7.0),
        ("guidance_scale", "inf", None), ("guidance_scale", "7,5", 7.5), ("guidance_scale", "0,750", 0.75),
        ("guidance_scale", "1,000", None), ("guidance_scale", "1,000,5", None), ("seed", "42,0", 42),
        ("guidance_scale", "1_0", None),
        ("sampler", " euler ", "euler"), ("sampler", "Euler a", "euler-a"), ("sampler", "DPM++ 2M", "dpmpp-2m"),
        ("sampler", "DPM2", None), ("guidance_interval", "0.28:5.42", (0.28, 5.42)),
        ("guidance_interval", "5:1", None), ("guidance_interval", "1:2:3", None), ("negative_prompt", " a ", " a "),
        ("clip_skip", "2", 2), ("on_long_prompt", "chunk", "chunk"), ("refiner_start", "1.5", None),
    ],
)  # fmt: skip
def test_cells(tmp_path: Path, field: str, text: str, value: Any) -> None:
    reader = open_rows(_write(tmp_path / "p.tsv", f"{field}\tprompt\n{text}\tx\n"))
    if value is None:
        assert field in bad(reader).problems[0]
    else:
        assert getattr(drawn(reader)[0].request, field) == value


def test_formats_that_are_not_known(tmp_path: Path) -> None:
    for name in ("prompts", "prompts.gz", "prompts.xlsx", ".txt.zip"):
        with pytest.raises(MissingInputError, match="does not exist"):
            open_rows(tmp_path / name)
        (tmp_path / name).touch()
        with pytest.raises(UsageError, match="--format txt, jsonl, csv, tsv, kohya or a1111"):
            open_rows(tmp_path / name)
    with pytest.raises(UsageError, match="standard input"):
        open_rows(None)
    with pytest.raises(UsageError, match="'yaml'"):
        open_rows(tmp_path / "a.txt", format="yaml")
    with pytest.raises(UsageError, match="prompt-column"):
        open_rows(tmp_path / "a.txt", prompt_column="x")
    assert prompts(raw(tmp_path / "prompts", b"a\n", format="txt")) == ["a"]


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "folder.txt").mkdir()
    packed = gzip.compress(b"a\n" * 100_000)
    for name, content, kind, words in (
        ("missing.txt", None, MissingInputError, "missing.txt"),
        ("fifo.txt", None, BadDataError, "pipe; name a prompt file, or - for standard input"),
        ("folder.txt", None, BadDataError, "folder"),
        ("cut.txt.gz", packed[:-9], BadDataError, "cut off"),
        ("torn.txt.gz", packed[:20] + bytes(range(99, 199)) + packed[120:], BadDataError, "damaged"),
        ("tail.txt.gz", packed + b"garbage" * 9, BadDataError, "damaged"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(kind, match=words):
            list(open_rows(tmp_path / name))
    assert len(raw(tmp_path / "two.txt.gz", packed + packed + bytes(512))) == 200_000


def test_bad_bytes_name_their_line(tmp_path: Path) -> None:
    found = raw(tmp_path / "p.txt", b"fine\n\n# caf\xe9\ncaf\xe9\na\0b\n" + b"x" * (5 << 20) + b"\nfine")
    assert [(row.row, row.line, row.problem[:32]) for row in found] == [
        (1, 1, ""),
        (2, 4, "the row is not UTF-8 text (byte "),
        (3, 5, "the row holds a NUL character; r"),
        (4, 6, "the row is longer than 4 MiB; ma"),
        (5, 7, ""),
    ]
    table = raw(tmp_path / "p.csv", b'prompt,a\n"x\n\xff",1\ny,\xff\nz,1\n')
    assert [(row.line, row.problem != "") for row in table] == [(2, True), (4, True), (5, False)]


def digest_of(path: Path) -> Digest:
    reader = open_rows(path)
    for _ in reader:
        pass
    return reader.digest()


def test_digests_tell_appended_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"a\nb")
    before = digest_of(path)
    for content, expected in (
        (b"a\nb", True), (b"a\nb\n", True), (b"a\nb\r\nc", True), (b"a\nbc", False), (b"a\nc\nb", False), (b"a", False),
    ):  # fmt: skip
        path.write_bytes(gzip.compress(content) if b"\r" in content else content)
        assert continues(path, before) is expected, content
    assert continues(path, Digest(hashlib.sha256().hexdigest(), 0))
    big = bytes(range(32, 127)) * 3000
    path.write_bytes(big[: 1 << 16])
    before = digest_of(path)
    path.write_bytes(big[: 1 << 16] + b"\nmore")
    assert continues(path, before)


# ---- files of other programs ----

BOM = "\ufeff"


def reads(path: Path, content: str | bytes, **options: Any) -> tuple[list[Item | BadRow], list[str]]:
    """The rows of a file, and the remarks on it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reader = open_rows(path, **options)
    return checked(reader), reader.hints


@pytest.mark.parametrize(
    ("name", "files", "hinted"),
    [
        ("p.txt", ["a\r\nb\r\n", "c\n", "# fruit\nd"], False),
        ("p.txt", ["a\nb", "c", "d\n"], True),
        ("p.jsonl", ['{"prompt":"a"}\n{"prompt":"b"}\n', '{"prompt":"c"}\n', '{"prompt":"d"}'], False),
        ("p.jsonl", ['{"prompt":"a"}\n{"prompt":"b"}', '{"prompt":"c"}', '{"prompt":"d"}'], True),
        ("p.csv", ["prompt,seed\na,1\nb,2\n", "prompt,seed\nc,3\n", "prompt,seed\nd,4"], False),
        ("p.csv", ['prompt,seed\na,1\n"b",2', "prompt,seed\nc,3\n", "prompt,seed\nd,4"], True),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_joined_files_are_read_as_if_alone(
    tmp_path: Path, name: str, files: list[str], hinted: bool, pack: Callable[[bytes], bytes]
) -> None:
    found, hints = reads(tmp_path / name, b"".join(pack((BOM + text).encode()) for text in files))
    assert [one.request.prompt for one in found if isinstance(one, Item)] == ["a", "b", "c", "d"]
    assert any("byte order mark" in hint for hint in hints) == hinted
    assert any("repeats the header" in hint for hint in hints) == (name == "p.csv")


def test_a_mark_within_quotes_is_text(tmp_path: Path) -> None:
    assert reads(tmp_path / "p.jsonl", f'{{"prompt": "a{BOM}b"}}')[0][0].request.prompt == f"a{BOM}b"  # type: ignore[union-attr]
    assert reads(tmp_path / "p.csv", f'prompt,id\n"a{BOM}b",1')[0][0].request.prompt == f"a{BOM}b"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        ("prompt,seed,steps\na,42.0,20.0\nb,,\n", {"seed": 42, "steps": 20}),
        ("sep=;\r\nprompt;seed\r\na;1\r\n", {"seed": 1}),
        ('"sep=;"\nprompt;seed\na;1\n', {"seed": 1}),
        ("sep=,\r\nprompt,seed\r\na,1\r\n", {"seed": 1}),
        ('prompt;seed;"notes, misc"\na;1;x\n', {"seed": 1}),
        ("prompt;notes, misc;seed\na;x;1\n", {"seed": 1}),
        ("prompt;guidance_scale\na;7,5\n", {"guidance_scale": 7.5}),
        ('seed, prompt\n1, "a"\n', {"seed": 1}),
        ('seed, prompt, steps\n1, "a", 7\n', {"seed": 1, "steps": 7}),
        ("prompt,cfg_scale,steps\na,1,5\n", {"guidance_scale": 1.0, "steps": 5}),
        (
            "prompt,CFG scale,Sampler,Steps,Size,Negative prompt,Clip skip\na,1,Euler a,5,32x64,n,2\n",
            {"guidance_scale": 1.0, "sampler": "euler-a", "steps": 5, "width": 32, "height": 64, "clip_skip": 2},
        ),
        ("prompt,num_inference_steps,guidance_scale\na,3,2\n", {"steps": 3, "guidance_scale": 2.0}),
        ("prompt,negative,size\na,n,32 × 16\n", {"negative_prompt": "n", "width": 32, "height": 16}),
        ("Prompt,Negative Prompt,Seed\na,n,1\n", {"negative_prompt": "n", "seed": 1}),
        ("prompt,sampler_name,scheduler\na,euler,karras\n", {"sampler": "euler", "schedule": "karras"}),
        ("prompt,Sampler,Schedule type\na,DPM++ 2M,Karras\n", {"sampler": "dpmpp-2m", "schedule": "karras"}),
        ("prompt,Sampler\na,DPM++ 2M Karras\n", {"sampler": "dpmpp-2m", "schedule": "karras"}),
        ("prompt,scheduler\na,EulerAncestralDiscreteScheduler\n", {"sampler": "euler-a"}),
        ("prompt,seeds,w,h,numInferenceSteps\na,7,32,16,3\n", {"seed": 7, "width": 32, "height": 16, "steps": 3}),
        ("prompt,step,cfg\na,3,2\n", {"steps": 3, "guidance_scale": 2.0}),
        ("steps,num_inference_steps,prompt\n3,,a\n", {"steps": 3}),
        *((f"prompt,{name}\na,2\n", {}) for name in ("n_iter", "n_samples", "num_images_per_prompt", "Batch count")),
    ],
)
def test_tables_of_other_programs(tmp_path: Path, content: str, fields: dict[str, Any]) -> None:
    found, hints = reads(tmp_path / "p.csv", content)
    if not fields:  # a count of 2
        assert len(found) == 2
    assert isinstance(found[0], Item), found[0]
    assert found[0].request.prompt == "a"
    assert {name: getattr(found[0].request, name) for name in fields} == fields
    assert hints == []


def test_json_has_the_same_names(tmp_path: Path) -> None:
    row = {"Prompt": "a", "CFG scale": 5, "Sampler": "Euler a", "size": [32, 16], "num_inference_steps": 3.0, "n": None}
    found, _ = reads(tmp_path / "p.jsonl", json.dumps(row))
    (item,) = (one for one in found if isinstance(one, Item))
    request = item.request
    assert (request.prompt, request.guidance_scale, request.sampler) == ("a", 5.0, "euler-a")
    assert (request.width, request.height, request.steps) == (32, 16, 3)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "prompt,steps,num_inference_steps\na,3,4\n", "steps and num_inference_steps"),
        ("p.csv", "prompt,size,w\na,32x32,4\n", "size and w"),
        ("p.csv", "prompt,n_iter,n_samples\na,3,4\n", "n_iter and n_samples"),
        ("p.csv", "prompt,Sampler,schedule\na,DPM++ 2M Karras,karras\n", "Sampler and schedule"),
        ("p.jsonl", '{"prompt":"a","cfg_scale":5,"guidance_scale":4}', "cfg_scale and guidance_scale"),
        ("p.csv", "prompt,size\na,big\n", "size 'big' is not WIDTHxHEIGHT"),
        ("p.csv", 'prompt,guidance_scale\na,"7,5"\n', "write its decimals after a point"),
        ("p.csv", "prompt;guidance_scale\na;1,000\n", "write its decimals after a point"),
        ("p.csv", "prompt,steps\na,20.5\n", "steps '20.5' is not a whole number"),
        ("p.jsonl", '[{"prompt": "a pear"}]', "jq -c"),
        ("p.csv", b"prompt,seed\na caf\xe9,1\n", "iconv -f cp1252 -t utf-8"),
        ("p.txt", b"a caf\xe9\n", "iconv -f cp1252 -t utf-8"),
    ],
)
def test_rows_that_cannot_be_meant_say_why(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    (row,), _ = reads(tmp_path / name, content)
    assert isinstance(row, BadRow)
    assert len(row.problems) == 1
    assert words in row.problems[0]


@pytest.mark.parametrize("kind", FORMATS)
def test_utf16_is_named_with_its_cure(tmp_path: Path, kind: str) -> None:
    (tmp_path / "p").write_bytes("prompt\na\n".encode("utf-16"))
    with pytest.raises(BadDataError, match=r"is UTF-16 text; .*iconv -f utf-16 -t utf-8\.$"):
        list(open_rows(tmp_path / "p", format=kind))


@pytest.mark.parametrize(("name", "value"), [("p.csv", "-1"), ("p.csv", "-1.0"), ("p.jsonl", "-1")])
def test_seed_minus_one_is_as_if_not_given(tmp_path: Path, name: str, value: str) -> None:
    content = f"prompt,id,seed\na,x,{value}\n" if name == "p.csv" else f'{{"prompt":"a","id":"x","seed":{value}}}'
    (item,), _ = reads(tmp_path / name, content)
    assert isinstance(item, Item)
    assert item.request.seed == derived_seed(1, "x")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "prompt,guidence\na,7\n", "column 'guidence' is no field of a request; did you mean guidance_scale?"),
        ("p.csv", "prompt,cfg-scal\na,7\n", "did you mean guidance_scale"),
        ("p.csv", "prompt,Checkpoint\na,x\n", "rows cannot choose it"),
        ("p.csv", "prompt,scale\na,0.7\n", "rows cannot choose it"),
        ("p.txt", '--prompt "a" --steps 3\n--prompt "b"\n', "line 1 seems to hold options"),
        ("p.txt", "--ar 16:9\n", "line 1 begins with --"),
    ],
)
def test_what_looks_like_an_option_gets_one_remark(tmp_path: Path, name: str, content: str, words: str) -> None:
    _, (hint,) = reads(tmp_path / name, content)
    assert words in hint


# ---- prompt files of other programs ----

KOHYA = """# a comment
a {red|green} cat --n dog, ugly --w 512 --h 768 --s 20 --d 5,6 --l 3.5 --ss euler_a
A dog --W 64 --f dog.png

plain -- text --n with -- in it
"""
A1111 = """--prompt "a cat, nice" --negative_prompt "ugly dog" --steps 20 --sampler_name "DPM++ 2M Karras" --n_iter 2 \
--batch_size 3 --cfg_scale 7 --do_not_save_grid true --restore_faces false --seed -1
  a plain line # with no comment

--prompt words without quotes --width 512 --height 768 --seed 9
""".replace("\\\n", "")


def raw_rows(path: Path, content: str, format: str | None = None) -> tuple[list[RawRow], list[str]]:
    path.write_text(content)
    reader = open_rows(path, format=format)
    return list(reader), reader.hints


def test_kohyas_lines(tmp_path: Path) -> None:
    rows, hints = raw_rows(tmp_path / "p.txt", KOHYA, "kohya")
    cat = {"prompt": "a {red|green} cat", "negative_prompt": "dog, ugly", "width": 512, "height": 768, "steps": 20,
           "guidance_scale": 3.5, "sampler": "euler-a"}  # fmt: skip
    assert [(row.row, row.line, row.fields) for row in rows] == [
        (1, 2, cat | {"seed": 5}),
        (2, 2, cat | {"seed": 6}),
        (3, 3, {"prompt": "A dog", "width": 64, "extra": {"--f": "dog.png"}}),
        (4, 5, {"prompt": "plain -- text", "negative_prompt": "with -- in it"}),
    ]
    assert not any(row.problem for row in rows)
    assert hints == []


def test_a1111s_lines(tmp_path: Path) -> None:
    rows, hints = raw_rows(tmp_path / "p.txt", A1111, "a1111")
    assert [row.fields for row in rows] == [
        {"prompt": "a cat, nice", "negative_prompt": "ugly dog", "steps": 20, "sampler": "dpmpp-2m",
         "schedule": "karras", "guidance_scale": 7.0, "count": 6, "extra": {"--do_not_save_grid": "true"}},
        {"prompt": "a plain line # with no comment"},
        {"prompt": "words without quotes", "width": 512, "height": 768, "seed": 9},
    ]  # fmt: skip
    assert not any(row.problem for row in rows)
    assert hints == []


@pytest.mark.parametrize(
    ("format", "line", "words"),
    [
        ("kohya", "a --zz 3", "option --zz is not taken: kohya's scripts have none"),
        ("kohya", "a --am 1", "--am is not taken: it has no counterpart here"),
        ("kohya", "--n b", "begins with an option"),
        ("kohya", "a --n b --n c", "negative_prompt twice"),
        ("a1111", '--prompt "a" --zz 3', "--zz is not taken"),
        ("a1111", '--prompt "a" --sd_model x', "rows cannot choose it"),
        ("a1111", '--prompt "a" --restore_faces true', "--restore_faces is not taken"),
        ("a1111", "it's --steps 3", "No closing quotation"),
        ("a1111", "a cat --steps 3", "text before its options"),
        ("a1111", "--prompt a --n_iter x", "--n_iter x is no number"),
        ("a1111", "--prompt " + "x" * (1 << 20), "too long for one with options"),
    ],
)
def test_lines_that_cannot_be_meant(tmp_path: Path, format: str, line: str, words: str) -> None:
    (row,), _ = raw_rows(tmp_path / "p.txt", line + "\n", format)
    assert words in row.problem


@pytest.mark.parametrize(
    ("line", "format"),
    [
        ("a cat --n dog", "kohya"), ("a cat --W 512 --d 3", "kohya"), ('--prompt "a" --steps 3', "a1111"),
        ("--steps 3 --prompt a", "a1111"), ("a cat -- a dog", ""), ("a cat --ar 16:9", ""), ("a--n b", ""),
    ],
)  # fmt: skip
def test_plain_text_that_looks_like_them_is_remarked_on_before_anything_is_drawn(
    tmp_path: Path, line: str, format: str
) -> None:
    path = tmp_path / "p.txt"
    path.write_text(f"{line}\n{line}\n")
    reader = open_rows(path)
    assert next(iter(reader)).fields == {"prompt": line}
    assert len(reader.hints) == bool(format)
    assert all(f"--format {format} reads them" in hint for hint in reader.hints)


def test_remarks_on_standard_input_come_before_its_first_picture(tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "out", "-m", tiny_model(), "--steps", "1")
    out = ldm_here("batch", "-", "--format", "txt", *arguments, stdin=b"a --s 20\n\xff\n")
    assert out.err.index("--format kohya reads them") < out.err.index("line 2")


# ---- numbers, seeds, grid ----


def test_numbers_do_not_depend_on_other_rows() -> None:
    grid = [("steps", (2, 3)), ("guidance_scale", (1.0, 5.0))]
    good: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b", "steps": 7, "count": 3}, {"prompt": "c"}]
    expected = [item for item in drawn(rows_of(*good), grid=grid, count=2) if item.row == 3]
    assert expected[0].number == 8 + 6
    broken: tuple[dict[str, Any], ...] = (
        {"prompt": "b", "steps": 0, "count": 3}, {"count": 3, "steps": []}, good[1] | {"x": 1},
    )  # fmt: skip
    for second in broken:
        found = checked(rows_of(good[0], second, good[2]), grid=grid, count=2)
        assert isinstance(found[8], BadRow)
        assert found[9:] == expected
    unreadable = [*rows_of(good[0]), RawRow(2, 2, None, "bad."), RawRow(3, 3, good[2])]
    assert [one.number for one in checked(unreadable, grid=grid, count=2) if isinstance(one, Item)] == [
        *range(8), *range(16, 24),
    ]  # fmt: skip


def test_grid() -> None:
    grid = [parse_grid("steps=20,50"), parse_grid("guidance-scale=5,7.5"), parse_grid('negative_prompt="a, b",')]
    assert grid == [("steps", (20, 50)), ("guidance_scale", (5.0, 7.5)), ("negative_prompt", ("a, b", ""))]
    found = drawn(rows_of({"prompt": "x"}, {"prompt": "y", "steps": 3, "negative_prompt": "n"}), grid=grid, count=2)
    assert [(item.request.steps, item.request.guidance_scale) for item in found[:16:4]] == [
        (20, 5), (20, 7.5), (50, 5), (50, 7.5),
    ]  # fmt: skip
    assert [item.request.negative_prompt for item in found[:4]] == ["a, b", "a, b", "", ""]
    assert [item.request.seed - derived_seed(1, "1") for item in found[:16]] == [0, 1] * 8
    assert [item.request.negative_prompt for item in found[16:]] == ["n"] * 4
    assert [item.request.steps for item in found[16:]] == [3] * 4
    seeds = drawn(rows_of({"prompt": "x"}, {"prompt": "y", "seed": 1}), grid=[parse_grid("seed=5,9")], count=2)
    assert [item.request.seed for item in seeds] == [5, 6, 9, 10, 1, 2]
    assert "past" in bad(rows_of({"prompt": "x"}), grid=[("seed", (0, MAX_SEED))], count=2).problems[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps", "FIELD=VALUE"), ("=5", "FIELD=VALUE"), ("", "FIELD=VALUE"), ("steps=", "no values"),
        ("stepz=5", "did you mean steps"), ("count=5", "'count' is not known; choose from"),
        ("prompt=a,b", "not known"),
        ("steps=20,,50", "steps ''"), ("steps=0", "1 to 999"), ("steps=2,2", "twice"), ("sampler=ddim,eular", "eular"),
        ('negative_prompt="a', "quotes"), ("guidance_scale=nan", "0 to 1000"), ("seed=1e3", "seed '1e3'"),
    ],
)  # fmt: skip
def test_grids_that_cannot_be_meant(text: str, words: str) -> None:
    with pytest.raises(UsageError, match="grid") as error:
        parse_grid(text)
    assert words in str(error.value)


def test_grids_that_are_too_large() -> None:
    with pytest.raises(UsageError, match="steps twice"):
        checked_grid([("steps", (1,)), ("steps", (2,))])
    with pytest.raises(UsageError, match="1000000 combinations"):
        drawn([], grid=[("steps", range(1, 501)), ("seed", range(2000))])


def test_rows_win_and_the_model_is_asked_once() -> None:
    asked = []

    def fit(request: GenerationRequest) -> GenerationRequest:
        asked.append(request)
        if request.steps == 5:
            raise UsageError("5 steps do not fit the model; use fewer.")
        return request

    rows = [{"prompt": f"{i}", "seed": i, "steps": 3 + i % 3} for i in range(300)]
    found = checked(rows_of(*rows), fit=fit)
    assert len(asked) == 3
    assert [one.problems for one in found if isinstance(one, BadRow)] == [
        ("5 steps do not fit the model; use fewer.",)
    ] * 100
    assert [one.request.seed for one in found if isinstance(one, Item)] == [i for i in range(300) if i % 3 != 2]
    assert "eta 0.5 does not go" in bad(rows_of({"prompt": "x", "sampler": "euler", "eta": 0.5})).problems[0]


def test_equal_values_of_other_types_are_other_settings() -> None:
    found = checked(rows_of(*({"prompt": "x", "steps": value} for value in (1, True, 1.0, 1, 1.5))))
    assert [isinstance(one, Item) for one in found] == [True, False, True, True, False]
    assert repr(found[2].request.steps) == "1"
    first, second = drawn(rows_of({"prompt": "x", "eta": 1}, {"prompt": "x", "eta": 1.0}))
    assert repr(first.request.eta) == repr(second.request.eta) == "1.0"


def test_prompts_are_looked_at_once_a_row() -> None:
    seen = []

    def check(request: GenerationRequest) -> None:
        seen.append(request.prompt)
        if request.prompt == "long":
            raise UsageError("the prompt is too long; cut it.")

    rows = rows_of({"prompt": "a"}, {"prompt": "long"})
    assert bad(rows, check_prompt=check, grid=[("steps", (1, 2))], count=3).problems == (
        "the prompt is too long; cut it.",
    )
    assert seen == ["a", "long"]


def test_a_request_made_in_haste_is_a_whole_one() -> None:
    (item,) = drawn(rows_of({"prompt": "ä", "negative_prompt": "n", "seed": 5}))
    assert item.request == GenerationRequest.from_dict(item.request.to_dict())
    assert hash(item.request) == hash(GenerationRequest.from_dict(item.request.to_dict()))


# ---- ids ----


def test_ids_must_differ() -> None:
    rows = rows_of(
        {"prompt": "a"}, {"prompt": "a", "id": "x"}, {"prompt": "a", "id": "X"}, {"prompt": "a", "id": "x"},
        {"prompt": "a", "id": "1"}, {"prompt": "a", "custom_id": 7}, {"prompt": "a"}, {"prompt": "a", "id": "../../x"},
        {"prompt": "", "id": "x"}, {"id": "late", "prompt": "", "steps": 0}, {"id": "late", "prompt": ""},
    )  # fmt: skip
    found = checked(rows)
    wrong = {one.row: one.problems for one in found if isinstance(one, BadRow)}
    assert wrong.pop(10) == ("steps 0 is not a whole number from 1 to 999.",)
    assert wrong == {
        4: ("id 'x' is taken already by line 2; ids must differ.",),
        5: ("id '1' is taken already by row 1, which has no id of its own; ids must differ.",),
        7: ("id '7' is taken already by line 6; ids must differ.",),
        9: ("id 'x' is taken already by line 2; ids must differ.",),
        11: ("id 'late' is taken already by line 10; ids must differ.",),
    }


def test_survey() -> None:
    rows = rows_of(*({"prompt": "x", "width": 32 if i % 4 else 0, "count": 2} for i in range(100)))
    found = survey(items(rows, COMMON, seed=1), 3)
    assert (found.rows, found.images, found.bad_rows) == (100, 150, 25)
    assert [row.row for row in found.first_bad] == [1, 5, 9]
    assert found.pixel_steps == 150 * 32 * 64 * 4


# ---- anything at all ----

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=30)
_RECORDS = st.lists(
    st.tuples(_TEXT, st.integers(0, MAX_SEED), st.floats(0, 1000), st.integers(1, 999), _TEXT), max_size=8
)
_HEADER = ["prompt", "seed", "guidance_scale", "steps", "note"]


@settings(deadline=None)
@given(records=_RECORDS, delimiter=st.sampled_from(",\t;"), end=st.sampled_from(["\n", "\r\n"]), packed=st.booleans())
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], delimiter: str, end: str, packed: bool
) -> None:
    out = io.StringIO()
    if "\r" not in end:  # Python 3.11 leaves such a cell unquoted then
        records = [(*(x.replace("\r", "") if isinstance(x, str) else x for x in record),) for record in records]
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([_HEADER, *records])
    content = out.getvalue().encode()
    path = tmp_path_factory.mktemp("csv") / ("p.tsv" if delimiter == "\t" else "p.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    found = drawn(open_rows(path))
    assert [
        (item.request.prompt, item.request.seed, item.request.guidance_scale, item.request.steps, item.extra["note"])
        for item in found
    ] == records


@settings(deadline=None)
@given(records=_RECORDS, ascii_only=st.booleans())
def test_what_json_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "p.jsonl"
    rows = [dict(zip(_HEADER[:4], record[:4], strict=True)) | {"extra": {"n": record[4]}} for record in records]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows), encoding="utf-8")
    found = drawn(open_rows(path))
    assert [(*(getattr(item.request, name) for name in _HEADER[:4]), item.extra["n"]) for item in found] == records


_BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([*(bytes([code]) for code in b'",\t\n\r\0\xff#{}:7'), b"prompt", b"seed"]), max_size=40
    ).map(b"".join),
    st.binary(max_size=60).map(lambda data: b"prompt,seed\n" + data),
    st.binary(max_size=60).map(lambda data: b"\x1f\x8b\x08\0" + data),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(content=_BYTES, kind=st.sampled_from(FORMATS))
def test_any_bytes_are_rows_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    found: list[Item | BadRow] = []
    try:
        found = checked(open_rows(path, format=kind))
    except LdmError as error:
        sentence = str(error)
    else:
        sentence = "."
    assert sentence.isprintable()
    assert sentence.endswith(".")
    for one in found:
        assert isinstance(one, Item) or (one.problems and all(text.isprintable() for text in one.problems))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
_NAMES = st.sampled_from([field for field in COMMON.to_dict()] + ["id", "custom_id", "count", "extra", "metadata", "x"])


@settings(deadline=None, max_examples=200)
@given(rows=st.lists(st.dictionaries(_NAMES, _JSON, max_size=5), max_size=3))
def test_any_values_are_pictures_or_problems(rows: list[dict[str, Any]]) -> None:
    rows = [row | {"count": 1} if isinstance(row.get("count"), int) else row for row in rows]
    for one in checked(rows_of(*rows), grid=[("steps", (1, 2))]):
        if isinstance(one, Item):
            assert GenerationRequest.from_dict(one.request.to_dict()) == one.request
        else:
            assert all(text.isprintable() for text in one.problems)


# ---- size ----

_READING = """
import itertools, sys
from ldmcli.batch.reading import open_rows
from ldmcli.batch.survey import items, survey
from ldmcli.batch.run import batches
from ldmcli.spec import GenerationRequest

rows = open_rows(None, format=sys.argv[1])
found = items(rows, GenerationRequest("", steps=1, width=8, height=8), seed=1)
{program}
assert "torch" not in sys.modules  # a model is not needed to read rows
# Of this program alone; what getrusage says counts the process that started it as well.
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
_DRY_RUN = "total = survey(found, 3)\nprint(total.rows, total.images, total.bad_rows)"
_WRITE = {
    "txt": "for i in range(200_000): print('a prompt, number', i)",
    "csv": "print('id,prompt,seed')\nfor i in range(100_000): print(f'id{i},\"a, {i}\",{i if i % 1000 else -2}')",
    "jsonl": 'for i in range(100_000): print(\'{"prompt": "p", "custom_id": "%d"}\' % i)',
}


def piped(source: str, program: str, kind: str) -> list[int]:
    """The numbers that a program prints which reads what another one writes; asserts that its memory stays small."""
    writer = [sys.executable, "-S", "-c", f"import sys\n{source}"]
    with subprocess.Popen(writer, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        reader = [sys.executable, "-c", _READING.format(program=program), kind]
        try:
            done = subprocess.run(
                reader, stdin=process.stdout, capture_output=True, timeout=280, env=environment(), check=False
            )
        finally:
            process.kill()
    assert done.returncode == 0, done.stderr
    *numbers, peak = map(int, done.stdout.split())
    assert peak < LEAN
    return numbers


@pytest.mark.parametrize(("kind", "rows", "wrong"), [("txt", 200_000, 0), ("csv", 100_000, 100), ("jsonl", 100_000, 0)])
def test_many_rows_take_little_memory(kind: str, rows: int, wrong: int) -> None:
    assert piped(_WRITE[kind], _DRY_RUN, kind) == [rows, rows - wrong, wrong]


def test_endless_input_flows() -> None:
    first = "for batch in itertools.islice(batches(found, 4), 5000): last = batch[-1]\nprint(last.row, len(batch))"
    assert piped("while True: print('a prompt')", first, "txt") == [20_000, 4]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("txt", "while True: sys.stdout.write('x' * 999)"),
        ("jsonl", "while True: sys.stdout.write('{' * 999)"),
        ("csv", "print('prompt,id')\nwhile True: sys.stdout.write('x' * 999)"),
        ("csv", "print('prompt,id\\n\"open')\nwhile True: print('x' * 9999)"),
        ("txt", "import gzip\ndata = gzip.compress(bytes(1 << 25))\nwhile True: sys.stdout.buffer.write(data)"),
    ],
)
def test_an_endless_line_is_one_bad_row(kind: str, source: str) -> None:
    row = 'row = next(iter(rows))\nassert "4 MiB" in row.problem or "1000 lines" in row.problem, row'
    assert piped(source, row, kind) == []


def test_rows_of_a_pipe_come_as_they_are_written() -> None:
    script = (
        "from ldmcli.batch.reading import open_rows\n"
        "for row in open_rows(None, format='csv'): print(row.fields['prompt'], flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for text in ("prompt,seed\na,1\n", '"b, c",2\n', "d,\r\n"):
            process.stdin.write(text.encode())
            process.stdin.flush()
            assert process.stdout.readline()
        process.stdin.close()
        assert process.wait(30) == 0


def test_standard_input_that_is_none() -> None:
    script = "from ldmcli.batch.reading import open_rows\nlist(open_rows(None, format='txt'))"
    closed = ["/bin/sh", "-c", '"$0" -c "$1" <&-', sys.executable, script]
    done = subprocess.run(closed, capture_output=True, env=environment(), check=False)
    assert b"standard input is closed" in done.stderr.splitlines()[-1]
