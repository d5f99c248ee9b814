"""The configuration file: what options are where neither command line nor environment says otherwise."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldmcli.errors import BadDataError, UsageError, printable

if TYPE_CHECKING:
    import click

    from ldmcli.cli.options import EnvOption

PROFILES = "profiles"
PROFILE = "ldmcli.profile"  # in the context's meta: which was asked for
_CURE = "mend it"
_MAX_BYTES = 1 << 20
Values = str | bool | list[str]


class Setting(NamedTuple):
    """What a line of the file says, as a command line would, and where it stands."""

    value: Values
    source: str


def config_path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the file is, there or not: $XDG_CONFIG_HOME/ldmcli/config.toml, or ~/.config/ldmcli/config.toml. None where
    there is no home either. Source: the XDG base directory specification."""
    base = environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        home = environ.get("HOME") if "HOME" in environ else os.path.expanduser("~")
        base = os.path.join(home, ".config") if home else ""
    return Path(base, "ldmcli", "config.toml") if os.path.isabs(base) else None


def use_config(context: "click.Context", _parameter: "click.Parameter", profile: str | None) -> None:
    """The callback of --profile, which runs before other options are looked at: has them start from the file. Raises
    UsageError where there is no such profile, and as `read_settings` does."""
    path = config_path()
    context.meta[PROFILE] = profile
    if context.resilient_parsing or path is None or not (profile or os.path.lexists(path)):
        return
    context.default_map = {
        name: setting.value for name, setting in read_settings(context.command, path, profile).items()
    }


def may_name_model() -> bool:
    """Whether the file seems to name a model, from a look that decides nothing else."""
    path = config_path()
    try:
        return path is not None and path.is_file() and "model" in path.read_text("utf-8", "replace")[:_MAX_BYTES]
    except OSError:
        return False


def read_settings(command: "click.Command", path: Path, profile: str | None) -> dict[str, Setting]:
    """What the file says for this command, by the names of its parameters; a profile's lines before all others.

    Raises UsageError where there is no such profile, BadDataError where the file is no TOML, or has a key that is no
    command's option or a value that no option takes; MissingInputError and StorageError where it cannot be read.
    """
    tables = _tables(path, profile) if os.path.lexists(path) else {}
    if profile and profile not in tables:
        raise UsageError(f"there is no configuration file {printable(str(path))}, and so no profile {profile!r}.")
    own = keys_of(command)
    found: dict[str, Setting] = {}
    for source, table in tables.items():
        seen: dict[str, str] = {}
        for key, value in table.items():
            option = own.get(key.replace("-", "_")) or _other_option(key, path)
            name = option.name or ""
            if name in seen and option in own.values():
                raise BadDataError(
                    f"{printable(str(path))} gives {seen[name]} and {key}, which are one; leave out one."
                )
            seen[name] = key
            if option in own.values():
                found[name] = Setting(_text(path, key, value, option), f"profile {source}" if source else path.name)
    return found


def keys_of(command: "click.Command") -> "dict[str, EnvOption]":
    """The options that the file may set, by their keys: long names with _ for -. Those that have no variable in the
    environment have no key either."""
    from ldmcli.cli.options import EnvOption

    options = (one for one in command.params if isinstance(one, EnvOption) and not one.hidden and one.name != "profile")
    return {text[2:].replace("-", "_"): one for one in options for text in one.opts if text.startswith("--")}


def all_commands() -> "Iterator[click.Command]":
    """Every command of `ldm`, read for this."""
    import click

    from ldmcli.cli.program import cli

    context = click.Context(cli)
    return filter(None, (cli.get_command(context, name) for name in cli.list_commands(context)))


def _tables(path: Path, profile: str | None) -> dict[str, dict[str, Any]]:
    """The lines of the file under "", then those of the profile under its name."""
    import tomllib

    from ldmcli.disk.opening import bad_file, open_regular

    with open_regular(path, ("", _CURE)) as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is over {_MAX_BYTES >> 20} MiB")
        lines = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad_file(path, f"is no TOML: {error}", _CURE) from None
    profiles = lines.pop(PROFILES, {})
    if not (isinstance(profiles, dict) and all(isinstance(one, dict) for one in profiles.values())):
        raise bad_file(path, f"has {PROFILES} that are no tables", f"write [{PROFILES}.NAME]")
    if profile and profile not in profiles:
        from difflib import get_close_matches

        near = get_close_matches(profile, profiles, 1, 0.6) or list(profiles)
        there = f"did you mean {' or '.join(map(printable, near[:5]))}?" if near else "it has none."
        raise UsageError(f"{printable(str(path))} has no profile {printable(repr(profile))}; {there}")
    return {"": lines} | ({profile: profiles[profile]} if profile else {})


def _other_option(key: str, path: Path) -> "EnvOption":
    """The option of another command that the key names. Raises BadDataError where there is none."""
    known = {name: option for command in all_commands() for name, option in keys_of(command).items()}
    if found := known.get(key.replace("-", "_")):
        return found
    from difflib import get_close_matches

    near = get_close_matches(key.replace("-", "_"), known, 1, 0.6)
    advice = f"did you mean {near[0].replace('_', '-')}?" if near else "keys are the long names of options."
    raise BadDataError(f"{printable(str(path))} has a key {printable(repr(key))}, which is no option; {advice}")


def _text(path: Path, key: str, value: Any, option: "EnvOption") -> Values:
    """The value as a command line would have it."""

    def wrong(what: str) -> BadDataError:
        said = f"{printable(str(path))}: {printable(key)} = {printable(str(value), 80)}"
        return BadDataError(f"{said} is not {what}, which this option takes.")

    if option.is_flag:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    values = value if isinstance(value, list) and option.multiple else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise wrong("text or a number, or a list of them" if option.multiple else "text or a number")
    texts = [str(one) for one in values]
    return texts if option.multiple else texts[0]
