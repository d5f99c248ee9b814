"""`ldm img2img`: a picture and prompts in, PNG files out."""

from typing import Any

import click

from ldmcli.cli.command import command
from ldmcli.cli.options import image_options
from ldmcli.cli.steering_options import DrawingCommand
from ldmcli.cli.txt2img import draw, drawing_options


@command(cls=DrawingCommand, short_help="Draw prompts on a picture, or on parts of it.")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@image_options
@drawing_options
@click.pass_context
def img2img(context: click.Context, prompts: tuple[str, ...], **options: Any) -> None:
    """Draw each PROMPT on the picture IMAGE, and print the path of each picture.

    With a --mask only that is repainted; models made for inpainting do it best, all others can.

    \b
    Examples:
    ldm img2img "a green apple" -i apple.png --strength 0.6
    ldm img2img "a moon" -i night.jpg --mask sky.png --mask-blur 4
    ldm img2img "a face" -i crowd.png --mask face.png --inpaint-area masked
    ldm img2img --from-image picture.png --strength 0.5

    Every option can be set by environment too: LDM_IMAGE, LDM_STRENGTH, LDM_MODEL, …
    """
    if options["image"] is None and options["from_image"] is None:
        raise click.UsageError("give --image FILE, - for standard input, or --from-image.", context)
    draw(context, prompts, options)
