"""`ldm config`: what options are set to here, and where that is said."""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import click

from ldmcli.cli.command import command, values
from ldmcli.cli.configured import PROFILE, all_commands, config_path, keys_of, read_settings
from ldmcli.cli.options import EnvOption, json_option, option, verbosity_options
from ldmcli.errors import UsageError, printable

_log = logging.getLogger(__name__)
_OTHER_VARIABLES = ("LDM_MODELS", "LDM_SERVER", "LDM_TOKEN", "LDM_PROFILE")
_DEFAULT = re.compile(r"\[defaults?: (.*?)(?:; .*)?\]", re.DOTALL)


@command(short_help="Show what options are set to, and where.")
@click.argument("of", metavar="[COMMAND]", required=False, shell_complete=values)
@option("--path", is_flag=True, envvar="LDM_PATH", help="Print where the configuration file is, there or not.")
@json_option("Print a JSON object a line.")
@verbosity_options
@click.pass_context
def config(context: click.Context, of: str | None, path: bool, as_json: bool) -> None:
    """Show which options environment and configuration file set, and which of them says so; of one COMMAND, every
    option and what it is by default.

    The file is $XDG_CONFIG_HOME/ldmcli/config.toml, else ~/.config/ldmcli/config.toml. Its keys are the long names of
    options; what stands in [profiles.NAME] counts with --profile NAME. Both are below the environment, and that is
    below the command line.

    \b
    model = "sd15.safetensors"
    steps = 30
    [profiles.draft]
    steps = 8
    """
    file = config_path()
    if path:
        if file is None:
            raise UsageError("there is no place for a configuration file; set HOME or XDG_CONFIG_HOME.")
        click.echo(os.fsencode(file))
        return
    commands = {one.name or "": one for one in all_commands()}
    if of is not None and of not in commands:
        near = difflib.get_close_matches(of, commands, 1, 0.6) or list(commands)
        raise UsageError(f"{printable(repr(of))} is no command; choose from {', '.join(near)}.")
    _warn_of_variables(list(commands.values()))
    profile = context.meta.get(PROFILE)
    rows: dict[str, tuple[Any, str]] = {}
    for one in [commands[of]] if of is not None else commands.values():
        rows |= dict(_in_force(context, one, profile, defaults=of is not None))
    if file is not None and not os.path.lexists(file):
        _log.info("there is no %s", printable(str(file), 4096))
    if not rows:
        _log.info("nothing is set; options are as their help says")
    width = max(map(len, rows), default=0)
    for key, (value, source) in rows.items():
        if as_json:
            click.echo(json.dumps({"option": key, "value": value, "from": source}))
        else:
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            click.echo(f"{key:{width}}  {printable(shown, 4096)}  ({printable(source)})")


def _in_force(
    context: click.Context, of: click.Command, profile: str | None, *, defaults: bool
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Each option of a command that something sets, its value and what says so; with `defaults` all others too."""
    file = config_path()
    settings = read_settings(of, file, profile) if file is not None else {}
    own = click.Context(of, info_name=of.name, parent=context.find_root())
    for one in dict.fromkeys(keys_of(of).values()):
        key = next(text for text in one.opts if text.startswith("--"))[2:]
        if value := os.environ.get(str(one.envvar)):
            yield key, (value, str(one.envvar))
        elif setting := settings.get(one.name or ""):
            yield key, setting
        elif defaults:
            yield key, (_default(own, one), "default")


def _default(context: click.Context, one: EnvOption) -> str:
    record = one.get_help_record(context)
    found = _DEFAULT.search(record[1]) if record else None
    return found[1] if found else "off" if one.is_flag else "none"


def _warn_of_variables(commands: list[click.Command]) -> None:
    """Say which variables look like an option's and are none's."""
    known = {str(one.envvar) for command in commands for one in command.params if isinstance(one, EnvOption)}
    known |= set(_OTHER_VARIABLES)
    for name in sorted(os.environ):
        if name.startswith("LDM_") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.7)
            _log.warning("%s is no option's variable%s", printable(name), f"; did you mean {near[0]}?" if near else "")
