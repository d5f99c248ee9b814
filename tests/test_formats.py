"""Pictures as PNG, JPEG and WebP: pixels and quality, metadata for every reader, damaged and hostile EXIF data."""

import contextlib
import hashlib
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_support import manifest
from cli_support import assert_refused, ldm, ldm_here, pixels, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldmcli.errors import BadDataError, UsageError
from ldmcli.gallery.sheet import SheetPicture, write_sheet
from ldmcli.images.encode import encode_pixels
from ldmcli.images.exif import exif_with, iterate_exif_text
from ldmcli.images.formats import Encoding, format_of_file
from ldmcli.images.metadata import read_parameters, read_record, text_chunks
from ldmcli.images.png_text import MAX_TEXT_BYTES
from ldmcli.spec import GenerationRequest

MODEL = {"name": "tiny", "path": "/models/tiny", "sha256": "6ce0161689b3853acaa03779ec93eafe" * 2}
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
DRAW = ("txt2img", "-m", tiny_model(), "a cat, 猫", "--steps", "2", "-s", "5", "--dtype", "fp32", "-q")
LOSSY = [Encoding("jpeg"), Encoding("webp")]


def text_of(prompt: str = "a cat") -> dict[str, str]:
    return text_chunks(GenerationRequest(prompt, steps=2), MODEL, {"dtype": "float32"})


def by_other_readers(path: Path) -> str:
    """A1111's text as sd-parsers, Civitai and A1111 itself take it from EXIF data."""
    with Image.open(path) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def with_exif(path: Path, exif: bytes) -> Path:
    Image.fromarray(PIXELS).save(path, exif=exif)
    return path


def tiff(
    entries: list[tuple[int, int, int, int]], data: bytes = b"", order: str = ">", count: int | None = None
) -> bytes:
    """EXIF data whose Exif directory, at 26, has `entries`; `data` follows it."""
    head = {">": b"MM\0*", "<": b"II*\0"}[order] + struct.pack(order + "I", 8)
    first = struct.pack(order + "HHHIII", 1, 0x8769, 4, 1, 26, 0)
    body = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    return b"Exif\0\0" + head + first + struct.pack(order + "H", len(entries) if count is None else count) + body + data


# --- files


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_the_ending_names_the_format_and_the_file_draws_the_picture_again(tmp_path: Path, name: str) -> None:
    assert ldm_here(*DRAW, "-o", tmp_path / name).code == 0
    file = tmp_path / name
    with Image.open(file) as image:
        image.load()
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(file.suffix, "JPEG")
        assert image.mode == "RGB"
    again = ldm_here("txt2img", "--from-image", file, "-q", "-o", tmp_path / f"again-{name}")
    assert again.code == 0, again
    assert (tmp_path / f"again-{name}").read_bytes() == file.read_bytes()
    facts = ldm_here("info", "--json", file).records[0]
    assert facts["request"]["prompt"] == "a cat, 猫"
    assert read_parameters(file).startswith("a cat, 猫\nSteps: 2, Sampler: ")  # type: ignore[union-attr]


def test_standard_output_has_the_format_that_is_asked_for(tmp_path: Path) -> None:
    ldm_here(*DRAW, "-o", tmp_path / "a.png")
    for asked, format in (("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")):
        result = ldm_here(*DRAW, "-o", "-", "--format", asked)
        with Image.open(io.BytesIO(result.out)) as image:
            assert image.format == format
    named = ldm_here(*DRAW, "-o", tmp_path / "out", env={"LDM_IMAGE_FORMAT": "webp", "LDM_LOSSLESS": "1"})
    assert named.paths == [tmp_path / "out" / "ldm-5.webp"]
    with Image.open(named.paths[0]) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels(tmp_path / "a.png"))


def test_a_real_process_writes_all_three(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.webp"):
        result = ldm(*DRAW, "-o", tmp_path / name, "--quality", "50", "--json")
        assert (result.code, result.records[0]["path"]) == (0, str(tmp_path / name))
        assert result.records[0]["phases"]["png"] >= 0
        assert by_other_readers(tmp_path / name) == read_parameters(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "a.jpg", "--format", "png"], ["a.jpg", "JPEG", "--image-format"]),
        (["-o", "a.jpg", "--lossless"], ["--lossless", "WebP"]),
        (["-o", "a.png", "--quality", "80"], ["--quality", "JPEG and WebP"]),
        (["-o", "a.webp", "--quality", "80", "--lossless"], ["--quality", "lossless WebP"]),
        (["-o", "a.webp", "--quality", "101"], ["--quality", "101"]),
        (["-o", "a.tiff"], ["a.tiff", "PNG, JPEG or WebP"]),
        (["--format", "gif"], ["gif", "webp"]),
        (["-o", "a.webp", "-W", "16392", "-H", "8"], ["16392", "WebP", "16383"]),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_loads(
    tmp_path: Path, options: list[str], words: list[str]
) -> None:
    assert_refused(ldm_here(*DRAW, *options, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.iterdir())


def test_lossless_webp_keeps_every_pixel_and_quality_says_how_much_else_does() -> None:
    def decoded(encoding: Encoding, of: np.ndarray = SMOOTH) -> tuple[np.ndarray, int]:
        data = encode_pixels(of, {}, encoding)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int), len(data)

    assert np.array_equal(decoded(Encoding("webp", lossless=True), PIXELS)[0], PIXELS)
    for format in ("jpeg", "webp"):
        (low, small), (usual, middle), (high, large) = (decoded(Encoding(format, q)) for q in (10, None, 100))
        assert small < middle < large
        assert abs(high - SMOOTH).mean() < abs(usual - SMOOTH).mean() < abs(low - SMOOTH).mean()
        assert decoded(Encoding(format, 90))[1] == middle


def test_python_refuses_what_no_format_has() -> None:
    for wrong in (("gif",), ("jpeg", 0), ("jpeg", 101), ("png", 80)):
        with pytest.raises(UsageError):
            Encoding(*wrong)
    with pytest.raises(UsageError, match="16383"):
        encode_pixels(np.zeros((1, 16384, 3), np.uint8), {}, Encoding("webp"))


# --- metadata


@pytest.mark.parametrize("encoding", LOSSY, ids=["jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a cat", "naïve 猫 👩\u200d🚀", 'two\nlines, "quoted": \\', "", "猫" * 500])
def test_the_same_record_and_text_in_every_format(tmp_path: Path, encoding: Encoding, prompt: str) -> None:
    text = text_of(prompt)
    png, other = tmp_path / "a.png", tmp_path / f"a{encoding.ending}"
    png.write_bytes(encode_pixels(PIXELS, text))
    other.write_bytes(encode_pixels(PIXELS, text, encoding))
    assert read_record(other) == read_record(png)
    assert by_other_readers(other) == read_parameters(other) == text["parameters"]
    assert format_of_file(other) == encoding.format


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_no_metadata_is_none_at_all(tmp_path: Path, name: str) -> None:
    ldm_here(*DRAW, "-o", tmp_path / name, "--no-metadata")
    with Image.open(tmp_path / name) as image:
        assert not image.getexif()
        assert not {"exif", "parameters", "ldmcli", "comment", "icc_profile", "xmp"} & image.info.keys()
    data = (tmp_path / name).read_bytes()
    assert not any(word.encode(code) in data for word in ("a cat", "Steps") for code in ("utf-8", "utf-16-be"))
    assert_refused(ldm_here("info", tmp_path / name), 65, "no text at all")


def test_what_a_jpeg_cannot_hold_is_left_out_with_a_word_and_the_record_goes_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpeg, webp = tmp_path / "a.jpg", tmp_path / "a.webp"
    for length, kept, words in (
        (20_000, {"ldmcli", "parameters"}, ""),
        (25_000, {"ldmcli"}, "left out: parameters;"),
        (80_000, set(), "left out: parameters, ldmcli;"),
    ):
        caplog.clear()
        text = text_of("a" * length)
        jpeg.write_bytes(encode_pixels(PIXELS, text, Encoding("jpeg")))
        assert dict(iterate_exif_text(jpeg)).keys() == kept
        assert words in caplog.text
        assert bool(words) == bool(caplog.text)
        webp.write_bytes(encode_pixels(PIXELS, text, Encoding("webp")))
        assert dict(iterate_exif_text(webp)) == text
    with Image.open(jpeg) as image:
        image.load()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a cat é\nSteps: 5".encode("utf-16-be"),
        b"UNICODE\0" + "a cat é\nSteps: 5".encode("utf-16-le"),
        b"UNICODE\0" + "a cat é\nSteps: 5".encode("utf-16"),
        b"UNICODE\0\xfe\xff" + "a cat é\nSteps: 5".encode("utf-16-be"),
        b"\0\0\0\0\0\0\0\0" + "a cat é\nSteps: 5".encode(),
        b"ASCII\0\0\0" + "a cat é\nSteps: 5".encode("latin-1") + b"\0",
        "a cat é\nSteps: 5".encode(),
    ],
    ids=["big", "little", "bom", "big-bom", "undefined", "ascii", "bare"],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_parameters_of_other_programs_are_read(tmp_path: Path, name: str, comment: bytes, order: str) -> None:
    path = with_exif(tmp_path / name, tiff([(0x9286, 7, len(comment), 40)], comment, order))
    assert read_parameters(path) == "a cat é\nSteps: 5"
    assert ldm_here("info", "--json", path).records == [{"kind": "picture", "parameters": "a cat é\nSteps: 5"}]


# --- damage


def test_a_jpeg_cut_off_in_its_pixels_still_gives_its_record(tmp_path: Path) -> None:
    for encoding in LOSSY:
        path = tmp_path / f"a{encoding.ending}"
        data = encode_pixels(PIXELS, text_of(), encoding)
        path.write_bytes(data[: len(data) * 2 // 3] if encoding.format == "webp" else data[:-20])
        if encoding.format == "jpeg":
            assert read_record(path)["request"]["prompt"] == "a cat"
        else:
            assert_refused(ldm_here("info", path), 65, "cut off")


RECORD = text_of()["ldmcli"].encode()
HOSTILE: list[tuple[bytes, str]] = [
    (b"Exif\0\0M", "without a TIFF header"),
    (b"Exif\0\0XX\0*\0\0\0\x08", "without a TIFF header"),
    (b"Exif\0\0MM\0*\xff\xff\xff\xff", "ends too early"),
    (b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", "ends too early"),
    (tiff([(0x9286, 7, 4_000_000_000, 40)]), "runs past its end"),
    (tiff([(0x9286, 7, 20, 4_000_000_000)]), "runs past its end"),
    (tiff([(0x927C, 7, 9, 40)], bytes(20), count=60_000), "ends too early"),
    (tiff([(0x9286, 7, 9, 40)], b"UNICODE\0a"), "broken"),
    (tiff([(0x9286, 7, 10, 40)], b"UNICODE\0\xd8\x01"), "broken"),
    (tiff([(0x927C, 7, 9, 40)], b"ldmcli\0\xff\xff"), "broken"),
    (tiff([(0x927C, 7, 9, 40)], b"ldmcli\0{}"), "without a version"),
    (tiff([(0x927C, 7, 9, 40)], b"someoneel"), "no text at all"),
    (tiff([(0x927C, 3, 9, 40)], b"ldmcli\0{}"), "no text at all"),
    (tiff([(0x9286, 7, 3, 0)]), "only AUTOMATIC1111"),
]


@pytest.mark.parametrize(("exif", "message"), HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_hostile_exif_data_is_bad_data(tmp_path: Path, name: str, exif: bytes, message: str) -> None:
    path = with_exif(tmp_path / name, exif)
    with pytest.raises(BadDataError, match=message) as caught:
        read_record(path)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xd8\xff", "cut off"),
        (b"\xff\xd8\xff\xe0", "runs past its end"),
        (b"\xff\xd8\xff\xe1\xff\xffExif\0\0", "runs past its end"),
        (b"\xff\xd8\xff\xe1\0\x01", "runs past its end"),
        (b"\xff\xd8\xff\xe0\0\x02junk", "no marker"),
        (b"\xff\xd8" + b"\xff\xe0\0\x02" * 20_000, "segments"),
        (b"\xff\xd8" + b"\xff\xd0" * 20_000, "segments"),
        (b"RIFF\0\0\0\0WEBP" + b"junk\0\0\0\0" * 20_000, "chunks"),
        (b"RIFF\0\0\0\0WEBPVP8 \xff\xff\xff\xff", "runs past its end"),
        (b"RIFF\0\0\0\0WEBPEXI", "ends too early"),
        (b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", MAX_TEXT_BYTES + 1) + bytes(MAX_TEXT_BYTES + 1), "16 MiB"),
        (b"RIFF\0\0\0\0WEBP", "no text at all"),
    ],
    ids=range(12),
)
def test_hostile_files_are_bad_data(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(data)
    with pytest.raises(BadDataError, match=message):
        read_record(path)


def test_a_directory_whose_entries_all_claim_the_whole_file_takes_no_memory_for_each(tmp_path: Path) -> None:
    data = bytes(4 << 20)
    entries = [(tag, 7, len(data), 40) for tag in range(1, 30_000)] + [(0x927C, 7, len(data), 40)] * 1000
    path = tmp_path / "a.webp"
    exif = tiff(entries, data)
    path.write_bytes(b"RIFF\0\0\0\0WEBPEXIF" + struct.pack("<I", len(exif)) + exif)
    tracemalloc.start()
    with pytest.raises(BadDataError, match="no text at all"):
        read_record(path)
    assert tracemalloc.get_traced_memory()[1] < 6 * len(data)
    tracemalloc.stop()


WHOLE = [encode_pixels(PIXELS, text_of(), encoding) for encoding in LOSSY]


@given(st.sampled_from(WHOLE), st.integers(0, 600), st.binary(min_size=1, max_size=4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_damage_gives_a_record_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, place: int, junk: bytes, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    place = place if data[:2] == b"\xff\xd8" else len(data) - place
    path.write_bytes(data[:place] if cut else data[:place] + junk + data[place + len(junk) :])
    with contextlib.suppress(BadDataError):
        read_record(path)


def test_text_without_a_place_in_exif_is_said_to_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert exif_with({}) == b""
    encode_pixels(PIXELS, {"workflow": "{}", "parameters": "x"}, Encoding("webp"))
    assert "left out: workflow; a PNG keeps it" in caplog.text


# --- batches


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_batch_in_another_format_resumes_and_is_shown(tmp_path: Path, format: str) -> None:
    rows, out, ending = tmp_path / "rows.txt", tmp_path / "out", Encoding(format).ending
    rows.write_text("a cat\na dog\na pear\n")
    command = ("batch", rows, "-m", tiny_model(), "-o", out, "--steps", "1", "--devices", "cpu", "-q")
    as_asked: tuple[Any, ...] = (*command, "--image-format", format, "--quality", "70", "--sheet", tmp_path / "s.png")
    first = ldm_here(*as_asked)
    assert first.code == 0, first
    assert [path.suffix for path in first.paths] == [ending] * 3
    assert all(hashlib.sha256((out / r["path"]).read_bytes()).hexdigest() == r["sha256"] for r in manifest(out))
    assert read_record(first.paths[1])["request"]["prompt"] == "a dog"
    before = first.paths[0].read_bytes()
    first.paths[0].unlink()
    assert ldm_here(*as_asked).paths == [first.paths[0]]
    assert first.paths[0].read_bytes() == before
    assert ldm_here(*as_asked).out == b""
    for other, words in ((command, ["image_format"]), ((*as_asked, "--quality", "71"), ["quality: 70 -> 71"])):
        assert_refused(ldm_here(*other), 65, "another run", *words)
    assert ldm_here("gallery", out).code == 0
    assert (out / "index.html").read_text().count(f'{ending}" alt=') == 3
    assert pixels(tmp_path / "s.png").std() > 0
    (out / "manifest").rename(tmp_path / "gone")  # now a folder of pictures
    assert ldm_here("gallery", out, "--json").records[0]["pictures"] == 3


def test_a_batch_of_pngs_says_nothing_new_of_itself(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a cat\n")
    command = ("batch", tmp_path / "rows.txt", "-m", tiny_model(), "-o", tmp_path / "out", "--steps", "1", "-q")
    assert ldm_here(*command).code == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert not {"image_format", "quality", "lossless"} & settings.keys()
    assert ldm_here(*command, "--image-format", "png").code == 0
    assert_refused(ldm_here(*command, "--format", "webp"), 2, "webp", "--image-format")
    assert_refused(ldm_here(*command, "--image-format", "jpeg", "--lossless"), 2, "--lossless")


def test_a_row_too_large_for_the_format_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "width": 16392, "height": 8}\n{"prompt": "b"}\n')
    command = ("batch", tmp_path / "rows.jsonl", "-m", tiny_model(), "--dry-run", "--image-format", "webp")
    result = ldm_here(*command)
    assert result.code == 3
    assert "line 1: a picture of 16392×8 is too large for WebP" in result.err


def test_sheets_show_every_format(tmp_path: Path) -> None:
    files = []
    for encoding in (Encoding(), *LOSSY):
        files.append(tmp_path / f"a{encoding.ending}")
        files[-1].write_bytes(encode_pixels(np.full((64, 64, 3), 40, np.uint8), {}, encoding))
    assert write_sheet(tmp_path / "sheet.png", [SheetPicture(file, file.name) for file in files]) == 3
    sheet = pixels(tmp_path / "sheet.png").astype(int)
    assert (abs(sheet - 40).max(axis=2) < 4).sum() > 3 * 60_000
