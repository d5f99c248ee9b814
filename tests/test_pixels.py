"""Pictures that users name: every common kind comes out right, and what is hostile costs one sentence and no memory."""

import errno
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_support import manifest
from cli_support import assert_refused, chunk, ldm, ldm_here, pixels, tiny_model
from fork_server import quick
from PIL import Image, ImageCms

from ldmcli import Session
from ldmcli.errors import BadDataError, LdmError, MissingInputError
from ldmcli.images.canvas import resized, surroundings
from ldmcli.images.pixels import MAX_PIXELS, facts_of, grey_of, on_white, read_picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MEMORY = 640 << 20  # bytes, of which torch, being linked meanwhile, takes two thirds


def encoded(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def colours(width: int = 6, height: int = 4) -> Image.Image:
    """A picture in which no pixel is another's."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 2 * 200], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def png(width: int, height: int, data: bytes = b"", *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [SIGNATURE, chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    )


# ---- what is read ----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_whatever_its_camera_says(orientation: int) -> None:
    """Each orientation is undone by what puts the upright picture into it."""
    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = colours() if turned is None else colours().transpose(turned)
    data = encoded(stored, exif=exif.tobytes())
    assert np.array_equal(read_picture(data), colours())
    facts = facts_of(data)
    assert (facts.width, facts.height) == (6, 4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_kinds_of_pixels(mode: str) -> None:
    plain = colours().convert(mode)
    found = read_picture(encoded(plain, "TIFF"))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(plain.convert("RGB")).astype(int)).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_keep_their_brightness(mode: str) -> None:
    """Which Pillow's own conversion cuts off at 255."""
    wide = np.array([[0, 257, 32768, 65535]], np.uint16)
    picture = Image.fromarray(wide) if mode == "I;16" else Image.fromarray(wide.astype(np.int32))
    assert np.asarray(read_picture(encoded(picture, "TIFF")))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_transparency_is_on_white() -> None:
    picture = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8))
    found = read_picture(encoded(picture))
    assert found.mode == "RGBA"
    assert np.asarray(on_white(found))[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_a_transparent_palette_is_on_white() -> None:
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    found = on_white(read_picture(encoded(picture, transparency=1)))
    assert np.asarray(found)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_a_mask_is_black_where_it_is_transparent() -> None:
    picture = Image.fromarray(np.array([[[255, 255, 255, 255], [255, 255, 255, 0]]], np.uint8))
    assert grey_of(read_picture(encoded(picture))).tolist() == [[255, 0]]


def swapped_profile() -> bytes:
    """sRGB with red and green in each other's place, under another name."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return swapped.replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_heeded(mode: str) -> None:
    colour = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode, palette=Image.Palette.ADAPTIVE)
    if mode == "RGBA":
        colour.putalpha(200)
    found = read_picture(encoded(colour, icc_profile=swapped_profile()))
    assert np.abs(np.asarray(found)[0, 0, :3].astype(int) - (0, 255, 0)).max() <= 2
    assert found.mode == ("RGBA" if mode == "RGBA" else "RGB")
    assert mode != "RGBA" or np.asarray(found)[0, 0, 3] == 200


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_srgb_and_damaged_profiles_change_nothing(mode: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", swapped_profile()[:200]):
        found = read_picture(encoded(colours().convert(mode), icc_profile=profile))
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(colours().convert(mode).convert("RGB")))


def test_one_pixel_and_a_long_strip() -> None:
    assert read_picture(encoded(colours(1, 1))).size == (1, 1)
    assert read_picture(encoded(Image.new("L", (20_000, 8)))).size == (20_000, 8)


# ---- what is refused ----


def animated(kind: str) -> bytes:
    return encoded(colours(), kind, save_all=True, append_images=[Image.new("RGB", (6, 4))], duration=100)


HOSTILE: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty.png", b"", ("is empty",)),
    ("text.png", b"no picture at all\n" * 9, ("is no picture",)),
    ("magic.jpg", b"\xff\xd8\xff" + bytes(400), ("magic.jpg",)),
    ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("is no picture",)),
    ("cut.png", encoded(Image.effect_noise((64, 64), 90))[:2000], ("damaged or cut off",)),
    ("cut.jpg", encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], ("damaged or cut off",)),
    ("cut.webp", encoded(Image.effect_noise((64, 64), 90), "WEBP")[:900], ("damaged or cut off",)),
    ("bomb.png", png(50_000, 50_000, bytes(1 << 20)), ("pixels", "smaller")),
    ("bomb.bmp", encoded(colours(), "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encoded(colours(), "BMP")[26:],
     ("pixels", "smaller")),
    ("text-bomb.png", png(4, 4, bytes(52), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28)))),
     ("damaged or cut off",)),
    ("animated.gif", animated("GIF"), ("animated", "(2)")),
    ("animated.webp", animated("WEBP"), ("animated", "(2)")),
    ("animated.png", animated("PNG"), ("animated", "(2)")),
    ("floats.tif", encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), ("floating",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "words"), HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_a_hostile_picture_is_one_sentence_and_no_memory(
    tmp_path: Path, name: str, data: bytes, words: tuple[str, ...]
) -> None:
    """As processes, with the file, as a mask and from standard input."""
    path, good = tmp_path / name, tmp_path / "good.png"
    path.write_bytes(data)
    good.write_bytes(encoded(colours()))
    draw = ("img2img", "x", "-o", tmp_path / "out", "-i")
    for command in ((*draw, path), (*draw, good, "--mask", path)):
        found = quick(*command)
        assert_refused(found, 65, name, *words)
        assert found.peak < MEMORY
    found = quick(*draw, "-", stdin=data)
    assert_refused(found, 65, "given as data" if data else "standard input is empty")
    assert found.peak < MEMORY
    assert not (tmp_path / "out").exists()


def test_a_real_process_takes_no_memory_for_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(next(data for name, data, _ in HOSTILE if name == path.name))
    found = ldm("img2img", "x", "-i", path, measure=True)
    assert_refused(found, 65, "bomb.png")
    assert found.peak < MEMORY


@pytest.mark.parametrize(
    ("name", "data", "shape"),
    [
        ("cmyk.jpg", encoded(colours(16, 16).convert("CMYK"), "JPEG"), (16, 16, 3)),
        ("profile.png", encoded(colours(16, 16), icc_profile=swapped_profile()), (16, 16, 3)),
        ("one.png", encoded(colours(1, 1)), (8, 8, 3)),
        ("strip.png", encoded(Image.new("L", (20_000, 8), 90)), (8, 20_000, 3)),
        *[
            (f"turned-{n}.png", encoded(colours(16, 8), exif=b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0"
             + bytes((n, 0, 0, 0, 0, 0, 0))), (8, 16, 3) if n < 5 else (16, 8, 3))
            for n in range(1, 9)
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_odd_picture_is_drawn_on_in_little_memory(
    tmp_path: Path, name: str, data: bytes, shape: tuple[int, ...]
) -> None:
    (tmp_path / name).write_bytes(data)
    options = ("-m", tiny_model(), "--steps", "2", "-s", "1", "--strength", "0.5", "-q", "-o", "out.png")
    found = quick("img2img", "x", "-i", name, *options, cwd=tmp_path)
    assert found.code == 0, found
    assert pixels(tmp_path / "out.png").shape == shape
    assert found.peak < 2 * MEMORY


def test_a_list_of_hostile_pictures_is_checked_row_by_row_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "good.png").write_bytes(encoded(colours(16, 16)))
    expected = {name: words for name, _, words in HOSTILE}
    for name, data, _ in HOSTILE:
        (tmp_path / name).write_bytes(data)
    expected |= {"pipe": ("is a pipe",), "gone.png": ("does not exist",), "http://example.org/a.png": ("an address",)}
    expected |= {".": ("is a folder",)}
    rows = [{"prompt": "x", "image": name} for name in expected]
    rows += [{"prompt": "x", "image": "good.png", "mask": name} for name in expected]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "fine", "image": "good.png"}])))
    command = ("batch", file, "-m", tiny_model(), "--steps", "2", "--devices", "cpu", "-o", tmp_path / "out")
    done = quick(*command)
    assert (done.code, len(done.paths)) == (3, 1), done
    failed = {record["row"]: record["error"] for record in manifest(tmp_path / "out") if record["status"] == "failed"}
    assert sorted(failed) == list(range(1, len(rows) + 1))
    for number, words in enumerate([*expected.values()] * 2, 1):
        said = str(failed[number])
        assert said.isprintable()
        assert all(word in said for word in words), said
    monkeypatch.setattr(Session, "load", None)
    monkeypatch.setattr(Session, "_loaded", None)
    refused = ldm_here(*command[:-1], tmp_path / "strict", "--strict")
    assert (refused.code, refused.out) == (65, b""), refused
    assert f"rows.jsonl has {len(rows)} bad rows" in refused.err
    assert not list((tmp_path / "strict").glob("**/*.png"))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cat.png").write_bytes(encoded(colours()))
    for name, code, words in (
        ("cot.png", 66, "its folder has cat.png"),
        (".", 65, "is a folder"),
        ("pipe", 65, "is a pipe"),
        ("https://example.org/cat.png", 66, "is an address"),
        ("/dev/zero", 65, "is a device"),
        (" ", 66, "' ' does not exist"),
    ):
        assert_refused(ldm_here("img2img", "x", "-i", name, cwd=tmp_path), code, words)
        assert_refused(ldm_here("img2img", "x", "-i", "cat.png", "--mask", name, cwd=tmp_path), code, words)


@pytest.mark.parametrize("option", ["--image", "--mask", "--depth"])
def test_a_picture_that_may_not_be_read_is_no_wrong_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Root may read everything, so that permissions are asked for in its place: 66, not 2, with where to look."""
    for name in ("good.png", "secret.png"):
        (tmp_path / name).write_bytes(encoded(colours()))
    opened, secret = os.open, str(tmp_path / "secret.png")

    def refuse(path: Any, *more: Any, **settings: Any) -> int:
        if os.fspath(path) == secret:
            raise PermissionError(errno.EACCES, "Permission denied", secret)
        return opened(path, *more, **settings)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode, **settings: os.fspath(path) != secret)
    given = () if option == "--image" else ("-i", tmp_path / "good.png")
    assert_refused(ldm_here("img2img", "x", *given, option, secret), 66, "secret.png is not readable", "permissions")


def test_too_many_pixels_are_refused_before_they_are_unpacked() -> None:
    with pytest.raises(BadDataError, match="64 million"):
        read_picture(png(MAX_PIXELS // 8 + 1, 8, bytes(9)))


def test_a_picture_is_looked_at_again_once_its_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(colours()))
    before = facts_of(str(path))
    assert facts_of(str(path)) is before
    path.write_bytes(encoded(colours(8, 8)))
    assert facts_of(str(path)).width == 8
    path.unlink()
    with pytest.raises(MissingInputError):
        facts_of(str(path))
    assert issubclass(MissingInputError, LdmError)


# ---- sizes ----


def test_how_a_picture_comes_to_a_size() -> None:
    picture = Image.fromarray(np.repeat(np.array([[10, 20, 30, 40]], np.uint8), 2, 0)).convert("RGB")
    assert resized(picture, 4, 2, "stretch") is picture
    assert [resized(picture, 8, 8, how).size for how in ("stretch", "crop", "fill")] == [(8, 8)] * 3
    assert np.asarray(resized(picture, 2, 2, "crop"))[0, :, 0].tolist() == [20, 30]
    filled = np.asarray(resized(picture, 4, 6, "fill"))[:, :, 0]
    assert filled.tolist() == [[10, 20, 30, 40]] * 6


def test_the_surroundings_of_a_mask() -> None:
    mask = np.zeros((40, 60), bool)
    mask[10:14, 50:58] = True
    assert surroundings(mask, 0, 2.0) == (50, 10, 58, 14)
    assert surroundings(mask, 4, 1.0) == (46, 5, 60, 19)
    assert surroundings(mask, 100, 1.0) == (0, 0, 60, 40)  # no more than there is
    left, top, right, bottom = surroundings(mask, 0, 0.25)
    assert (left, right) == (50, 58)
    assert (top, bottom) == (0, 32)  # shifted to stay inside
