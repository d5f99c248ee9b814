import click
from ldmcli.cli.command import command
@command(short_help="x")
def schema() -> None:
    """x"""
