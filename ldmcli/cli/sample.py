"""`ldm sample`: pictures of models that draw no prompts."""

from pathlib import Path
from typing import Any

import click

from ldmcli.cli.command import command
from ldmcli.cli.option_types import Name
from ldmcli.cli.options import (
    expanded,
    hires_options,
    model_options,
    option,
    output_options,
    sampling_options,
    together,
)
from ldmcli.cli.txt2img import draw

_MAX_LAYOUT = 1 << 20  # bytes of a file
# What the commands that draw prompts have beside these, as it is where nobody says otherwise.
_NO_PROMPT = {"embeddings": (), "negative_prompt": "", "dynamic_prompts": False}

_CONDITIONS = together(
    option("--label", type=Name(), multiple=True, metavar="CLASS",
           help="The class to draw: its number, or its name where MODEL.classes.txt, or classes.txt in the model's "
           "folder, has a class a line; may be given again."),
    option("--layout", type=click.Path(), metavar="FILE",
           help='Objects and where they are: JSON, a list of {"label": 17, "box": [left, top, right, bottom]}, from 0 '
           "to 1."),
    option("--map", type=click.Path(allow_dash=True), metavar="FILE",
           help="A semantic map: a picture, grey or with a palette, whose pixels are numbers of classes, 255 for none; "
           "its size is the result's unless --size is given."),
)  # fmt: skip


@command(short_help="Draw without prompts: classes, layouts, maps, or nothing.")
@_CONDITIONS
@model_options
@sampling_options
@hires_options
@output_options
@click.pass_context
def sample(context: click.Context, **options: Any) -> None:
    """Draw with a model that reads no prompts, and print the path of each picture.

    The latent diffusion paper has such models: of faces and bedrooms, which read nothing, of ImageNet's classes, of
    layouts and of semantic maps. `ldm info` says what one reads.

    \b
    Examples:
    ldm sample -m celeba.safetensors -c 16 -o faces
    ldm sample -m cin256-v2.safetensors --label 207 --label "tree frog" -g 3
    ldm sample -m layout2img.safetensors --layout boxes.json
    ldm sample -m semantic.safetensors --map map.png

    Every option can be set by environment too: LDM_LABEL, LDM_MODEL, LDM_STEPS, …
    """
    if options["layout"] is not None:
        options["layout"] = layout_of_file(expanded(options["layout"]))
    draw(context, ("",), options | _NO_PROMPT)


def layout_of_file(path: Path) -> Any:
    """What the JSON file holds. Raises BadDataError where it is none, MissingInputError, StorageError."""
    from ldmcli.batch.reading import JSON
    from ldmcli.disk.opening import bad_file, open_regular

    cure = 'write a list of {"label": 17, "box": [0, 0, 0.5, 1]}'
    with open_regular(path, ("", cure)) as file:
        data = file.read(_MAX_LAYOUT + 1)
    if len(data) > _MAX_LAYOUT:
        raise bad_file(path, f"is over {_MAX_LAYOUT >> 20} MiB", cure)
    try:
        return JSON.decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is not valid JSON: {error}", cure) from None
