"""`ldm man`: the help of all commands as one manual page."""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import click

from ldmcli import __version__
from ldmcli.cli.command import command, show_rare
from ldmcli.cli.configured import all_commands

_HEAD = """\
.TH LDM 1 "" "ldm {version}" "User Commands"
.SH NAME
ldm \\- draw pictures from text with latent diffusion models
"""
_TAIL = """\
.SH ENVIRONMENT
Each option has a variable: LDM_STEPS is \\-\\-steps. An option on the command line wins.
.TP
.B LDM_MODELS
The folder in which \\-\\-model finds models by name.
.TP
.B LDM_SERVER
The socket of
.BR "ldm serve" .
.TP
.B HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE
The Hugging Face hub's cache, the key to it, its address, and whether to do without it.
.SH FILES
.TP
.I $XDG_CONFIG_HOME/ldmcli/config.toml
What options are where neither command line nor environment says otherwise; see
.BR "ldm config" .
"""


@command(short_help="Show all this as a manual page.")
def man() -> None:
    """Show the help of all commands as a manual page; in a pipe or a file, print its source.

    \b
    ldm man > ~/.local/share/man/man1/ldm.1
    """
    source = page()
    if sys.stdout.isatty() and shutil.which("man"):
        subprocess.run(["man", "-l", "-"], input=source.encode(), check=False)
    else:
        click.echo(source, nl=False)


def page() -> str:
    """The page in the language of troff's man macros."""
    root = click.get_current_context().find_root()
    parts = [_HEAD.format(version=__version__), _section(root, "SYNOPSIS")]
    for one in all_commands():
        context = click.Context(one, info_name=one.name, parent=root, max_content_width=root.max_content_width)
        show_rare(context)
        parts.append(_section(context, f"ldm {one.name}".upper()))
    return "".join([*parts, _TAIL])


def _section(context: click.Context, title: str) -> str:
    formatter = _Formatter()
    formatter.write(f".SH {title}\n")
    context.command.format_help(context, formatter)
    return formatter.getvalue()


class _Formatter(click.HelpFormatter):
    """Has click write its help for troff."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self.write(f".B {_plain(prog)}\n{_plain(args)}\n")

    def write_heading(self, heading: str) -> None:
        self.write(f".SS {_plain(heading)}\n")

    def write_paragraph(self) -> None:
        self.write(".PP\n")

    def write_text(self, text: str) -> None:
        for paragraph in text.split("\n\n"):
            lines = [_plain(line) for line in paragraph.splitlines()]
            if lines and lines[0] == "\b":
                lines = [".nf", *lines[1:], ".fi"]
            self.write("\n".join([".PP", *lines]) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], *_: Any, **__: Any) -> None:
        for term, text in rows:
            self.write(f".TP\n.B {_plain(term)}\n{_plain(text)}\n")


def _plain(text: str) -> str:
    """Text that troff takes as it is."""
    text = text.strip(" \n").replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in (".", "'") else text
