"""Pictures on disk: exact pixels and text, metadata for its readers, hostile PNGs, whole-or-absent writes."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldmcli.disk.writing import check_may_write, prepare_folder, write_exact, write_new
from ldmcli.errors import BadDataError, CannotCreateError, LdmError, MissingInputError, StorageError
from ldmcli.images.encode import encode_png
from ldmcli.images.metadata import infotext, read_parameters, read_record, text_chunks
from ldmcli.images.png_text import MAX_TEXT_BYTES, iterate_text
from ldmcli.spec import MAX_PROMPT_BYTES, MAX_SEED, GenerationRequest

MODEL = {"name": "tiny-emoji", "path": "/models/tiny", "sha256": "6ce0161689b3853acaa03779ec93eafe" * 2}
RUNTIME = {"dtype": "bfloat16", "device": "cpu", "attention": "sdpa", "torch": "2.14.1"}
PIXELS = np.zeros((2, 2, 3), np.uint8)
REQUEST = GenerationRequest(
    "a cat", "blurry", seed=42, steps=50, guidance_scale=7.5, width=512, height=512, sampler="ddim"
)
TEXTS = [
    "",
    "plain",
    "naïve café",
    "a\nb\r\nc\td",
    "\x01\x07\x1b[31m\x7f\x85\x9f",
    "猫と 犬",
    "👩‍🚀🏳️‍🌈",
    "‮bidi\u2028",
    '"quotes\\"',
]
# FIELD_NOTES §3: what A1111 applies to the last line.
READER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def save(path: Path, request: GenerationRequest = REQUEST, pixels: np.ndarray = PIXELS) -> Path:
    path.write_bytes(encode_png(pixels, text_chunks(request, MODEL, RUNTIME)))
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, end: bytes = chunk(b"IEND", b"")) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def with_record(folder: Path, record: Any) -> Path:
    path = folder / "record.png"
    text = record if isinstance(record, str) else json.dumps(record)
    path.write_bytes(png_with(chunk(b"tEXt", b"ldmcli\0" + text.encode("latin-1"))))
    return path


def good_record() -> dict[str, Any]:
    return json.loads(text_chunks(REQUEST, MODEL, RUNTIME)["ldmcli"])


def fields_of(text: str) -> dict[str, str]:
    """What A1111 finds in the last line of an infotext."""
    found = {}
    for name, value in READER.findall(text.strip().split("\n")[-1]):
        found[name] = json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value
    return found


def leftovers(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".part"))


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# --- encoding


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 64), (33, 65)])
def test_pixels_come_back_exactly(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels, {}))) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_strided_pixels_come_back_exactly() -> None:
    pixels = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(3, 16, 16).transpose(1, 2, 0)[::2, ::-1]
    with Image.open(io.BytesIO(encode_png(pixels, {}))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_back_equal_here_and_in_pillow(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(PIXELS, {"parameters": text, "other": text}))
    assert list(iterate_text(path)) == [("parameters", text), ("other", text)]
    with Image.open(path) as image:
        image.load()
        assert image.info == {"parameters": text, "other": text}


@pytest.mark.parametrize("text", TEXTS)
def test_text_chunks_are_those_pillow_would_write(text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=info)
    ours = encode_png(PIXELS, {"parameters": text})
    theirs = file.getvalue()
    start, end = 33, theirs.index(b"IDAT") - 4
    assert ours[start:end] == theirs[start:end]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 2), np.uint8),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2, 2, 3)),
        np.zeros((0, 2, 3), np.uint8),
    ],
)
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(pixels, {})


@pytest.mark.parametrize("text", [{"": "x"}, {"k" * 80: "x"}, {"猫": "x"}, {"k": "a\0b"}, {"k": "\ud800"}])
def test_text_png_cannot_hold_is_refused(text: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"PNG text|codec"):
        encode_png(PIXELS, text)


# --- infotext


def test_infotext_reads_as_a1111_writes_it() -> None:
    expected = """\
        a cat
        Negative prompt: blurry
        Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x512, Model hash: 6ce0161689, \
Model: tiny-emoji, RNG: CPU, Version: ldmcli """
    assert infotext(REQUEST, MODEL["name"], MODEL["sha256"]).startswith(textwrap.dedent(expected))


def test_infotext_leaves_out_what_is_not_there() -> None:
    text = infotext(GenerationRequest("a cat", steps=50, guidance_scale=7.0, sampler="ddim"), "", "")
    assert re.fullmatch(r"a cat\nSteps: 50, Sampler: DDIM, CFG scale: 7, Seed: 0, RNG: CPU, Version: ldmcli \S+", text)


SDXL, SD2 = "Stable Diffusion XL", "Stable Diffusion 2.x"


@pytest.mark.parametrize(
    ("asked", "of_model", "key", "value"),
    [
        ({"steps": 7}, {}, "Steps", "7"),
        ({"guidance_scale": 1.25}, {}, "CFG scale", "1.25"),
        ({"guidance_scale": 7.0}, {}, "CFG scale", "7"),
        ({"seed": MAX_SEED}, {}, "Seed", str(MAX_SEED)),
        ({"width": 64, "height": 128}, {}, "Size", "64x128"),
        ({"sampler": "euler-a"}, {}, "Sampler", "Euler a"),
        ({"sampler": "dpmpp-2m-sde"}, {}, "Sampler", "DPM++ 2M SDE"),
        ({"eta": 0.5}, {}, "Eta DDIM", "0.5"),
        ({"eta": 0.0}, {}, "Eta DDIM", None),
        ({"eta": 0.5}, {}, "Eta", None),
        ({"guidance_rescale": 0.7}, {}, "CFG Rescale", "0.7"),
        ({"sampler": "euler", "schedule": "karras"}, {}, "Schedule type", "Karras"),
        ({"sampler": "euler", "schedule": "leading"}, {}, "Schedule type", "DDIM"),
        ({"sampler": "euler", "schedule": "trailing"}, {}, "Schedule type", "SGM Uniform"),
        ({"sampler": "euler", "schedule": "linspace"}, {}, "Schedule type", "Uniform"),
        ({"sampler": "dpmpp-2m"}, {"schedule": "linspace"}, "Schedule type", "Uniform"),  # Karras unless told
        ({"sampler": "dpmpp-2m", "schedule": "karras"}, {"schedule": "leading"}, "Schedule type", "Karras"),
        ({"sampler": "ddim"}, {"schedule": "leading"}, "Schedule type", None),
        ({"clip_skip": 1}, {}, "Clip skip", None),
        ({"clip_skip": 2}, {}, "Clip skip", "2"),
        ({"clip_skip": 2}, {"family": SD2}, "Clip skip", "2"),
        ({"clip_skip": 1}, {"family": SDXL}, "Clip skip", None),
        ({"clip_skip": 2}, {"family": SDXL}, "Clip skip", "3"),
        ({"prompt": "a cat (a lion)"}, {}, "Emphasis", "None"),
        ({"negative_prompt": "[blurry]"}, {}, "Emphasis", "None"),
        ({"prompt": r"a\b"}, {}, "Emphasis", "None"),
        ({"prompt": "a BREAK b"}, {}, "Emphasis", "None"),
        ({"prompt": "a cat, breaking: bad"}, {}, "Emphasis", None),
        ({"prompt": "a (cat:1.2)", "prompt_syntax": "weighted"}, {}, "Emphasis", None),
        ({}, {}, "RNG", "CPU"),
        ({}, {}, "Model hash", MODEL["sha256"][:10]),
    ],
)
def test_a1111_reads_each_value(asked: dict[str, Any], of_model: dict[str, str], key: str, value: str | None) -> None:
    request = GenerationRequest(**{"prompt": "a cat", **asked})
    assert fields_of(infotext(request, "m", MODEL["sha256"], **of_model)).get(key) == value


def test_a1111_takes_our_version_for_none_of_its_own() -> None:
    """It would repair what its old versions did otherwise."""
    from packaging import version

    with pytest.raises(version.InvalidVersion):
        version.parse(fields_of(infotext(REQUEST, "m", ""))["Version"])


@pytest.mark.parametrize(
    "name", ["plain", "a, b: c", "two\nlines", '"quoted"', "back\\slash", 'mid"dle', "é猫👩‍🚀", "end\\,"]
)
@pytest.mark.parametrize("prompt", ["", "a\nSteps: 3, Sampler: x, Seed: 1\n", 'Model: "', "Negative prompt: x\n\n"])
def test_reader_finds_the_values_whatever_the_prompt(name: str, prompt: str) -> None:
    request = GenerationRequest(prompt, prompt, seed=MAX_SEED, steps=7, guidance_scale=1.25, width=64, height=128)
    fields = fields_of(infotext(request, name, MODEL["sha256"]))
    assert (fields["Steps"], fields["Size"], fields["Model"], fields["RNG"]) == ("7", "64x128", name, "CPU")


# --- record


def test_record_reads_back(tmp_path: Path) -> None:
    record = read_record(save(tmp_path / "a.png"))
    assert GenerationRequest.from_dict(record["request"]) == REQUEST
    assert (record["model"], record["runtime"]) == (MODEL, RUNTIME)
    assert record["version"]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    negative=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    seed=st.integers(0, MAX_SEED),
    guidance=st.floats(0, 1000),
)
def test_any_request_survives(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str, seed: int, guidance: float
) -> None:
    request = GenerationRequest(prompt, negative, seed=seed, guidance_scale=guidance)
    path = save(tmp_path_factory.getbasetemp() / "hypothesis.png", request)
    assert GenerationRequest.from_dict(read_record(path)["request"]) == request
    assert read_parameters(path) == infotext(request, MODEL["name"], MODEL["sha256"])
    with Image.open(path) as image:
        assert image.info["parameters"] == read_parameters(path)


@pytest.mark.parametrize("letter", ["\x01", "a", "é", "猫", "👩"])
def test_the_longest_prompts_can_be_read_again(tmp_path: Path, letter: str) -> None:
    longest = letter * (MAX_PROMPT_BYTES // len(letter.encode()))
    path = save(tmp_path / "a.png", GenerationRequest(longest, longest))
    assert read_record(path)["request"]["prompt"] == longest
    with Image.open(path) as image:
        assert image.info["parameters"].startswith(longest)


def test_model_path_that_is_not_utf8_survives(tmp_path: Path) -> None:
    model = MODEL | {"name": "m\udcff", "path": "/models/m\udcff"}
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(PIXELS, text_chunks(REQUEST, model, RUNTIME)))
    assert read_record(path)["model"] == model


def test_a_picture_cut_off_in_its_pixels_still_gives_its_record(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", pixels=np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])
    assert read_record(path)["request"]["prompt"] == "a cat"


BROKEN_RECORDS: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    ("[" * 200_000, "too deeply"),
    ("9" * 5000, "not JSON"),
    ([], "not a JSON object"),
    ({}, "without a version"),
    ({"request": None}, "request is missing"),
    ({"model": []}, "model is missing"),
    ({"model": {"name": "x"}}, "model has no path"),
    ({"runtime": {"dtype": 3}}, "runtime field 'dtype'"),
    ({"request": {"prompt": "x", "\x1bstrange": 1}}, r"unknown fields \(\\x1bstrange\)"),
    ({"request": {"seed": 1}}, "no prompt"),
    ({"request": {"prompt": "x", "seed": -1}}, "seed -1"),
    ({"request": {"prompt": "x", "steps": 50.0}}, r"steps 50\.0"),
    ({"request": {"prompt": "x", "guidance_scale": float("nan")}}, "guidance_scale nan"),
    ({"request": {"prompt": "x", "guidance_scale": 10**400}}, "cannot be run"),
    ({"request": {"prompt": "x", "sampler": ["ddim"]}}, "sampler"),
    ({"request": {"prompt": "\ud800"}}, "surrogate"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_RECORDS)
def test_broken_records_are_bad_data(tmp_path: Path, change: Any, message: str) -> None:
    record = good_record() | change if isinstance(change, dict) and change else change
    with pytest.raises(BadDataError, match=message) as caught:
        read_record(with_record(tmp_path, record))
    assert "record.png" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "no text at all"),
        ([chunk(b"tEXt", b"parameters\0a cat")], "only AUTOMATIC1111 parameters"),
        ([chunk(b"tEXt", b"prompt\0{}"), chunk(b"tEXt", b"workflow\0{}")], "ComfyUI"),
        ([chunk(b"tEXt", b"Tit\x1ble\0x")], r"its text is: Tit\\x1ble"),
    ],
)
def test_a_picture_without_record_says_what_it_has(tmp_path: Path, chunks: list[bytes], message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(*chunks))
    with pytest.raises(BadDataError, match=message):
        read_record(path)


def test_pictures_of_pillow_are_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("first", "packed " * 100, zip=True)
    info.add_itxt("second", "猫" * 100, zip=True)
    info.add_text("parameters", "猫\nSteps: 1")
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    assert list(iterate_text(path)) == [
        ("first", "packed " * 100),
        ("second", "猫" * 100),
        ("parameters", "猫\nSteps: 1"),
    ]
    assert read_parameters(path) == "猫\nSteps: 1"


def test_text_after_the_pixels_is_found_and_no_text_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(chunk(b"IDAT", b"x" * 100_000), chunk(b"tEXt", b"parameters\0late")))
    assert read_parameters(path) == "late"
    path.write_bytes(png_with())
    assert read_parameters(path) is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("data", "text"),
    [("猫 é".encode(), "猫 é"), ("é".encode("latin-1"), "é"), (b"\xff\xc3\xa9", "ÿÃ©"), (b"plain", "plain")],
)
def test_utf8_in_a_latin1_chunk_is_read_where_it_is_valid(tmp_path: Path, data: bytes, text: str, packed: bool) -> None:
    path = tmp_path / "a.png"
    kind, body = (b"zTXt", b"\0" + zlib.compress(data)) if packed else (b"tEXt", data)
    path.write_bytes(png_with(chunk(kind, b"parameters\0" + body)))
    assert read_parameters(path) == text


def test_latin1_that_looks_like_utf8_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GenerationRequest("Ã© Â°"))
    assert (read_parameters(path) or "").startswith("Ã© Â°\n")
    with Image.open(path) as image:
        assert image.info["parameters"] == read_parameters(path)


BROKEN = {
    "checksum": chunk(b"tEXt", b"Comment\0x")[:-1] + b"\0",
    "keyword": chunk(b"tEXt", b"no separator"),
    "zlib": chunk(b"zTXt", b"Comment\0\0not zlib"),
    "utf-8": chunk(b"iTXt", b"Comment\0\0\0\0\0\xff"),
    "too long": chunk(b"tEXt", b"Comment\0" + b"x" * MAX_TEXT_BYTES),
    "bomb": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * (MAX_TEXT_BYTES + 1), 9)),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_text_hides_no_good_text_and_is_told_where_none_is_found(tmp_path: Path, broken: bytes) -> None:
    record = chunk(b"tEXt", b"ldmcli\0" + json.dumps(good_record()).encode())
    path = tmp_path / "a.png"
    for chunks in ((broken, record), (record, broken), (broken, record, broken)):
        path.write_bytes(png_with(*chunks))
        assert read_record(path)["request"] == REQUEST.to_dict()
    path.write_bytes(png_with(broken))
    with pytest.raises(BadDataError, match=r"broken|16 MiB"):
        read_record(path)


# --- hostile files

BOMB = zlib.compress(b"\0" * (MAX_TEXT_BYTES + 1), 9)
HOSTILE: list[tuple[bytes, str]] = [
    (b"", "it is empty"),
    (b"\xff\xd8\xff\xe0 a JPEG", "not a PNG file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "not a PNG file"),
    (b"\x89PNG\r\n\x1a\n", "cut off"),
    (png_with(end=b""), "cut off"),
    (png_with(end=b"\0\0\0"), "cut off"),
    (png_with(end=b"\xff\xff\xff\xfftEXtabc"), "runs past its end"),
    (png_with(end=b"\x00\x00\x10\x00IDATabc"), "runs past its end"),
    (png_with(end=b"\0\0\0\0\x1b[2J\0\0\0\0"), "no chunk type"),
    (png_with(chunk(b"tEXt", b"a\0b")[:-1] + b"\0"), "wrong checksum"),
    (png_with(chunk(b"tEXt", b"no separator")), "no keyword"),
    (png_with(chunk(b"zTXt", b"a\0\1x")), "compression method"),
    (png_with(chunk(b"zTXt", b"a\0")), "compression method"),
    (png_with(chunk(b"zTXt", b"a\0\0not zlib")), "broken zTXt"),
    (png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 999)[:-6])), "cut off"),
    (png_with(chunk(b"zTXt", b"a\0\0" + BOMB)), "unpacks to more"),
    (png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)), "unpacks to more"),
    (png_with(chunk(b"iTXt", b"a\0")), "fields are missing"),
    (png_with(chunk(b"iTXt", b"a\0\0\0\0\0\xff")), "codec"),
    (png_with(*[chunk(b"tEXt", b"a\0" + b"x" * (1 << 20))] * 17), "16 MiB of text"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_pictures_are_bad_data(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for read in (read_record, read_parameters):
        with pytest.raises(BadDataError, match=message) as caught:
            read(path)
        assert "\x1b" not in str(caught.value)


def test_broken_text_is_not_tried_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    record = chunk(b"tEXt", b"ldmcli\0" + json.dumps(good_record()).encode())
    path.write_bytes(png_with(*[BROKEN["bomb"]] * 20, record))
    with pytest.raises(BadDataError, match="unpacks to more"):
        read_record(path)


def test_a_flood_of_empty_chunks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(chunk(b"juNK", b"") * 200_000))
    with pytest.raises(BadDataError, match="chunks"):
        read_record(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_record_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = save(tmp_path_factory.getbasetemp() / "damaged.png")
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    with contextlib.suppress(BadDataError):
        assert read_record(path)["model"] == MODEL


def test_a_missing_picture_names_its_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "picture-0001.png")
    with pytest.raises(MissingInputError, match=r"its folder has picture-0001\.png"):
        read_record(tmp_path / "picture-001.png")
    with pytest.raises(MissingInputError, match="nor does its folder"):
        read_record(tmp_path / "no" / "such" / "folder.png")


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300, "\ud800.png"])
def test_impossible_names_are_missing_inputs(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingInputError) as caught:
        read_record(tmp_path / name)
    assert "\0" not in str(caught.value)


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    for path in (tmp_path, tmp_path / "fifo.png", Path("/dev/zero")):
        with pytest.raises(BadDataError, match=r"is a (folder|pipe|device)"):
            read_record(path)
    with pytest.raises(BadDataError, match="in a circle"):
        read_record(tmp_path / "loop.png")


# --- writing


def test_names_count_up_and_overwrite_replaces(tmp_path: Path) -> None:
    names = [write_new(tmp_path, "cat", str(i).encode(), overwrite=False).name for i in range(3)]
    assert names == ["cat.png", "cat-2.png", "cat-3.png"]
    assert write_new(tmp_path, "cat", b"new", overwrite=True) == tmp_path / "cat.png"
    assert (tmp_path / "cat.png").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["cat-2.png", "cat-3.png", "cat.png"]


def test_dangling_links_and_folders_count_as_taken(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "cat.png")
    (tmp_path / "cat-2.png").mkdir()
    assert write_new(tmp_path, "cat", b"x", overwrite=False).name == "cat-3.png"


def test_write_exact_keeps_what_is_there(tmp_path: Path) -> None:
    path = write_exact(tmp_path / "a.png", b"old", overwrite=False)
    with pytest.raises(CannotCreateError, match="there already"):
        write_exact(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old"
    write_exact(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.png"]


def test_overwrite_replaces_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    os.symlink("/dev/null", tmp_path / "null.png")
    for name in ("fifo", "folder", "null"):
        with pytest.raises(CannotCreateError, match="not a regular file"):
            write_new(tmp_path, name, b"x", overwrite=True)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("stem", ["", "..", "../up", "a/b", "x" * 300, "a\0b"])
def test_stems_that_are_no_names_are_refused(tmp_path: Path, stem: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for overwrite in (False, True):
        with pytest.raises(CannotCreateError) as caught:
            write_new(folder, stem, b"x", overwrite=overwrite)
        assert "\0" not in str(caught.value)
    assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["inside"]


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_mode_honours_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = write_new(tmp_path, "a", b"x", overwrite=False)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_prepare_folder_makes_parents_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("end", ["file", "file/below", "x" * 300, "loop", "a\0b"])
def test_folders_that_cannot_be(tmp_path: Path, end: str) -> None:
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(CannotCreateError):
        prepare_folder(tmp_path / end)


def test_folders_in_proc_are_refused() -> None:
    if Path("/proc/self").exists():
        with pytest.raises(CannotCreateError):
            prepare_folder(Path("/proc/pictures"))


def test_a_folder_that_has_gone_is_made_anew(tmp_path: Path) -> None:
    assert write_new(tmp_path / "gone" / "too", "a", b"x", overwrite=False).read_bytes() == b"x"
    assert write_exact(tmp_path / "gone" / "a.png", b"x", overwrite=True).read_bytes() == b"x"


def test_only_new_and_own_files_are_written(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    check_may_write(path, b"our mark", "sheet", "--sheet")
    path.write_bytes(b"by our mark known")
    check_may_write(path, b"our mark", "sheet", "--sheet")
    path.write_bytes(b" " * 5000 + b"our mark")
    others = [path, tmp_path / "prompts.txt", tmp_path / "folder", tmp_path / "fifo", tmp_path / "dangling"]
    others[1].write_text("a prompt")
    others[2].mkdir()
    os.mkfifo(others[3])
    os.symlink("nowhere", others[4])
    for other in others:
        with pytest.raises(CannotCreateError, match="is there already and is no sheet"):
            check_may_write(other, b"our mark", "sheet", "--sheet")
    for never in (path / "below.png", tmp_path / ("n" * 300)):
        with pytest.raises(CannotCreateError):
            check_may_write(never, b"our mark", "sheet", "--sheet")


Write = Callable[..., Path]
WRITERS: list[Write] = [
    lambda folder, overwrite: write_new(folder, "a", b"new", overwrite=overwrite),
    lambda folder, overwrite: write_exact(folder / "b.png", b"new", overwrite=overwrite),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), StorageError),
        (OSError(errno.EDQUOT, "quota"), StorageError),
        (OSError(errno.EIO, "bad disk"), StorageError),
        (OSError(errno.EROFS, "read-only"), CannotCreateError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_fault_leaves_the_folder_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
    overwrite: bool,
    fault: BaseException,
    expected: type[BaseException],
) -> None:
    if overwrite:
        (tmp_path / "a.png").write_bytes(b"old")
        (tmp_path / "b.png").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    def fail(*_: object) -> int:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected):
        write(tmp_path, overwrite)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == before
    assert all((tmp_path / name).read_bytes() == b"old" for name in before)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.EIO])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_link(*_: object) -> None:
        raise OSError(number, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    names = [write_new(tmp_path, "a", f"{i}".encode(), overwrite=False).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"0", b"1", b"2"]
    with pytest.raises(CannotCreateError, match="there already"):
        write_exact(tmp_path / "a.png", b"x", overwrite=False)

    def no_rename(*_: object) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(StorageError):
        write_new(tmp_path, "b", b"x", overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_folder_that_cannot_sync_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "cannot sync a folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert write_new(tmp_path, "a", b"x", overwrite=False).read_bytes() == b"x"


def test_a_real_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from ldmcli.errors import StorageError
        from ldmcli.disk.writing import write_new
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_new(Path(sys.argv[1]), "a", bytes(100_000), overwrite=False)
        except StorageError as error:
            print(error)
    """
    finished = run_python(code, tmp_path)
    assert "File too large" in finished.stdout, finished.stderr
    assert os.listdir(tmp_path) == []


def on_tmpfs(tmp_path: Path, options: str, code: str) -> str:
    """Run `code` with a tmpfs of its own on argv[1], in a mount namespace that ends with it; its stdout."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root on Linux")
    mount = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"',
        str(tmp_path),
    ]
    try:
        probe = subprocess.run([*mount, "true"], capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if probe.returncode != 0:
        pytest.skip("cannot mount here")
    command = [*mount, sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_full_disk_is_a_storage_error_and_can_go_on(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from ldmcli.errors import StorageError
        from ldmcli.disk.writing import write_new
        folder = Path(sys.argv[1])
        write_new(folder, "a", bytes(40_000), overwrite=False)
        try:
            write_new(folder, "a", bytes(40_000), overwrite=False)
        except StorageError as error:
            print(error)
        assert os.listdir(folder) == ["a.png"]
        write_new(folder, "a", bytes(10_000), overwrite=False)
        assert sorted(os.listdir(folder)) == ["a-2.png", "a.png"]
    """
    assert "No space left" in on_tmpfs(tmp_path, "size=64k", code)


def test_a_read_only_folder_cannot_be_prepared(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ldmcli.errors import CannotCreateError
        from ldmcli.disk.writing import check_may_write, prepare_folder, write_new
        for act in (prepare_folder, lambda folder: write_new(folder, "a", b"x", overwrite=True)):
            try:
                act(Path(sys.argv[1]))
            except CannotCreateError as error:
                print(error)
    """
    assert on_tmpfs(tmp_path, "ro", code).count("Read-only file system") == 2


def test_two_processes_with_one_stem_lose_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ldmcli.disk.writing import write_new
        for i in range(40):
            print(write_new(Path(sys.argv[1]), "same", f"{sys.argv[2]} {i}".encode(), overwrite=False))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "AB"]
    paths = [path for writer in writers for path in writer.communicate(timeout=120)[0].split()]
    assert len(set(paths)) == 80
    assert {path.read_text() for path in tmp_path.iterdir()} == {f"{n} {i}" for n in "AB" for i in range(40)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_leaves_no_torn_file(tmp_path: Path, overwrite: bool) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from ldmcli.disk.writing import write_new
        print("ready", flush=True)
        while True:
            write_new(Path(sys.argv[1]), "a", b"x" * 2_000_000, overwrite={overwrite})
    """
    for delay in (0.0, 0.003, 0.01, 0.03, 0.1):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        writer.stdout.close()
    sizes = {path.stat().st_size for path in tmp_path.glob("[!.]*")}
    assert sizes == {2_000_000}
    assert all(name.startswith(".ldm-") for name in leftovers(tmp_path))


def test_errors_escape_names(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J").touch()
    acts: list[Callable[[], object]] = [
        lambda: prepare_folder(tmp_path / "\x1b[2J"),
        lambda: write_exact(tmp_path / "\x1b[2J", b"", overwrite=False),
        lambda: write_exact(tmp_path / "\x1b[2J" / "a.png", b"", overwrite=False),
        lambda: read_record(tmp_path / "\x1b[2J"),
        lambda: read_record(tmp_path / "\x1b[2K"),
    ]
    for act in acts:
        with pytest.raises(LdmError) as caught:
            act()
        assert "\x1b" not in str(caught.value)


def test_importing_is_light() -> None:
    code = """
        import sys
        import ldmcli.images.metadata, ldmcli.images.encode, ldmcli.disk.writing
        print(sorted({"torch", "PIL", "numpy"} & set(sys.modules)))
    """
    assert run_python(code).stdout.strip() == "[]"
