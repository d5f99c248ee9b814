"""Many pictures of an exported model, through the session that `ldm txt2img` walks.

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
from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

_sessions: list[Session] = []  # of a worker process


def _open(folder: Path, device: str, dtype: str) -> Session:
    return Session(ModelSpec(str(folder)), RuntimeSpec(device, dtype, threads=1))


def _start_worker(folder: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    _sessions.append(_open(folder, "cpu", dtype))


def _draw_in_worker(requests: list[GenerationRequest]) -> list[numpy.ndarray]:
    return _draw(_sessions[0], requests)


def _draw(session: Session, requests: list[GenerationRequest]) -> list[numpy.ndarray]:
    return [picture.pixels() for picture in session.draw(requests, batch_size=len(requests))]


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
            self._session = _open(folder, device, dtype)

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
        if self._pool is not None:
            drawn = self._pool.map(_draw_in_worker, batches)
        else:
            drawn = (_draw(self._session, batch) for batch in batches)
        return to_float(stack([picture for batch in drawn for picture in batch]))


def check_size(folder: Path, size: int) -> None:
    """Raises UsageError where the model's pictures are not of the preset's size."""
    drawn = open_model(folder).config.default_size
    if drawn != size:
        raise UsageError(f"{folder} draws {drawn} pixels a side and the preset {size}; name its preset with --preset.")
