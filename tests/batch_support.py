"""What the tests of batch runs share: items and a setup for the small random model, and what a run left on disk."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cli_support import pixels, tiny_model

from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.manifest import read_manifests
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec


def setup_in(folder: Path, **fields: Any) -> Setup:
    """A run of the small random model in `folder`; `fields` are those of a Setup or of a RuntimeSpec."""
    model = ModelSpec(str(fields.pop("model", tiny_model())))
    own = {name: fields.pop(name) for name in ("batch_size", "metadata") if name in fields}
    return Setup(folder, model, RuntimeSpec(**({"device": "cpu", "dtype": "fp32", "cache": False} | fields)), **own)


def item(number: int, prompt: str | None = None, **fields: Any) -> Item:
    """The picture `number`, with a prompt of its own."""
    settings = {"seed": number, "steps": 2, "width": 16, "height": 16, "sampler": "ddim", "guidance_scale": 7.5}
    request = GenerationRequest(f"prompt {number}" if prompt is None else prompt, **(settings | fields))
    return Item(number, number + 1, number + 1, f"id-{number}", request)


def items(count: int, **fields: Any) -> list[Item]:
    return [item(number, **fields) for number in range(count)]


def batches(of: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(of), size):
        yield list(of[start : start + size])


def statuses(outcomes: Iterable[Outcome]) -> dict[int, str]:
    """Each item's status; asserts that none is told of twice."""
    found = [(outcome.item.number, outcome.status) for outcome in outcomes]
    assert len(found) == len(dict(found)), found
    return dict(sorted(found))


def pictures(folder: Path, outcomes: Iterable[Outcome]) -> np.ndarray:
    """The pictures of these outcomes in the order of their numbers, (n, height, width, 3)."""
    done = sorted(outcomes, key=lambda outcome: outcome.item.number)
    return np.stack([pixels(folder / outcome.path) for outcome in done])


def lines_of(folder: Path) -> dict[int, list[str]]:
    """What the manifests say of each number, line by line."""
    found: dict[int, list[str]] = {}
    for record in read_manifests(folder):
        found.setdefault(record["number"], []).append(record["status"])
    return found
