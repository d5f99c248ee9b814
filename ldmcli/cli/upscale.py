"""`ldm upscale`: pictures in, larger pictures out."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldmcli.cli.arguments import STDIN, picture_from_stdin
from ldmcli.cli.command import command
from ldmcli.cli.options import (
    device_options,
    expanded,
    file_options,
    json_option,
    option,
    server_options,
    verbosity_options,
)
from ldmcli.cli.output import Output, choose_encoding, in_folder, open_output
from ldmcli.cli.resident import find_server
from ldmcli.cli.terminal import bar, loading
from ldmcli.disk.opening import open_regular
from ldmcli.errors import BadDataError, MissingInputError, UsageError, printable
from ldmcli.images.formats import Encoding
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.startup import quicken, settle_down
from ldmcli.upscaling.larger import Enlargement, larger_file, read_file
from ldmcli.upscaling.target import Target, parse_size
from ldmcli.upscaling.tiles import TILE

if TYPE_CHECKING:
    from ldmcli.cli.remote_upscale import RemoteWork
    from ldmcli.upscaling.upscaler import Upscaler, UpscalerFile

_log = logging.getLogger(__name__)


@command(short_help="Make pictures larger, by a network trained for it.")
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True)
@option("-m", "--upscaler", metavar="FILE", default="embedded", show_default=True,
        help="The network: ESRGAN, Real-ESRGAN, Compact, SwinIR, DAT, HAT and others, as .safetensors.")  # fmt: skip
@option("--allow-pickle", is_flag=True, help="Read .pth files too, by torch's restricted unpickler alone.")
@option("-o", "--output", metavar="PATH", required=True,
        help="A folder, a .png, .jpg or .webp file, or - for stdout.")  # fmt: skip
@option("--scale", type=float, metavar="FACTOR", help="How many times as large.  [default: the network's own, often 4]")
@option("--size", metavar="WxH", help="This size exactly, cut where the proportions differ; Wx or xH keep them.")
@file_options("--image-format", "--format")
@option("--tile", type=click.IntRange(0, 1 << 14), default=TILE, show_default=True, metavar="PIXELS",
        help="Compute so much of a picture's side at once; 0 all. Smaller takes less memory.")  # fmt: skip
@device_options
@server_options
@option("--overwrite", is_flag=True, help="Replace files that are there already.")
@option("--no-metadata", is_flag=True, help="Write nothing of what the picture says of itself.")
@json_option("Report each picture as a JSON line.")
@verbosity_options
@click.pass_context
def upscale(context: click.Context, pictures: tuple[str, ...], **options: Any) -> None:
    """Make each IMAGE larger and print the path of each result; - reads a picture from standard input.

    What a picture says of itself is kept and added to. Pictures are turned upright; transparency is kept where the
    format has it. In a folder, a result has its picture's name. Where a picture cannot be read, the others are enlarged
    all the same, and the exit code is that of the first that could not.

    \b
    Examples:
    ldm upscale photo.jpg -o large.png
    ldm upscale *.png -m 4x-UltraSharp.safetensors --scale 2 -o large
    ldm upscale photo.jpg --size 1920x1080 -o wallpaper.webp --quality 85
    ldm txt2img "a rose" -o - | ldm upscale - -o rose.png
    """
    # 1. Everything that can be known before a network is read.
    width, height = parse_size(options["size"]) if options["size"] else (None, None)
    target = Target(options["scale"], width, height)
    names = ("image_format", "quality", "lossless")
    encoding = choose_encoding(options["output"], **{name: options[name] for name in names})
    how = Enlargement(target, encoding, not options["no_metadata"], options["tile"])
    work = _open(how, options)
    with _stdin_as_file(pictures) as sources:
        outputs = _outputs(sources, encoding, options)
        # 2. Each picture; the network is read once there is one.
        if isinstance(work, _Work):
            quicken()
        codes = []
        for source, output in zip(sources, outputs, strict=True):
            try:
                work.enlarge(source, output)
            except BadDataError as error:
                if len(sources) == 1:
                    raise
                _log.error("%s", error)
                codes.append(error.exit_code)
    context.exit(codes[0] if codes else 0)


def _open(how: Enlargement, options: dict[str, Any]) -> "_Work | RemoteWork":
    """The network, looked at: a server's, where there is one."""

    def here() -> _Work:
        from ldmcli.upscaling.upscaler import open_upscaler

        return _Work(open_upscaler(options["upscaler"], allow_pickle=options["allow_pickle"]), how, options)

    server = find_server(options)
    if server is None:
        return here()
    from ldmcli.cli.remote_upscale import RemoteWork

    return RemoteWork(server, how, options, here)


@contextlib.contextmanager
def _stdin_as_file(pictures: Sequence[str]) -> Iterator[list[Path]]:
    """The pictures' files; what standard input has, in one that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        if STDIN in pictures:
            if pictures.count(STDIN) > 1:
                raise UsageError("- reads standard input, and that only once.")
            (Path(folder) / "stdin").write_bytes(picture_from_stdin())
        yield [Path(folder) / "stdin" if name == STDIN else _file(name) for name in pictures]


def _file(name: str) -> Path:
    if not name:
        raise UsageError("an IMAGE has an empty name; name a picture file.")
    if "://" in name:
        raise MissingInputError(f"{printable(name)} is an address, and pictures are read from files; fetch it first.")
    return expanded(name)


def _outputs(sources: Sequence[Path], encoding: Encoding, options: dict[str, Any]) -> list[Output]:
    """Where each picture goes. Raises an LdmError where one is not there, or its result may not be written."""
    for source in sources:
        with open_regular(source, ("", "name a picture file")):
            pass
    overwrite = options["overwrite"]
    output = open_output(
        options["output"], encoding, overwrite=overwrite, as_json=options["as_json"], one_image=len(sources) == 1
    )
    if output.path is None and len(sources) > 1:
        raise UsageError("-o - takes one picture, and there are more; give a folder to -o.")
    if output.path is None or output.is_file:
        return [output]
    return in_folder(output, [f"{source.stem}{encoding.ending}" for source in sources])


class _Work:
    """Enlarges pictures by one network, which is read when the first of them has been."""

    def __init__(self, file: "UpscalerFile", how: Enlargement, options: dict[str, Any]) -> None:
        self._file, self._how, self._options = file, how, options
        self._upscaler: Upscaler | None = None

    def enlarge(self, source: Path, output: Output) -> None:
        """Read, enlarge, write and report one picture. Raises BadDataError where it cannot be read."""
        picture, text = read_file(source, self._how)
        upscaler = self._loaded()
        started = time.perf_counter()
        with contextlib.closing(bar(desc=source.stem, unit="tile")) as progress:
            data, size = larger_file(picture, text, upscaler, self._how, partial(show, progress))
        report(source, output, data, size, upscaler.name, time.perf_counter() - started)

    def _loaded(self) -> "Upscaler":
        if self._upscaler is None:
            from ldmcli.speed.policy import choose_runtime
            from ldmcli.upscaling.upscaler import Upscaler

            dtype = self._options["dtype"]
            with contextlib.closing(loading(self._file.name)):
                runtime = choose_runtime(RuntimeSpec(device=self._options["device"], dtype=dtype))
                self._upscaler = Upscaler(self._file, runtime, asked=dtype != "auto")
            settle_down()
        return self._upscaler


def show(progress: Any, done: int, total: int) -> None:
    """Move a bar of tiles."""
    progress.total, progress.n = total, done
    progress.refresh()


def report(source: Path, output: Output, data: bytes, size: tuple[int, ...], name: str, seconds: float) -> None:
    """Write and report one picture."""
    facts = {"image": str(source), "width": size[0], "height": size[1], "upscaler": name}
    output.write(data, 0, facts | {"seconds": round(seconds, 3)})
