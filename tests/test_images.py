"""Pictures on disk: exact pixels and text, metadata for its readers, hostile PNGs."""

import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import A1111, chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldmcli.checks import MAX_PROMPT_BYTES
from ldmcli.errors import BadDataError, MissingInputError
from ldmcli.images.encode import encode_pixels
from ldmcli.images.metadata import infotext, read_parameters, read_record, text_chunks
from ldmcli.images.png_text import MAX_TEXT_BYTES, iterate_text
from ldmcli.spec import MAX_SEED, GenerationRequest

MODEL = {"name": "tiny-emoji", "path": "/models/tiny", "sha256": "6ce0161689b3853acaa03779ec93eafe" * 2}
RUNTIME = {"dtype": "bfloat16", "device": "cpu", "attention": "sdpa", "torch": "2.14.1"}
PIXELS = np.zeros((2, 2, 3), np.uint8)
REQUEST = GenerationRequest(
    "a cat", "blurry", seed=42, steps=50, guidance_scale=7.5, width=512, height=512, sampler="ddim"
)
TEXTS = [
    "", "plain", "naïve café", "Ã© Â°", "a\nb\r\nc\td", "\x01\x07\x1b[31m\x7f\x85\x9f", "猫と 犬", "\u202ebidi\u2028",
    "👩\u200d🚀🏳️\u200d🌈", '"quotes\\"',
]  # fmt: skip


def save(path: Path, request: GenerationRequest = REQUEST, pixels: np.ndarray = PIXELS) -> Path:
    path.write_bytes(encode_pixels(pixels, text_chunks(request, MODEL, RUNTIME)))
    return path


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
    for name, value in A1111.findall(text.strip().split("\n")[-1]):
        found[name] = json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value
    return found


# --- encoding


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 64), (33, 65)])
def test_pixels_come_back_exactly(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for ours in (pixels, pixels.transpose(1, 0, 2)[::2, ::-1]):
        with Image.open(io.BytesIO(encode_pixels(ours, {}))) as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), ours)


@pytest.mark.parametrize("text", TEXTS)
def test_text_reads_back_equal_here_and_in_pillow(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_pixels(PIXELS, {"parameters": text, "other": text}))
    assert list(iterate_text(path)) == [("parameters", text), ("other", text)]
    with Image.open(path) as image:
        image.load()
        assert image.info == {"parameters": text, "other": text}


def test_what_png_cannot_hold_is_refused() -> None:
    for pixels in (PIXELS[0], np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3)), PIXELS[:0]):
        with pytest.raises(ValueError, match="uint8"):
            encode_pixels(pixels, {})
    for text in ({"": "x"}, {"k" * 80: "x"}, {"猫": "x"}, {"k": "a\0b"}, {"k": "\ud800"}):
        with pytest.raises(ValueError, match=r"PNG text|codec"):
            encode_pixels(PIXELS, text)


# --- infotext


def test_infotext_reads_as_a1111_writes_it() -> None:
    expected = """\
        a cat
        Negative prompt: blurry
        Steps: 50, Sampler: DDIM, CFG scale: 7.5, Seed: 42, Size: 512x512, Model hash: 6ce0161689, \
Model: tiny-emoji, RNG: CPU, Version: ldmcli """
    assert infotext(REQUEST, MODEL["name"], MODEL["sha256"]).startswith(textwrap.dedent(expected))
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


@pytest.mark.parametrize("letter", ["\x01", "a", "猫"])
def test_the_longest_prompts_can_be_read_again(tmp_path: Path, letter: str) -> None:
    longest = letter * (MAX_PROMPT_BYTES // len(letter.encode()))
    path = save(tmp_path / "a.png", GenerationRequest(longest, longest))
    assert read_record(path)["request"]["prompt"] == longest
    with Image.open(path) as image:
        assert image.info["parameters"].startswith(longest)


def test_model_path_that_is_not_utf8_survives(tmp_path: Path) -> None:
    model = MODEL | {"name": "m\udcff", "path": "/models/m\udcff"}
    path = tmp_path / "a.png"
    path.write_bytes(encode_pixels(PIXELS, text_chunks(REQUEST, model, RUNTIME)))
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


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("late", [chunk(b"IDAT", b"x" * 100_000), chunk(b"tEXt", b"parameters\0late")]),
        (None, []),
        *(
            (text, [chunk(kind, b"parameters\0" + body)])
            for data, text in (("猫 é".encode(), "猫 é"), (b"\xe9", "é"), (b"\xff\xc3\xa9", "ÿÃ©"), (b"plain", "plain"))
            for kind, body in ((b"tEXt", data), (b"zTXt", b"\0" + zlib.compress(data)))
        ),
    ],
)
def test_parameters_are_found_wherever_they_stand_in_utf8_or_latin_1(
    tmp_path: Path, text: str | None, chunks: list[bytes]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(*chunks))
    assert read_parameters(path) == text


def test_pictures_of_pillow_are_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    texts = [("first", "packed " * 100), ("second", "猫" * 100), ("parameters", "猫\nSteps: 1")]
    info.add_text(*texts[0], zip=True)
    info.add_itxt(*texts[1], zip=True)
    info.add_text(*texts[2])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert list(iterate_text(tmp_path / "a.png")) == texts


# --- hostile files

BOMB = zlib.compress(b"\0" * (MAX_TEXT_BYTES + 1), 9)
BROKEN = [
    (chunk(b"tEXt", b"a\0b")[:-1] + b"\0", "wrong checksum"),
    (chunk(b"tEXt", b"no separator"), "no keyword"),
    (chunk(b"tEXt", b"a\0" + b"x" * MAX_TEXT_BYTES), "16 MiB of text"),
    (chunk(b"zTXt", b"a\0\1x"), "compression method"),
    (chunk(b"zTXt", b"a\0"), "compression method"),
    (chunk(b"zTXt", b"a\0\0not zlib"), "broken zTXt"),
    (chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 999)[:-6]), "cut off"),
    (chunk(b"zTXt", b"a\0\0" + BOMB), "unpacks to more"),
    (chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB), "unpacks to more"),
    (chunk(b"iTXt", b"a\0"), "fields are missing"),
    (chunk(b"iTXt", b"a\0\0\0\0\0\xff"), "codec"),
]


def record_chunk() -> bytes:
    return chunk(b"tEXt", b"ldmcli\0" + json.dumps(good_record()).encode())


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_text_hides_no_good_text_and_is_told_where_none_is_found(
    tmp_path: Path, broken: bytes, message: str
) -> None:
    path = tmp_path / "a.png"
    for chunks in ((broken, record_chunk()), (record_chunk(), broken)):
        path.write_bytes(png_with(*chunks))
        assert read_record(path)["request"] == REQUEST.to_dict()
    path.write_bytes(png_with(broken))
    with pytest.raises(BadDataError, match=message):
        read_parameters(path)


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "it is empty"),
    (b"GIF89a a GIF", "no PNG, JPEG or WebP file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "no PNG, JPEG or WebP file"),
    (b"\x89PNG\r\n\x1a\n", "cut off"),
    (png_with(end=b""), "cut off"),
    (png_with(end=b"\0\0\0"), "cut off"),
    (png_with(end=b"\xff\xff\xff\xfftEXtabc"), "runs past its end"),
    (png_with(end=b"\x00\x00\x10\x00IDATabc"), "runs past its end"),
    (png_with(end=b"\0\0\0\0\x1b[2J\0\0\0\0"), "no chunk type"),
    (png_with(*[chunk(b"tEXt", b"a\0" + b"x" * (1 << 20))] * 17), "16 MiB of text"),
    (png_with(*[BROKEN[7][0]] * 20, record_chunk()), "unpacks to more"),
    (png_with(chunk(b"juNK", b"") * 200_000), "chunks"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_pictures_are_bad_data(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for read in (read_record, read_parameters):
        with pytest.raises(BadDataError, match=message) as caught:
            read(path)
        assert "\x1b" not in str(caught.value)


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
    for name in ("no/such/folder.png", "a\0b.png", "x" * 300, "\ud800.png"):
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


def test_importing_is_light() -> None:
    code = (
        "import sys, ldmcli.images.metadata, ldmcli.images.encode; print({'torch', 'PIL', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"
