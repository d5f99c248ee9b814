"""`ldm models`: what there is to name after --model."""

import json
import logging
import textwrap

import click

from ldmcli.cli.command import command
from ldmcli.cli.options import json_option, verbosity_options


@command(short_help="List the models at hand.")
@json_option("Print each model as a JSON line.")
@verbosity_options
def models(as_json: bool) -> None:
    """List the models at hand: what to type after --model, the family and the size on disk.

    These are the embedded one, those in the folder weights/ (here, and beside the program), in the folder that
    LDM_MODELS names, and in the cache of the Hugging Face hub. What is there but cannot be run is listed with the
    reason. Only headers are read. With -v, what a model's own list says that it knows stands below it.
    """
    from ldmcli.errors import printable
    from ldmcli.hub.listing import models_at_hand

    found = list(models_at_hand())
    if as_json:
        for model in found:
            click.echo(json.dumps(model.to_dict()))
        return
    width = min(max((len(model.name) for model in found), default=0), 60)
    for model in found:
        state = model.family or f"cannot be run: {model.error}"
        note = "  (embedded, the default)" if model.origin == "embedded" else ""
        click.echo(f"{printable(model.name, 4096):{width}}  {_size(model.bytes):>8}  {printable(state, 4096)}{note}")
        if model.words and logging.getLogger("ldmcli").isEnabledFor(logging.DEBUG):
            known = printable(f"knows: {', '.join(model.words)}", 1 << 20)
            click.echo(textwrap.fill(known, 120, initial_indent="  ", subsequent_indent="  "))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
