"""Pictures as they grow: every few steps on the terminal, or in a file that is replaced."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli import __version__
from ldmcli.cli.terminal import pass_by
from ldmcli.disk.writing import check_may_write, prepare_folder, write_exact
from ldmcli.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from ldmcli.serving.client import RemoteProgress
    from ldmcli.session.session import Progress

_MARK = "ldmcli-preview"  # by which a file that may be replaced is known
_LEVEL = 1  # of zlib: the file lasts for a few steps


class Previews:
    """Shows how pictures grow that are drawn together, beside one another; call it with each Progress."""

    def __init__(self, every: int, file: Path | None, *, on_terminal: bool) -> None:
        """`every` is a number of steps, 0 for no previews. Raises CannotCreateError where the file is there and is no
        preview."""
        self._every, self._file, self._on_terminal = every, file, on_terminal
        if file is not None:
            prepare_folder(file.parent)
            self._check(file)

    def __call__(self, progress: "Progress | RemoteProgress") -> None:
        """Show them, where it is their turn."""
        if not (self._every and progress.done) or progress.done % self._every:
            return
        from PIL import Image

        size = progress.requests[0].width, progress.requests[0].height
        found = [Image.frombytes("RGB", (width, height), data) for width, height, data in progress.preview()]
        if not found:
            return
        row = Image.new("RGB", (size[0] * len(found), size[1]))
        for i, one in enumerate(found):
            row.paste(one.resize(size, Image.Resampling.BICUBIC), (i * size[0], 0))
        if self._file is not None:
            self._write(row, self._file)
        if self._on_terminal:
            from ldmcli.cli.terminal_pictures import rendered

            pass_by(*rendered(row))

    def _check(self, file: Path) -> None:
        check_may_write(file, _MARK.encode(), "preview", "--preview-file")

    def _write(self, row: "Image.Image", file: Path) -> None:
        from PIL.PngImagePlugin import PngInfo

        self._check(file)
        text, data = PngInfo(), io.BytesIO()
        text.add_text(_MARK, __version__)
        row.save(data, "PNG", pnginfo=text, compress_level=_LEVEL)
        write_exact(file, data.getvalue(), overwrite=True)


def preview_steps(options: Mapping[str, Any]) -> int:
    """How many steps lie between previews; 0 for none. Raises UsageError where they have no place to go."""
    file = options["preview_file"]
    if options["preview"] and not (options["show"] or file):
        raise UsageError("--preview shows a picture as it grows in the terminal or in a file; give --show or "
                         "--preview-file FILE.png.")  # fmt: skip
    if file and not file.lower().endswith(".png"):
        raise UsageError("--preview-file is written as PNG; name a file in .png.")
    if file and options["output"] and Path(file).resolve() == Path(options["output"]).resolve():
        raise UsageError("--preview-file and --output are the same file; give another name to one.")
    return options["preview"] or int(bool(file))
