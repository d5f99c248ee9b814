"""A contender's side of the pipes: questions arrive as lines of JSON on stdin, answers leave as lines on stdout."""

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from bench.job import Job


class Drawing(Protocol):
    """What every contender can be asked: each answer is a dictionary of plain values."""

    def greet(self) -> dict[str, Any]:
        """Versions, device, dtype, threads, bytes of `weights` in memory, and the prompt's `tokens` by text encoder."""

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        """Draw the job's pictures: `seconds` from prompt to PNG data, and those of each of the `steps` but the first.
        Without `decode` only the steps are taken."""

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        """Draw them once and keep final latents and pixels in `file` (parity.py)."""

    def memory(self) -> dict[str, int]:
        """Peaks in bytes: `host`, and on a GPU `gpu_allocated` and `gpu_reserved`."""


def main(contender: Callable[[Job], Drawing], cold: Callable[[Job, str], dict[str, Any]] | None = None) -> None:
    """Run as the command line says: `serve JOB` answers questions, `cold JOB PNG` draws once into a file and prints
    phases, marks and peaks as `ldm txt2img --json` does."""
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    if kind == "cold":
        assert cold is not None
        print(json.dumps(cold(job, sys.argv[3])))
    else:
        _serve(lambda: contender(job))


def _serve(load: Callable[[], Drawing]) -> None:
    """Answer until stdin ends, and then stop at once, even within a computation: whoever asked has gone. An error ends
    the process; the last line of its traceback is what the bench tells."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    contender: Drawing | None = None
    while True:
        fields = json.loads(questions.get())
        contender = contender or load()
        answer = getattr(contender, fields.pop("ask"))(**fields)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def _listen(questions: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)
