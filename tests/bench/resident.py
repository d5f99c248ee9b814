"""What `ldm serve` saves: twenty commands in a loop and the first picture, with and without it; and a warm Session.

    python tests/bench/resident.py [--prompts N] [--steps N] [--model MODEL]

Prints medians in seconds. The server and the commands are processes of their own, on the CPU in float32.
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


def warm(prompts: int, steps: int, model: str | None) -> list[float]:
    """Seconds of each picture, from prompt to PNG, of a Session that has drawn before."""
    with Session(ModelSpec(model), RuntimeSpec(device="cpu", dtype="fp32")) as session:

        def draw(number: int) -> None:
            (picture,) = session.draw([GenerationRequest(prompt(number), seed=number, steps=steps)])
            session.encode(picture)

        draw(prompts)
        return [timed(lambda number=number: draw(number)) for number in range(prompts)]  # type: ignore[misc]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model")
    given = parser.parse_args()
    options = ["--steps", str(given.steps), "--device", "cpu", "--dtype", "fp32"]
    options += ["--model", given.model] if given.model else []
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name:
        folder = Path(name)
        os.environ["LDM_SERVER"] = str(folder / "s.sock")
        without = [timed(command(number, options, folder / "without")) for number in range(given.prompts)]
        server = subprocess.Popen([*LDM, "serve", "-q"])
        try:
            while subprocess.run([*LDM, "serve", "--status"], capture_output=True, check=False).returncode:
                time.sleep(0.1)
            before = computed()
            served = [timed(command(number, options, folder / "with")) for number in range(given.prompts)]
            client = (computed() - before) / given.prompts
        finally:
            server.terminate()
            server.wait()
        same = all(
            path.read_bytes() == (folder / "with" / path.name).read_bytes() for path in (folder / "without").iterdir()
        )
    alone = warm(given.prompts, given.steps, given.model)
    for what, seconds in (("commands alone", without), ("commands with a server", served), ("a warm Session", alone)):
        print(f"{what}: {statistics.median(seconds):.3f} s a picture, first {seconds[0]:.3f}, all {sum(seconds):.2f}")
    over = statistics.median(served) - statistics.median(alone)
    print(f"a command with a server computes for {client:.3f} s itself")
    print(f"a command with a server over a warm picture: {over:.3f} s; the same bytes: {same}")


if __name__ == "__main__":
    main()
