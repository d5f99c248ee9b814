"""A contender's side of the pipes: questions arrive as lines of JSON on stdin, answers leave as lines on stdout."""

import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.contenders import Job

from ldmcli.bench import StepClock, memory
from ldmcli.stopwatch import Stopwatch, process_age

OnStep = Callable[[Any], object]  # hears of the latents after every step
PARITY_STEPS = 4  # few, so that what 16 bits round away does not grow from step to step
BOUNDS = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}  # of the latents' relative error


class Serving:
    """What every contender can be asked; each answer is a dictionary of plain values. `watch` times the phases of its
    pictures."""

    def __init__(self, job: Job) -> None:
        self.job, self.watch = job, Stopwatch()

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
        """Draw the pictures once and keep in `file` what `parity` reads: the final latents (pictures, channels, height,
        width), and pixels (pictures, height, width, 3) if there are any."""
        import numpy as np

        latents: list[Any] = []
        drawn = list(self.pictures(steps, self.job.prompt, lambda after: latents.append(after), decode=decode))
        last = latents[-1] if isinstance(latents[-1], np.ndarray) else latents[-1].float().cpu().numpy()
        np.savez(file, allow_pickle=False, latents=last, **({"pixels": np.stack(drawn)} if decode else {}))
        return {}

    def memory(self) -> dict[str, int]:
        """Peaks in bytes: `host`, and on a GPU `gpu_allocated` and `gpu_reserved`."""
        return memory(self.job.device)


def parity(reference: Path, candidate: Path, dtype: str) -> dict[str, Any]:
    """How far the candidate's file is from that of `ldm` in float32, of the picture that is farthest: `latents`, the
    norm of the difference over the norm of the reference's; `max_level` and `mean_level` of 255, where both have
    pixels; and whether it `passed`."""
    import numpy as np

    with np.load(reference) as right, np.load(candidate) as other:
        ours, theirs = right["latents"].astype(np.float64), other["latents"].astype(np.float64)
        if ours.shape != theirs.shape:
            return {"passed": False, "reason": f"latents of shape {theirs.shape}, not {ours.shape}"}
        apart, whole = (np.linalg.norm(each.reshape(len(ours), -1), axis=1) for each in (ours - theirs, ours))
        error = float((apart / whole).max())
        result: dict[str, Any] = {"latents": error, "bound": BOUNDS[dtype], "passed": error <= BOUNDS[dtype]}
        if "pixels" in right and "pixels" in other:
            levels = np.abs(right["pixels"].astype(int) - other["pixels"].astype(int)).reshape(len(ours), -1)
            result |= {"max_level": int(levels.max()), "mean_level": float(levels.mean(axis=1).max())}
    return result


def main(contender: Callable[[Job], Serving], imports: Callable[[Job], object] = lambda job: None) -> None:
    """Run as the command line says: `serve JOB` answers questions, `cold JOB PNG` draws once into a file, from nothing,
    and prints phases, marks and peaks as `ldm txt2img --json` does. `imports` imports what the job needs."""
    kind, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    if kind == "serve":
        _serve(lambda: contender(job))
        return
    imports(job)
    imported, started = process_age(), time.perf_counter()
    served = contender(job)
    served.watch.add("imports", imported)
    served.watch.add("weights", time.perf_counter() - started)
    (image,) = served.pictures(job.steps, job.prompt, lambda _: served.watch.mark("first_step"), decode=True)
    with served.watch.phase("png"):
        image.save(sys.argv[3])
    print(json.dumps(served.watch.report()))


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
        print(json.dumps(answer), file=replies, flush=True)


def _listen(questions: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)
