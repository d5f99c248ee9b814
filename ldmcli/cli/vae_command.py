"""`ldm vae`: pictures to latents by an autoencoder alone, and back."""

import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ldmcli.cli.command import command, values
from ldmcli.cli.option_types import Device, Seed
from ldmcli.cli.options import expanded, file_options, json_option, option, tiling_option, verbosity_options
from ldmcli.cli.output import STDOUT, Output, choose_encoding, in_folder, open_output
from ldmcli.cli.terminal import loading
from ldmcli.disk.opening import open_regular
from ldmcli.disk.writing import check_replaceable, prepare_folder
from ldmcli.errors import BadDataError, NotFiniteError, UsageError, printable
from ldmcli.images.formats import Encoding, format_of_name
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.linking import settle_down
from ldmcli.speed.memory import check_memory
from ldmcli.speed.startup import quicken

if TYPE_CHECKING:
    import numpy as np

    from ldmcli.checkpoints.source import PartSource
    from ldmcli.config import VAEConfig
    from ldmcli.session.autoencoding import Autoencoding

_ENDING = ".safetensors"
_OF_WAY = {"encode": ("sample", "seed"), "decode": ("image_format", "quality", "lossless")}  # of no use the other way
_log = logging.getLogger(__name__)


@command(short_help="Encode pictures as latents, or decode latents, by an autoencoder alone.")
@click.argument("way", type=click.Choice(["encode", "decode"]), metavar="encode|decode")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, shell_complete=values)
@option("-m", "--model", metavar="MODEL",
        help="The autoencoder, KL or VQ, or a model that has one: a folder, file, or a name as for txt2img.  "
        "[default: the embedded model]")  # fmt: skip
@option("-o", "--output", metavar="PATH", required=True,
        help="A .safetensors file for the latents, or a picture's file; or a folder, for one file each.")  # fmt: skip
@option(
    "--sample", is_flag=True, help="Encode: draw latents from what a KL autoencoder gives, by --seed; else its mean."
)
@option("-s", "--seed", type=Seed(), default=0, show_default=True, metavar="INTEGER",
        help="Seed of the first picture's latents; the next has the next; -1 is random.")  # fmt: skip
@file_options("--image-format", "--format")
@option("--dtype", type=click.Choice(["auto", "fp16", "bf16", "fp32"]), default="fp32", show_default=True,
        help="Numbers to compute with; auto: fp16 on a GPU, bf16 on a CPU that has it.")  # fmt: skip
@option("--device", type=Device(), metavar="[auto|cpu|cuda|cuda:N]", default="auto", show_default=True,
        help="Where to compute; auto: the GPU if there is one.")  # fmt: skip
@tiling_option
@option("--allow-pickle", is_flag=True, help="Read .ckpt and .bin files too, by torch's restricted unpickler alone.")
@option("--overwrite", is_flag=True, help="Replace files that are there already.")
@json_option("Report each file as a JSON line.")
@verbosity_options
@click.pass_context
def vae(context: click.Context, way: str, files: tuple[str, ...], **options: Any) -> None:
    """Encode each picture FILE as latents, or decode the latents in each FILE to pictures; print each new file's path.

    A file of latents holds `latents` (pictures, channels, height, width) as the autoencoder gives them, not scaled, and
    of a VQ autoencoder `codes` (pictures, height, width). Where there are only codes, these are decoded.

    \b
    Examples:
    ldm vae encode photo.png -m kl-f8.safetensors -o latents.safetensors
    ldm vae decode latents.safetensors -m kl-f8.safetensors -o photo-again.png
    ldm vae encode *.png -m vq-f4 -o latents
    """
    # 1. Everything that can be known before weights are read.
    _check_options(context, way)
    paths = [expanded(name) for name in files]
    for path in paths:
        with open_regular(path, ("", "name a file")):
            pass
    source = _open(options["model"], allow_pickle=options["allow_pickle"])
    work = _Work(source, options, encodes=way == "encode")
    if options["sample"] and source.config.codes:
        raise UsageError("--sample is for KL autoencoders, and a codebook leaves nothing to draw; leave it out.")
    # 2. Each file; the weights are read once there is one.
    if way == "encode":
        _encode(paths, work, options)
    else:
        _decode(paths, work, options)


def _check_options(context: click.Context, way: str) -> None:
    """Raise UsageError where an option was typed that would change nothing."""
    for other, names in _OF_WAY.items():
        for name in names:
            typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            option_name = f"--{name.replace('_', '-')}"
            if typed and way != other:
                raise UsageError(f"{option_name} is for ldm vae {other}; leave it out.")
            if typed and name == "seed" and not context.params["sample"]:
                raise UsageError("--seed is for latents that are drawn; add --sample, or leave it out.")


class _Work:
    """An autoencoder, or half of it, that is read when it is first needed."""

    def __init__(self, source: "PartSource[VAEConfig]", options: dict[str, Any], *, encodes: bool) -> None:
        self.source = source
        self._options, self._encodes = options, encodes
        self._loaded: Autoencoding | None = None

    @property
    def autoencoder(self) -> "Autoencoding":
        """Raises LdmError."""
        if self._loaded is None:
            from ldmcli.session.autoencoding import Autoencoding

            names = ("device", "dtype", "vae_tiling")
            spec = RuntimeSpec(**{name: self._options[name] for name in names})
            with loading(self.source.path.name):
                self._loaded = Autoencoding(self.source, spec, encoder=self._encodes, decoder=not self._encodes)
            settle_down()
        return self._loaded


def _open(name: str | None, *, allow_pickle: bool) -> "PartSource[VAEConfig]":
    from ldmcli.checkpoints.source import embedded_model
    from ldmcli.checkpoints.vae_source import open_autoencoder
    from ldmcli.hub.listing import find_model

    path = embedded_model() if name is None else find_model(name, half=False)
    return open_autoencoder(path, allow_pickle=allow_pickle)


def _encode(paths: Sequence[Path], work: _Work, options: dict[str, Any]) -> None:
    outputs = _latents_outputs(paths, options)
    sizes = _sizes(paths, work.source.config.factor)
    for size in sizes:
        check_memory(work.source.config, *size, tiled=options["vae_tiling"])
    if len(outputs) < len(paths) and len(set(sizes)) > 1:
        other = next(path for path, size in zip(paths, sizes, strict=True) if size != sizes[0])
        raise UsageError(
            f"{printable(str(paths[0]))} and {printable(str(other))} differ in size, and one file holds latents of "
            "one; give a folder to -o."
        )
    quicken()
    seed = _first_seed(options)
    seeds = itertools.repeat(None) if seed is None else itertools.count(seed)
    each = list(zip(paths, sizes, seeds))  # noqa: B905
    groups = [each] if len(outputs) < len(paths) else [[one] for one in each]
    for output, group in zip(outputs, groups, strict=True):
        _encode_group(group, output, work)


def _encode_group(group: "Sequence[tuple[Path, tuple[int, int], int | None]]", output: Output, work: _Work) -> None:
    """Encode pictures of one size into one file."""
    import numpy as np

    from ldmcli.checkpoints.latents_file import tensor_bytes
    from ldmcli.images.pixels import on_white, read_picture

    autoencoder, started = work.autoencoder, time.perf_counter()
    found = []
    for path, (width, height), seed in group:
        pixels = np.asarray(on_white(read_picture(str(path))))[:height, :width]
        found.append(vars(autoencoder.encode(pixels, seed)))
    tensors = {name: np.stack([one[name] for one in found]) for name in found[0] if found[0][name] is not None}
    facts = {"images": [str(path) for path, *_ in group]}
    facts |= {name: list(tensor.shape) for name, tensor in tensors.items()}
    data = tensor_bytes(tensors, {"scaling_factor": repr(work.source.config.scaling_factor)})
    output.write(data, 0, facts | {"seconds": round(time.perf_counter() - started, 3)})


def _latents_outputs(paths: Sequence[Path], options: dict[str, Any]) -> list[Output]:
    """One file for all, or one in a folder for each. Raises UsageError, CannotCreateError."""
    name, overwrite = options["output"], options["overwrite"]
    where = Path(name)
    if name == STDOUT or format_of_name(where):
        raise UsageError(f"{printable(name)}: latents are written as {_ENDING}; name such a file, or a folder.")
    one_file = where.suffix == _ENDING and not name.endswith("/") and not where.is_dir()
    output = Output(where, one_file, overwrite, options["as_json"], _ENDING)
    prepare_folder(where.parent if one_file else where)
    if not one_file:
        return in_folder(output, [f"{path.stem}{_ENDING}" for path in paths])
    check_replaceable(where, overwrite=overwrite)
    return [output]


def _sizes(paths: Sequence[Path], factor: int) -> list[tuple[int, int]]:
    """How much is encoded of each picture: a multiple of the factor. Raises BadDataError."""
    from ldmcli.images.pixels import facts_of

    found = []
    for path in paths:
        facts = facts_of(str(path))
        width, height = facts.width // factor * factor, facts.height // factor * factor
        if not width or not height:
            raise BadDataError(
                f"{printable(str(path))} has {facts.shape} pixels; a latent stands for {factor}×{factor}."
            )
        if (width, height) != (facts.width, facts.height):
            _log.warning(
                "%s has %s pixels; %d×%d, multiples of %d, are encoded, from the top left",
                printable(str(path)), facts.shape, width, height, factor,
            )  # fmt: skip
        found.append((width, height))
    return found


def _decode(paths: Sequence[Path], work: _Work, options: dict[str, Any]) -> None:
    from ldmcli.checkpoints.latents_file import check_latents, open_latents, read_latents

    config = work.source.config
    sources = [open_latents(path, config) for path in paths]
    total = sum(count for _, _, count in sources)
    encoding = choose_encoding(options)
    output = open_output(
        options["output"], encoding, overwrite=options["overwrite"], as_json=options["as_json"], one_image=total == 1
    )
    if output.path is None and total > 1:
        raise UsageError(f"-o - takes one picture, and there are {total}; give a folder to -o.")
    for file, name, _ in sources:
        height, width = (side * config.factor for side in file.tensors[name].shape[-2:])
        encoding.check_size(width, height)
        check_memory(config, width, height, tiled=options["vae_tiling"])
    outputs = [output]
    if output.path and not output.is_file:
        stems = [
            file.path.stem if count == 1 else f"{file.path.stem}-{i}"
            for file, _, count in sources
            for i in range(count)
        ]
        outputs = in_folder(output, [f"{stem}{encoding.ending}" for stem in stems])
    quicken()
    places = iter(outputs)
    for file, name, _ in sources:
        for i, latents in enumerate(read_latents(file, name, config)):
            started = time.perf_counter()
            try:
                pixels = work.autoencoder.decode(latents)
            except NotFiniteError:
                check_latents(file.path, latents)
                raise
            data, (width, height) = _picture(pixels, encoding)
            facts = {"latents": str(file.path), "index": i, "width": width, "height": height}
            next(places).write(data, 0, facts | {"seconds": round(time.perf_counter() - started, 3)})


def _picture(pixels: "np.ndarray", encoding: Encoding) -> tuple[bytes, tuple[int, int]]:
    from PIL import Image

    from ldmcli.images.encode import encode_image

    picture = Image.fromarray(pixels)
    return encode_image(picture, {}, encoding), picture.size


def _first_seed(options: dict[str, Any]) -> int | None:
    """The first picture's seed; None where nothing is drawn by lot."""
    if not options["sample"]:
        return None
    seed = options["seed"]
    if seed is None:
        seed = secrets.randbelow(1 << 32)
        _log.info("seed %d", seed)
    elif seed < 0:
        raise UsageError(f"--seed {seed} is below 0; give a whole number, or -1 for a random one.")
    return int(seed)
