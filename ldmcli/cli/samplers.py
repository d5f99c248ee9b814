"""`ldm samplers`: what --sampler and --schedule can be."""

import json

import click

from ldmcli.cli.command import command
from ldmcli.cli.options import json_option, verbosity_options

_FIELDS = ("name", "title", "summary", "spacings", "draws_noise", "takes_eta")


@command(short_help="List the samplers.")
@json_option("Print one JSON object a line.")
@verbosity_options
def samplers(as_json: bool) -> None:
    """List the samplers, a line each: the name for --sampler, what it is, and which --schedule it takes if not all."""
    from ldmcli.sampling.catalogue import SAMPLERS
    from ldmcli.spacings import SPACINGS

    for row in SAMPLERS.values():
        if as_json:
            facts = {field: getattr(row, field) for field in _FIELDS}
            click.echo(json.dumps(facts))
            continue
        some = row.spacings and row.spacings != SPACINGS
        limits = f"; only with --schedule {', '.join(row.spacings)}" if some else ""
        own = "" if row.spacings else "; has its own schedule"
        click.echo(f"{row.name:{max(map(len, SAMPLERS))}}  {row.summary}{limits}{own}")
