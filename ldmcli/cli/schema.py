"""`ldm schema`: what a row of a prompt file may hold, as JSON schema."""

import json
import re

import click

from ldmcli.cli.command import command
from ldmcli.cli.configured import all_commands


@command(short_help="Print the JSON schema of a row, with all fields of a request.")
def schema() -> None:
    """Print the JSON schema (draft 2020-12) of a row of `ldm batch` in JSON lines, for editors, agents and validators:
    every field of a request with its type, range, default and meaning.

    \b
    ldm schema > row.schema.json
    """
    from ldmcli.batch.row_schema import row_schema

    click.echo(json.dumps(row_schema(_described()), indent=2, ensure_ascii=False))


def _described() -> dict[str, str]:
    """What the help says of each option, less its default."""
    commands, found = {one.name: one for one in all_commands()}, dict[str, str]()
    for name in ("upscale", "sample", "txt2img", "img2img"):  # what the last says counts
        options = (option for option in commands[name].params if isinstance(option, click.Option))
        found |= {option.name or "": re.sub(r"\s*\[default.*", "", option.help or "") for option in options}
    return found
