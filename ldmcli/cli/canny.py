"""`ldm canny`: a picture's edges, as ControlNets for them are given."""

import time
from pathlib import Path
from typing import Any

import click

from ldmcli.cli.arguments import STDIN, picture_from_stdin
from ldmcli.cli.command import command, values
from ldmcli.cli.options import file_options, json_option, option, verbosity_options
from ldmcli.cli.output import choose_encoding, in_folder, open_output
from ldmcli.control import CANNY_USUAL, thresholds
from ldmcli.errors import UsageError


@command(short_help="Draw a picture's edges.")
@click.argument("image", metavar="IMAGE", shell_complete=values)
@option("-o", "--output", metavar="PATH", required=True,
        help="A folder, a .png, .jpg or .webp file, or - for stdout.")  # fmt: skip
@option("--thresholds", metavar="LOW,HIGH", default=CANNY_USUAL, show_default=True,
        help="Edges begin where a gradient is over HIGH, and go on over LOW.")  # fmt: skip
@file_options("--image-format", "--format")
@option("--overwrite", is_flag=True, help="Replace a file that is there already.")
@json_option("Report the picture as a JSON line.")
@verbosity_options
def canny(image: str, **options: Any) -> None:
    """Write the edges of IMAGE, white on black, as OpenCV finds them; - reads a picture from standard input.

    \b
    Examples:
    ldm canny photo.jpg -o edges.png
    ldm txt2img "a house" --control-net canny.safetensors --control-image edges.png
    """
    given = thresholds(options["thresholds"])
    if given is None:
        raise UsageError(f"--thresholds {options['thresholds']} are none; give LOW,HIGH, such as {CANNY_USUAL}.")
    encoding = choose_encoding(options)
    place = open_output(
        options["output"], encoding, overwrite=options["overwrite"], as_json=options["as_json"], one_image=True
    )
    if place.path and not place.is_file:
        (place,) = in_folder(place, [f"{'edges' if image == STDIN else Path(image).stem}{encoding.ending}"])
    import numpy as np
    from PIL import Image

    from ldmcli.images.edges import canny as edges_of
    from ldmcli.images.encode import encode_image
    from ldmcli.images.pixels import on_white, read_picture

    started = time.perf_counter()
    picture = on_white(read_picture(picture_from_stdin() if image == STDIN else image))
    edges = Image.fromarray(edges_of(np.asarray(picture), *given)).convert("RGB")
    data = encode_image(edges, {}, encoding)
    place.write(data, 0, {"image": image, "width": edges.width, "height": edges.height,
                          "seconds": round(time.perf_counter() - started, 3)})  # fmt: skip
