"""What `ldm serve` saves: commands with and without it, and pictures of a warm Session, in turn.

    python tests/bench/resident.py [--prompts N] [--steps N] [--model MODEL]

Prints minima and medians in seconds, and what Python itself takes of each command. The server and the commands are
processes of their own, on the CPU in float32; the program's files are compiled, as they are after a first run.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session

LDM = (sys.executable, "-m", "ldmcli")
ANIMALS = ("fox", "owl", "cat", "dog", "whale")


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def computed() -> float:
    """Seconds that processes which have ended took of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(number: int, options: Sequence[str], folder: Path) -> Callable[[], object]:
    """A picture drawn by a command, from Enter to the PNG."""
    words = (*LDM, "txt2img", prompt(number), "-s", str(number), "-o", str(folder), "-q", *options)
    return lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def prompt(number: int) -> str:
    """A prompt like no other of a run."""
    return f"a {ANIMALS[number % len(ANIMALS)]} on a background of colour {number}"


def warm(session: Session, number: int, steps: int) -> Callable[[], object]:
    """A picture of a Session that has drawn before, from the prompt to the PNG."""

    def draw() -> None:
        (picture,) = session.draw([GenerationRequest(prompt(number), seed=number, steps=steps)])
        session.encode(picture)

    return draw


def python(statement: str) -> Callable[[], object]:
    """Python, which starts, does this and ends."""
    return lambda: subprocess.run([sys.executable, "-c", statement], check=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model")
    given = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with which every start compiles the program
    options = ["--steps", str(given.steps), "--device", "cpu", "--dtype", "fp32"]
    options += ["--model", given.model] if given.model else []
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name:
        folder = Path(name)
        os.environ["LDM_SERVER"] = str(folder / "s.sock")
        server = subprocess.Popen([*LDM, "serve", "-q"])
        try:
            while subprocess.run([*LDM, "serve", "--status"], capture_output=True, check=False).returncode:
                time.sleep(0.1)
            measure(given.prompts, given.steps, options, given.model, folder)
        finally:
            server.terminate()
            server.wait()


def measure(prompts: int, steps: int, options: Sequence[str], model: str | None, folder: Path) -> None:
    """Draw every prompt in each way, and print what that took."""
    ways = ("commands alone", "commands with a server", "a warm Session", "python -c pass", "python -c 'import click'")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: list[float] = []
    with Session(ModelSpec(model), RuntimeSpec(device="cpu", dtype="fp32")) as session:
        warm(session, prompts, steps)()
        for number in range(prompts):
            works = (
                command(number, [*options, "--no-server"], folder / "without"),
                command(number, options, folder / "with"),
                warm(session, number, steps),
                python("pass"),
                python("import click"),
            )
            for way, work in zip(ways, works, strict=True):
                before = computed()
                seconds[way].append(timed(work))
                if way == ways[1]:
                    cpu.append(computed() - before)
    for way, each in seconds.items():
        least, median = min(each), statistics.median(each)
        print(f"{way}: least {least:.3f} s, median {median:.3f}, first {each[0]:.3f}, all {sum(each):.2f}")
    served, alone = (seconds[way] for way in ways[1:3])
    over = statistics.median(one - other for one, other in zip(served, alone, strict=True))
    same = all(
        path.read_bytes() == (folder / "with" / path.name).read_bytes() for path in (folder / "without").iterdir()
    )
    print(f"a command with a server computes for {min(cpu):.3f} s itself, in the median {statistics.median(cpu):.3f}")
    least = min(served) - min(alone)
    print(f"over a warm picture: {least:.3f} s between the least, {over:.3f} in the median pair; same bytes: {same}")


if __name__ == "__main__":
    main()
