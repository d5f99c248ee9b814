"""`ldm show`: pictures in the terminal."""

import click

from ldmcli.cli.arguments import STDIN, each_file, picture_from_stdin
from ldmcli.cli.command import command, values
from ldmcli.cli.options import expanded, verbosity_options
from ldmcli.cli.terminal import hindrance
from ldmcli.errors import UsageError, printable


@command(short_help="Show pictures in the terminal.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, shell_complete=values)
@verbosity_options
@click.pass_context
def show(context: click.Context, files: tuple[str, ...]) -> None:
    """Show each picture FILE in the terminal; - reads one from standard input.

    Terminals with graphics of their own (iTerm2 and WezTerm, kitty, or sixel, as foot and Konsole have) show every
    pixel, others coloured half blocks. Where a file cannot be shown, the others are all the same, and the exit
    code is that of the first that could not.

    \b
    Examples:
    ldm show ldm-7.png
    ldm txt2img "a rose" -o - | ldm show -
    """
    if why := hindrance():
        raise UsageError(f"{why}, and pictures are shown nowhere else.")
    from ldmcli.cli.terminal_pictures import ask_terminal, show_picture

    ask_terminal()

    def show_one(file: str) -> None:
        show_picture(picture_from_stdin() if file == STDIN else str(expanded(file)))
        if len(files) > 1:
            click.echo(printable(file, 4096))

    each_file(context, files, show_one)
