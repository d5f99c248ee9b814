"""`ldm sample`: pictures of models that draw no prompts."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

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
_NO_PROMPT = {"embeddings": (), "dynamic_prompts": False}

_CONDITIONS = together(
    option("--label", type=Name(), multiple=True, metavar="CLASS",
           help="The class to draw: its number, or its name where MODEL.classes.txt, or classes.txt in the model's "
           "folder, has a class a line; may be given again."),
    option("--layout", type=click.Path(readable=False), metavar="FILE",
           help='Objects and where they are: JSON, a list of {"label": 17, "box": [left, top, right, bottom]}, from 0 '
           "to 1."),
    option("--map", type=click.Path(allow_dash=True, readable=False), metavar="FILE",
           help="A semantic map: a lossless picture, grey or with a palette, whose pixels are numbers of classes, 255 "
           "for none; its size is the result's unless --size is given."),
    option("--image-embedding", type=click.Path(readable=False), metavar="FILE",
           help="For unCLIP models: CLIP's embedding of a picture, or rows of them, a picture each, in safetensors; or "
           "the picture itself, where the model's folder has an image encoder, or --image-encoder names one."),
    option("--embedding-row", type=int, metavar="ROW", help="Draw only this row, from 0 on.  [default: every one]"),
    option("--noise-level", type=int,
           help="How much noise is added to the embedding first, 0 to 999: more varies more.  [default: 0]"),
    option("-p", "--prompt", metavar="TEXT", default="", help="What the picture shows, for models that read that too."),
    option("-n", "--negative-prompt", metavar="TEXT", default="", help="What it should not show, for these."),
)  # fmt: skip


@command(short_help="Draw classes, layouts, maps, embeddings, or nothing.")
@_CONDITIONS
@model_options
@sampling_options
@hires_options
@output_options
@click.pass_context
def sample(context: click.Context, **options: Any) -> None:
    """Draw with a model that reads no prompts, or more than those, and print the path of each picture.

    The latent diffusion paper has such models: of faces and bedrooms, which read nothing, of ImageNet's classes, of
    layouts and of semantic maps. unCLIP models read an embedding of a picture beside a prompt. `ldm info` says what
    one reads.

    \b
    Examples:
    ldm sample -m celeba.safetensors -c 16 -o faces
    ldm sample -m cin256-v2.safetensors --label 207 --label "tree frog" -g 3
    ldm sample -m layout2img.safetensors --layout boxes.json
    ldm sample -m semantic.safetensors --map map.png
    ldm sample -m sd21-unclip-h.safetensors --image-embedding fox.safetensors -p "a painting"

    Every option can be set by environment too: LDM_LABEL, LDM_MODEL, LDM_STEPS, …
    """
    if options["layout"] is not None:
        options["layout"] = layout_of_file(expanded(options["layout"]))

    def typed(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    if options["image_embedding"] is None:  # prompts of the environment are meant for others
        options |= {name: "" for name in ("prompt", "negative_prompt") if not typed(name)}
    prompts = (options.pop("prompt"),)
    recorded = options["from_image"] is not None and not typed("prompt")
    draw(context, () if recorded else prompts, options | _NO_PROMPT)


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
