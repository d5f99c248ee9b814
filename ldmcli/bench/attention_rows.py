"""What was measured of attention's kernels, shape by shape, and the table that is made of it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldmcli.speed.attention_choice import Row

GAIN = 0.97  # of the time of torch's own pick, under which a kernel enters the table
EXACT = 1.5  # times the error of torch's own pick, up to which it does
LEAST_ERROR = 1e-6  # relative, that counts as none


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention of `heads` heads of `head_dim` numbers of `dtype` ("float16"), `queries` to `keys` tokens, for so many
    samples."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.batch}×{self.heads} heads of {self.head_dim}, {self.queries}→{self.keys}, {self.dtype}"

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Normal queries, keys and values, laid out as the modules' projections give them."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def heads_of(tokens: int) -> Tensor:
            sizes = (self.batch, tokens, self.heads * self.head_dim)
            flat = torch.randn(sizes, generator=generator, device=device).to(dtype)
            return flat.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        return heads_of(self.queries), heads_of(self.keys), heads_of(self.keys)


@dataclasses.dataclass
class Result:
    """By kernel: seconds of a call, the relative error, or why it refused. `picked` is the kernel that torch picks."""

    problem: Problem
    picked: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> str:
        """The fastest kernel that beats torch's own pick well enough and is as exact; else "sdpa"."""
        if "sdpa" not in self.seconds:
            return "sdpa"
        error = max(EXACT * self.errors["sdpa"], LEAST_ERROR)
        fit = [name for name in self.seconds if self.errors[name] <= error]
        fastest = min(fit, key=self.seconds.__getitem__, default="sdpa")
        return fastest if self.seconds[fastest] < GAIN * self.seconds["sdpa"] else "sdpa"

    def __str__(self) -> str:
        parts = [f"{name} {1e6 * t:.1f} µs ({self.errors[name]:.1e})" for name, t in self.seconds.items()]
        parts += [f"{name} refused ({why})" for name, why in self.refused.items()]
        return f"{self.problem} [torch: {self.picked}]: {', '.join(parts)} → {self.best}"


def rows_of(results: Iterable[Result], capability: str) -> list[Row]:
    """Rows for the kernels that beat torch's own pick. Numbers of heads that were measured next to each other and have
    the same best kernel make one row, which holds for numbers between too."""
    best: dict[tuple[str, int, int, int], dict[int, str]] = {}
    for result in results:
        p = result.problem
        by_heads = best.setdefault((p.dtype, p.head_dim, p.queries, p.keys), {})
        heads = p.batch * p.heads
        by_heads[heads] = result.best if by_heads.get(heads, result.best) == result.best else "sdpa"
    rows = []
    for shape, by_heads in sorted(best.items()):
        runs: list[tuple[str, list[int]]] = []
        for heads, name in sorted(by_heads.items()):
            if not runs or runs[-1][0] != name:
                runs.append((name, []))
            runs[-1][1].append(heads)
        rows += [Row(capability, *shape, run[0], run[-1], name) for name, run in runs if name != "sdpa"]
    return rows


def merged(old: Iterable[Row], new: Iterable[Row], results: Iterable[Result], capability: str) -> list[Row]:
    """The table with the rows of shapes that were measured now put in place of its own."""
    again = {(capability, p.dtype, p.head_dim, p.queries, p.keys) for p in (result.problem for result in results)}
    return sorted([*(row for row in old if row[:5] not in again), *new])


def table_source(rows: Iterable[Row], measured_with: Mapping[str, str]) -> str:
    """The source of attention_table.py, formatted as the rest of the program is."""
    lines = "".join(f"    ({', '.join(map(_quoted, row))}),\n" for row in rows)
    said = "".join(f"    {_quoted(key)}: {_quoted(measured_with[key])},\n" for key in sorted(measured_with))
    return _SOURCE.format(
        note=_SOME if said else _NONE,
        measured_with=f"{{\n{said}}}" if said else "{}",
        rows=f"(\n{lines})" if lines else "()",
    )


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


_SOME = "Where it says nothing, torch picks."
_NONE = "It is empty: no card has been measured yet, so that everywhere torch picks."
_SOURCE = '''"""Which kernel of `models.attention` beat torch's own pick, by shape. Written by
`python -m ldmcli.bench.attention_shapes --table`; not to be edited by hand.

{note}
"""

# Card and libraries that were measured, by compute capability and number type.
MEASURED_WITH: dict[str, str] = {measured_with}
# Compute capability, number type, head_dim, queries, keys, batch · heads from, to, kernel.
ROWS: tuple[tuple[str, str, int, int, int, int, int, str], ...] = {rows}
'''
