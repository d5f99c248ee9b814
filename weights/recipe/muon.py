"""The optimizers of stages 1 and 2: Muon for the hidden layers' weights and AdamW for all else (Jordan et al. 2024), or
with `--optimizer adamw` AdamW alone.

A gradient, seen as a matrix, is mostly a few directions; Muon steps by the nearest matrix that has all directions
alike, so that rare ones count as much. Short runs gain most: with the same batches, stage 1 was after 350 steps where
AdamW came after 950, and stage 2 after 475 where AdamW came after 715. Steps are scaled to the size of AdamW's (Liu et
al. 2025, arXiv:2502.16982), so that learning rates stay what they were.
"""

from typing import Any

import torch
from torch import Tensor, nn
from training import Team, set_learning_rate

_FIRST_AND_LAST = ("conv_in", "conv_out")  # see pixels, latents or noise, and are AdamW's
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values end between 0.7 and 1.2


class Muon(torch.optim.Optimizer):
    """Steps along what is left of the averaged gradients when their singular values are made alike. Each process of the
    team works out its share of the matrices."""

    def __init__(
        self, matrices: list[nn.Parameter], rate: float, team: Team, *, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": rate, "momentum": momentum, "weight_decay": decay})
        self._team = team

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_team": self._team}  # an optimizer's copy forgets all that is not its own

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step by the gradients, which are those of the whole team."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            owners = _shared_out(matrices, self._team.size)
            steps = []
            for matrix, owner in zip(matrices, owners, strict=True):
                if "average" not in self.state[matrix]:
                    self.state[matrix]["average"] = torch.zeros_like(matrix)
                average = self.state[matrix]["average"].lerp_(matrix.grad, 1 - group["momentum"])
                if owner == self._team.rank:
                    ahead = matrix.grad.lerp(average, group["momentum"])
                    steps.append(orthogonal(ahead.flatten(1)).view(matrix.shape))
                else:
                    steps.append(torch.empty(matrix.shape, device=matrix.device))
            self._team.hand_round(steps, owners)
            for matrix, one in zip(matrices, steps, strict=True):
                size = 0.2 * max(one.flatten(1).shape) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(one, alpha=-group["lr"] * size)


class Descent:
    """The optimizer of a module, by its name: a step, and what a checkpoint holds of it."""

    def __init__(self, name: str, module: nn.Module, rate: float, team: Team) -> None:
        matrices = hidden_matrices(module) if name == "muon" else []
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
        self._module = module
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        ]
        if matrices:
            self._optimizers.append(Muon(matrices, rate, team))

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Go down the gradients, which are those of the whole team."""
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[str(i)])


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions but for the first and the last."""
    layers = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith(_FIRST_AND_LAST)
    ]
    return [layer.weight for layer in layers]


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About the nearest matrix whose singular values are 1, by an iteration of Newton–Schulz's kind."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


def _shared_out(matrices: list[nn.Parameter], size: int) -> list[int]:
    """Which of `size` processes works out each matrix, so that all have about as much to do."""
    work = [matrix.numel() * min(len(matrix), matrix[0].numel()) for matrix in matrices]
    owners, loads = [0] * len(matrices), [0] * size
    for i in sorted(range(len(matrices)), key=lambda i: -work[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += work[i]
    return owners
