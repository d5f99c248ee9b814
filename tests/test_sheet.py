"""The contact sheet: every picture in its place with its caption, whatever the caption holds, within bounds."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from cli_support import pixels
from PIL import Image, ImageFont

from ldmcli.errors import CannotCreateError
from ldmcli.gallery import sheet
from ldmcli.gallery.sheet import SheetPicture, check_sheet, wrapped, write_sheet
from ldmcli.images.encode import encode_pixels

RED, GREEN, BLUE = (220, 30, 30), (30, 160, 60), (30, 60, 220)


def plain(path: Path, colour: tuple[int, int, int], height: int = 64, width: int = 64) -> Path:
    path.write_bytes(encode_pixels(np.full((height, width, 3), colour, np.uint8), {}))
    return path


def font(size: int = 14):
    return ImageFont.load_default(size)


def test_pictures_stand_in_order_with_dark_captions_on_white(tmp_path: Path) -> None:
    colours = (RED, GREEN, BLUE, RED, GREEN)
    entries = [SheetPicture(plain(tmp_path / f"{n}.png", colour), "a caption") for n, colour in enumerate(colours)]
    assert write_sheet(tmp_path / "s.png", entries) == 5
    drawn = pixels(tmp_path / "s.png")
    height, width, _ = drawn.shape
    assert width == 20 + 3 * (256 + 16) - 16 + 20
    pitch = (height - 40 + 24) // 2
    centres = [(20 + row * pitch + 128, 20 + column * 272 + 128) for row in (0, 1) for column in (0, 1, 2)]
    assert [tuple(drawn[centre]) for centre in centres] == [*colours, (255, 255, 255)]
    under = drawn[20 + 256 + 2 : 20 + 256 + 26, 20 : 20 + 256]
    assert under.min() < 60, "no dark ink under the first picture"
    assert (under == 255).mean() > 0.7


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    assert write_sheet(tmp_path / "s.png", [SheetPicture(plain(tmp_path / "wide.png", RED, 200, 800), "")]) == 1
    reds = np.argwhere((abs(pixels(tmp_path / "s.png").astype(int) - RED) < 30).all(axis=-1))
    assert tuple(reds.max(axis=0) - reds.min(axis=0) + 3) == (64, 256)  # with the edge around it


def test_what_cannot_be_read_is_an_empty_cell_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = encode_pixels(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), {})
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    bomb = plain(tmp_path / "bomb.png", RED, 1, 1)
    bomb.write_bytes(bomb.read_bytes().replace(b"\0\0\0\1\0\0\0\1", b"\0\1\x86\xa0\0\1\x86\xa0", 1))
    names = ("cut.png", "text.png", "pipe.png", "bomb.png", "missing.png")
    entries = [SheetPicture(tmp_path / name, name) for name in names]
    entries.append(SheetPicture(plain(tmp_path / "ok.png", BLUE), "ok"))
    with caplog.at_level(logging.WARNING, "ldmcli"):
        assert write_sheet(tmp_path / "s.png", entries) == 6
    assert "5 pictures cannot be read" in caplog.text
    assert (pixels(tmp_path / "s.png") == BLUE).all(axis=-1).any()


@pytest.mark.parametrize(
    ("caption", "lines"),
    [
        ("seed 42", ["seed 42"]),
        ("", []),
        ("tab\there\nnewline\x07bell\x1b[31m", ["tab here newline bell [31m"]),
        ("Ein schöner Łódź – 2×2 ½", ["Ein schoner Lodz - 2x2 1⁄2"]),
        ("🍎 and 👩\u200d🚀\ufe0f", ["[red apple] and [woman][rocket]"]),
        ("漢字 é e\u0301", ["\ufffd\ufffd e e"]),
        ("\u202eevil\u2066 \ud800 \U000e0041", ["evil \ufffd"]),
        ("שלום", ["\ufffd" * 4]),
    ],
)
def test_captions_are_spelled_in_what_the_font_has(caption: str, lines: list[str]) -> None:
    assert wrapped(caption, 400, font()) == lines


@pytest.mark.parametrize("caption", ["word " * 500, "x" * 100_000, "a reasonably long caption, twice " * 9])
@pytest.mark.parametrize("width", [96, 256])
def test_long_captions_are_wrapped_and_cut(caption: str, width: int) -> None:
    lines = wrapped(caption, width, font())
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font().getlength(line) <= width for line in lines)


def test_every_sort_of_character_is_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    every = [chr(code) for code in (*range(0x250), *range(0x250, 0x10000, 23), *range(0x1F300, 0x1FAFF, 9))]
    one = plain(tmp_path / "one.png", RED, 8, 8)
    assert write_sheet(tmp_path / "s.png", [SheetPicture(one, "".join(every[n::60])) for n in range(60)]) == 60
    assert caplog.text == ""


def test_many_pictures_get_smaller_cells_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sheet, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr(sheet, "MAX_PICTURES", 30)
    one = SheetPicture(plain(tmp_path / "one.png", GREEN, 16, 16), "c")
    assert write_sheet(tmp_path / "a.png", [one] * 30) == 30
    assert caplog.text == ""
    assert write_sheet(tmp_path / "b.png", [one] * 50) == 30
    assert "only the first 30 pictures" in caplog.text
    for name in ("a.png", "b.png"):
        height, width, _ = pixels(tmp_path / name).shape
        assert height * width <= 1_000_000


def test_the_smallest_cells_let_all_pictures_in() -> None:
    grid = sheet._grid(sheet.MAX_PICTURES)
    assert grid.columns * grid.rows >= sheet.MAX_PICTURES
    assert grid.size[0] * grid.size[1] <= sheet.MAX_PIXELS


def test_nothing_to_show_writes_nothing(tmp_path: Path) -> None:
    assert write_sheet(tmp_path / "s.png", []) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_replaces_sheets_alone(tmp_path: Path) -> None:
    pictures = [SheetPicture(plain(tmp_path / "one.png", RED), "c")]
    path = tmp_path / "new" / "s.png"
    for _ in range(2):
        check_sheet(path)
        assert write_sheet(path, pictures) == 1
    with Image.open(path) as image:
        assert list(image.info) == ["ldmcli-sheet"]
    (tmp_path / "prompts.txt").write_text("mine")
    for foreign in (tmp_path / "prompts.txt", tmp_path / "one.png"):
        before = foreign.read_bytes()
        for act in (check_sheet, lambda path: write_sheet(path, pictures)):
            with pytest.raises(CannotCreateError, match="no contact sheet"):
                act(foreign)
        assert foreign.read_bytes() == before
