"""What was measured, as Markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import parity

from ldmcli.bench import PHASES, shown_seconds, shown_size

Record = Mapping[str, Any]


def passed(results: Mapping[str, Any]) -> bool:
    """Whether no contender failed or draws something else."""
    return not any(flawed(record) for record in results["contenders"].values())


def flawed(record: Record) -> bool:
    """Whether a contender's times are not to be trusted: it failed, or draws something else."""
    return record["failure"] is not None or record.get("parity", {}).get("passed") is False


def base(results: Mapping[str, Any]) -> str | None:
    """What ratios are to: the first other program, else the first variant of this one."""
    others = [name for name in results["contenders"] if name.partition(" ")[0] != "ldm"]
    return next((name for name in others if not name.startswith("ldm-")), others[0] if others else None)


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table for each clock, and for the profile and parity; what was left out or failed."""
    task, machine = results["task"], results["machine"]
    versions = {k: v for record in results["contenders"].values() for k, v in _versions(record).items()}
    parts = [
        f"{results['model']}: {task['width']}×{task['height']}, {task['steps']} steps of DDIM, guidance "
        f"{task['guidance_scale']:g}, {task['batch_size']} at once; {machine.get('gpu') or machine['cpu']}, "
        f"{task['threads']} of {machine['cpus']} CPUs; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    ]
    titles = {"cold": "a new process to the PNG on disk", "image": "warm, prompt to PNG", "step": "one U-Net step"}
    for clock, title in titles.items():
        found = {name: record for name, record in results["contenders"].items() if record["samples"].get(clock)}
        if found:
            rows = [{"contender": _label(n, r), **_cells(clock, n, r, results)} for n, r in found.items()]
            parts.append(_table(f"{clock}: {title}", rows))
    if results["profile"]:
        floors = (results["floor"] or {}).get("kinds", {})
        parts.append(_table("profile: one step of ldm by kinds of work", list(_profile(results["profile"], floors))))
    compared = [
        {"contender": _label(name, record), "dtype": record["greeting"]["dtype"], **_parity(record["parity"])}
        for name, record in results["contenders"].items()
        if record.get("parity")
    ]
    parts.append(_table(f"parity: beside ldm in fp32, after {parity.STEPS} steps", compared) if compared else "")
    floor = results["floor"]
    if floor:
        rate = f"{floor['flops_per_second'] / 1e9:,.0f} GFLOP/s ({floor['product']}, {floor['dtype']})"
        times = f"{shown_seconds(floor['step'])} a step, {shown_seconds(floor['image'])} an image"
        parts.append(f"floor: {times}, at the best rate measured, {rate}")
    parts += [f"left out: {name} {why}" for name, why in results["left_out"].items()]
    parts += [f"failed: {n}: {r['failure']}" for n, r in results["contenders"].items() if r["failure"] is not None]
    return "\n\n".join(filter(None, parts))


def _cells(clock: str, name: str, record: Record, results: Mapping[str, Any]) -> dict[str, str]:
    samples, peaks = record["samples"], {where: max(sizes) for where, sizes in record["peaks"].items()}
    seconds, other = statistics.median(samples[clock]), base(results)
    ends = f"{shown_seconds(min(samples[clock]))}–{shown_seconds(max(samples[clock]))}"
    cells = {"median": shown_seconds(seconds), "min–max": ends, f"× {other}": ratio(results, name, other, clock)}
    if clock == "cold":
        first = ratio(results, name, other, "first_step")
        cells |= {"first step": shown_seconds(statistics.median(samples["first_step"])), f"first step × {other}": first}
        cells |= {phase: f"{statistics.median(p.get(phase, 0.0) for p in record['phases']):.2f}" for phase in PHASES}
        kept = {"first step peak": "first_step", "peak": "cold"}
    else:
        at_once = results["task"]["batch_size"]
        floor = results["floor"]
        cells |= {"pictures/s" if clock == "image" else "picture steps/s": f"{at_once / seconds:.3g}"}
        cells |= {"× floor": f"{seconds / floor[clock]:.2f}" if floor else ""}
        kept = {"peak": "host", "GPU peak": "gpu_allocated", "GPU reserved": "gpu_reserved"}
    return cells | {title: shown_size(peaks[where]) for title, where in kept.items() if peaks.get(where)}


def ratio(results: Mapping[str, Any], name: str, other: str | None, clock: str) -> str:
    """One contender's median over the other's; "" where either has none."""
    ours, theirs = (results["contenders"].get(each or "", {}).get("samples", {}).get(clock) for each in (name, other))
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}" if ours and theirs and name != other else ""


def _parity(found: Mapping[str, Any]) -> dict[str, str]:
    return {
        "latents": f"{found['latents']:.1e}" if "latents" in found else "",
        "bound": f"{found['bound']:g}" if "bound" in found else "",
        "largest level": f"{found['max_level']} of 255" if "max_level" in found else "",
        "mean level": f"{found['mean_level']:.3f}" if "mean_level" in found else "",
        "": "passed" if found["passed"] else f"FAILED {found.get('reason', '')}".rstrip(),
    }


def _profile(profile: Mapping[str, Any], floors: Mapping[str, float]) -> Iterator[dict[str, str]]:
    rows = [(kind, of_kind["seconds"], f"{of_kind['calls']:.0f}") for kind, of_kind in profile["kinds"].items()]
    for kind, seconds, calls in [*rows, ("none of these", profile["idle"], ""), ("the step", profile["step"], "")]:
        share = f"{seconds / profile['step']:.1%}"
        floor = (
            {"floor ms": f"{floors[kind] * 1e3:.3f}", "× floor": f"{seconds / floors[kind]:.2f}"}
            if floors.get(kind)
            else {}
        )
        yield {"work": kind, "ms": f"{seconds * 1e3:.3f}", "share": share, "calls": calls, **floor}


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown; columns that are empty in every row are left out, and times that are not to be trusted are struck."""
    names = dict.fromkeys(name for row in rows for name in row)
    header = [name for name in names if any(row.get(name) for row in rows)]
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for row in rows:
        first, *cells = (row.get(name, "") for name in header)
        struck = [f"~~{cell}~~" if cell and "(FAILED)" in first else cell for cell in cells]
        lines.append(f"| {' | '.join([first, *struck])} |")
    return "\n".join(lines)


def _label(name: str, record: Record) -> str:
    return f"{name} (FAILED)" if flawed(record) else name


def _versions(record: Record) -> Mapping[str, str]:
    found: Mapping[str, str] = record.get("greeting", {}).get("versions", {})
    return found
