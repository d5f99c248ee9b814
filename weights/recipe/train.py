"""The whole recipe: every stage in its order, each a process of its own, ending with a model that `ldm` draws with.

A stage whose result is in the run's folder is left out, and the long ones, `vae`, `decoder` and `unet`, go on from
their last checkpoint: after a kill the same command goes on where it stopped. What it does is printed and kept in
train.log.

    python weights/recipe/train.py                               # on a CPU, about two hours
    python weights/recipe/train.py --preset gpu --device cuda
    python weights/recipe/train.py --from unet                   # stage 2 anew, from the autoencoder that is there
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from presets import PRESETS, Preset, recipe_arguments

from ldmcli.speed.cpu.threads import available_cores

RECIPE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    script: str
    result: str  # in the run's folder; written last
    others: tuple[str, ...] = ()  # what else to remove before the stage is done anew
    minutes: str | None = None  # the preset's budget; such a stage has a checkpoint, and shares its batch in a team


STAGES = (
    Stage("data", "data.py", "dataset.pt"),
    Stage("tokenizer", "tokenizer.py", "tokenizer/tokenizer_config.json", ("tokenizer", "known_words.txt")),
    Stage("clip", "train_clip.py", "clip.pt"),
    Stage("vae", "train_vae.py", "vae.pt", ("vae_checkpoint.pt",), "vae_minutes"),
    Stage("decoder", "train_decoder.py", "decoder.pt", ("decoder_checkpoint.pt",), "decoder_minutes"),
    Stage("unet", "train_unet.py", "model.pt", ("unet_checkpoint.pt", "latents.pt"), "unet_minutes"),
)


class Journal:
    """What the run does: printed, and appended to train.log with the time of day."""

    def __init__(self, run: Path) -> None:
        self.path = run / "train.log"

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@contextlib.contextmanager
def only_run(run: Path) -> Iterator[int]:
    """Hold the run's folder, made if it is missing. Stages inherit the lock by its file descriptor: one that outlived a
    killed train.py still writes its checkpoint, and must end before it is started again."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "train.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"train.py: another training is at work in {run}; wait for it, stop it, or choose another --out."
            ) from None
        yield lock.fileno()


def check_same_run(args: argparse.Namespace) -> None:
    """Refuse to go on with another preset, seed or optimizer than the folder's stages were begun with."""
    note = args.out / "train.json"
    asked = {"preset": args.preset, "seed": args.seed, "optimizer": args.optimizer}
    if note.exists() and args.first != STAGES[0].name:
        begun = json.loads(note.read_text(encoding="utf-8"))
        if begun != asked:
            told = " ".join(f"--{name} {value}" for name, value in begun.items())
            raise SystemExit(
                f"train.py: {args.out} holds a training with {told}; go on with these, choose another --out, or begin "
                "anew with --from data."
            )
    note.write_text(json.dumps(asked) + "\n", encoding="utf-8")


def remove_results(run: Path, first: str) -> None:
    """Remove what the stage `first` and all after it left; logs stay."""
    names = [stage.name for stage in STAGES]
    for stage in STAGES[names.index(first) :] if first in names else ():
        for name in (stage.result, *stage.others):
            if (run / name).is_dir():
                shutil.rmtree(run / name)
            else:
                (run / name).unlink(missing_ok=True)


def team_size(args: argparse.Namespace, preset: Preset) -> int:
    """How many processes train the long stages: as asked, else as many as there are cores and as both batches can be
    shared among evenly; one on a GPU."""
    if args.processes is not None:
        return args.processes
    most = 1 if args.device.startswith("cuda") else available_cores()
    return max(n for n in range(1, most + 1) if preset.vae_batch % n == 0 and preset.unet_batch % n == 0)


def command_of(stage: Stage, args: argparse.Namespace) -> list[str]:
    preset = PRESETS[args.preset]
    command = [str(RECIPE / stage.script), "--preset", args.preset, "--out", str(args.out), "--device", args.device]
    command += ["--seed", str(args.seed)]
    if stage.name == "data" and args.font is not None:
        command += ["--font", str(args.font)]
    if stage.minutes is None:
        return [sys.executable, *command]
    command += [
        "--optimizer",
        args.optimizer,
        "--minutes",
        f"{args.minutes_scale * getattr(preset, stage.minutes):g}",
        "--resume",
    ]
    size = team_size(args, preset)
    if size == 1:
        return [sys.executable, *command]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *command]


def run_to_end(command: list[str], lock: int) -> int:
    """The exit status of a command. Ctrl-C ends it before it ends this process: it is in a session of its own, so that
    it is asked once, and a team's first process asks the others."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {})
    child = subprocess.Popen(command, env=environment, pass_fds=(lock,), start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise


def check_font(args: argparse.Namespace) -> None:
    from data import DEFAULT_FONT  # imports torch, which nothing else here needs

    font = args.font or DEFAULT_FONT
    if not font.is_file():
        raise SystemExit(
            f"train.py: the emoji font {font} is missing; install it (Debian: apt-get install fonts-noto-color-emoji), "
            "or name it with --font."
        )


def run_stages(args: argparse.Namespace, journal: Journal, lock: int) -> None:
    """All stages that have no result yet, then the export."""
    again = resume_command(sys.argv)
    for stage in STAGES:
        if (args.out / stage.result).exists():
            journal(f"{stage.name}: {args.out / stage.result} is there, left out")
            continue
        if stage.name == "data":
            check_font(args)
        run_stage(stage.name, command_of(stage, args), journal, lock, again)
    export = [sys.executable, str(RECIPE / "export.py"), "--run", str(args.out), "--folder", str(args.folder)]
    run_stage("export", export, journal, lock, again)
    journal(f'done; draw with: ldm txt2img --model {args.folder} "a red apple on a blue background"')


def run_stage(name: str, command: list[str], journal: Journal, lock: int, again: str) -> None:
    journal(f"{name}: {shlex.join(command)}")
    start = time.monotonic()
    try:
        status = run_to_end(command, lock)
    except KeyboardInterrupt:
        journal(f"{name}: interrupted after {time.monotonic() - start:.0f} s; to go on: {again}")
        raise SystemExit(130) from None
    if status != 0:
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        journal(f"{name}: {ended} after {time.monotonic() - start:.0f} s; once that is mended, go on with: {again}")
        raise SystemExit(1)
    journal(f"{name}: took {time.monotonic() - start:.0f} s")


def resume_command(argv: list[str]) -> str:
    """The same command without --from, which would begin its stage anew."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--from":
            next(words, None)
        elif not word.startswith("--from="):
            kept.append(word)
    return shlex.join([sys.executable, *kept])


def train_arguments() -> argparse.ArgumentParser:
    parser = recipe_arguments(__doc__)
    parser.allow_abbrev = False  # so that resume_command knows --from
    parser.add_argument("--folder", type=Path, help="where the model goes (default: tiny-emoji in the run's folder)")
    names = [*(stage.name for stage in STAGES), "export"]
    parser.add_argument("--from", dest="first", choices=names, help="do this stage and all after it anew")
    parser.add_argument("--processes", type=int, help="of one thread each, on a CPU (default: one for each core)")
    parser.add_argument("--minutes-scale", type=float, default=1.0, help="times the preset's budgets (default: 1)")
    parser.add_argument("--font", type=Path, help="the colour emoji font (default: Debian's place for it)")
    return parser


def main() -> None:
    parser = train_arguments()
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    if args.processes is not None:
        if args.processes < 1 or preset.vae_batch % args.processes or preset.unet_batch % args.processes:
            parser.error(f"--processes must share batches of {preset.vae_batch} and {preset.unet_batch} evenly")
        if args.processes > 1 and args.device.startswith("cuda"):
            parser.error("--processes is for a CPU; a GPU takes one")
    if args.minutes_scale <= 0:
        parser.error("--minutes-scale must be above 0")
    args.folder = args.folder or args.out / "tiny-emoji"

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stage, too
    with only_run(args.out) as lock:
        check_same_run(args)
        if args.first is not None:
            remove_results(args.out, args.first)
        run_stages(args, Journal(args.out), lock)


if __name__ == "__main__":
    main()
