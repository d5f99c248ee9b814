"""Names of files by a pattern: safe, told apart, the same when a run goes on."""

import json
from pathlib import Path

import pytest
from cli_support import assert_refused, ldm_here, tiny_model

from ldmcli.errors import UsageError
from ldmcli.images.naming import MAX_LENGTH, NamePattern

DRAW = ("-m", tiny_model(), "--steps", "1", "-W", "8", "-H", "8")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{row:05d}-{id}-{seed}", "00003-cat-7"),
        ("{number:3}_{seed:d}", "-5_7".strip("-")),
        ("{prompt}", "a-red-cat-x"),
        ("{prompt:.5}", "a-red"),
        ("{guidance_scale:.2f}", "7.50"),
        ("{guidance-scale}x", "7.5x"),
        ("{sampler}.{eta}", "euler.0"),
        ("{id}{schedule}", "cat"),
    ],
)
def test_patterns(pattern: str, expected: str) -> None:
    request = {"prompt": "a red cat/x", "seed": 7, "guidance_scale": 7.5, "sampler": "euler", "eta": 0.0}
    assert NamePattern(pattern).of(request, row=3, id="cat", number=5) == expected


@pytest.mark.parametrize("text", ["../../etc/passwd", "\0\n\x1b[31m", ".hidden", "-rf", "é ★", "", "a" * 5000, "CON"])
def test_names_are_safe_whatever_is_in_them(text: str) -> None:
    name = NamePattern("{prompt}").of({"prompt": text}, row=1, id=text, number=2)
    assert name
    assert len(name) <= MAX_LENGTH
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-+=,@éÉ")
    assert name[0] not in ".-"
    assert name.isascii()


@pytest.mark.parametrize(
    "pattern",
    ["", "x", "{}", "{0}", "{foo}", "{seed.real}", "{seed[0]}", "{seed!r}", "{seed", "a/{seed}", "{seed:>9}", "é{seed}",
     "{seed:{row}}", "{seed:999d}", "{seed}" * 100],
)  # fmt: skip
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="name "):
        NamePattern(pattern)


def test_pictures_of_txt2img(tmp_path: Path) -> None:
    common = ("txt2img", "a cat", "a dog", *DRAW, "-s", "5", "-c", "2", "-o", tmp_path)
    result = ldm_here(*common, "--name", "{row:02d}-{number}-{prompt}-{seed}")
    names = ["01-1-a-cat-5", "01-2-a-cat-6", "02-3-a-dog-5", "02-4-a-dog-6"]
    assert [path.stem for path in result.paths] == names
    again = ldm_here(*common, "--name", "{seed}")
    assert [path.stem for path in again.paths] == ["5", "6", "5-2", "6-2"]
    for where in ("-", "one.png"):
        assert_refused(ldm_here(*common[:-1], where, "--name", "{seed}"), 2, "--name", "folder")


def lines(folder: Path) -> list[dict[str, object]]:
    found = [json.loads(line) for file in (folder / "manifest").glob("*.jsonl") for line in file.open()]
    return sorted(found, key=lambda line: line["number"])


def test_pictures_of_a_batch_resume_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "id": "cat/1", "seed": 4}\n{"prompt": "b", "id": "cat 1", "seed": 4}\n'
        '{"prompt": "c", "id": "CAT-1", "seed": 4}\n{"prompt": "d", "id": "2-9", "seed": 4, "count": 2}\n'
    )
    out = tmp_path / "out"
    common = ("batch", tmp_path / "rows.jsonl", *DRAW, "-o", out, "--name", "{id}-{seed}")
    assert ldm_here(*common).code == 0
    names = ["cat-1-4", "cat-1-4-2", "CAT-1-4-3", "2-9-4", "2-9-5"]
    assert [line["path"] for line in lines(out)] == [f"images/00000/{name}.png" for name in names]
    before = {path: path.stat().st_mtime_ns for path in (out / "images/00000").iterdir()}
    (out / "images/00000/cat-1-4-2.png").unlink()
    (out / "images/00000/2-9-5.png").write_bytes(b"")
    result = ldm_here(*common)
    assert result.code == 0
    assert sorted(path.stem for path in result.paths) == ["2-9-5", "cat-1-4-2"]
    assert "2 pictures that were done are gone" in result.err
    after = {path: path.stat().st_mtime_ns for path in (out / "images/00000").iterdir()}
    assert set(after) == set(before)
    assert sum(after[path] != before[path] for path in before) == 2
    assert ldm_here("batch", "--status", out, "--json").records[0]["done"] == 4
    assert_refused(ldm_here(*common[:-1], "{row}"), 65, "name")
    assert_refused(ldm_here(*common[:-2]), 65, "name")


def test_no_picture_of_a_run_is_drawn_over_another(tmp_path: Path) -> None:
    """A row that was bad takes no name that a later one got meanwhile."""
    common = ("batch", "-", "--format", "jsonl", *DRAW, "-o", tmp_path, "--name", "{prompt}")
    rows = [b'{"prompt": "x", "steps": 0}\n', b'{"prompt": "x", "seed": 1}\n']
    assert ldm_here(*common, stdin=b"".join(rows)).code == 3
    drawn = (tmp_path / "images/00000/x.png").read_bytes()
    mended = ldm_here(*common, "--retry-failed", stdin=b'{"prompt": "x", "seed": 2}\n' + rows[1])
    assert (tmp_path / "images/00000/x.png").read_bytes() == drawn
    assert mended.code in (0, 65)
