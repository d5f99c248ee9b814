"""`ldm` in processes forked from one that has the command line loaded and no torch: starting Python takes longer than
most refusals. What a command needs of a process (memory, environment, working folder) it has of its own."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cli_support import Result, environment

LEAN = 150 << 20  # bytes: what a command without torch may take
_SERVER = """
import json, os, sys, traceback
import ldmcli.cli.info, ldmcli.cli.txt2img, ldmcli.checkpoints.inspection, ldmcli.session.opened

answers = os.fdopen(os.dup(1), "w")
for line in os.fdopen(os.dup(0)):
    asked = json.loads(line)
    child = os.fork()
    if not child:
        try:
            for number, name in enumerate(("in", "out", "err")):
                os.dup2(os.open(asked[name], os.O_RDWR), number)
            os.environ.clear()
            os.environ.update(asked["env"])
            os.chdir(asked["cwd"])
            os._exit(ldmcli.cli.run(asked["arguments"]))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(70)
    _, status, used = os.wait4(child, 0)
    answers.write(json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss << 10, used.ru_utime + used.ru_stime]))
    answers.write(chr(10))
    answers.flush()
"""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    atexit.register(server.kill)
    return server


def quick(
    *arguments: str | bytes | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
) -> Result:
    """Run `ldm ARGUMENTS` to its end, as `ldm` does; the result's peak is measured and its seconds are of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ("in", "out", "err")}
        for name, path in paths.items():
            Path(path).write_bytes(stdin if name == "in" else b"")
        asked = {
            "arguments": [os.fsdecode(a) for a in arguments],
            "env": environment(env),
            "cwd": str(cwd or Path.cwd()),
        }
        server = _server()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(asked | paths) + "\n")
        server.stdin.flush()
        code, peak, seconds = json.loads(server.stdout.readline())
        err = Path(paths["err"]).read_bytes().decode("utf-8", "backslashreplace")
        result = Result(code, Path(paths["out"]).read_bytes(), err, seconds, peak)
    assert "Traceback" not in result.err, result.err
    return result
