"""Pictures in the terminal, by its own graphics (iTerm2's protocol, kitty's, or sixel), else as coloured half blocks.

Imported where one is to be shown; with it come textual-image, rich and Pillow.
"""

import base64
import contextlib
import functools
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.measure import Measurement

from ldmcli.cli.terminal import cleared
from ldmcli.images.pixels import on_white, read_picture

if TYPE_CHECKING:
    from textual_image.renderable import HalfcellImage, SixelImage, TGPImage

    _Renderable = type[HalfcellImage] | type[SixelImage] | type[TGPImage]

_SPARE = 2  # lines below a picture: for the bar, and a path
_LEAST, _MOST = 32, 256  # columns that a picture takes where the terminal has them; kitty's protocol counts to 297
_COLUMN = 8  # pixels, about
_WITH_FILES = ("iTerm.app", "WezTerm")  # what terminals call themselves in TERM_PROGRAM


def show_picture(source: str | bytes) -> None:
    """Show a picture by its path or its file's bytes. Raises as `read_picture`."""
    text, _ = rendered(on_white(read_picture(source)))
    with cleared():
        sys.stdout.write(text)
        sys.stdout.flush()


def rendered(picture: Image.Image) -> tuple[str, int]:
    """What the terminal is to be sent to show an RGB picture as large as it is, or fits, and how many lines that takes.
    With kitty's protocol the terminal has the pixels by then."""
    kind, blocks = ask_terminal()
    size = shutil.get_terminal_size()
    most = picture.width if blocks else max(_LEAST, picture.width // _COLUMN)
    columns, lines = min(size.columns, most, _MOST), max(1, size.lines - _SPARE)
    if kind is None:
        return _as_file(picture, columns, lines)
    console = _console(width=columns, height=lines)
    with console.capture() as captured:
        console.print(kind(picture, "auto", "auto"))
    text = captured.get()
    return text, text.count("\n")


def _as_file(picture: Image.Image, columns: int, lines: int) -> tuple[str, int]:
    """A picture by iTerm2's protocol (https://iterm2.com/documentation-images.html), within so many cells, which are
    about twice as high as wide."""
    shape = picture.height / picture.width / 2
    columns = max(1, min(columns, int(lines / shape)))
    lines = min(lines, max(1, round(columns * shape)))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    how = f"inline=1;size={file.tell()};width={columns};height={lines};preserveAspectRatio=1"
    return f"\x1b]1337;File={how}:{data}\a\n", lines


def _takes_files() -> bool:
    """Whether this terminal says that it has iTerm2's protocol, and no multiplexer stands between, which has not."""
    named = os.environ.get("TERM_PROGRAM") in _WITH_FILES or os.environ.get("LC_TERMINAL") == "iTerm2"
    between = os.environ.get("TERM", "").startswith(("screen", "tmux")) or not {"TMUX", "STY"}.isdisjoint(os.environ)
    return named and not between


@functools.cache
def ask_terminal() -> "tuple[_Renderable | None, bool]":
    """What shows pictures on this terminal, None for iTerm2's protocol, and whether by half blocks. It is asked once:
    the answer comes as if it had been typed, so nothing else may be reading then."""
    if _takes_files():
        return None, False
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    with _terminal_as_stdin():
        from textual_image.renderable import HalfcellImage
        from textual_image.renderable import Image as Suitable

        console = _console()
        Measurement.get(console, console.options, HalfcellImage(Image.new("RGB", (1, 1))))  # asks for a cell's size
    return Suitable, Suitable is HalfcellImage  # type: ignore[return-value]


def _console(**size: Any) -> Console:
    # Colours, whatever NO_COLOR says of text: without them there is no picture.
    return Console(file=sys.stdout, force_terminal=True, no_color=False, **size)


@contextlib.contextmanager
def _terminal_as_stdin() -> Iterator[None]:
    """The library asks by way of `sys.__stdin__`, and fails where that is a file or a pipe: give it the terminal, or
    nothing where this process is in the background, which may not change its settings."""
    before = sys.__stdin__
    with contextlib.ExitStack() as stack:
        terminal = None
        with contextlib.suppress(OSError):
            terminal = stack.enter_context(open("/dev/tty"))
            terminal = terminal if os.tcgetpgrp(terminal.fileno()) == os.getpgrp() else None
        vars(sys)["__stdin__"] = terminal
        try:
            yield
        finally:
            vars(sys)["__stdin__"] = before
