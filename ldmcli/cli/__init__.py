"""The command `ldm`: parses, builds requests, calls, prints. Importing it never imports torch."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from ldmcli import __version__
from ldmcli.cli.info import info
from ldmcli.cli.txt2img import txt2img
from ldmcli.errors import LdmError, StorageError, printable

_INTERRUPTED, _CLOSED_PIPE, _TERMINATED = 130, 141, 143  # 128 + the signal's number


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds the stack so that temporary files are removed."""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 65 bad data or model, 66 no such input, 73 cannot create output, "
    "74 I/O, 130 interrupted, 143 terminated.",
)
@click.version_option(__version__, "-V", "--version", message="ldm %(version)s")
def cli() -> None:
    """Draw pictures from text with latent diffusion models.

    \b
    ldm txt2img "a red apple on a blue background"
    ldm txt2img -m sd15.safetensors "a lighthouse at dawn" -o pictures
    ldm info picture.png

    Results go to standard output, everything else to standard error.
    """


cli.add_command(txt2img)
cli.add_command(info)


def main() -> None:
    """Entry point of `ldm`: runs the command line and exits with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. All expected failures become one line on stderr."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        result = cli.main(list(arguments), prog_name="ldm", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LdmError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever read the results has gone: say nothing, and keep the interpreter from flushing into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted.", _INTERRUPTED)
    except _Terminated:
        return _fail("terminated.", _TERMINATED)
    except OSError as error:
        return _fail(f"input or output failed: {printable(str(error))}.", StorageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory; ask for a smaller picture, a smaller --batch-size or --dtype bf16.", 1)
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _fail(message: str, code: int) -> int:
    logging.getLogger("ldmcli").debug("failed", exc_info=True)
    with contextlib.suppress(OSError):
        click.echo(f"ldm: error: {message}", err=True)
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)
