"""The command `ldm`: parses, builds requests, calls, prints.

Importing it imports next to nothing: a command that draws has torch's libraries linked meanwhile. The commands are in
`ldmcli.cli.program`.
"""

import gc
import os
import signal
import sys
from collections.abc import Sequence

COMMANDS = (
    "txt2img", "img2img", "sample", "batch", "upscale", "canny", "vae", "serve", "info", "show", "gallery", "pull",
    "models", "samplers", "config", "schema", "completion", "man", "bench",
)  # fmt: skip
OWN_OPTIONS = ("-h", "--help", "-V", "--version")
COMPLETION = "_LDM_COMPLETE"  # the variable in which click's completion scripts ask
INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number
_DRAWING = ("txt2img", "img2img", "sample")


def main() -> None:
    """Entry point of `ldm`: runs the command line and exits with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run` has handlers: what an import prints helps nobody
    gc.disable()  # what imports make is there to stay
    _prepare(sys.argv[1:])
    try:
        code = run(sys.argv[1:])
    except Exception:  # an error of ours; the interpreter's own way out would meet libraries that are half loaded
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    if code in (INTERRUPTED, TERMINATED):
        _die_of(code - 128)
    if "ray" in sys.modules and code != INTERRUPTED:
        sys.exit(code)  # Ray ends its processes when the interpreter does
    # All is written and flushed. Taking torch down piece by piece would cost half a second, and sys.exit would die of
    # the signal instead where that had hit certain imports.
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. All expected failures become one line on stderr."""
    from ldmcli.cli.program import run_commands

    return run_commands(arguments)


def _prepare(words: Sequence[str]) -> None:
    """What has to come before torch's libraries; and these, where the words are as good as sure to draw here."""
    from ldmcli.cli.configured import may_name_model
    from ldmcli.speed.cpu.threads import yield_cores

    named = "LDM_MODEL" in os.environ or any(word.startswith(("-m", "--model")) for word in words)
    if named or may_name_model():
        from ldmcli.speed.cpu.heap import ask_for_large_pages

        ask_for_large_pages()  # the embedded model is too small to gain from them
    yield_cores()
    if _seems_to_draw(words) and not _seems_served(words):
        from ldmcli.speed.linking import link_ahead

        link_ahead()


def _seems_to_draw(words: Sequence[str]) -> bool:
    """Whether a command line that nobody has parsed yet is one that draws, and asks for no help."""
    if not words or COMPLETION in os.environ or not {*OWN_OPTIONS, "--help-all"}.isdisjoint(words):
        return False
    if None in (sys.stdin, sys.stdout, sys.stderr):
        return False  # `run` first fills these places, or a library's file could be in one of them
    return words[0] in _DRAWING or words[0] not in COMMANDS


def _seems_served(words: Sequence[str]) -> bool:
    """Whether a server is there, or to be left behind, which then draws."""
    from ldmcli.errors import UsageError
    from ldmcli.serving.place import is_safe, socket_path

    if "--no-server" in words:
        return False
    try:
        return "LDM_KEEP" in os.environ or any(word.startswith("--keep") for word in words) or is_safe(socket_path())
    except (UsageError, OSError):  # of which the command line speaks
        return True


def _die_of(number: int) -> None:
    """End of the signal itself, as a shell expects that is to leave its loop: it goes on where a command exits."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
