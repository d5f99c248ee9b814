"""`ldm info`: what a picture or a weight file holds, from its headers."""

import json
from typing import Any

import click

from ldmcli.cli.options import expanded, json_option, option, verbosity_options


@click.command(short_help="Tell what a picture or a model file is.")
@click.argument("file", metavar="FILE")
@option("--allow-pickle", is_flag=True, help="Look into .ckpt, .pt and .bin files too, for plain tensors alone.")
@json_option("Print one JSON object.")
@verbosity_options
def info(file: str, allow_pickle: bool, as_json: bool) -> None:
    """Tell what FILE is: the request a PNG holds; or a model's family, parts and dimensions.

    Only headers are read, so this is quick for files of any size.
    """
    from ldmcli.checkpoints.inspection import inspect

    facts = inspect(expanded(file), allow_pickle=allow_pickle)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for line in _lines(facts):
        click.echo(line)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Nested facts as aligned `name: value` lines, safe to print."""
    from ldmcli.errors import printable

    lines = []
    for name, value in facts.items():
        if value is None:
            continue  # not said
        label = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict):
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, str) and "\n" in value:
            lines += [label, *(f"{indent}  {printable(line, 4096)}" for line in value.splitlines())]
        else:
            shown = f"{value:,}" if isinstance(value, int) and value >= 10_000 and name == "parameters" else str(value)
            lines.append(f"{label} {printable(shown, 4096)}")
    return lines
