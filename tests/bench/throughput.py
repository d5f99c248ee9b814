"""Pictures a second of `ldm batch` once it is under way, neither start nor reading of weights counted.

The program runs on one batch and on some more: the further batches took what the second run took longer.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.job import PROMPT
from bench.processes import environment, python, run

_PICTURES = 64  # that the longer run draws more, at the least, in two batches or more


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write every sample where --json says."""
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--batch-sizes", default="16,64", metavar="N,N,…")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    o, words = parser.parse_known_args(arguments)  # the others are for `ldm batch`
    rows = [measure(int(size), o.runs, words) for size in o.batch_sizes.split(",")]
    if o.json is not None:
        o.json.write_text(json.dumps({"rows": rows}) + "\n")
    print("| `ldm batch`, at once | images/s | one batch, s |\n|---|---:|---:|")
    for row in rows:
        print(f"| {row['batch_size']} | {row['images_per_second']:.3g} | {statistics.median(row['short']):.3g} |")
    return 0


def measure(batch_size: int, runs: int, words: Sequence[str]) -> dict[str, Any]:
    """Seconds of each run of one batch and of more, and the rate of a steady stream."""
    batches = max(2, -(-_PICTURES // batch_size))
    with tempfile.TemporaryDirectory(prefix="ldm-throughput-") as name:

        def seconds(count: int) -> float:
            folder = Path(tempfile.mkdtemp(dir=name))
            prompts = folder / "prompts.txt"
            prompts.write_text("".join(f"{i + 1} {PROMPT}\n" for i in range(batch_size * count)))
            command = ["batch", str(prompts), "-o", str(folder / "run"), "-b", str(batch_size), "--quiet", *words]
            return run(python("ldmcli", *command), environment(Path(name), None)).seconds

        seconds(1)  # warms the page cache; kernels are compiled
        pairs = [(seconds(1), seconds(1 + batches)) for _ in range(runs)]
    short, long = zip(*pairs, strict=True)
    further = statistics.median(long) - statistics.median(short)
    rate = batch_size * batches / further if further > 0 else float("nan")
    return {"batch_size": batch_size, "batches": batches, "short": short, "long": long, "images_per_second": rate}


if __name__ == "__main__":
    sys.exit(main())
