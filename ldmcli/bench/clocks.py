"""What contenders that compute with torch share: when each step ended, and how much memory was held."""

import time
from typing import Any

from ldmcli.stopwatch import process_peak


class StepClock:
    """When each step ended. On a GPU an event is put into its stream, so that the loop waits for nothing."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._marks: list[Any] = []

    def tick(self) -> None:
        """A step has ended."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """The time each step took, the first left out: its begin is not known, and it has more to do."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [after - before for before, after in pairs]
        if self._marks:
            self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def memory(device: str) -> dict[str, int]:
    """The most this process has held, in bytes: of the host's memory, and of the GPU's."""
    held = {"host": process_peak()}
    if device.startswith("cuda"):
        import torch

        held["gpu_allocated"] = torch.cuda.max_memory_allocated()
        held["gpu_reserved"] = torch.cuda.max_memory_reserved()
    return held
