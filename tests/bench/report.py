"""What was measured, as Markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.serving import PARITY_STEPS

from ldmcli.bench import PHASES, shown_seconds, shown_size

Record = Mapping[str, Any]
_TITLES = {"cold": "a new process to the PNG on disk", "image": "warm, prompt to PNG", "step": "one U-Net step"}


def passed(results: Mapping[str, Any]) -> bool:
    """Whether no contender failed or draws something else."""
    return not any(map(flawed, results["contenders"].values()))


def flawed(record: Record) -> bool:
    """Whether a contender's times are not to be trusted: it failed, or draws something else."""
    return record["failure"] is not None or record.get("parity", {}).get("passed") is False


def base(results: Mapping[str, Any]) -> str | None:
    """What ratios are to: the first other program, else the first variant of this one."""
    others = [name for name in results["contenders"] if name != "ldm"]
    return next((name for name in others if not name.startswith("ldm-")), others[0] if others else None)


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table for each clock, and for the profile and parity; what was left out or failed."""
    task, machine, floor = results["task"], results["machine"], results["floor"] or {}
    records: Mapping[str, Record] = results["contenders"]
    versions = {k: v for record in records.values() for k, v in record.get("greeting", {}).get("versions", {}).items()}
    parts = [
        f"{results['model']}: {task['width']}×{task['height']}, {task['steps']} steps of DDIM, guidance "
        f"{task['guidance_scale']:g}, {task['batch_size']} at once; {machine.get('gpu') or machine['cpu']}, "
        f"{task['threads']} of {machine['cpus']} CPUs; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    ]
    for clock, title in _TITLES.items():
        found = {name: record for name, record in records.items() if record["samples"].get(clock)}
        rows = [{"contender": _label(n, r), **_cells(clock, n, r, results)} for n, r in found.items()]
        parts.append(_table(f"{clock}: {title}", rows))
    if results["profile"]:
        rows = list(_profile(results["profile"], floor.get("kinds", {})))
        parts.append(_table("profile: one step of ldm by kinds of work", rows))
    compared = [
        {"contender": _label(name, record), "dtype": record["greeting"]["dtype"], **_parity(record["parity"])}
        for name, record in records.items()
        if record.get("parity")
    ]
    parts.append(_table(f"parity: beside ldm in fp32, after {PARITY_STEPS} steps", compared))
    if floor:
        rate = f"{floor['flops_per_second'] / 1e9:,.0f} GFLOP/s ({floor['product']}, {floor['dtype']})"
        times = f"{shown_seconds(floor['step'])} a step, {shown_seconds(floor['image'])} an image"
        parts.append(f"floor: {times}, at the best rate measured, {rate}")
    parts += [f"left out: {name} {why}" for name, why in results["left_out"].items()]
    parts += [f"failed: {name}: {r['failure']}" for name, r in records.items() if r["failure"] is not None]
    return "\n\n".join(filter(None, parts))


def _cells(clock: str, name: str, record: Record, results: Mapping[str, Any]) -> dict[str, str]:
    samples, peaks = record["samples"], {where: max(sizes) for where, sizes in record["peaks"].items()}
    seconds, other, floor = statistics.median(samples[clock]), base(results), results["floor"]

    def ratio(to: str) -> str:
        theirs = results["contenders"][other]["samples"].get(to) if other and other != name else None
        return f"{statistics.median(samples[to]) / statistics.median(theirs):.2f}" if theirs else ""

    ends = f"{shown_seconds(min(samples[clock]))}–{shown_seconds(max(samples[clock]))}"
    cells = {"median": shown_seconds(seconds), "min–max": ends, f"× {other}": ratio(clock)}
    if clock == "cold":
        first = shown_seconds(statistics.median(samples["first_step"]))
        cells |= {"first step": first, f"first step × {other}": ratio("first_step")}
        cells |= {phase: f"{statistics.median(p.get(phase, 0.0) for p in record['phases']):.2f}" for phase in PHASES}
        kept = {"first step peak": "first_step", "peak": "cold"}
    else:
        unit = "pictures/s" if clock == "image" else "picture steps/s"
        cells |= {unit: f"{results['task']['batch_size'] / seconds:.3g}"}
        cells |= {"× floor": f"{seconds / floor[clock]:.2f}" if floor else ""}
        kept = {"peak": "host", "GPU peak": "gpu_allocated", "GPU reserved": "gpu_reserved"}
    return cells | {title: shown_size(peaks[where]) for title, where in kept.items() if peaks.get(where)}


def _parity(found: Mapping[str, Any]) -> dict[str, str]:
    told = {"latents": "{:.1e}", "bound": "{:g}", "max_level": "{} of 255", "mean_level": "{:.3f}"}
    cells = {name.replace("_", " "): form.format(found[name]) for name, form in told.items() if name in found}
    return cells | {"": "passed" if found["passed"] else f"FAILED {found.get('reason', '')}".rstrip()}


def _profile(profile: Mapping[str, Any], floors: Mapping[str, float]) -> Iterator[dict[str, str]]:
    rows = [(kind, of_kind["seconds"], f"{of_kind['calls']:.0f}") for kind, of_kind in profile["kinds"].items()]
    for kind, seconds, calls in [*rows, ("none of these", profile["idle"], ""), ("the step", profile["step"], "")]:
        row = {"work": kind, "ms": f"{seconds * 1e3:.3f}", "share": f"{seconds / profile['step']:.1%}", "calls": calls}
        if floor := floors.get(kind):
            row |= {"floor ms": f"{floor * 1e3:.3f}", "× floor": f"{seconds / floor:.2f}"}
        yield row


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown; columns that are empty in every row are left out, and times that are not to be trusted are struck."""
    names = dict.fromkeys(name for row in rows for name in row)
    header = [name for name in names if any(row.get(name) for row in rows)]
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for row in rows:
        first, *cells = (row.get(name, "") for name in header)
        struck = [f"~~{cell}~~" if cell and "(FAILED)" in first else cell for cell in cells]
        lines.append(f"| {' | '.join([first, *struck])} |")
    return "\n".join(lines) if rows else ""


def _label(name: str, record: Record) -> str:
    return f"{name} (FAILED)" if flawed(record) else name
