"""Orthogonal fine-tuning: rows of a weight are turned, block by block (Qiu et al. 2023, OFT; Liu et al. 2023, BOFT)."""

import torch
from torch import Tensor


def rotated_by_blocks(weight: Tensor, blocks: Tensor, constraint: Tensor | None) -> Tensor:
    """`weight` turned by what `blocks` give through Cayley's transform: OFT where they are [blocks, size, size], BOFT
    where there are several sets of them."""
    turns = _cayley(blocks, constraint, weight.shape[0])
    return rotated(weight, turns) if blocks.ndim == 3 else _butterfly(weight, turns)


def rotated(weight: Tensor, turns: Tensor) -> Tensor:
    """Each block of rows times the transpose of its matrix; `turns` is [blocks, size, size]."""
    grouped = weight.unflatten(0, turns.shape[:2])
    return torch.einsum("knm,kn...->km...", turns, grouped).flatten(0, 1)


def _butterfly(weight: Tensor, turns: Tensor) -> Tensor:
    """BOFT: before each set of turns, rows that lie 2^i half blocks apart are put beside one another, and after it put
    back. `turns` is [sets, blocks, size, size]."""
    half = turns.shape[-1] // 2
    for i, turn in enumerate(turns):
        mixed = weight.unflatten(0, (-1, 2, 2**i * half)).transpose(1, 2)
        grouped = mixed.flatten(0, 2).unflatten(0, turn.shape[:2])
        turned = torch.einsum("bij,bj...->bi...", turn, grouped).flatten(0, 1)
        weight = turned.unflatten(0, mixed.shape[:3]).transpose(1, 2).flatten(0, 2)
    return weight


def _cayley(blocks: Tensor, constraint: Tensor | None, rows: int) -> Tensor:
    """(I + Q)(I - Q)⁻¹ with Q = B - Bᵀ, whose norm over all blocks `constraint` · rows bounds unless that is 0."""
    skew = (blocks - blocks.mT).double()
    if constraint is not None:
        limit, norm = constraint.reshape(()).double() * rows, skew.norm()
        skew = skew * torch.where((limit > 0) & (norm > limit), limit / norm, 1.0)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return ((eye + skew) @ torch.linalg.inv(eye - skew)).float()
