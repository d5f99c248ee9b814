"""`ldm samplers`: what --sampler and --schedule can be."""

import json

import click

from ldmcli.cli.options import json_option, verbosity_options

_FIELDS = ("name", "title", "summary", "spacings", "draws_noise", "takes_eta")


@click.command(short_help="List the samplers.")
@json_option("Print one JSON object a line.")
@verbosity_options
def samplers(as_json: bool) -> None:
    """List the samplers, a line each: the name for --sampler, what it is, and what --schedule it does not take."""
    from ldmcli.sampling.catalogue import SAMPLERS, SPACINGS

    for row in SAMPLERS.values():
        if as_json:
            facts = {field: getattr(row, field) for field in _FIELDS}
            click.echo(json.dumps(facts))
            continue
        refused = [spacing for spacing in SPACINGS if spacing not in row.spacings]
        limits = f"; not with --schedule {', '.join(refused)}" if row.spacings and refused else ""
        own = "" if row.spacings else "; has its own schedule"
        click.echo(f"{row.name:{max(map(len, SAMPLERS))}}  {row.summary}{limits}{own}")
