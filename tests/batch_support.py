"""What the tests of batch runs share: items and a setup for the small random model, `ldm batch` in this process, and
what a run left on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cli_support import Result, ldm_here, pixels, tiny_model

from ldmcli.batch.items import Item, Outcome, Setup
from ldmcli.batch.manifest import read_manifests
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec


def setup_in(folder: Path, **fields: Any) -> Setup:
    """A run of the small random model in `folder`; `fields` are those of a Setup or of a RuntimeSpec."""
    model = ModelSpec(str(fields.pop("model", tiny_model())))
    metadata = fields.pop("metadata", True)
    return Setup(folder, model, RuntimeSpec(**({"device": "cpu", "dtype": "fp32", "cache": False} | fields)), metadata)


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
    """Each item's status; asserts that none came twice."""
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


# ---- the command ----


def batch(*arguments: str | Path, stdin: bytes = b"") -> Result:
    """`ldm batch` with the random model and one step."""
    return ldm_here(
        "batch", *arguments, "-m", tiny_model(), "--steps", "1", "--dtype", "fp32", "--no-cache", stdin=stdin
    )


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted((folder / "manifest").glob("*")) for line in path.read_text().splitlines()
    ]


def status(folder: Path) -> dict[str, Any]:
    return ldm_here("batch", "--status", folder, "--json").records[0]


def assert_whole(folder: Path, rows: int) -> None:
    """Every row is done exactly once, every picture is sound and the one in the manifest."""
    done = [record for record in manifest(folder) if record["status"] == "done"]
    assert sorted(record["row"] for record in done) == list(range(1, rows + 1))
    for record in done:
        data = (folder / record["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
        assert pixels(data).shape == (16, 16, 3)
    on_disk = {str(path.relative_to(folder)) for path in (folder / "images").rglob("*") if path.is_file()}
    assert on_disk == {record["path"] for record in done}  # and nothing temporary is left
    assert status(folder) | {"folder": ""} == {
        "folder": "", "rows": rows, "done": rows, "failed": 0, "pending": 0, "images": rows, "failed_images": 0,
    }  # fmt: skip
