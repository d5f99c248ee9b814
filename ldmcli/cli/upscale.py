"""`ldm upscale`: pictures in, larger pictures out."""

import contextlib
import dataclasses
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ldmcli.cli.arguments import STDIN, each_file, picture_from_stdin
from ldmcli.cli.command import command, values
from ldmcli.cli.option_types import Seed
from ldmcli.cli.options import (
    device_options,
    expanded,
    file_options,
    json_option,
    option,
    server_options,
    show_option,
    together,
    verbosity_options,
)
from ldmcli.cli.output import Output, choose_encoding, in_folder, open_output
from ldmcli.cli.resident import find_server
from ldmcli.cli.terminal import bar, loading, shows_pictures
from ldmcli.disk.opening import open_regular
from ldmcli.errors import BadDataError, MissingInputError, UsageError, printable
from ldmcli.images.formats import Encoding
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.linking import settle_down
from ldmcli.speed.startup import quicken
from ldmcli.upscaling.larger import Enlargement, larger_file, read_file
from ldmcli.upscaling.target import Enlarger, Target, parse_size

if TYPE_CHECKING:
    from ldmcli.cli.remote_upscale import RemoteWork

_log = logging.getLogger(__name__)
_EMBEDDED, _PICKLES = "embedded", (".pth", ".pt", ".ckpt", ".bin")


# Of models that draw pictures larger.
_drawing_options = together(
    option("-p", "--prompt", default="", metavar="TEXT", help="What is on the picture, for models that read prompts."),
    option("-n", "--negative-prompt", default="", metavar="TEXT", help="What it should not show."),
    option("--steps", type=int, help="Sampling steps.  [default: the model's own; 75 or 100]"),
    option("-g", "--guidance-scale", "--cfg-scale", type=float,
           help="How closely to follow the prompt.  [default: the model's own; 9]"),
    option("--noise-level", type=int, help="Noise added to the picture first, 0 to 350.  [default: 20]"),
    option("--eta", type=float,
           help="Fresh noise in DDIM: 0 none, 1 as in DDPM.  [default: 1 for LDM super-resolution, 0 for SD's]"),
    option("-s", "--seed", type=Seed(), metavar="INTEGER", help="Of the noise; -1 is random.  [default: random, "
           "reported]"),
)  # fmt: skip
_DRAWING = ("prompt", "negative_prompt", "steps", "guidance_scale", "noise_level", "eta", "seed")


@command(short_help="Make pictures larger, by a network trained for it.")
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True, shell_complete=values)
@option("-m", "--upscaler", metavar="FILE", default=_EMBEDDED, show_default=True,
        help="The network: ESRGAN, Real-ESRGAN, Compact, SwinIR, DAT, HAT and others, as .safetensors; or a model that "
        "draws pictures larger: LDM super-resolution or SD's x4 upscaler, a file, a folder or ORG/NAME.")  # fmt: skip
@option("--allow-pickle", is_flag=True, help="Read .pth and .ckpt files too, by torch's restricted unpickler alone.")
@option("-o", "--output", metavar="PATH", required=True,
        help="A folder, a .png, .jpg or .webp file, or - for stdout.")  # fmt: skip
@option("--scale", type=float, metavar="FACTOR", help="How many times as large.  [default: the network's own, often 4]")
@option("--size", metavar="WxH", help="This size exactly, cut where the proportions differ; Wx or xH keep them.")
@file_options("--image-format", "--format")
@option("--tile", type=click.IntRange(0, 1 << 14), metavar="PIXELS",
        help="Compute so much of a picture's side at once; 0 all. Smaller takes less memory.  [default: 256; 128 for "
        "models that draw]")  # fmt: skip
@_drawing_options
@device_options
@server_options
@show_option
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
    ldm upscale small.png -m x4-upscaler.safetensors -p "a white cat" -o cat.png
    ldm txt2img "a rose" -o - | ldm upscale - -o rose.png
    """
    # 1. Everything that can be known before a network is read.
    width, height = parse_size(options["size"]) if options["size"] else (None, None)
    target = Target(options["scale"], width, height)
    encoding = choose_encoding(options)
    how = Enlargement(target, encoding, not options["no_metadata"], options["tile"])
    work = _open(context, how, options)
    with _stdin_as_file(pictures) as sources:
        outputs = _outputs(sources, encoding, options)
        # 2. Each picture; the network is read once there is one.
        if isinstance(work, _Work):
            quicken()
        pairs = list(zip(sources, outputs, strict=True))
        each_file(context, pairs, lambda pair: work.enlarge(*pair), BadDataError)


def _open(context: click.Context, how: Enlargement, options: dict[str, Any]) -> "_Work | RemoteWork":
    """The network, or the model that draws, looked at: a server's, where there is one."""
    draws = _draws_larger(options["upscaler"], allow_pickle=options["allow_pickle"])
    for name in () if draws else _DRAWING:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            _network(how, options)  # which says so where it is none, or not there
            raise UsageError(f"--{name.replace('_', '-')} is for models that draw pictures larger; leave it out.")
    settings = {name: options[name] for name in _DRAWING} if draws else None
    if settings and settings["seed"] is None:
        settings["seed"] = secrets.randbelow(1 << 32)

    def here() -> _Work:
        return _drawing(how, options, settings) if settings else _network(how, options)

    work: _Work | RemoteWork
    if server := find_server(options):
        from ldmcli.cli import remote_upscale

        work = remote_upscale.RemoteWork(server, how, options, settings, here)
    else:
        work = here()
    if settings and options["seed"] is None:
        _log.info("seed %d", settings["seed"])
    return work


def _draws_larger(name: str, *, allow_pickle: bool) -> bool:
    """Whether `name` is a model that draws pictures larger, or a model's folder or name on the hub, rather than an
    upscaler's file. Raises as `open_weights` does, for a file that is neither."""
    if name in ("", _EMBEDDED):
        return False
    from ldmcli.checkpoints.file_kinds import describe_single_file, family_named
    from ldmcli.checkpoints.files import open_weights

    typed = expanded(name)
    path: Path | None = typed
    if not os.path.lexists(typed):  # else a client of a server spares itself what computes
        from ldmcli.hub.listing import find_here

        path = find_here(name)
    if path is None:
        return "/" in name and not name.startswith((".", "/", "~")) and not name.endswith((".safetensors", *_PICKLES))
    if os.path.isdir(path):
        return True
    if not os.path.isfile(path) or (path.suffix in _PICKLES and not allow_pickle):
        return False
    weights = open_weights(path, allow_pickle=allow_pickle)
    family = family_named(describe_single_file({key: info.shape for key, info in weights.tensors.items()}))
    return family is not None and family.enlarges


def _drawing(how: Enlargement, options: dict[str, Any], settings: dict[str, Any]) -> "_Work":
    """A model that draws pictures larger, looked at."""
    from ldmcli.session import Session
    from ldmcli.session.diffusion_upscaler import DiffusionUpscaler
    from ldmcli.spec import ModelSpec

    runtime = RuntimeSpec(device=options["device"], dtype=options["dtype"])
    session = Session(ModelSpec(model=options["upscaler"], allow_pickle=options["allow_pickle"]), runtime)
    upscaler = DiffusionUpscaler(session, settings, how.tile)

    def load() -> DiffusionUpscaler:
        upscaler.load()
        return upscaler

    return _Work(session.name, how, load)


def _network(how: Enlargement, options: dict[str, Any]) -> "_Work":
    """A network, looked at."""
    from ldmcli.upscaling.upscaler import open_upscaler

    file = open_upscaler(options["upscaler"], allow_pickle=options["allow_pickle"])

    def load() -> Enlarger:
        from ldmcli.speed.policy import choose_runtime
        from ldmcli.upscaling.upscaler import Upscaler

        runtime = choose_runtime(RuntimeSpec(device=options["device"], dtype=options["dtype"]))
        return Upscaler(file, runtime, asked=options["dtype"] != "auto")

    return _Work(file.name, how, load)


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
    output = dataclasses.replace(output, show=shows_pictures(options["show"]))
    if output.path is None and len(sources) > 1:
        raise UsageError("-o - takes one picture, and there are more; give a folder to -o.")
    if output.path is None or output.is_file:
        return [output]
    return in_folder(output, [f"{source.stem}{encoding.ending}" for source in sources])


class _Work:
    """Enlarges pictures by one network, which is read when the first of them has been."""

    def __init__(self, name: str, how: Enlargement, load: Callable[[], Enlarger]) -> None:
        self._name, self._how, self._load = name, how, load
        self._upscaler: Enlarger | None = None

    def enlarge(self, source: Path, output: Output) -> None:
        """Read, enlarge, write and report one picture. Raises BadDataError where it cannot be read."""
        picture, text = read_file(source, self._how)
        upscaler = self._loaded()
        started = time.perf_counter()
        with contextlib.closing(bar(desc=source.stem, unit="tile")) as progress:
            data, size = larger_file(picture, text, upscaler, self._how, partial(show, progress))
        report(source, output, data, size, upscaler.name, time.perf_counter() - started)

    def _loaded(self) -> Enlarger:
        if self._upscaler is None:
            with contextlib.closing(loading(self._name)):
                self._upscaler = self._load()
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
