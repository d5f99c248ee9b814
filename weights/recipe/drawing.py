"""Many pictures of an exported model, through the pipeline that `ldm txt2img` walks.

On a CPU by several processes of one thread each: threads wait for each other once an operation, processes for nobody.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy
import torch
from data import stack, to_float
from torch import Tensor

from ldmcli.checkpoints.source import open_model
from ldmcli.errors import UsageError
from ldmcli.pipeline import Pipeline, load_pipeline
from ldmcli.spec import GenerationRequest
from ldmcli.speed.policy import choose_runtime

_loaded: list[Pipeline] = []  # of a worker process


def _load(folder: Path, device: str, dtype: str) -> Pipeline:
    return load_pipeline(open_model(folder), choose_runtime(device, dtype))


def _start_worker(folder: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    _loaded.append(_load(folder, "cpu", dtype))
    torch.set_num_threads(1)


def _draw_in_worker(requests: list[GenerationRequest]) -> list[numpy.ndarray]:
    return _loaded[0].draw(requests)


class Artist:
    """Draws requests that agree in all but prompts, negative prompts and seed. Use it in a `with` block."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "auto", *, processes: int, batch: int) -> None:
        self.folder, self.batch = folder, batch
        self._pool: ProcessPoolExecutor | None = None
        if device == "cpu" and processes > 1:
            self._pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(folder, dtype)
            )
        else:
            self._pipeline = _load(folder, device, dtype)
            if device == "cpu":
                torch.set_num_threads(1)

    def __enter__(self) -> "Artist":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """Pictures (N, 3, height, width) in [-1, 1], in order. Batches do not depend on the number of processes."""
        batches = [list(requests[start : start + self.batch]) for start in range(0, len(requests), self.batch)]
        drawn = map(self._pipeline.draw, batches) if self._pool is None else self._pool.map(_draw_in_worker, batches)
        return to_float(stack([picture for batch in drawn for picture in batch]))


def check_size(folder: Path, size: int) -> None:
    """Raises UsageError where the model's pictures are not of the preset's size."""
    drawn = open_model(folder).config.default_size
    if drawn != size:
        raise UsageError(f"{folder} draws {drawn} pixels a side and the preset {size}; name its preset with --preset.")
