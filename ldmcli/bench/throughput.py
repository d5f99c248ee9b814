"""Pictures a second of `ldm batch` once it is under way, where text, steps, VAE and PNG of successive batches overlap.

`python -m ldmcli.bench.throughput --model FOLDER` runs the program on one batch and on some more: the further batches
took what the second run took longer, and neither the start of a process nor the reading of weights is in that.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.bench.plan import environment
from ldmcli.bench.processes import Processes
from ldmcli.bench.task import PROMPT
from ldmcli.errors import LdmError

_FURTHER = 2  # batches at the least that the longer run draws more than one
_PICTURES = 64  # that it draws more, at the least


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write every sample where --json says. Returns the exit code."""
    options = _options(arguments)
    try:
        rows = [measure(options, size) for size in options.batch_sizes]
    except LdmError as error:
        print(f"ldm: error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows}) + "\n")
    print(table(rows))
    return 0


def measure(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Seconds of each run of one batch and of more, and what they say of a steady stream. Raises ContenderError."""
    batches = max(_FURTHER, -(-_PICTURES // batch_size))
    with tempfile.TemporaryDirectory(prefix="ldm-throughput-") as name:
        folder = Path(name)
        with Processes(folder, environment(options.threads, folder)) as processes:
            _seconds(processes, folder, options, batch_size, 1)  # warms the page cache; kernels are compiled
            pairs = [
                [_seconds(processes, folder, options, batch_size, count) for count in (1, 1 + batches)]
                for _ in range(options.runs)
            ]
    short, long = zip(*pairs, strict=True)
    return summed(batch_size, batches, short, long)


def summed(batch_size: int, batches: int, short: Sequence[float], long: Sequence[float]) -> dict[str, Any]:
    """The measurement of so many further batches, from seconds of runs without and with them."""
    further = statistics.median(long) - statistics.median(short)
    return {
        "batch_size": batch_size,
        "batches": batches,
        "short": list(short),
        "long": list(long),
        "seconds_a_batch": further / batches,
        "images_per_second": batch_size * batches / further if further > 0 else None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements in Markdown."""
    lines = ["**`ldm batch`, steady: further batches alone**", "", "| at once | images/s | s a batch | one batch, s |"]
    lines += ["|---|---:|---:|---:|"]
    for row in rows:
        rate = "" if row["images_per_second"] is None else f"{row['images_per_second']:.3g}"
        whole = statistics.median(row["short"])
        lines.append(f"| {row['batch_size']} | {rate} | {row['seconds_a_batch']:.3g} | {whole:.3g} |")
    return "\n".join(lines)


def _seconds(processes: Processes, folder: Path, options: argparse.Namespace, batch_size: int, batches: int) -> float:
    """How long `ldm batch` takes, from its start to its end, for so many batches."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{i + 1} {PROMPT}\n" for i in range(batch_size * batches)))
    words = ["--model", options.model, "--device", options.device, "--steps", options.steps, "-b", batch_size]
    if options.size:
        words += ["--width", options.size, "--height", options.size]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = ["batch", str(prompts), "--output", f"{output}/run", "--sampler", "ddim", "--quiet", *map(str, words)]
        return processes.run("ldm batch", "ldmcli.cli", *command).seconds


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ldmcli.bench.throughput", description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, help="width and height in pixels; the model's own unless given")
    parser.add_argument("--batch-sizes", type=_numbers, default=[16, 64], metavar="N,N,…")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="OMP_NUM_THREADS of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
