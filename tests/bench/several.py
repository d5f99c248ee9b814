"""`python -m bench.several`: ldm and diffusers at several batch sizes, all loaded at once and asked in turn.

For a card that is lent for minutes: what `make bench` measures in one process after the other takes several times as
long, most of it for loading. Memory must hold a process for each program and batch size.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.contenders import CONTENDERS, OURS, REFERENCE, Contender, Job
from bench.processes import Worker, environment, python
from bench.serving import PARITY_STEPS, parity

BOTH = (OURS, CONTENDERS["diffusers"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line for each, and write all samples. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.several", description=__doc__)
    parser.add_argument("out", type=Path, help="a JSON file for every sample")
    parser.add_argument("--model", required=True, help="a diffusers folder (bench.random_weights writes one)")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--batches", default="1,4,16", help="with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="fp16")
    o = parser.parse_args(arguments)
    job = Job("", o.model, steps=o.steps, width=o.size, height=o.size, guidance_scale=o.guidance_scale,
              device=o.device, dtype=o.dtype, threads=4)  # fmt: skip
    found: dict[str, Any] = {}
    for line in measure(job, [int(batch) for batch in o.batches.split(",")], o.rounds, found):
        print(line, flush=True)
        o.out.write_text(json.dumps(found))
    return 0


def measure(job: Job, batches: Sequence[int], rounds: int, found: dict[str, Any]) -> Any:
    """Yield lines to be read, and put every sample into `found`."""
    with tempfile.TemporaryDirectory(prefix="ldm-several-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        workers = {(one.name, batch): worker(one, job, batch, folder) for one in BOTH for batch in batches}
        if 1 in batches:  # the only size whose error is told
            workers["right", 0] = worker(REFERENCE, dataclasses.replace(job, dtype="fp32"), 1, folder)
        try:
            with ThreadPoolExecutor(len(workers)) as pool:
                drawn = [pool.submit(first, each, folder / f"{who} {batch}.npz")
                         for (who, batch), each in workers.items()]  # fmt: skip
                for future in drawn:
                    future.result()
            if 1 in batches:
                workers.pop(("right", 0)).kill()
            for who, batch in workers:
                if batch == 1:
                    found[f"{who}, error"] = parity(folder / "right 0.npz", folder / f"{who} {batch}.npz", job.dtype)
                    yield f"{who}: {found[f'{who}, error']}"
            for batch in batches:
                yield from timed({one.name: workers[one.name, batch] for one in BOTH}, job, batch, rounds, found)
        finally:
            for each in workers.values():
                each.kill()


def worker(contender: Contender, job: Job, batch: int, folder: Path) -> Worker:
    """A contender's process for one batch size."""
    own = dataclasses.replace(job, name=contender.name, batch_size=batch, settings=contender.settings)
    env = environment(folder, job.threads) | dict(contender.environment)
    return Worker(python(contender.module, "serve", own.to_json()), env)


def first(worker: Worker, file: Path) -> None:
    """Load, and draw a few steps."""
    worker.ask("compare", steps=PARITY_STEPS, file=str(file), decode=True)


def timed(workers: dict[str, Worker], job: Job, batch: int, rounds: int, found: dict[str, Any]) -> Any:
    """Pictures of one batch size, in turn; lines to be read."""
    for each in workers.values():
        each.ask("draw", steps=PARITY_STEPS, prompt=job.prompt, decode=True)
    samples: dict[str, dict[str, Any]] = {name: {"image": [], "step": []} for name in workers}
    for i in range(rounds):
        for name, each in workers.items():
            answer = each.ask("draw", steps=job.steps, prompt=f"{i} {job.prompt}", decode=True)
            samples[name]["image"].append(answer["seconds"])
            samples[name]["step"] += answer["steps"]
    medians = {name: {clock: statistics.median(values) for clock, values in own.items()}
               for name, own in samples.items()}  # fmt: skip
    for name, each in workers.items():
        samples[name]["memory"] = memory = each.ask("memory")
        found[f"{name}, {batch}"] = samples[name]
        step, image = medians[name]["step"], medians[name]["image"]
        ratio = {clock: medians[name][clock] / medians[BOTH[1].name][clock] for clock in ("step", "image")}
        low, *_, high = statistics.quantiles(samples[name]["step"], n=10, method="inclusive")
        yield (
            f"{name} × {batch}: a step {1e3 * step:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f}; {1 / step:.1f} a "
            f"second; {ratio['step']:.3f} × diffusers), an image {image:.3f} s ({ratio['image']:.3f} ×), "
            + ", ".join(f"{where} {size / 1e9:.2f} GB" for where, size in memory.items())
        )


if __name__ == "__main__":
    sys.exit(main())
