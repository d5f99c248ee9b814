"""Results as tables for a terminal, as Markdown, and as JSON with every sample."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ldmcli.bench import parity
from ldmcli.bench.measure import Record, median_phases, ratio
from ldmcli.bench.plan import Results
from ldmcli.bench.task import describe

_PHASES = ("imports", "weights", "text", "denoise", "vae", "png", "rest")
_TITLES = {
    "cold": "cold: a new process to the PNG on disk",
    "image": "image: warm, prompt to PNG{pictures}",
    "step": "step: one {guided} U-Net step{pictures}",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table of text; the first column is the contender's name. `flawed` are the rows not to be trusted."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    flawed: frozenset[int] = frozenset()


def to_text(results: Results) -> str:
    """For a terminal: what was measured, the tables, what the floor is and what went wrong."""
    parts = [_heading(results), *(_as_text(table) for table in tables(results)), *_notes(results)]
    return "\n\n".join(parts)


def to_markdown(results: Results) -> str:
    """The same for a README."""
    parts = [
        _heading(results).replace("\n", "; "),
        *(_as_markdown(table) for table in tables(results)),
        *_notes(results),
    ]
    return "\n\n".join(parts)


def to_dict(results: Results) -> dict[str, Any]:
    """All there is, as plain JSON values: raw samples in seconds, sizes in bytes."""
    contenders = {
        name: dataclasses.asdict(record)
        | {
            "medians": {clock: dataclasses.asdict(summary) for clock, summary in _summaries(record).items()},
            "ratios": {clock: ratio(record, results.base, clock) for clock in record.samples},
            "times_floor": {clock: _over_floor(results, record, clock) for clock in ("image", "step")},
        }
        for name, record in results.records.items()
    }
    return {
        "model": results.name,
        "task": describe(results.task),
        "machine": results.machine,
        "processes": "alive together" if results.together else "one at a time",
        "ratios_to": results.base.name if results.base else None,
        "floor": results.floor,
        "profile": results.profile,
        "contenders": contenders,
        "passed": not results.flawed,
    }


def tables(results: Results) -> Iterator[Table]:
    """One table for each clock that ran, one for the profile, and one for parity where there are peers or 16 bits."""
    task = results.task
    for clock, cells in (("cold", _cold), ("image", _image), ("step", _step)):
        records = [record for record in results.records.values() if record.summary(clock)]
        if records:
            pictures = f", {task.batch_size} pictures at once" if task.batch_size > 1 else ""
            title = _TITLES[clock].format(guided="guided" if task.guided else "unguided", pictures=pictures)
            yield _table(title, records, results, cells)
    if results.profile:
        yield _profile(results.profile, (results.floor or {}).get("kinds", {}))
    compared = [record for record in results.records.values() if record.parity]
    if len(compared) > 1 or any(record.greeting.get("dtype") != "fp32" for record in compared):
        title = f"parity: latents and picture beside ldm in fp32, after {parity.STEPS} steps"
        yield _table(title, compared, results, _parity)


Cells = Callable[[Record, Results], dict[str, str]]


def _table(title: str, records: Sequence[Record], results: Results, cells: Cells) -> Table:
    """Columns that are empty in every row are left out."""
    rows = [{"contender": _label(record), **cells(record, results)} for record in records]
    header = tuple(name for name in rows[0] if any(row.get(name) for row in rows))
    flawed = frozenset(i for i, record in enumerate(records) if record.flawed)
    return Table(title, header, tuple(tuple(row.get(name) or "" for name in header) for row in rows), flawed)


def _cold(record: Record, results: Results) -> dict[str, str]:
    phases = median_phases(record)
    first = record.summary("first_step")
    to_first = ratio(record, results.base, "first_step")
    return {
        **_times(record, results, "cold"),
        "first step": _seconds(first.median) if first else "",
        "× first step": _ratio(to_first),
        "peak by then": _size(record.peak("first_step")),
        **{name: f"{phases[name]:.2f}" if name in phases else "" for name in _PHASES},
        "peak memory": _size(record.peak("cold")),
    }


def _image(record: Record, results: Results) -> dict[str, str]:
    summary = record.summary("image")
    assert summary is not None
    return {
        **_times(record, results, "image"),
        "images/s": f"{results.task.batch_size / summary.median:.3g}",
        "× floor": _ratio(_over_floor(results, record, "image")),
        **_memory(record),
    }


def _step(record: Record, results: Results) -> dict[str, str]:
    summary = record.summary("step")
    assert summary is not None
    memory = {} if record.summary("image") else _memory(record)
    pictures = results.task.batch_size
    return {
        **_times(record, results, "step"),
        "it/s": f"{1 / summary.median:.3g}",
        "picture it/s": f"{pictures / summary.median:.3g}" if pictures > 1 else "",
        "× floor": _ratio(_over_floor(results, record, "step")),
        **memory,
    }


def _parity(record: Record, _results: Results) -> dict[str, str]:
    found = record.parity
    return {
        "dtype": record.greeting.get("dtype", ""),
        "latents": f"{found['latents']:.1e}" if "latents" in found else "",
        "bound": f"{found['bound']:g}" if "bound" in found else "",
        "largest level": f"{found['max_level']} of 255" if "max_level" in found else "",
        "mean level": f"{found['mean_level']:.3f}" if "mean_level" in found else "",
        "parity": "passed" if found["passed"] else f"FAILED {found.get('reason', '')}".rstrip(),
    }


def _times(record: Record, results: Results, clock: str) -> dict[str, str]:
    summary = record.summary(clock)
    assert summary is not None
    base = results.base
    return {
        "median": _seconds(summary.median),
        "min–max": f"{_seconds(summary.low)}–{_seconds(summary.high)}",
        f"× {base.name}" if base else "×": _ratio(ratio(record, base, clock)),
    }


def _memory(record: Record) -> dict[str, str]:
    return {
        "peak memory": _size(record.peak("host")),
        "GPU peak": _size(record.peak("gpu_allocated")),
        "GPU reserved": _size(record.peak("gpu_reserved")),
    }


def _profile(profile: dict[str, Any], floors: dict[str, float]) -> Table:
    """What a step of `ldm` spends its time on, beside the floor of each kind of work that has one."""
    rows = [(kind, of_kind["seconds"], f"{of_kind['calls']:.0f}") for kind, of_kind in profile["kinds"].items()]
    rows += [("none of these", profile["idle"], ""), ("the step", profile["step"], "")]
    cells = [
        (
            kind,
            f"{seconds * 1000:.3f}",
            f"{seconds / profile['step']:.1%}",
            calls,
            f"{floors[kind] * 1000:.3f}" if kind in floors else "",
            f"{seconds / floors[kind]:.2f}" if floors.get(kind) else "",
        )
        for kind, seconds, calls in rows
    ]
    header = ("work", "ms", "share", "calls", "floor ms", "× floor")
    count = len(header) if floors else len(header) - 2
    return Table("profile: one step of ldm by kinds of work", header[:count], tuple(row[:count] for row in cells))


def _over_floor(results: Results, record: Record, clock: str) -> float | None:
    summary = record.summary(clock)
    return summary.median / results.floor[clock] if results.floor and summary else None


def _summaries(record: Record) -> dict[str, Any]:
    found = {clock: record.summary(clock) for clock in record.samples}
    return {clock: summary for clock, summary in found.items() if summary}


def _label(record: Record) -> str:
    return f"{record.name} (FAILED)" if record.flawed else record.name


def _heading(results: Results) -> str:
    task = results.task
    greetings = [record.greeting for record in results.records.values() if record.greeting]
    versions: dict[str, str] = {}
    for greeting in greetings:
        versions |= greeting["versions"]
    what = f"{results.name}: {task.width}×{task.height}, {task.steps} steps of DDIM, guidance {task.guidance_scale:g}"
    what += f", {task.batch_size} pictures at once" if task.batch_size > 1 else ""
    where = greetings[0].get("gpu") or results.machine["cpu"]
    how = f"{where}, {task.threads} {'thread' if task.threads == 1 else 'threads'}, {results.machine['cpus']} CPUs"
    held = [
        f"{record.name} {_size(record.greeting.get('weights'))} ({record.greeting['dtype']})"
        for record in results.records.values()
        if record.greeting
    ]
    return "\n".join(
        [what, how, ", ".join(f"{k} {v}" for k, v in versions.items()), f"weights in memory: {', '.join(held)}"]
    )


def _notes(results: Results) -> Iterator[str]:
    if results.floor:
        floor = results.floor
        yield (
            f"floor: {_seconds(floor['step'])} a step, {_seconds(floor['image'])} an image, at the best rate measured "
            f"in {floor['dtype']}, {floor['flops_per_second'] / 1e9:,.0f} GFLOP/s ({floor['product']})"
        )
    failures = [f"{record.name} {record.failure}" for record in results.records.values() if record.failure]
    if failures:
        yield "failed: " + "\n        ".join(failures)


def _as_text(table: Table) -> str:
    cells = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
    lines = ["  ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(row)).rstrip() for row in cells]
    return "\n".join([table.title, *lines])


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _as_markdown(table: Table) -> str:
    """Times not to be trusted are struck."""
    lines = [f"| {' | '.join(table.header)} |", f"|---|{'---:|' * (len(table.header) - 1)}"]
    for i, row in enumerate(table.rows):
        name, *cells = row
        struck = [f"~~{cell}~~" if cell and i in table.flawed else cell for cell in cells]
        lines.append(f"| {' | '.join([name, *struck])} |")
    return "\n".join([f"**{table.title}**", "", *lines])


def _seconds(seconds: float) -> str:
    """With three digits or so: 12.3 s, 1.23 s, 12.3 ms."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.1f} s" if seconds >= 100 else f"{seconds:.3g} s" if seconds >= 1 else f"{seconds:.3f} s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
