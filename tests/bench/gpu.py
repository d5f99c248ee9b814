"""`make bench-gpu`: all that is to be measured on a GPU, in one command.

Each part is a process of its own, with its table (.md), its samples (.json) and what it said meanwhile (.log) in the
folder. One that fails does not stop the others. The summary sets the targets beside what is in the folder, whichever
call has put it there.
"""

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.processes import environment, python
from bench.targets import to_markdown

_ROOT = Path(__file__).resolve().parents[2]
_GRACE = 30.0  # seconds for an interrupted part to end its own processes


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to measure: a module with its words. `family` is that of the random weights."""

    about: str
    words: str
    family: str = ""
    module: str = "bench"


_SD15, _SDXL = (
    "--steps 50 --clock image,step --width 512 --height 512",
    "--steps 30 --clock image,step --width 1024 --height 1024",
)
_OWN = "ldm-eager,ldm-torch-kernels,ldm-plain,ldm-sdpa,ldm-xformers"
PARTS = {
    "card": Part("a guided step, technique by technique", "--seconds 120", module="bench.card_check"),
    "tests": Part("the tests that need a GPU", "-m cuda -rs --color=no tests", module="pytest"),
    "sd15": Part("SD1.5, warm; what each technique is worth", f"{_SD15} --runs 10 --against diffusers,{_OWN}", "sd15"),
    "cold": Part("SD1.5, from the start of a process", "--steps 20 --clock cold --runs 5 --against diffusers", "sd15"),
    "compile": Part("SD1.5, beside torch.compile(mode=max-autotune)",
                    f"{_SD15} --runs 10 --against diffusers-compile,ldm-compile", "sd15"),
    "batch16": Part("SD1.5, 16 pictures at once", f"{_SD15} --batch-size 16 --profile --against diffusers", "sd15"),
    "batch64": Part("SD1.5, 64 pictures at once", f"{_SD15} --batch-size 64 --against diffusers", "sd15"),
    "throughput": Part("SD1.5, `ldm batch` under way", "--steps 50", "sd15", "bench.throughput"),
    "sdxl": Part("SDXL, warm", f"{_SDXL} --runs 5 --profile --against diffusers,ldm-eager,ldm-low-vram", "sdxl"),
    "memory": Part("SDXL 2048², decoded in strips or not", "--steps 4 --width 2048 --height 2048 --clock image "
                   "--runs 2 --against ldm-tiled,ldm-low-vram", "sdxl"),
    "profile": Part("SD1.5, a step by kinds of work", f"{_SD15} --clock step --profile --against ldm-eager", "sd15"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, then print the summary. Returns 0 where all of them went well, else 1."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the results go")
    parser.add_argument("--parts", default="", help=f"with spaces between: {', '.join(PARTS)}; all unless given")
    parser.add_argument("--scratch", type=Path, help="weights and compiled code for the next call; OUT/scratch")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for one part")
    parser.add_argument("--summary", action="store_true", help="only sum up what is in OUT")
    o = parser.parse_args(arguments)
    wanted = o.parts.split() or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"part {unknown[0]} is not known; choose from {', '.join(PARTS)}")
    out, scratch = o.out.absolute(), (o.scratch or o.out / "scratch").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    codes = []
    if not o.summary:
        for name in [name for name in PARTS if name in wanted]:
            codes.append(run_part(name, PARTS[name], out, scratch, o.limit))
    text = summary(out)
    (out / "summary.md").write_text(text + "\n")
    print(text)
    return int(any(codes))


def run_part(name: str, part: Part, out: Path, scratch: Path, limit: float) -> int | None:
    """Run one part to its end, or to the limit (None), and note what became of it."""
    print(f"bench-gpu: {name}: {part.about} …", file=sys.stderr, flush=True)
    for ending in ("md", "json", "log", "part.json"):
        (out / f"{name}.{ending}").unlink(missing_ok=True)
    started, code = time.monotonic(), 0
    log, table = out / f"{name}.log", out / f"{name}.md"
    for command in commands(name, part, out, scratch):
        code = _ended(command, table, log, limit, scratch)
        if code:
            break
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lost = [line for line in lines if "left out" in line or "no further part" in line] or lines[-1:] if code else []
    done = {"code": code, "seconds": round(time.monotonic() - started), "note": "; ".join(lost).replace("|", "∣")[:500]}
    (out / f"{name}.part.json").write_text(json.dumps(done))
    return code


def commands(name: str, part: Part, out: Path, scratch: Path) -> list[list[str]]:
    """What a part runs: its random weights are written first, where they are not there yet."""
    words, before, json_file = part.words.split(), [], str(out / f"{name}.json")
    if part.family:
        model = scratch / part.family
        if not (model / "model_index.json").is_file():  # it is written last
            before = [python("bench.random_weights", part.family, str(model))]
        words += ["--model", str(model), "--device", "cuda", "--json", json_file]
    if part.module == "bench":
        words += ["--compile-cache", str(scratch / "compiled")]
    if part.module == "bench.card_check":
        words = [str(out / "card"), *words]
    return [*before, python(part.module, *words)]


def summary(out: Path) -> str:
    """The parts that were run, and the targets beside what was seen, by what is in the folder."""
    lines, results = ["| part | | seconds | |", "|---|---|---:|---|"], {}
    for name, part in PARTS.items():
        done = _read_json(out / f"{name}.part.json")
        if done is None:
            lines.append(f"| {name}: {part.about} | not run | | |")
            continue
        word = {None: "took too long", 0: "ok"}.get(done["code"], f"failed ({done['code']})")
        lines.append(f"| {name}: {part.about} | {word} | {done['seconds']} | {done['note']} |")
        found = _read_json(out / f"{name}.json")
        if found is not None and part.module == "bench":
            results[name] = found
    return "\n".join([*lines, "", to_markdown(results)])


def _ended(command: Sequence[str], table: Path, log: Path, limit: float, scratch: Path) -> int | None:
    """The exit code of a command; None where it took longer than `limit` seconds and was interrupted."""
    env = environment(scratch, None, scratch / "compiled")
    with table.open("ab") as out, log.open("ab") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, cwd=_ROOT, env=env)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
