"""Draw with two commits and compare: `python tests/compare_commits.py [REVISION]`.

fp32 pictures, their records and what is reported must be equal to the bit, through `ldm txt2img` and `ldm batch`, alone
and in batches; a run folder of the earlier commit must resume, and its pictures must be drawn again. Exits with 1 where
anything differs. Needs diffusers, which makes small random models once; some minutes on two cores.
"""

import argparse
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = "5ac5bce"
COMMON = ("--dtype", "fp32", "--device", "cpu", "--no-cache", "--threads", "2", "--quiet", "--json")
# What is written for other programs follows their wording, which changed on purpose.
_WORDING = re.compile(r"(, )?(Version|Eta|Eta DDIM|Clip skip|Emphasis|Schedule type): [^,]*")
# What differs from run to run, or with the version alone; `sha256` of a file, not of a model.
VOLATILE = {"version", "versions", "time", "seconds", "worker", "check", "torch"}

Found = dict[str, Any]  # what a command left, by name: exit code, reports, pixels, records


@dataclasses.dataclass(frozen=True)
class Case:
    """One command in a process of its own; `rows` become the prompt file of `ldm batch`."""

    name: str
    arguments: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = ()


def cases(models: Path) -> Iterator[Case]:
    """Every command that is compared. Samplers are named, so that a changed default is no difference."""

    def draw(name: str, *arguments: str, model: str = "", **paths: str) -> Case:
        chosen = [f"--{option}={models / path}" for option, path in ({"model": model} | paths).items() if path]
        size = ("-W", "96", "-H", "96") if model else ()  # files of small models say the size of large ones
        return Case(f"txt2img {name}", ("txt2img", *chosen, *size, *arguments, "-s", "7", "-o", "out"))

    def batch(name: str, size: int, rows: Sequence[dict[str, Any]], *arguments: str, **paths: str) -> Case:
        chosen = [f"--{option}={models / path}" for option, path in paths.items()]
        sides = ("-W", "96", "-H", "96") if "model" in paths else ()
        command = ("batch", "rows.jsonl", *chosen, *sides, *arguments, "-b", str(size), "--steps", "4", "-o", "out")
        return Case(f"batch {name} -b {size}", command, tuple(rows))

    two = ("a red apple on a blue background", "a fox", "-n", "a dog")
    ddim, few = ("--sampler", "ddim"), ("--steps", "3")
    long = ("--prompt-syntax", "weighted", "--on-long-prompt", "chunk", "--clip-skip", "2")
    yield draw("embedded", *two, *ddim, "--steps", "8")
    yield draw("embedded -c 3 -b 3", "an orange", "a pear", *ddim, "--steps", "8", "-c", "3", "-b", "3")
    yield draw("SD1 folder, weighted, chunks", WEIGHTED, *ddim, *few, *long, "-c", "2", "-b", "2", model="sd1")
    yield draw("SD1 file, eta 1, tiles", *two, *ddim, *few, "--eta", "1", "--vae-tiling", model="sd1.safetensors")
    yield draw("SD2-v folder, dpmpp-2m", *two, *few, "--sampler", "dpmpp-2m", model="sd2-v")
    of_v = ("--prediction-type", "v_prediction", "--guidance-rescale", "0.7")
    yield draw("SD2-v file, rescale", *two, *ddim, *few, *of_v, model="sd2-v.safetensors")
    yield draw("SDXL folder, sizes", *two, *few, "--sampler", "euler", "--crop-left", "8", "-W", "64", model="sdxl")
    refined = ("--sampler", "euler", "--steps", "5", "-c", "2", "-b", "2")
    yield draw("SDXL and refiner folders", "a fox", *refined, model="sdxl", refiner="refiner")
    yield draw("SDXL and refiner files", "a fox", *refined, model="sdxl.safetensors", refiner="refiner.safetensors")
    turbo = ("--sampler", "euler-a", "--schedule", "trailing", "--steps", "2", "-g", "1")
    yield draw("Turbo folder", *two[:2], "--sampler", "euler-a", "--steps", "2", model="turbo")
    yield draw("Turbo file -c 2 -b 2", *two[:2], *turbo, "-c", "2", "-b", "2", model="turbo.safetensors")
    yield draw("LCM folder", *two[:2], "--sampler", "lcm", model="lcm")
    yield draw("LCM file -c 2 -b 2", *two[:2], "--sampler", "lcm", *few, "-g", "5", "-c", "2", "-b", "2",
               model="lcm.safetensors")  # fmt: skip
    yield batch("embedded", 1, mixed_rows())
    yield batch("embedded", 4, mixed_rows())
    yield batch("SD1 folder", 4, mixed_rows(), model="sd1")
    yield batch("SD1 file", 1, mixed_rows(), model="sd1.safetensors")
    # PLMS mixes velocities now as diffusers does, where it mixed noise before.
    of_v_rows = [row for row in mixed_rows()[:8] if row["sampler"] != "plms"]
    yield batch("SD2-v folder", 4, of_v_rows, model="sd2-v")
    euler = [row | {"sampler": "euler"} for row in mixed_rows() if row["sampler"] == "ddim" and "eta" not in row]
    yield batch("SDXL and refiner", 4, euler, model="sdxl", refiner="refiner")
    lcm = [{"prompt": f"{number} pears", "sampler": "lcm", "guidance_scale": 4 + number % 2} for number in range(5)]
    yield batch("LCM file", 4, lcm, model="lcm.safetensors")


AGAIN = (
    "txt2img embedded",
    "txt2img SD2-v file, rescale",
    "txt2img SDXL and refiner folders",
    "batch embedded -b 4",
    "batch SD1 folder -b 4",
)
WEIGHTED = "a (red apple:1.3) on a [blue] background, " + "with (pears) and oranges, " * 20


def mixed_rows() -> list[dict[str, Any]]:
    """Rows of many settings, some of which may share a batch."""
    settings: list[dict[str, Any]] = [
        {},
        {},
        {"sampler": "plms"},
        {"sampler": "euler-a"},
        {"sampler": "dpmpp-2m", "schedule": "karras"},
        {"eta": 1},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "a dog", "count": 2},
        {"guidance_interval": [0.5, 5]},
        {"prompt": WEIGHTED, "prompt_syntax": "weighted", "on_long_prompt": "chunk"},
        {"guidance_scale": 1},
        {"width": 64, "height": 96},
        {},
    ]
    return [{"prompt": f"{number} red apples", "sampler": "ddim"} | row for number, row in enumerate(settings)]


def make_models(folder: Path) -> None:
    """The small models, as folders and as files in the original layout."""
    from oracle.original_layout import original_state, with_extras, write
    from oracle.random_families import random_family
    from oracle.random_model import random_pipeline, save

    for name in ("sd1", "sd2-v", "sdxl", "refiner", "turbo", "lcm"):
        pipeline = random_pipeline() if name == "sd1" else random_family(name)
        save(pipeline, folder / name)
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        state = original_state({part: getattr(pipeline, part) for part in parts if getattr(pipeline, part, None)})
        write(with_extras(state) if name == "sd1" else state, folder / f"{name}.safetensors")


def run(checkout: Path, case: Case, folder: Path) -> Found:
    """Run a case's command in `folder` with the program in `checkout`."""
    folder.mkdir(parents=True, exist_ok=True)
    if case.rows:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LDM_")}
    env = kept | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    env["GOMP_SPINCOUNT"] = "1000"  # on a busy machine threads that spin cost minutes
    command = [sys.executable, "-m", "ldmcli", case.arguments[0], *COMMON, *case.arguments[1:]]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    found: Found = {"exit code": done.returncode if done.returncode in (0, 75) else done.stderr.strip()}
    reports = [_steady(json.loads(line)) for line in done.stdout.splitlines()]
    found["reports"] = sorted(reports, key=json.dumps)
    return found | left_in(folder / "out")


def left_in(folder: Path) -> Found:
    """The pictures in a folder by their paths, as pixels and text; and the records of a run."""
    import numpy as np
    from PIL import Image

    found: Found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            found[f"pixels of {path.relative_to(folder)}"] = np.asarray(picture).astype(np.int16)
            text = dict(picture.text)  # type: ignore[attr-defined]
        record = _steady(json.loads(text.pop("ldmcli")))
        text = {name: _WORDING.sub("", value) for name, value in text.items()}
        found[f"record of {path.relative_to(folder)}"] = text | {"ldmcli": record}
    lines = [json.loads(line) for path in folder.glob("manifest/*.jsonl") for line in path.open()]
    if lines:
        found["manifest"] = sorted(map(_steady, lines), key=json.dumps)
        found["run.json"] = _steady(json.loads((folder / "run.json").read_text()))
    return found


def _steady(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run; of measured times and memory, their names."""
    kept = {name: value for name, value in record.items() if name not in VOLATILE}
    if "request" in kept or "seed" in kept:
        kept.pop("sha256", None)  # the file's, whose compression is free; a model has neither
    for name, value in kept.items():
        if name in ("phases", "marks", "peaks"):
            kept[name] = sorted(value)
        elif isinstance(value, dict):
            kept[name] = _steady(value)
    return kept


def differences(before: Found, after: Found) -> list[str]:
    """What is not equal, in words."""
    found = [f"only before: {name}" for name in before.keys() - after.keys()]
    found += [f"only after: {name}" for name in after.keys() - before.keys()]
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name], after[name]
        if not name.startswith("pixels"):
            if old != new:
                found.append(f"{name}: {_first_difference(old, new)}")
        elif old.shape != new.shape:
            found.append(f"{name}: {new.shape} for {old.shape}")
        elif (old != new).any():
            found.append(f"{name}: max difference {abs(old - new).max()} in {(old != new).mean():.1%}")
    return found


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in old | new if old.get(name) != new.get(name) or (name in old) != (name in new)]
        return _first_difference(old.get(names[0]), new.get(names[0]), f"{where}.{names[0]}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        place = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        return _first_difference(old[place], new[place], f"{where}[{place}]")
    return f"{where} {new!r} for {old!r}"[:400]


def resumed(before: Path, after: Path, case: Case, folder: Path) -> list[str]:
    """Stop a run of `before` after three pictures and let both finish it: what differs."""
    cut = dataclasses.replace(case, arguments=(*case.arguments, "--max-images", "3"))
    stopped = run(before, cut, folder / "before")
    shutil.copytree(folder / "before", folder / "after")
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "after" / "out").rglob("*.png")}
    if stopped["exit code"] != 75 or len(drawn) != 3:
        return [f"the run did not stop after three pictures: {stopped['exit code']}"]
    old, new = (run(checkout, case, folder / side) for checkout, side in ((before, "before"), (after, "after")))
    again = [f"drawn again: {path.name}" for path, when in drawn.items() if path.stat().st_mtime_ns != when]
    return again + differences(old, new)


def rerun(before: Path, after: Path, drawn: Path, folder: Path) -> list[str]:
    """Draw a picture of `before` again from what it records, by both: what differs."""
    case = Case("", ("txt2img", "--from-image", str(drawn), "-o", "out"))
    old, new = (run(checkout, case, folder / side) for checkout, side in ((before, "before"), (after, "after")))
    return differences(old, new) if old["reports"] else [f"nothing was drawn: {old['exit code']}"]


def check_out(revision: str, folder: Path) -> Path:
    """The files of a revision of this repository."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def compare(before: Path, after: Path, scratch: Path, only: str) -> int:
    """Print a line for each case, as it is done; the number of cases that differ."""
    wrong = 0

    def tell(name: str, found: list[str], drawn: int) -> None:
        nonlocal wrong
        wrong += bool(found)
        print(f"{name:44} {drawn:3} pictures  {'; '.join(found[:3]) or 'equal'}", flush=True)

    models = scratch / "models"
    make_models(models)
    for number, case in enumerate(case for case in cases(models) if only in case.name):
        folders = [scratch / f"{number}-{side}" for side in ("before", "after", "resumed")]
        old, new = (run(checkout, case, folder) for checkout, folder in zip((before, after), folders, strict=False))
        pictures = sorted((folders[0] / "out").rglob("*.png"))
        found = differences(old, new) if pictures else [f"nothing was drawn: {old['exit code']}"]
        tell(case.name, found, len(pictures))
        if case.name in AGAIN and case.rows:
            tell("  … stopped, and resumed by both", resumed(before, after, case, folders[2]), len(pictures))
        elif case.name in AGAIN and pictures:
            tell("  … again, from the picture", rerun(before, after, pictures[-1], folders[2]), 1)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default=BASE, help=f"the earlier commit  [default: {BASE}]")
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout of the earlier commit, in its place")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory(prefix="ldmcli-compare-") as name:
        scratch = Path(name)
        before = options.before and options.before.resolve()
        wrong = compare(before or check_out(options.revision, scratch / "commit"), ROOT, scratch, options.only)
    print(f"{wrong} cases differ" if wrong else "everything is equal")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
