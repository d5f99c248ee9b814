"""Pictures a second of `ldm batch` once it is under way, neither its start nor the reading of weights counted.

The program runs on one batch and on some more: the further batches took what the second run took longer.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.contenders import PROMPT
from bench.processes import python, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write every sample where --json says. What is not known here goes to `ldm batch`."""
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--batch-sizes", default="16,64", metavar="N,N,…")
    parser.add_argument(
        "--pictures", type=int, default=64, help="that the longer run draws more, in two batches or more"
    )
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    o, words = parser.parse_known_args(arguments)
    print("| `ldm batch`, at once | images/s | one batch, s |\n|---|---:|---:|")
    found = {}
    for size in map(int, o.batch_sizes.split(",")):
        more = max(2, -(-o.pictures // size))
        _seconds(size, 1, words)  # warms the page cache; kernels are compiled
        samples = found[size] = [(_seconds(size, 1, words), _seconds(size, 1 + more, words)) for _ in range(o.runs)]
        short, long = (statistics.median(column) for column in zip(*samples, strict=True))
        print(f"| {size} | {size * more / (long - short):.3g} | {short:.3g} |")
    if o.json is not None:
        o.json.write_text(json.dumps(found) + "\n")
    return 0


def _seconds(size: int, batches: int, words: Sequence[str]) -> float:
    """How long `ldm batch` takes for so many batches of so many pictures."""
    with tempfile.TemporaryDirectory(prefix="ldm-throughput-") as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("".join(f"{i + 1} {PROMPT}\n" for i in range(size * batches)))
        command = ["batch", str(prompts), "-o", f"{folder}/run", "-b", str(size), "--quiet", *words]
        return run(python("ldmcli", *command), os.environ).seconds


if __name__ == "__main__":
    sys.exit(main())
