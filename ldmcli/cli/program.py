"""The commands of `ldm` as one click group, and what becomes of errors and signals. Importing it imports no torch."""

import contextlib
import importlib
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TextIO

import click

from ldmcli import __version__
from ldmcli.cli import COMMANDS, COMPLETION, INTERRUPTED, OWN_OPTIONS, TERMINATED
from ldmcli.errors import LdmError, MissingInputError, StorageError, UsageError, printable
from ldmcli.speed.linking import is_linking, settle_down
from ldmcli.speed.memory import is_out_of_memory

_MAX_USAGE_ERROR = 500  # characters: click quotes whole arguments
_UNHEARD_S = 2.0  # after which a signal that had no effect is raised again
_CLOSED_PIPE = 141  # 128 + the signal's number
# Modules whose command has the name of another room's file.
_ELSEWHERE = {name: f"{name}_command" for name in ("bench", "config", "vae")}


class _Terminated(BaseException):
    """SIGTERM arrived; unwinds the stack so that temporary files are removed."""


class _Commands(click.Group):
    """Each command is the function of the same name in a module of its own, imported when it is run: the options of
    all of them take longer than most need."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ldmcli.cli.{_ELSEWHERE.get(cmd_name, cmd_name)}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with txt2img in front of what begins with a prompt. Raises UsageError where it may be none."""
        if args and args[0] not in (*COMMANDS, *OWN_OPTIONS):
            missing = ["txt2img"] if ctx.resilient_parsing else self._missing_command(ctx, args)
            args = [*missing, *args]
        return super().parse_args(ctx, args)

    def _missing_command(self, ctx: click.Context, args: Sequence[str]) -> list[str]:
        """The command that was left out; none where that is not to be told, which click then says."""
        if not args[0].startswith("-") or args[0] in ("-", "--"):
            if args[0].split() == [args[0]]:  # a word alone
                from ldmcli.cli.mistakes import asked_about

                if question := asked_about(args[0], COMMANDS):
                    raise click.UsageError(question, ctx)
            return ["txt2img"]
        name = args[0].partition("=")[0]
        for command in ("txt2img", "img2img"):
            options = self._options(ctx, command)
            if name in options or (name[1:2] != "-" and name[:2] in options):
                later = _first_command(args, options)
                if later:
                    raise click.UsageError(f"{name} is an option of a command; write it behind {later}.", ctx)
                return [command]
        return []

    def _options(self, ctx: click.Context, command: str) -> dict[str, click.Option]:
        found = self.get_command(ctx, command)
        options = (one for one in (found.params if found else ()) if isinstance(one, click.Option))
        return {name: one for one in options for name in one.opts}


def _first_command(args: Sequence[str], options: Mapping[str, click.Option]) -> str:
    """The first of the arguments that is a command and no option's value; "" where there is none."""
    words = args[: args.index("--")] if "--" in args else args
    for before, word in itertools.pairwise(words):
        if word in COMMANDS and not (before in options and not options[before].is_flag):
            return word
    return ""


@click.group(
    cls=_Commands,
    subcommand_metavar="PROMPT|COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 some rows failed, 65 bad data or model, 66 no such input, "
    "73 cannot create output, 74 I/O, 75 try again, 130 interrupted, 143 terminated.",
)
@click.version_option(__version__, "-V", "--version", message="ldm %(version)s")
def cli() -> None:
    """Draw pictures from text with latent diffusion models.

    \b
    ldm "a red apple on a blue background"
    ldm "a lighthouse at dawn" -m sd15.safetensors -o pictures
    ldm img2img "a green apple" -i apple.png
    ldm batch prompts.txt -o out
    ldm upscale picture.png -o large.png
    ldm info picture.png
    ldm models

    Results go to standard output, everything else to standard error.
    """
    if not is_linking():
        settle_down()  # the imports of this command are done
    try:
        os.getcwd()
    except OSError:  # without it MKL ends the process at its first product, in the middle of a picture
        raise MissingInputError("the working folder is gone; change to one that is there and run again.") from None


def run_commands(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. All expected failures become one line on stderr."""
    if not _open_streams():
        return _fail("standard output is closed; results go there.", StorageError.exit_code)
    try:
        with _signals_raise():
            result = _invoke(arguments)
            sys.stdout.flush()
            return result
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        return _fail(_usage_error(error), error.exit_code)
    except LdmError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        return _CLOSED_PIPE  # whoever read the results has gone: say nothing
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted.", INTERRUPTED)
    except _Terminated:
        return _fail("terminated.", TERMINATED)
    except OSError as error:
        return _fail(f"input or output failed: {printable(str(error))}.", StorageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory; ask for a smaller picture, a smaller --batch-size or --dtype bf16.", 1)
    finally:
        _flush(sys.stdout)
        _flush(sys.stderr)


def _invoke(arguments: Sequence[str]) -> int:
    """What click's own main does, less its way with closed pipes and interrupts."""
    completion = os.environ.get(COMPLETION)
    if completion:
        from click.shell_completion import shell_complete

        from ldmcli.cli import completion as _  # noqa: F401  makes its own ways known to click

        with contextlib.suppress(KeyError, ValueError):  # of variables that shells set
            if not (code := shell_complete(cli, {}, "ldm", COMPLETION, completion)):
                return code
        raise UsageError(f"{COMPLETION} is not set as the scripts of `ldm completion` set it; unset it.")
    try:
        with cli.make_context("ldm", list(arguments)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    return 0


def _open_streams() -> bool:
    """Give closed standard streams a place to lead to, lest a file opened later take their number, and have standard
    output take any text; returns whether that was open."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack characters that help texts have
    return "stdout" not in closed


def _flush(stream: TextIO) -> None:
    """Empty `stream`, into the void where it takes no more: the interpreter would try again and complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _usage_error(error: click.ClickException) -> str:
    """click's message as one sentence, safe to print, with the help to turn to."""
    from ldmcli.cli.mistakes import usage_sentence

    message = printable(usage_sentence(error), _MAX_USAGE_ERROR)
    if message.endswith("?"):
        return message
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path if context else 'ldm'} --help."


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt and _Terminated, whatever an import that they hit makes of that; once
    more where it makes nothing of it at all, as C code that looks for an attribute does, or what is called when
    something is freed, of which Python would print a traceback."""
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}
    received: list[type[BaseException]] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(kinds[signal.Signals(number)])
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, _UNHEARD_S)
        raise received[-1]

    def again(_number: int, _frame: FrameType | None) -> None:
        raise received[-1]

    def not_raised(lost: "sys.UnraisableHookArgs") -> None:
        if not (received and issubclass(lost.exc_type, received[-1])):
            before(lost)

    before, sys.unraisablehook = sys.unraisablehook, not_raised
    for number in kinds:
        if signal.getsignal(number) is not signal.SIG_IGN:  # which is how nohup and shells in the background ask
            signal.signal(number, on_signal)
    try:
        yield
    except Exception:
        if received:
            raise received[-1] from None
        raise
    finally:
        sys.unraisablehook = before
        if received:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _fail(message: str, code: int) -> int:
    logging.getLogger("ldmcli").debug("failed", exc_info=True)
    with contextlib.suppress(OSError):
        click.echo(f"ldm: error: {message}", err=True)
    return code
