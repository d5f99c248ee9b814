"""`make bench`: this program beside others, and beside itself with techniques turned off.

All draw the same picture by DDIM: same weights, tokens, noise, steps and number of threads, in turn, each in its own
process. Each must first come near ldm's own picture in fp32; if one does not, or fails, the exit code is 1.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.contenders import CLOCKS, CONTENDERS, chosen
from bench.measuring import Plan, measure
from bench.processes import environment, python, run
from bench.report import passed, to_markdown

from ldmcli.errors import LdmError

_FIELDS = {
    "prompt": str, "negative-prompt": str, "seed": int, "steps": int, "width": int, "height": int,
    "guidance-scale": float, "batch-size": int, "device": str, "dtype": str, "threads": int,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables. Returns the exit code."""
    o = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="bench: %(message)s", stream=sys.stderr)
    given = {name: getattr(o, name) for name in (field.replace("-", "_") for field in _FIELDS)}
    try:
        with tempfile.TemporaryDirectory(prefix="ldm-bench-", ignore_cleanup_errors=True) as folder:
            model = o.model
            if o.random_weights:
                model = Path(folder, o.random_weights)
                run(python("bench.random_weights", o.random_weights, str(model)), environment(Path(folder), None))
            plan = Plan(model.absolute(), tuple(chosen(o.against)), given, o.clock, o.runs, o.profile, o.compile_cache)
            results = measure(plan)
    except LdmError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if o.json is not None:
        o.json.write_text(json.dumps(results) + "\n")
    print(to_markdown(results))
    return 0 if passed(results) else 1


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    from ldmcli.checkpoints.source import embedded_model

    found = argparse.ArgumentParser(prog="make bench", description=__doc__)
    found.add_argument("--model", type=Path, default=embedded_model(), help="a diffusers folder or file")
    found.add_argument("--random-weights", help="sd15, sd21 or sdxl in place of a model: 2 to 7 GB in TMPDIR")
    found.add_argument(
        "--against", default="diffusers,ldm-no-cache", metavar="LIST", help=f"with commas: {', '.join(CONTENDERS)}"
    )
    found.add_argument("--clock", type=_clocks, default=CLOCKS, help="with commas: cold, image, step")
    found.add_argument("--runs", type=int, default=3, help="rounds")
    found.add_argument("--profile", action="store_true", help="what a step spends its time on, by kinds of work")
    found.add_argument("--compile-cache", type=Path, help="keep what programs compile there")
    found.add_argument("--json", type=Path, help="write every sample there")
    for name, kind in _FIELDS.items():
        found.add_argument(f"--{name}", type=kind)
    return found


def _clocks(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if not set(names) <= set(CLOCKS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(CLOCKS)}")
    return tuple(clock for clock in CLOCKS if clock in names)


if __name__ == "__main__":
    sys.exit(main())
