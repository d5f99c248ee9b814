"""What each kind of adapter makes of a weight: a small function from weight and factors to the difference.

All compute in float32; convolutions are [out, in, k, k], and 1×1 factors may have or lack the last two. Where shapes do
not fit, they raise RuntimeError, ValueError or IndexError before they make anything larger than the weight.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ldmcli.adapters.rotations import rotated, rotated_by_blocks

Factors = Mapping[str, Tensor]


def new_weight(kind: str, weight: Tensor, factors: Factors, strength: float) -> Tensor | None:
    """`weight` (float32) with the adapter merged: W + strength · (W' - W), for every kind, as in AUTOMATIC1111's web
    UI. None where the adapter does not change it. `weight` is written into.

    Raises RuntimeError, ValueError or IndexError where shapes do not fit.
    """
    if kind == "LoRA" and not factors.keys() & {"mid", "dora_scale", "magnitude"} and _whole(weight, factors):
        up = _scaled(factors["up"], factors, factors["down"].shape[0])  # the usual case: one pass, no copy
        new = weight.flatten(1).addmm_(up.flatten(1), factors["down"].flatten(1), alpha=strength)
        return new.reshape(weight.shape)
    delta = DELTAS[kind](weight, factors)
    if delta is None:
        return None
    delta = _fitted(delta, weight)
    if "dora_scale" in factors or "magnitude" in factors:
        delta = _decomposed(weight + delta, factors) - weight
    return torch.add(weight, delta, alpha=strength)


def new_bias(bias: Tensor | None, factors: Factors, strength: float) -> Tensor | None:
    """`bias` with what the adapter adds to it; None where that is nothing. Raises as `new_weight` does."""
    added = next((factors[name] for name in ("diff_b", "b_norm") if name in factors), None)
    if "up_bias" in factors:
        added = _scaled(factors["up_bias"], factors, factors["down"].shape[0])
    if added is None:
        return None
    if bias is None:
        raise ValueError("the module has no bias")
    return bias + strength * _fitted(added, bias)


def lora(weight: Tensor, factors: Factors) -> Tensor:
    """LoRA (Hu et al. 2021); of convolutions LoCon, with `mid` in Tucker's form (LyCORIS, Yeh et al. 2023)."""
    down, mid = factors["down"], factors.get("mid")
    up = _scaled(factors["up"], factors, down.shape[0])  # by far the smaller
    return _product(weight, up, down) if mid is None else _tucker(weight, mid, up.flatten(1).T, down.flatten(1))


def loha(weight: Tensor, factors: Factors) -> Tensor:
    """LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, FedPara)."""
    halves = []
    for half in ("1", "2"):
        a, b, mid = factors[f"hada_w{half}_a"], factors[f"hada_w{half}_b"], factors.get(f"hada_t{half}")
        halves.append(_product(weight, a, b) if mid is None else _tucker(weight, mid, a, b))
    return _scaled(halves[0] * halves[1], factors, factors["hada_w1_b"].shape[0])


def lokr(weight: Tensor, factors: Factors) -> Tensor:
    """LoKr: a Kronecker product, either side of which may be of low rank (Edalati et al. 2022, KronA)."""
    first, second = factors.get("lokr_w1"), factors.get("lokr_w2")
    ranks = [factors[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in factors]
    if first is None:
        first = _product(weight, factors["lokr_w1_a"], factors["lokr_w1_b"])
    if second is None:
        a, b, mid = factors["lokr_w2_a"], factors["lokr_w2_b"], factors.get("lokr_t2")
        second = _product(weight, a, b) if mid is None else _tucker(weight, mid, a, b)
    if second.ndim == 2 and first.shape[1] * second.shape[1] != weight.shape[1]:  # the kernel's sides are in its rows
        second = second.reshape(second.shape[0], -1, *weight.shape[2:])
    _check_size(weight, first.numel() * second.numel())
    delta = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous())
    return _scaled(delta, factors, ranks[0] if ranks else None)


def glora(weight: Tensor, factors: Factors) -> Tensor:
    """GLoRA: a low-rank matrix, and the weight times another (Chavan et al. 2023). Old files have a and b swapped."""
    a1, a2, b1, b2 = (factors[name] for name in ("a1", "a2", "b1", "b2"))
    fits = b1.shape[1] == b2.shape[0] == a1.shape[1] == a2.shape[0]
    fits_swapped = b2.shape[1] == b1.shape[0] == a2.shape[1] == a1.shape[0]
    if fits_swapped and (not fits or b1.shape[0] < b1.shape[1]):  # of square weights both fit: a rank is the less
        a1, a2, b1, b2 = a2, a1, b2, b1
    core = factors.get("bm")
    added = _product(weight, b1, b2) if core is None else _tucker(weight, core, b1.flatten(1).T, b2.flatten(1))
    _check_size(weight, weight.numel() // weight.shape[1] * max(a1[0].numel(), a2[0].numel()))
    product = torch.einsum("oi...,ir,rj->oj...", weight, a1.flatten(1), a2.flatten(1))
    return _scaled(_fitted(added, weight) + product, factors, b2.shape[0])


def ia3(weight: Tensor, factors: Factors) -> Tensor:
    """IA3: each output, or each input where `on_input` is set, times a number of its own (Liu et al. 2022)."""
    scales, axis = factors["weight"].flatten(), int(bool(factors["on_input"]))
    if len(scales) != weight.shape[axis]:
        raise ValueError(f"{len(scales)} numbers for {weight.shape[axis]} {'columns' if axis else 'rows'}")
    return weight * scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def oft(weight: Tensor, factors: Factors) -> Tensor:
    """OFT and BOFT, whose alpha is a constraint; old files of LyCORIS hold the rotations themselves, as `oft_diag`."""
    if "oft_diag" in factors:
        new = rotated(weight, factors["oft_diag"])
    else:
        new = rotated_by_blocks(weight, factors["oft_blocks"], factors.get("alpha"))
    if "rescale" in factors:
        new = new * factors["rescale"].reshape(-1, *[1] * (weight.ndim - 1))
    return new - weight


def difference(weight: Tensor, factors: Factors) -> Tensor | None:
    """The weight's difference itself; None where only the bias has one."""
    return factors["diff"] if "diff" in factors else factors.get("w_norm")


DELTAS: dict[str, Callable[[Tensor, Factors], Tensor | None]] = {
    "LoRA": lora,
    "LoHa": loha,
    "LoKr": lokr,
    "GLoRA": glora,
    "IA3": ia3,
    "OFT": oft,
    "full": difference,
}


def _whole(weight: Tensor, factors: Factors) -> bool:
    """Whether the product of a LoRA's matrices has all of the weight's rows and columns."""
    up, down = factors["up"], factors["down"]
    rows_fit = up.ndim > 1 and len(up) == len(weight) and up[0].numel() == len(down)
    return rows_fit and down.ndim > 1 and weight.ndim > 1 and down[0].numel() == weight[0].numel()


def _product(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product of [o, r] and [r, i, …], which keeps the shape of the last."""
    _check_size(weight, a.shape[0] * b[0].numel())
    return (a.flatten(1) @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _tucker(weight: Tensor, core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Tucker's form: core [r, r, k, k] with a [r, o] and b [r, i] gives [o, i, k, k]."""
    _check_size(weight, a.shape[1] * b.shape[1] * core[0, 0].numel())
    return torch.einsum("ab...,ao,bi->oi...", core, a, b)


def _check_size(weight: Tensor, numbers: int) -> None:
    """Raise ValueError where so many numbers are more than the weight has: a small file must not fill the memory."""
    if numbers > weight.numel():
        raise ValueError(f"a change of {numbers} numbers")


def _scaled(delta: Tensor, factors: Factors, rank: int | None) -> Tensor:
    """`delta` times `scale` where there is one, else alpha / rank; alpha 0 means the rank, as when it is trained.

    Beside two whole matrices (rank None) alpha means nothing: some files have 1e10 there.
    """
    if "scale" in factors:
        return delta * factors["scale"].reshape(())
    if "alpha" not in factors or rank is None:
        return delta
    alpha = factors["alpha"].reshape(())
    return delta * torch.where(alpha == 0, 1.0, alpha / rank)


def _decomposed(weight: Tensor, factors: Factors) -> Tensor:
    """DoRA: `weight` with the file's magnitudes in place of its own norms (Liu et al. 2024).

    Norms are of columns where `dora_scale` is [1, in, …], of rows where it is [out, 1, …]; a list is of rows if it is
    as long as those, and PEFT's are always of rows. A wrong axis would not fail but broadcast.
    """
    scale = factors.get("dora_scale")
    by_column = scale is not None and (scale.shape[0] == 1 if scale.ndim > 1 else len(scale) != weight.shape[0])
    if scale is None:
        scale = factors["magnitude"]
    rows = weight.transpose(0, 1) if by_column else weight
    norms = rows.flatten(1).norm(dim=1) + torch.finfo(torch.float32).eps
    if scale.numel() != len(rows):
        raise ValueError(f"{scale.numel()} magnitudes for {len(rows)} {'columns' if by_column else 'rows'}")
    ratio = (scale.flatten() / norms).reshape(-1, *[1] * (weight.ndim - 1))
    return weight * (ratio.transpose(0, 1) if by_column else ratio)


def _fitted(delta: Tensor, weight: Tensor) -> Tensor:
    """`delta` in the shape of `weight`: 1×1 convolutions are linear layers elsewhere, and to inputs that the adapter
    does not know, as an inpainting model's first layer has, nothing is added. Raises ValueError."""
    if delta.shape[:1] == weight.shape[:1] and delta.numel() == weight.numel():
        return delta.reshape(weight.shape)
    if delta.ndim == weight.ndim == 4 and delta.shape[0] == weight.shape[0] and delta.shape[2:] == weight.shape[2:]:
        more = weight.shape[1] - delta.shape[1]
        if delta.shape[1] == 4 and more > 0:
            return torch.nn.functional.pad(delta, (0, 0, 0, 0, 0, more))
    raise ValueError(f"a change of shape {list(delta.shape)}")
