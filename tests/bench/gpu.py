"""`make bench-gpu`: all that is to be measured on a GPU, in one command.

Each part is a process of its own, with its table (.md), its samples (.json) and what it said meanwhile (.log) in the
folder; one that fails does not stop the others. The summary sets the targets beside all samples that are there,
whichever call has put them there.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench.processes import environment, python
from bench.targets import to_markdown

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to measure: a module with its words. `family` is that of the random weights."""

    words: str
    family: str = ""
    module: str = "bench"


_SD15 = "--steps 50 --clock image,step --width 512 --height 512 --against"
_SDXL = "--steps 30 --clock image,step --width 1024 --height 1024 --runs 5 --profile --against"
PARTS = {
    "card": Part("--seconds 120", module="bench.card_check"),
    "tests": Part("-m cuda -rs --color=no tests", module="pytest"),
    "sd15": Part(f"{_SD15} diffusers,ldm-eager,ldm-torch-kernels,ldm-plain,ldm-sdpa,ldm-xformers --runs 10", "sd15"),
    "cold": Part("--steps 20 --clock cold --runs 5 --against diffusers,ldm-no-cache", "sd15"),
    "compile": Part(f"{_SD15} diffusers-compile,ldm-compile --runs 10", "sd15"),
    "batch16": Part(f"{_SD15} diffusers --batch-size 16 --profile", "sd15"),
    "batch64": Part(f"{_SD15} diffusers --batch-size 64", "sd15"),
    "throughput": Part("--steps 50", "sd15", "bench.throughput"),
    "sdxl": Part(f"{_SDXL} diffusers,ldm-eager,ldm-low-vram", "sdxl"),
    "memory": Part("--steps 4 --width 2048 --height 2048 --clock image --against ldm-tiled,ldm-low-vram", "sdxl"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, then print the summary. Returns 0 where all of them went well, else 1."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the results go")
    parser.add_argument("--parts", default="", help=f"with spaces between: {', '.join(PARTS)}; all unless given")
    parser.add_argument("--scratch", type=Path, help="weights and compiled code for the next call; OUT/scratch")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for one part")
    parser.add_argument("--device", default="cuda")
    o = parser.parse_args(arguments)
    wanted = o.parts.split() or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"part {unknown[0]} is not known; choose from {', '.join(PARTS)}")
    if o.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU to be had here; --device cpu tries the parts without one")
    out, scratch = o.out.absolute(), (o.scratch or o.out / "scratch").absolute()
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True)
    lines = ["| part | | seconds |", "|---|---|---:|"]
    for name in [name for name in PARTS if name in wanted]:
        print(f"bench-gpu: {name} …", file=sys.stderr, flush=True)
        started, word = time.monotonic(), run_part(name, out, scratch, o.device, o.limit)
        lines.append(f"| {name} | {word} | {time.monotonic() - started:.0f} |")
    found = {name: out / f"{name}.json" for name, part in PARTS.items() if part.module == "bench"}
    results = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    text = "\n".join([*lines, "", to_markdown(results)])
    (out / "summary.md").write_text(text + "\n")
    print(text)
    return int(any(" | ok | " not in line for line in lines[2:]))


def run_part(name: str, out: Path, scratch: Path, device: str, limit: float) -> str:
    """Run one part to its end, or to the limit, in place of what an earlier call left of it; returns what became of it
    in a word or two."""
    for ending in ("md", "json", "log"):
        (out / f"{name}.{ending}").unlink(missing_ok=True)
    with (out / f"{name}.md").open("wb") as table, (out / f"{name}.log").open("wb") as log:
        for command in commands(name, out, scratch, device):
            env = environment(scratch, None, scratch / "compiled")
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=table, stderr=log, cwd=_ROOT, env=env, timeout=limit,
                    check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:  # its contenders end with it
                return "took too long"
            if done.returncode:
                return f"failed ({done.returncode})"
    return "ok"


def commands(name: str, out: Path, scratch: Path, device: str) -> list[list[str]]:
    """What a part runs: its random weights are written first, where they are not there yet."""
    part, before = PARTS[name], []
    words = part.words.split()
    if part.family:
        model = scratch / part.family
        if not (model / "model_index.json").is_file():  # it is written last
            before = [python("bench.random_weights", part.family, str(model))]
        words += ["--model", str(model), "--device", device, "--json", str(out / f"{name}.json")]
    if part.module == "bench":
        words += ["--compile-cache", str(scratch / "compiled")]
    if part.module == "bench.card_check":
        words += [str(out / "card"), *(["--cpu"] if device == "cpu" else [])]
    return [*before, python(part.module, *words)]


if __name__ == "__main__":
    sys.exit(main())
