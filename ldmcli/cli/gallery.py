"""`ldm gallery`: a folder of pictures as pages for the browser."""

import json
import logging
import os

import click

from ldmcli.cli.command import command, values
from ldmcli.cli.options import expanded, json_option, option, verbosity_options

_log = logging.getLogger(__name__)


@command(short_help="Write HTML pages that show a folder of pictures.")
@click.argument("folder", metavar="DIR", shell_complete=values)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    shell_complete=values,
    help="The first page; the others stand beside it.  [default: DIR/index.html]",
)
@option("--page-size", type=click.IntRange(1, 5000), default=200, show_default=True, help="Pictures on a page.")
@json_option("Report a JSON object instead of the path.")
@verbosity_options
def gallery(folder: str, output: str | None, page_size: int, as_json: bool) -> None:
    """Write HTML pages that show the pictures in DIR, what they were made with, and which failed.

    DIR is what `ldm batch` wrote, or any folder of pictures by this program. Prints the path of the first page. The
    pages filter by words and by any field (steps:20, guidance>5), show a picture beside its settings, or two and where
    they differ, and copy the command that draws one again. Nothing is fetched from elsewhere: they work from the disk
    and on a web server. Run again, it brings them up to date.
    """
    from ldmcli.gallery.pages import write_gallery

    written = write_gallery(expanded(folder), expanded(output) if output else None, page_size=page_size)
    counts = (written.pictures, written.failed, written.pages)
    _log.info("pictures: %d; failed: %d; pages: %d", *counts)
    if as_json:
        facts = {"pictures": written.pictures, "failed": written.failed, "pages": written.pages}
        click.echo(json.dumps({"path": str(written.index), **facts}))
    else:
        click.echo(os.fsencode(written.index))
