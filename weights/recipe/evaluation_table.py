"""evaluate.py's results: kept in a JSON file as they come, and as Markdown tables."""

import json
import math
import os
from pathlib import Path

CHECKS = ("real", "guidance", "negatives", "samplers")  # in the order in which they are worth their time


class Results:
    """What was measured for one model and its settings, in a file that may hold others' too."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._all: dict[str, dict[str, dict]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._own = self._all.setdefault(identity, {})

    def __contains__(self, key: str) -> bool:
        return key in self._own

    def __getitem__(self, key: str) -> dict:
        return self._own[key]

    def keep(self, key: str, found: dict) -> None:
        """Add a result and write the file, so that a stop at any moment leaves the old file or the new one."""
        self._own[key] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self._all, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def show(self, key: str) -> None:
        """Print a result in one line."""
        found = self[key]
        words = [f"{name} {_plain(value)}" for name, value in found.items() if name not in ("right", "missed", "rows")]
        words += [str(row) for row in found.get("rows", ())]
        missed = ", ".join(f"{name} {count}" for name, count in list(found.get("missed", {}).items())[:5])
        print(f"{key}: {'; '.join(words)}{'; missed: ' + missed if missed else ''}", flush=True)

    def cells(self) -> list[tuple[str, int, float]]:
        """Sampler, steps and guidance of the cells that are there, sorted by guidance, sampler and steps."""
        keys = [key.split() for key in self._own if key.split()[0] in ("ddim", "plms")]
        cells = [(sampler, int(steps), float(guidance)) for sampler, steps, guidance in keys]
        return sorted(cells, key=lambda cell: (cell[2], cell[0], cell[1]))


def _plain(value: float | list[float]) -> str:
    return " / ".join(f"{part:.3f}" for part in value) if isinstance(value, list) else f"{value:.4g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_SCORES = ["object, seen", "object, held out", "background, seen", "background, held out", "Fréchet"]


def _scores(found: dict) -> list[str]:
    shares = [*found["object"], *found["background"]]
    return [*(f"{share:.3f}" for share in shares), f"{found['frechet']:.1f}"]


def _varied(found: dict) -> list[str]:
    return [f"{found[name]:.1f}" for name in ("difference", "place", "extent")]


def _guidance_table(results: Results) -> str:
    rows = []
    for sampler, steps, guidance in results.cells():
        if (sampler, steps) == ("ddim", 25):
            key = f"varied {guidance:g}"
            between = _varied(results[key]) if key in results else ["–"] * 3
            rows.append([f"{guidance:g}", *_scores(results[f"ddim 25 {guidance:g}"]), *between])
    for key, title in (("real", "real pictures"), ("vae", "real, through the VAE")):
        if key in results:
            rows.append([title, *_scores(results[key]), *(_varied(results[key]) if key == "real" else ["–"] * 3)])
    return _table(["guidance", *_SCORES, "between seeds: difference", "place", "size"], rows)


def _sampler_table(results: Results) -> str:
    rows = []
    cells = results.cells()
    compared = {guidance for sampler, _, guidance in cells if sampler == "plms"}
    for sampler, steps, guidance in (cell for cell in cells if cell[2] in compared):
        found, best = results[f"{sampler} {steps} {guidance:g}"], f"ddim 50 {guidance:g}"
        against = _against(found["right"], results[best]["right"]) if best in results else "–"
        rows.append([f"{guidance:g}", sampler.upper(), str(steps), *_scores(found), against])
    return _table(["guidance", "sampler", "steps", *_SCORES, "both right only here / only by DDIM 50"], rows)


def _against(one: str, other: str) -> str:
    pairs = list(zip(one, other, strict=True))
    return f"{pairs.count(('1', '0'))} / {pairs.count(('0', '1'))}"


def _negative_table(rows: list[dict]) -> str:
    shares = [
        [row["prompt"], row["negative"] or "–", *(f"{row[name] / row['pictures']:.2f}" for name in ("red", "hearts"))]
        for row in rows
    ]
    return _table(["prompt", "negative prompt", "red hearts", "hearts of any colour"], shares)


def uncertainty(share: float, count: int) -> float:
    """Half of the 95 % interval of a share of `count` independent answers, by the normal approximation; a share of 1
    is taken for one with one answer wrong."""
    share = min(share, 1 - 1 / count)
    return 1.96 * math.sqrt(share * (1 - share) / count)


def _explained(held_out: list[bool], guidance: float) -> str:
    seen, held = len(held_out) - sum(held_out), sum(held_out)
    near = " and ".join(f"±{uncertainty(share, min(seen, held)):.3f} at {share}" for share in (0.98, 0.9))
    return (
        f"Each row: {len(held_out)} pictures, {seen} of pairs seen in training and {held} of held-out pairs, with the "
        f"same prompts and seeds in all rows. A share is uncertain by {near} (95 %, binomial); a smaller difference "
        "between two rows means something only where the same pictures change, which the last column of the samplers' "
        "table counts. Fréchet: the distance to real pictures of the same pairs on the 80 features of "
        "recipe/features.py, comparable only within these tables. Between seeds: 8 pictures of each of 22 prompts; the "
        "mean root mean square difference of two at 16 × 16 (of 255), and the standard deviations, in pixels, of the "
        "place of what is not background and of its size. Negative prompts and, where only one guidance stands there, "
        f"samplers at guidance {guidance:g}."
    )


def tables(results: Results, held_out: list[bool], guidance: float) -> str:
    """All tables that the results are enough for, as Markdown. `held_out` tells which of a row's pairs are."""
    parts = [
        "### Guidance (DDIM, 25 steps)",
        _guidance_table(results),
        "### Samplers and steps",
        _sampler_table(results),
    ]
    if "negative" in results:
        parts += ["### Negative prompts", _negative_table(results["negative"]["rows"])]
    if "vae" in results:
        vae = results["vae"]
        parts.append(f"The VAE on real pictures: PSNR {vae['psnr']:.2f} dB, SSIM {vae['ssim']:.4f}.")
    return "\n\n".join([*parts, _explained(held_out, guidance)]) + "\n"
