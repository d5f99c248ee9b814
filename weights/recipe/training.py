"""What the training stages share: a budget of minutes, weight averaging, a team of processes and checkpoints that
survive a stop."""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from emoji import Emoji, emoji_of
from presets import PRESETS
from torch import Tensor, distributed, nn

from ldmcli.speed.policy import cpu_has_bf16


class Clock:
    """Progress of a run, 0 … 1, in minutes of training or in steps; a resumed run goes on where it stopped.

    Presets count minutes: the learning rate then reaches its end on a busy machine too, and the log says how many steps
    it was. A run of a number of steps gives the same weights each time.
    """

    def __init__(self, minutes: float, steps: int | None, spent_seconds: float = 0.0) -> None:
        self.budget_seconds, self.steps = 60 * minutes, steps
        self._start = time.monotonic() - spent_seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def progress(self, step: int) -> float:
        return min(step / self.steps if self.steps else self.seconds / self.budget_seconds, 1.0)


def seed_of_step(seed: int, step: int, team: "Team") -> int:
    """What a process draws a step's batch from: a resumed run draws what an unbroken one would have."""
    return ((seed << 32) + step) * 1009 + team.rank


def learning_rate(peak: float, step: int, progress: float, warm_up: int, floor: float = 0.01) -> float:
    """Linear warm-up over `warm_up` steps, then a half cosine over the run's progress (Loshchilov & Hutter
    2017)."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Average:
    """An exponential moving average of a model's weights: what is kept of a run."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # forget the start quickly
        averaged = list(self.model.parameters())
        torch._foreach_lerp_(averaged, [p.detach() for p in model.parameters()], 1 - decay)


class Recorded:
    """A function of tensors to a tensor, which on a GPU is recorded at its fourth call and replayed from then on: small
    networks are computed faster than their operations are launched. Inputs keep their shapes. Where it cannot be
    recorded it is called as it is, and so on a CPU."""

    EAGER_CALLS = 3

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._side is None:
            return self._function(*inputs)
        self._calls += 1
        if self._calls <= self.EAGER_CALLS:
            return self._aside(inputs)
        if self._graph is None and not self._record(inputs):
            self._side = None
            return self._function(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._result.clone()

    def _aside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Called as it is, beside the stream of all else, as must be before a recording."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            result = self._function(*inputs)
        current.wait_stream(self._side)
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> bool:
        self._inputs, graph = [given.clone() for given in inputs], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._function(*self._inputs)
        except RuntimeError as error:
            print(f"not recorded, and so slower: {error}", flush=True)
            return False
        self._graph = graph
        return True


class Team:
    """Processes of one thread each that train one model together, started by torchrun; or this process alone.

    On a machine that others use too they beat threads: they wait for each other once a step, not once an
    operation. All start from the same weights and step with the same averaged gradients.
    """

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._boards: dict[int, _Board] = {}
        if self.size > 1:
            distributed.init_process_group("gloo")

    def together(self, share: Tensor, count: int) -> Tensor:
        """All `count` rows of a tensor of which each process made every size-th, beginning with its rank."""
        if self.size == 1:
            return share
        most = -(-count // self.size)
        padded = torch.cat([share, share.new_zeros((most - len(share), *share.shape[1:]))])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    @torch.no_grad()
    def average(self, model: nn.Module, loss: float, progress: float) -> tuple[float, float]:
        """Average the gradients and the loss over the team; the progress of all is that of the first."""
        if self.size == 1:
            return loss, progress
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        extra = torch.tensor([loss, progress * self.size if self.rank == 0 else 0.0])
        every = [*gradients, extra]
        counts = [each.numel() for each in every]
        board = self._board(sum(counts))
        for part, each in zip(board.own.split(counts), every, strict=True):
            part.view_as(each).copy_(each)
        board.average()
        for part, each in zip(board.mean.split(counts), every, strict=True):
            each.copy_(part.view_as(each))
        return extra[0].item(), extra[1].item()

    @torch.no_grad()
    def hand_round(self, parts: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Give every process what each part is in the process that owns it."""
        if self.size == 1:
            return
        counts = [part.numel() for part in parts]
        board = self._board(sum(counts))
        for part, owner, place in zip(parts, owners, board.own.split(counts), strict=True):
            if owner == self.rank:
                place.view_as(part).copy_(part)
        rows = [row.split(counts) for row in board.exchange()]
        for i, (part, owner) in enumerate(zip(parts, owners, strict=True)):
            if owner != self.rank:
                part.copy_(rows[owner][i].view_as(part))
        self.wait()  # until all have read

    def _board(self, count: int) -> "_Board":
        if count not in self._boards:
            self._boards[count] = _Board(self, count)
        return self._boards[count]


class _Board:
    """Shared memory in which a team adds up `count` numbers of each: every process writes its own row, then adds up its
    share of all rows. Ten million numbers of three processes took 0.03 to 0.07 s; through gloo's sockets 0.11 to
    0.16."""

    def __init__(self, team: Team, count: int) -> None:
        self._team = team
        name = Path("/dev/shm") / f"ldmcli-recipe-{os.environ['MASTER_PORT']}-{count}"
        self._rows = self._shared_rows(name, count)
        if self._rows is None:
            self.own = self.mean = torch.empty(count)
            return
        self.own, self.mean = self._rows[team.rank], self._rows[-1]
        self._share = slice(count * team.rank // team.size, count * (team.rank + 1) // team.size)

    def _shared_rows(self, name: Path, count: int) -> Tensor | None:
        """A row for each process and one for the mean; None where the system has no room for them (containers often
        have 64 MB). torch's own shared tensors would need their handles sent from process to process."""
        rows, there = self._team.size + 1, torch.ones(1)
        if self._team.rank == 0:
            try:
                name.unlink(missing_ok=True)
                with name.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, 4 * count * rows)
            except OSError:
                name.unlink(missing_ok=True)
                there.zero_()
        distributed.broadcast(there, 0)
        if not there:
            return None
        shared = torch.from_file(str(name), shared=True, size=count * rows).view(rows, count)
        self._team.wait()
        if self._team.rank == 0:
            name.unlink()
        return shared

    def exchange(self) -> Sequence[Tensor]:
        """The rows of all processes, once all are written."""
        if self._rows is None:
            rows = [torch.empty_like(self.own) for _ in range(self._team.size)]
            distributed.all_gather(rows, self.own)
            return rows
        self._team.wait()
        return self._rows[:-1]

    def average(self) -> None:
        """From all own rows to `mean`, the same bits for all."""
        if self._rows is None:
            distributed.all_reduce(self.own)
            self.own /= self._team.size
            return
        self._team.wait()
        torch.mean(self._rows[:-1, self._share], dim=0, out=self.mean[self._share])
        self._team.wait()


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint so that a stop at any moment leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def known_emoji(args: argparse.Namespace) -> tuple[Emoji, ...]:
    """The preset's emoji that data.py found in its font, in the order of their labels."""
    characters = load(args.out / "dataset.pt")["characters"]
    by_character = {emoji.character: emoji for emoji in emoji_of(PRESETS[args.preset])}
    return tuple(by_character[character] for character in characters)


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 inside the block, where the device computes with it faster than with float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or cpu_has_bf16())


def log(line: str, path: Path) -> None:
    """Print a line and append it to the run's log."""
    print(line, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
