"""What this program is to reach on one GPU, as data, and whether a campaign saw it."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.report import flawed


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on what a part of the campaign measures (gpu.py).

    `measure`: "rate", the clock's rounds a second, and "floor", the floor's share of its time, are at least `bound`; at
    most that are the "ratio" of its median to that of the contender `against`, "peak" that of memory peaks (`clock`
    says of which memory), and "error" that of the distances from the reference.
    """

    what: str
    part: str
    measure: str
    bound: float
    clock: str = "step"
    against: str = "diffusers"
    ours: str = "ldm"


_SD15, _BATCH, _SDXL = "SD1.5 512², 50 steps", "SD1.5 512², 16 at once", "SDXL 1024², 30 steps"
TARGETS = (
    Target(f"{_SD15}: guided steps a second", "sd15", "rate", 150),
    Target(f"{_SD15}: a step", "sd15", "ratio", 0.45),
    Target(f"{_SD15}: an image", "sd15", "ratio", 0.45, "image"),
    Target(f"{_SD15}: a step", "compile", "ratio", 0.75, against="diffusers-compile"),
    Target(f"{_SD15}: an image", "compile", "ratio", 0.75, "image", "diffusers-compile"),
    Target(f"{_BATCH}: a step's share of the best measured rate", "batch16", "floor", 0.55),
    Target(f"{_BATCH}: a step", "batch16", "ratio", 0.7),
    Target(f"{_BATCH}: an image", "batch16", "ratio", 0.7, "image"),
    Target(f"{_SDXL}: guided steps a second", "sdxl", "rate", 30),
    Target(f"{_SDXL}: a step", "sdxl", "ratio", 0.65),
    Target(f"{_SDXL}: an image", "sdxl", "ratio", 0.65, "image"),
    Target("SD1.5 512², 20 steps: cold, nothing cached", "cold", "ratio", 0.35, "cold", ours="ldm-no-cache"),
    *(
        Target(f"{name}: GPU memory {where} at its peak", part, "peak", 1, f"gpu_{where}")
        for name, part in ((_SD15, "sd15"), (_BATCH, "batch16"), (_SDXL, "sdxl"))
        for where in ("allocated", "reserved")
    ),
    Target(f"{_SD15}: fp16's error", "sd15", "error", 1),
    Target(f"{_SDXL}: fp16's error", "sdxl", "error", 1),
)


def judged(target: Target, found: Mapping[str, Any] | None) -> tuple[float | None, str]:
    """What was seen of a target in a part's results, and the word for that. What a contender did that failed, or that
    drew something else, does not count."""
    if found is None:
        return None, "not run"
    records = found["contenders"]
    compared = target.measure in ("ratio", "peak", "error")
    names = [target.ours, *([target.against] if compared else [])]
    for name in names:
        if name not in records or flawed(records[name]):
            return None, f"not run: {name} {'took no part' if name not in records else 'failed'}"
    values = [_value(target, records[name], found["floor"]) for name in names]
    if None in values:
        return None, "not run: not measured"
    seen = values[0] / values[1] if compared else values[0]
    return seen, "PASS" if (seen <= target.bound if compared else seen >= target.bound) else "MISS"


def _value(target: Target, record: Mapping[str, Any], floor: Mapping[str, Any] | None) -> float | None:
    """The number of one contender that the target is about."""
    if target.measure == "error":
        return record["parity"].get("latents")
    if target.measure == "peak":
        return max(record["peaks"].get(target.clock, ()), default=None)
    samples = record["samples"].get(target.clock)
    if not samples or (target.measure == "floor" and not floor):
        return None
    median = statistics.median(samples)
    if target.measure == "floor":
        return floor[target.clock] / median
    return 1 / median if target.measure == "rate" else median


def to_markdown(parts: Mapping[str, Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> str:
    """A row for each target, given the results by part."""
    lines = ["| target | bound | seen | |", "|---|---:|---:|---|"]
    for target in targets:
        seen, word = judged(target, parts.get(target.part))
        unit = {"rate": "≥ {:g} it/s", "floor": "≥ {:g} of it"}.get(target.measure, f"≤ {{:g}} × {target.against}")
        shown = "" if seen is None else f"{seen:.3g}"
        lines.append(f"| {target.what} | {unit.format(target.bound)} | {shown} | {word} |")
    return "\n".join(lines)
