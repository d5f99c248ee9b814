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
            for matrix in matrices:
                if "average" not in self.state[matrix]:
                    self.state[matrix]["average"] = torch.zeros_like(matrix)
            averages = [self.state[matrix]["average"] for matrix in matrices]
            gradients = [matrix.grad for matrix in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            own = [i for i, owner in enumerate(owners) if owner == self._team.rank]
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
            steps = [torch.empty(matrix.shape, device=matrix.device) for matrix in matrices]
            for i, one in zip(own, _directions([ahead[i].flatten(1) for i in own]), strict=True):
                steps[i] = one.view(matrices[i].shape)
            self._team.hand_round(steps, owners)
            torch._foreach_mul_(steps, group["lr"])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(matrices, steps)


class Descent:
    """The optimizer of a module, by its name: a step, and what a checkpoint holds of it."""

    def __init__(self, name: str, module: nn.Module, rate: float, team: Team) -> None:
        matrices = hidden_matrices(module) if name == "muon" else []
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
        self._module, self._device = module, others[0].device
        self._recorded = self._device.type == "cuda"
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=self._recorded)
        ]
        if matrices:
            self._optimizers.append(Muon(matrices, rate, team))
        self._place_rates()
        self.set_rate(rate)

    def _place_rates(self) -> None:
        """On a GPU rates are tensors, so that a recorded step reads what they are then."""
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"] = torch.as_tensor(group["lr"], device=self._device) if self._recorded else group["lr"]

    def set_rate(self, rate: float) -> None:
        for optimizer in self._optimizers:
            set_learning_rate(optimizer, rate)

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Go down the gradients, which are those of the whole team."""
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self._optimizers):
            optimizer.load_state_dict(state[str(i)])
        self._place_rates()


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions but for the first and the last."""
    layers = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith(_FIRST_AND_LAST)
    ]
    return [layer.weight for layer in layers]


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About the nearest matrix whose singular values are 1, by an iteration of Newton–Schulz's kind; of (n, rows,
    columns) each."""
    a, b, c = _NEWTON_SCHULZ
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).reshape(-1, *sorted(matrix.shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape)


def _directions(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of each, as large as AdamW's steps; those of one shape together, which a GPU does in the time of
    one."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    found = list(matrices)
    for places in by_shape.values():
        together = orthogonal(torch.stack([matrices[i] for i in places]))
        for i, one in zip(places, together * (0.2 * max(together.shape[1:]) ** 0.5), strict=True):
            found[i] = one
    return found


def _shared_out(matrices: list[nn.Parameter], size: int) -> list[int]:
    """Which of `size` processes works out each matrix, so that all have about as much to do."""
    work = [matrix.numel() * min(len(matrix), matrix[0].numel()) for matrix in matrices]
    owners, loads = [0] * len(matrices), [0] * size
    for i in sorted(range(len(matrices)), key=lambda i: -work[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += work[i]
    return owners
