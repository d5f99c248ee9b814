"""Options that commands share, and how each is also read from the environment."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


class EnvOption(click.Option):
    """An option that is also read from LDM_NAME: --guidance-scale from LDM_GUIDANCE_SCALE."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.envvar is None and self.name is not None:
            self.envvar = f"LDM_{self.name.upper()}"


def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """click.option, also read from the environment."""
    return click.option(*names, cls=EnvOption, **settings)


def verbosity_options(command: _Command) -> _Command:
    """-q and -v, which take effect at once."""
    command = option(
        "-q", "--quiet", is_flag=True, expose_value=False, is_eager=True, callback=_quiet, help="Only errors on stderr."
    )(command)
    return option("-v", "--verbose", is_flag=True, expose_value=False, callback=_verbose, help="More on stderr.")(
        command
    )


def json_option(help_text: str) -> Callable[[_Command], _Command]:
    """--json, passed on as `as_json`."""
    return option("--json", "as_json", is_flag=True, envvar="LDM_JSON", help=help_text)


def expanded(path: str) -> Path:
    """`path` with a leading ~ or ~user spelled out; as it stands where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _quiet(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    _log_to_stderr(logging.ERROR if value else logging.INFO)


def _verbose(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        _log_to_stderr(logging.DEBUG)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"ldm: {level}{super().format(record)}"


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("ldmcli")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
