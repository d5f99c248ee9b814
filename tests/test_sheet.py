"""The contact sheet: every picture in its place with its caption, whatever the caption holds, within bounds."""

import logging
from pathlib import Path

import numpy as np
import pytest
from cli_support import pixels

from ldmcli.errors import CannotCreateError, UsageError
from ldmcli.gallery import sheet
from ldmcli.gallery.sheet import Sheet, SheetPicture, wrapped, write_sheet
from ldmcli.images.encode import encode_png

RED, GREEN, BLUE = (220, 30, 30), (30, 160, 60), (30, 60, 220)


def plain(colour: tuple[int, int, int], height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def font(size: int = 14):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def test_pictures_stand_in_order_with_dark_captions_on_white(tmp_path: Path) -> None:
    entries = [SheetPicture(plain(colour), "a caption") for colour in (RED, GREEN, BLUE)]
    assert write_sheet(tmp_path / "s.png", entries, columns=2, cell=128) == Sheet(3)
    drawn = pixels(tmp_path / "s.png")
    height, width, _ = drawn.shape
    assert width == 20 + 128 + 16 + 128 + 20
    centres = (20 + 64, 20 + 128 + 16 + 64)
    second_row = height - (height - 2 * 20) // 4
    assert tuple(drawn[20 + 64, centres[0]]) == RED
    assert tuple(drawn[20 + 64, centres[1]]) == GREEN
    assert (drawn[second_row - 64 : second_row, centres[0]] == BLUE).all(axis=-1).any()
    assert (drawn[second_row - 64 : second_row, centres[1]] == 255).all(), "the fourth cell is empty"
    under = drawn[20 + 128 + 2 : 20 + 128 + 24, 20 : 20 + 128]
    assert under.min() < 60, "no dark ink under the first picture"
    assert (under == 255).mean() > 0.7


def test_files_keep_their_shape_and_transparency_is_laid_on_white(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "wide.png").write_bytes(encode_png(plain(RED, 100, 400), {}))
    Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    entries = [SheetPicture(tmp_path / name, "") for name in ("wide.png", "clear.png")]
    assert write_sheet(tmp_path / "s.png", entries, cell=200, columns=2) == Sheet(2)
    drawn = pixels(tmp_path / "s.png")
    reds = np.argwhere((abs(drawn.astype(int) - RED) < 30).all(axis=-1))
    size = reds.max(axis=0) - reds.min(axis=0) + 3  # with the edge around it
    assert tuple(size) == (50, 200)
    assert tuple(drawn[20 + 100, 20 + 200 + 16 + 100]) == (255, 255, 255)


def test_what_cannot_be_read_is_an_empty_cell_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import os

    whole = encode_png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), {})
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    bomb = encode_png(plain(RED, 1, 1), {}).replace(b"\0\0\0\1\0\0\0\1", b"\0\1\x86\xa0\0\1\x86\xa0", 1)
    (tmp_path / "bomb.png").write_bytes(bomb)
    names = ("cut.png", "text.png", "pipe.png", "bomb.png", "missing.png")
    entries = [SheetPicture(tmp_path / name, name) for name in names]
    with caplog.at_level(logging.WARNING, "ldmcli"):
        assert write_sheet(tmp_path / "s.png", [*entries, SheetPicture(plain(BLUE), "ok")]) == Sheet(6, 0, 5)
    assert "5 pictures cannot be read" in caplog.text


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


def test_every_sort_of_character_is_drawn(tmp_path: Path) -> None:
    every = [chr(code) for code in (*range(0x250), *range(0x250, 0x10000, 23), *range(0x1F300, 0x1FAFF, 9))]
    entries = [SheetPicture(plain(RED, 8, 8), "".join(every[n : n + 60])) for n in range(0, len(every), 60)]
    assert write_sheet(tmp_path / "s.png", entries, cell=96).unreadable == 0


def test_many_pictures_get_smaller_cells_and_the_rest_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sheet, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr(sheet, "MAX_PICTURES", 100)
    one = plain(GREEN, 16, 16)
    assert write_sheet(tmp_path / "a.png", (SheetPicture(one, "c") for _ in range(30))) == Sheet(30)
    with caplog.at_level(logging.WARNING, "ldmcli"):
        result = write_sheet(tmp_path / "b.png", (SheetPicture(one, "c") for _ in range(250)))
    assert result.shown + result.left_out == 250
    assert 30 < result.shown < 100
    assert f"{result.left_out} more" in caplog.text
    for name in ("a.png", "b.png"):
        height, width, _ = pixels(tmp_path / name).shape
        assert height * width <= 1_000_000


def test_one_column_stops_at_the_longest_side(tmp_path: Path) -> None:
    result = write_sheet(tmp_path / "s.png", [SheetPicture(plain(RED, 4, 4), "c")] * 300, columns=1)
    assert result.left_out > 0
    assert pixels(tmp_path / "s.png").shape[0] <= sheet.MAX_SIDE


def test_nothing_to_show_writes_nothing(tmp_path: Path) -> None:
    assert write_sheet(tmp_path / "s.png", []) == Sheet(0)
    assert list(tmp_path.iterdir()) == []


def test_out_of_range_and_taken_names_are_refused(tmp_path: Path) -> None:
    one = [SheetPicture(plain(RED), "c")]
    for options in ({"cell": 10}, {"cell": 5000}, {"columns": 0}, {"columns": 1000}):
        with pytest.raises(UsageError, match="contact sheet"):
            write_sheet(tmp_path / "s.png", one, **options)
    (tmp_path / "s.png").write_text("mine")
    with pytest.raises(CannotCreateError):
        write_sheet(tmp_path / "s.png", one)
    assert (tmp_path / "s.png").read_text() == "mine"
    assert write_sheet(tmp_path / "s.png", one, overwrite=True) == Sheet(1)
