"""Orthogonal fine-tuning rotates rows of a weight, block by block (Qiu et al. 2023, OFT; Liu et al. 2023, BOFT)."""

import torch
from torch import Tensor


def rotated_by_blocks(weight: Tensor, blocks: Tensor, constraint: Tensor | None) -> Tensor:
    """`weight` rotated by what `blocks` give through Cayley's transform: OFT where they are [blocks, size, size], BOFT
    where there are several sets of them."""
    rotations = _cayley(blocks, constraint, weight.shape[0])
    return rotated(weight, rotations) if blocks.ndim == 3 else _butterfly(weight, rotations)


def rotated(weight: Tensor, rotations: Tensor) -> Tensor:
    """Each block of rows times the transpose of its matrix; `rotations` is [blocks, size, size]."""
    rows = weight.unflatten(0, rotations.shape[:2])
    return torch.einsum("knm,kn...->km...", rotations, rows).flatten(0, 1)


def _butterfly(weight: Tensor, rotations: Tensor) -> Tensor:
    """BOFT: before each set of rotations, rows that lie 2^i half blocks apart are put beside one another, and after it
    put back. `rotations` is [sets, blocks, size, size]."""
    half = rotations.shape[-1] // 2
    for i, rotation in enumerate(rotations):
        mixed = weight.unflatten(0, (-1, 2, 2**i * half)).transpose(1, 2)
        rows = mixed.flatten(0, 2).unflatten(0, rotation.shape[:2])
        rows = torch.einsum("bij,bj...->bi...", rotation, rows).flatten(0, 1)
        weight = rows.unflatten(0, mixed.shape[:3]).transpose(1, 2).flatten(0, 2)
    return weight


def _cayley(blocks: Tensor, constraint: Tensor | None, rows: int) -> Tensor:
    """(I + Q)(I - Q)⁻¹ with Q = B - Bᵀ, whose norm over all blocks `constraint` · rows bounds unless that is 0."""
    skew = (blocks - blocks.mT).double()
    if constraint is not None:
        limit, norm = constraint.reshape(()).double() * rows, skew.norm()
        skew = skew * torch.where((limit > 0) & (norm > limit), limit / norm, 1.0)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return ((eye + skew) @ torch.linalg.inv(eye - skew)).float()
