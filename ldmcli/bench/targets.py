"""What this program is to reach on one GPU, as data, and whether a run of gpu.py saw it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

PASS, MISS, NOT_RUN = "PASS", "MISS", "not run"


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on what one part of gpu.py measures.

    `measure`: "rate" in its clock's rounds a second, "floor" the floor's share of its time, both at least `bound`; at
    most that are the "ratio" of its median time to that of the contender `against`, "peak" that of memory peaks (where:
    `clock`), and "error" that of the distances from the reference.
    """

    what: str
    part: str
    measure: str
    bound: float
    clock: str = "step"
    against: str = ""
    ours: str = "ldm"

    @property
    def at_least(self) -> bool:
        """Whether the bound is from below."""
        return self.measure in ("rate", "floor")

    def limit(self) -> str:
        """The bound in words."""
        unit = {"rate": " it/s", "floor": " of the floor's rate"}.get(self.measure, f" × {self.against}")
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{unit}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target, what was seen of it (None: nothing that counts), and the word for that; `reason` why nothing was."""

    target: Target
    seen: float | None
    word: str
    reason: str = ""


def _beside(name: str, part: str, against: str, bound: float) -> tuple[Target, Target]:
    return (
        Target(f"{name}: a step beside {against}", part, "ratio", bound, against=against),
        Target(f"{name}: an image beside {against}", part, "ratio", bound, "image", against),
    )


def _peaks(name: str, part: str) -> tuple[Target, Target]:
    return (
        Target(f"{name}: GPU memory in use at its peak", part, "peak", 1, "gpu_allocated", "diffusers"),
        Target(f"{name}: GPU memory reserved at its peak", part, "peak", 1, "gpu_reserved", "diffusers"),
    )


_SD15, _BATCH, _SDXL = "SD1.5 512², 50 steps", "SD1.5 512², 16 at once", "SDXL 1024², 30 steps"
TARGETS = (
    Target(f"{_SD15}: guided steps a second", "sd15", "rate", 200),
    *_beside(_SD15, "sd15", "diffusers", 0.45),
    *_beside(_SD15, "compile", "diffusers-compile", 0.75),
    Target(f"{_BATCH}: the best measured rate of products", "batch16", "floor", 0.55),
    *_beside(_BATCH, "batch16", "diffusers", 0.7),
    Target(f"{_SDXL}: guided steps a second", "sdxl", "rate", 30),
    *_beside(_SDXL, "sdxl", "diffusers", 0.65),
    Target(
        "SD1.5 512², 20 steps: a new process to the PNG, nothing cached",
        "cold",
        "ratio",
        0.35,
        "cold",
        "diffusers",
        ours="ldm --no-cache",
    ),
    *_peaks(_SD15, "sd15"),
    *_peaks(_BATCH, "batch16"),
    *_peaks(_SDXL, "sdxl"),
    Target(f"{_SD15}: fp16's error beside that of diffusers", "sd15", "error", 1, against="diffusers"),
    Target(f"{_SDXL}: fp16's error beside that of diffusers", "sdxl", "error", 1, against="diffusers"),
)


def judged(parts: Mapping[str, Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """The verdict on each target, given the JSON of `ldm bench` by part. What a contender did that failed, or that
    drew something else, does not count."""
    return [_judged(target, parts.get(target.part)) for target in targets]


def _judged(target: Target, found: Mapping[str, Any] | None) -> Verdict:
    if found is None:
        return Verdict(target, None, NOT_RUN, f"no results of the part {target.part}")
    contenders = found["contenders"]
    for name in filter(None, (target.ours, target.against)):
        # A record of cold starts alone says nothing of parity: that is the program's own.
        for each in dict.fromkeys((name, name.partition(" ")[0])):
            record = contenders.get(each)
            if record is None:
                return Verdict(target, None, NOT_RUN, f"{each} took no part")
            if record["failure"] is not None:
                return Verdict(target, None, NOT_RUN, f"{each} failed")
            if record["parity"].get("passed") is False:
                return Verdict(target, None, NOT_RUN, f"{each} draws something else")
    seen = _seen(target, contenders[target.ours], contenders.get(target.against))
    if seen is None:
        return Verdict(target, None, NOT_RUN, "not measured")
    reached = seen >= target.bound if target.at_least else seen <= target.bound
    return Verdict(target, seen, PASS if reached else MISS)


def _seen(target: Target, ours: Mapping[str, Any], other: Mapping[str, Any] | None) -> float | None:
    """What was measured for the target; None where anything is missing."""
    if target.measure == "rate":
        own = _median(ours, target.clock)
        return 1 / own if own else None
    if target.measure == "floor":
        times = ours["times_floor"].get(target.clock)
        return 1 / times if times else None
    assert other is not None
    quantity = {"ratio": _median, "peak": _peak, "error": _error}[target.measure]
    own, theirs = quantity(ours, target.clock), quantity(other, target.clock)
    return own / theirs if own is not None and theirs else None


def _median(record: Mapping[str, Any], clock: str) -> float | None:
    summary = record["medians"].get(clock)
    return summary["median"] if summary else None


def _peak(record: Mapping[str, Any], where: str) -> float | None:
    return max(record["peaks"].get(where, ()), default=None)


def _error(record: Mapping[str, Any], _clock: str) -> float | None:
    return record["parity"].get("latents")


def to_markdown(verdicts: Sequence[Verdict]) -> str:
    """A row for each target: its bound, what was seen, the verdict."""
    lines = ["| target | bound | seen | |", "|---|---:|---:|---|"]
    for verdict in verdicts:
        seen = "" if verdict.seen is None else f"{verdict.seen:.3g}"
        word = f"{verdict.word}: {verdict.reason}" if verdict.reason else verdict.word
        lines.append(f"| {verdict.target.what} | {verdict.target.limit()} | {seen} | {word} |")
    return "\n".join(lines)
