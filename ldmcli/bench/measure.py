"""What was measured of each contender, and the numbers that tell it: median, spread, ratio."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

CLOCKS = ("cold", "image", "step")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The middle and the ends of some samples, in their unit, and how many there are."""

    median: float
    low: float
    high: float
    runs: int


@dataclasses.dataclass
class Record:
    """All that is known of one contender. Samples are seconds by clock (`cold`, `first_step`, `image`, `step`), phases
    those of each cold run, peaks bytes by where (`cold`; `first_step`, of a cold run until then; `host`,
    `gpu_allocated`, `gpu_reserved`). `greeting` is what it said of itself, `parity` how far it is from the reference;
    `failure` why it did not go on."""

    name: str
    greeting: dict[str, Any] = dataclasses.field(default_factory=dict)
    parity: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: str | None = None
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    peaks: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def flawed(self) -> bool:
        """Whether its times are not to be trusted: it failed, or draws something else."""
        return self.failure is not None or self.parity.get("passed") is False

    def add(self, clock: str, *seconds: float) -> None:
        """Note samples."""
        self.samples.setdefault(clock, []).extend(seconds)

    def note_peak(self, where: str, size: int | None) -> None:
        """Note a peak of memory, if it could be told."""
        if size is not None:
            self.peaks.setdefault(where, []).append(size)

    def summary(self, clock: str) -> Summary | None:
        """Of one clock's samples; None where there are none."""
        samples = self.samples.get(clock)
        return summarize(samples) if samples else None

    def peak(self, where: str) -> int | None:
        """The largest peak noted there."""
        return max(self.peaks.get(where, ()), default=None)


def summarize(samples: Sequence[float]) -> Summary:
    """Median, smallest, largest and number of one sample or more."""
    return Summary(statistics.median(samples), min(samples), max(samples), len(samples))


def ratio(record: Record, base: Record | None, clock: str) -> float | None:
    """The record's median over the base's; None where either has none, or the base is the record itself."""
    ours, theirs = record.summary(clock), base.summary(clock) if base else None
    if ours is None or theirs is None or record is base or theirs.median == 0:
        return None
    return ours.median / theirs.median


def median_phases(record: Record) -> dict[str, float]:
    """The median of each phase over the cold runs, in the order of the first; phases of no run are left out."""
    names = dict.fromkeys(name for phases in record.phases for name in phases)
    return {name: statistics.median(p.get(name, 0.0) for p in record.phases) for name in names}
