"""All that is to be measured on a GPU, in one command: `make bench-gpu`, or `python -m ldmcli.bench.gpu --out DIR`.

Each part is a process of its own, with its table (.md), its samples (.json) and what it said meanwhile (.log) in DIR. A
part that fails does not stop the others. The summary at the end sets the targets beside what is in DIR, whichever call
has put it there, so that parts can be run in several calls.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ldmcli
from ldmcli.bench.contenders import PEERS, VARIANTS
from ldmcli.bench.processes import ContenderError, Processes
from ldmcli.bench.targets import judged, to_markdown
from ldmcli.disk.writing import named_errors, prepare_folder
from ldmcli.errors import LdmError, UsageError, printable

_LIMIT = 570.0  # seconds for one part
_GRACE = 30.0  # seconds for a part that was interrupted to end its own processes
_ROOT = Path(ldmcli.__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to measure. `family` is that of the random weights; `steps`, `size` (pixels) and `words` are what the
    program that measures is called with, `against` its contenders."""

    name: str
    about: str
    program: str = "bench"
    family: str = ""
    steps: int = 50
    size: int = 512
    against: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


_WARM = ("--clock", "image,step")
_OWN = ("ldm-eager", "ldm-torch-kernels", "ldm-plain", "ldm-sdpa", "ldm-xformers")
PARTS = (
    Part("tests", "the tests that need a GPU", "tests"),
    Part("sd15", "SD1.5, warm, beside diffusers; what each technique is worth", family="sd15",
         against=("diffusers", *_OWN), words=(*_WARM, "--runs", "10")),
    Part("cold", "SD1.5, from the start of a process to the PNG", family="sd15", steps=20, against=("diffusers",),
         words=("--clock", "cold", "--runs", "5")),
    Part("compile", "SD1.5, warm, beside torch.compile(mode=max-autotune)", family="sd15",
         against=("diffusers-compile", "ldm-compile"), words=(*_WARM, "--runs", "10")),
    Part("batch16", "SD1.5, 16 pictures at once", family="sd15", against=("diffusers",),
         words=(*_WARM, "--batch-size", "16", "--profile")),
    Part("batch64", "SD1.5, 64 pictures at once", family="sd15", against=("diffusers",),
         words=(*_WARM, "--batch-size", "64")),
    Part("throughput", "SD1.5, `ldm batch` under way", "throughput", "sd15", words=("--batch-sizes", "16,64")),
    Part("sdxl", "SDXL, warm, beside diffusers", family="sdxl", steps=30, size=1024,
         against=("diffusers", "ldm-eager", "ldm-low-vram"), words=(*_WARM, "--runs", "5", "--profile")),
    Part("memory", "SDXL 2048², decoded in strips", family="sdxl", steps=4, size=2048, against=("ldm-low-vram",),
         words=("--clock", "image", "--runs", "2", "--vae-tiling")),
    Part("profile", "SD1.5, a step by kinds of work", family="sd15", words=("--clock", "step", "--profile")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where results go and what all parts have in common. `scratch` holds the random weights, and what was compiled,
    for the next call. Given a `model`, `steps` or `size`, all parts use that in place of their own: a trial."""

    out: Path
    scratch: Path
    device: str = "cuda"
    model: Path | None = None
    steps: int | None = None
    size: int | None = None
    limit: float = _LIMIT

    @property
    def is_trial(self) -> bool:
        """Whether results say nothing of the targets."""
        return self.device == "cpu" or any(own is not None for own in (self.model, self.steps, self.size))


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of a part: its exit code (None: it took too long), how long it took, and its last word. A `trial` is
    held against no target."""

    name: str
    code: int | None
    seconds: float
    note: str
    trial: bool = False

    @property
    def word(self) -> str:
        """The outcome in a word or two."""
        word = "took too long" if self.code is None else "ok" if self.code == 0 else f"failed ({self.code})"
        return f"{word}, a trial" if self.trial else word


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for and print the summary. Returns 0 where all of them went well, else 1; or the
    exit code of an error."""
    options = _options(arguments)
    scratch = options.scratch or options.out / "scratch"
    setting = Setting(
        options.out.absolute(),
        scratch.absolute(),
        options.device,
        options.model.absolute() if options.model else None,
        options.steps,
        options.size,
        options.limit,
    )
    try:
        if options.summary:
            print(summary(setting.out))
            return 0
        return run(setting, chosen_parts(options.parts))
    except LdmError as error:
        print(f"ldm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ldm: error: interrupted.", file=sys.stderr)
        return 130


def chosen_parts(names: str) -> list[Part]:
    """The parts of a list with spaces or commas between, in their own order; all where it is empty. Raises
    UsageError."""
    wanted = names.replace(",", " ").split()
    known = {part.name: part for part in PARTS}
    for name in wanted:
        if name not in known:
            raise UsageError(f"part {printable(repr(name))} is not known; choose from {', '.join(known)}.")
    return [part for part in PARTS if not wanted or part.name in wanted]


def run(setting: Setting, parts: Sequence[Part]) -> int:
    """Run these parts, then print and write the summary of all that is in the folder. Returns 0 where all went well,
    else 1. Raises LdmError where the device or the folder is not to be had."""
    prepare_folder(setting.out)
    prepare_folder(setting.scratch)
    device = _device(setting)
    with named_errors(setting.out, "write into the folder"):
        _write_json(setting.out / "device.json", device)
        found = []
        for part in parts:
            _say(f"{part.name}: {part.about} …")
            done = run_part(setting, part)
            found.append(done)
            _write_json(setting.out / f"{part.name}.part.json", dataclasses.asdict(done))
            _say(f"{part.name}: {done.word}, {done.seconds:.0f} s{': ' + done.note if done.note else ''}")
        text = summary(setting.out)
        (setting.out / "summary.md").write_text(text + "\n")
    print(text)
    return 0 if all(done.code == 0 for done in found) else 1


def run_part(setting: Setting, part: Part) -> Done:
    """Run one part to its end, or to the limit. What an earlier call left of it is removed first."""
    for ending in ("md", "json", "log", "part.json"):
        (setting.out / f"{part.name}.{ending}").unlink(missing_ok=True)
    try:
        model = _model(setting, part)
    except LdmError as error:
        return Done(part.name, error.exit_code, 0.0, str(error), setting.is_trial)
    command = command_of(setting, part, model)
    table, log = setting.out / f"{part.name}.md", setting.out / f"{part.name}.log"
    started = time.monotonic()
    with table.open("wb") as out, log.open("wb") as errors:
        code = _ended(command, setting.limit, stdout=out, stderr=errors)
    note = _last_word(table) if part.program == "tests" else _last_word(log) if code else ""
    return Done(part.name, code, time.monotonic() - started, note, setting.is_trial)


def command_of(setting: Setting, part: Part, model: Path | None) -> list[str]:
    """What a part runs."""
    python, json_file = [sys.executable, "-m"], setting.out / f"{part.name}.json"
    if part.program == "tests":
        return [*python, "pytest", "-m", "cuda", "-rs", "--color=no", str(_ROOT / "tests")]
    common = ["--device", setting.device]
    steps, size = setting.steps or part.steps, setting.size or part.size
    common += ["--model", str(model), "--steps", str(steps)]
    if part.program == "throughput":
        return [*python, "ldmcli.bench.throughput", *common, "--size", str(size), "--json", str(json_file), *part.words]
    common += ["--width", str(size), "--height", str(size), "--json-file", str(json_file), "--markdown"]
    common += ["--compile-cache", str(setting.scratch / "compiled"), "--against", ",".join(_able(setting, part))]
    return [*python, "ldmcli", "bench", *common, *part.words]


def summary(out: Path) -> str:
    """The parts that were run, and the targets beside what was seen, by what is in the folder."""
    device = _read_json(out / "device.json") or {}
    memory = f", {device['memory'] / 1e9:.0f} GB" if "memory" in device else ""
    lines = [f"{device.get('name', 'CPU')}{memory}, torch {device.get('torch', '')}", ""]
    lines += ["| part | | seconds | |", "|---|---|---:|---|"]
    results: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        done = _read_json(out / f"{part.name}.part.json")
        outcome = Done(**done) if done else None
        told = f"{outcome.word} | {outcome.seconds:.0f} | {outcome.note}" if outcome else "not run | |"
        lines.append(f"| {part.name}: {part.about} | {told} |")
        found = _read_json(out / f"{part.name}.json")
        if found is not None and part.program == "bench" and outcome and not outcome.trial:
            results[part.name] = found
    return "\n".join([*lines, "", to_markdown(judged(results))])


def _last_word(log: Path) -> str:
    """How a program ended, by what it said: which contenders took no further part, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="backslashreplace").splitlines() if line.strip()]
    lost = [line.partition("warning: ")[2] for line in lines if "takes no further part" in line]
    return printable("; ".join(lost or lines[-1:]), 1000).replace("|", "∣")  # it goes into a table


def _able(setting: Setting, part: Part) -> list[str]:
    """The part's contenders that run on the device."""
    known = PEERS | VARIANTS
    kind = setting.device.partition(":")[0]
    return [name for name in part.against if known[name].device in ("", kind)]


def _model(setting: Setting, part: Part) -> Path | None:
    """The folder of the part's model, whose random weights are written the first time they are needed."""
    if setting.model or not part.family:
        return setting.model
    folder = setting.scratch / part.family
    if not (folder / "model_index.json").is_file():  # it is written last
        _say(f"{part.family}: random weights into {folder} …")
        _groundwork(setting, "weights", part.family, str(folder))
    return folder


def _device(setting: Setting) -> dict[str, Any]:
    """What is known of the device. Raises UsageError where it is not there."""
    try:
        return json.loads(_groundwork(setting, "device", setting.device).splitlines()[-1])
    except LdmError as error:
        raise UsageError(f"this measures on an NVIDIA GPU, and there is none to be had here ({error})") from error


def _groundwork(setting: Setting, *arguments: str) -> str:
    """What groundwork.py prints. Raises LdmError."""
    with Processes(setting.scratch, os.environ) as processes:
        try:
            return processes.run("groundwork", "ldmcli.bench.groundwork", *arguments).out
        except ContenderError as error:
            raise error.cause() from None


def _ended(command: Sequence[str], limit: float, **streams: Any) -> int | None:
    """The exit code of a command; None where it took longer than `limit` seconds and was interrupted."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("LDM_")}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=_ROOT, env=own, **streams)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that is running still: interrupted, it ends those that it started."""
    for stop, seconds in ((lambda: process.send_signal(signal.SIGINT), _GRACE), (process.kill, None)):
        if process.poll() is None:
            stop()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def _say(line: str) -> None:
    print(f"bench-gpu: {line}", file=sys.stderr, flush=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_json(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="python -m ldmcli.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--parts", default="", help=f"which, with spaces between: {names}; all unless given")
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="weights and compiled code; OUT/scratch unless given"
    )
    parser.add_argument("--summary", action="store_true", help="only sum up what is in DIR")
    parser.add_argument("--limit", type=float, default=_LIMIT, help="seconds for one part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, metavar="DIR", help="in place of random weights")
    parser.add_argument("--steps", type=int, help="in place of each part's own number")
    parser.add_argument("--size", type=int, help="pixels, in place of each part's own width and height")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
