"""A contender's side of the pipes: questions arrive as lines of JSON on stdin, answers leave as lines on stdout."""

import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from bench.job import Job
from bench.parity import keep

from ldmcli.bench import StepClock, memory

OnStep = Callable[[Any], object]  # hears of the latents after every step


class Serving:
    """What every contender can be asked; each answer is a dictionary of plain values."""

    job: Job

    def greet(self) -> dict[str, Any]:
        """Versions, device, dtype, threads, and the prompt's `tokens` by text encoder."""
        raise NotImplementedError

    def pictures(self, steps: int, prompt: str, on_step: OnStep, *, decode: bool) -> Iterable[Any]:
        """The job's pictures, as Pillow's; none without `decode`, where only the steps are taken."""
        raise NotImplementedError

    def draw(self, steps: int, *, prompt: str, decode: bool = True) -> dict[str, Any]:
        """`seconds` from prompt to PNG data, and those of each of the `steps` but the first."""
        clock, data = StepClock(self.job.device), io.BytesIO()
        started = time.perf_counter()
        for picture in self.pictures(steps, prompt, lambda _: clock.tick(), decode=decode):
            picture.save(data, "PNG")
        return {"seconds": time.perf_counter() - started, "steps": clock.seconds(), "png": len(data.getvalue())}

    def compare(self, steps: int, file: str, *, decode: bool = True) -> dict[str, Any]:
        """Draw the pictures once and keep final latents and pixels in `file` (parity.py)."""
        import numpy as np

        latents: list[Any] = []
        drawn = list(self.pictures(steps, self.job.prompt, lambda after: latents.append(after), decode=decode))
        last = latents[-1] if isinstance(latents[-1], np.ndarray) else latents[-1].float().cpu().numpy()
        keep(file, last, np.stack(drawn) if decode else None)
        return {}

    def memory(self) -> dict[str, int]:
        """Peaks in bytes: `host`, and on a GPU `gpu_allocated` and `gpu_reserved`."""
        return memory(self.job.device)


def main(contender: Callable[[Job], Serving], cold: Callable[[Job, str], dict[str, Any]] | None = None) -> None:
    """Run as the command line says: `serve JOB` answers questions, `cold JOB PNG` draws once into a file and prints
    phases, marks and peaks as `ldm txt2img --json` does."""
    kind, job = sys.argv[1], Job.from_json(sys.argv[2])
    if kind == "cold":
        assert cold is not None
        print(json.dumps(cold(job, sys.argv[3])))
    else:
        _serve(lambda: contender(job))


def _serve(load: Callable[[], Serving]) -> None:
    """Answer until stdin ends, and then stop at once, even within a computation: whoever asked has gone. An error ends
    the process; the last line of its traceback is what the bench tells."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    contender: Serving | None = None
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
