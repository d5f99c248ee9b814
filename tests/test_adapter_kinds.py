"""Each kind of adapter, merged from a file, against its formula in float64."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_support import Networks, noise, small_networks, state, unequal, write
from torch import Tensor

from ldmcli.adapters.adapter import open_adapter
from ldmcli.adapters.merging import Merger, Use

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # [256, 32]
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [32, 32]
CONV = "up_blocks.0.resnets.0.conv1"  # [64, 128, 3, 3]
ONE = "down_blocks.0.attentions.0.proj_in"  # [32, 32, 1, 1]
NORM = "down_blocks.0.resnets.0.norm1"
Factors = dict[str, Tensor]
Made = tuple[Factors, Callable[[Tensor], Tensor]]


def alpha(value: float) -> Tensor:
    return torch.tensor(value)


def product(a: Tensor, b: Tensor) -> Tensor:
    return (a.flatten(1) @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("abxy,ao,bi->oixy", core, a, b)


def lora(shape: tuple[int, ...], rank: int = 4, *, tail: tuple[int, ...] = ()) -> Made:
    up, down = noise(shape[0], rank, *tail, seed=2), noise(rank, *shape[1:], seed=3)
    factors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha(3)}
    return factors, lambda w: w + 3 / rank * product(up.double(), down.double()).reshape(w.shape)


def lora_without_alpha() -> Made:
    factors, _ = lora((256, 32))
    del factors["alpha"]
    return factors, lambda w: w + factors["lora_up.weight"].double() @ factors["lora_down.weight"].double()


def lora_of_alpha_zero() -> Made:
    _, expected = lora_without_alpha()
    return lora((256, 32))[0] | {"alpha": alpha(0)}, expected


def lora_with_scale() -> Made:
    _, expected = lora_without_alpha()
    return lora((256, 32))[0] | {"scale": alpha(0.5)}, lambda w: w + 0.5 * (expected(w) - w)


def locon_tucker() -> Made:
    up, mid, down = noise(64, 4, 1, 1, seed=2), noise(5, 5, 3, 3, seed=3)[:4, :4], noise(4, 128, 1, 1, seed=4)
    factors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": alpha(2)}
    return factors, lambda w: w + 0.5 * tucker(mid.double(), up.double().flatten(1).T, down.double().flatten(1))


def loha(shape: tuple[int, ...]) -> Made:
    width = math.prod(shape[1:])
    w1a, w1b, w2a, w2b = (noise(*s, seed=i) for i, s in enumerate([(shape[0], 4), (4, width)] * 2))
    factors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": alpha(2)}
    return factors, lambda w: w + 0.5 * ((w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double())).reshape(shape)


def loha_tucker() -> Made:
    w1a, w1b, w2a, w2b = (noise(4, n, seed=i) for i, n in enumerate((64, 128, 64, 128)))
    t1, t2 = noise(4, 4, 3, 3, seed=7), noise(4, 4, 3, 3, seed=8)
    factors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "hada_t1": t1, "hada_t2": t2}
    d = torch.Tensor.double
    return factors, lambda w: w + tucker(d(t1), d(w1a), d(w1b)) * tucker(d(t2), d(w2a), d(w2b))


def lokr() -> Made:
    w1, w2 = noise(8, 4, seed=2), noise(32, 8, seed=3)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha(1e10)}, lambda w: w + torch.kron(w1.double(), w2.double())


def lokr_low_rank() -> Made:
    w1a, w1b, w2a, w2b = noise(8, 2, seed=2), noise(2, 4, seed=3), noise(32, 2, seed=4), noise(2, 8, seed=5)
    factors = {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": alpha(6)}
    return factors, lambda w: w + 3 * torch.kron(w1a.double() @ w1b.double(), w2a.double() @ w2b.double())


def lokr_conv() -> Made:
    w1, w2a, w2b = noise(8, 8, seed=2), noise(8, 2, seed=4), noise(2, 16 * 9, seed=5)
    factors = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": alpha(1)}
    second = (w2a.double() @ w2b.double()).reshape(8, 16, 3, 3)
    return factors, lambda w: w + 0.5 * torch.kron(w1.double()[:, :, None, None], second)


def lokr_tucker() -> Made:
    w1, t2, w2a, w2b = noise(8, 8, seed=2), noise(2, 2, 3, 3, seed=3), noise(2, 8, seed=4), noise(2, 16, seed=5)
    factors = {"lokr_w1": w1, "lokr_t2": t2, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": alpha(1)}
    second = tucker(t2.double(), w2a.double(), w2b.double()).contiguous()
    return factors, lambda w: w + 0.5 * torch.kron(w1.double()[:, :, None, None], second)


def glora(shape: tuple[int, int]) -> Made:
    out, into = shape
    a1, a2, b1, b2 = noise(into, 4, seed=2), noise(4, into, seed=3), noise(out, 4, seed=4), noise(4, into, seed=5)
    factors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": alpha(2)}
    return factors, lambda w: w + 0.5 * (w @ a1.double() @ a2.double() + b1.double() @ b2.double())


def old_glora(shape: tuple[int, int]) -> Made:
    factors, expected = glora(shape)
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {f"{swapped[key[:2]]}.weight" if key != "alpha" else key: f for key, f in factors.items()}, expected


def glora_conv() -> Made:
    a1, a2, b1, b2 = (
        noise(*s, seed=i) for i, s in enumerate([(128, 4, 1, 1), (4, 128, 1, 1), (64, 4, 1, 1), (4, 128, 3, 3)])
    )
    factors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    rotation = a1.double().flatten(1) @ a2.double().flatten(1)
    return factors, lambda w: w + torch.einsum("oixy,ij->ojxy", w, rotation) + product(b1.double(), b2.double())


def ia3(shape: tuple[int, ...], *, on_input: bool) -> Made:
    scales = noise(shape[1] if on_input else shape[0], seed=2)
    factors = {"weight": scales, "on_input": torch.tensor(on_input)}
    if len(shape) == 4:
        factors["weight"] = scales[None, :, None, None]
    ones = [1] * (len(shape) - 2)
    view = scales.double().reshape(1, -1, *ones) if on_input else scales.double().reshape(-1, 1, *ones)
    return factors, lambda w: w * (1 + view)


def rotations(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    skew = blocks.double() - blocks.double().transpose(-1, -2)
    if constraint and skew.norm() > constraint:
        skew = skew * constraint / skew.norm()
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def oft(shape: tuple[int, ...], *, constraint: float = 0.0, rescale: bool = False, as_rotations: bool = False) -> Made:
    blocks = noise(shape[0] // 8, 8, 8, seed=2)
    rotation = rotations(blocks, constraint * shape[0])
    factors = {"oft_diag": rotation.float()} if as_rotations else {"oft_blocks": blocks, "alpha": alpha(constraint)}
    scales = noise(shape[0], *[1] * (len(shape) - 1), seed=3) + 1
    if rescale:
        factors["rescale"] = scales

    def expected(w: Tensor) -> Tensor:
        rows = [rotation[i].T @ w[8 * i : 8 * i + 8].flatten(1) for i in range(len(rotation))]
        whole = torch.cat(rows).reshape(w.shape)
        return whole * scales.double() if rescale else whole

    return factors, expected


def boft(shape: tuple[int, ...]) -> Made:
    size, count = 8, shape[0] // 8
    sets = int(math.log2(count)) + 1
    blocks = noise(sets, count, size, size, seed=2)
    rotation = rotations(blocks)

    def expected(w: Tensor) -> Tensor:
        flat = w.flatten(1)
        for i in range(sets):
            far = 2**i * size // 2
            order = [
                start + at + half * far for start in range(0, shape[0], 2 * far) for at in range(far) for half in (0, 1)
            ]
            mixed = torch.block_diag(*rotation[i]) @ flat[order]
            flat = torch.empty_like(flat)
            flat[order] = mixed
        return flat.reshape(w.shape)

    return {"oft_blocks": blocks}, expected


def full(shape: tuple[int, ...], key: str = "diff") -> Made:
    change = noise(*shape, seed=2)
    return {key: change}, lambda w: w + change.double()


def dora(made: Made, shape: tuple[int, ...], axis: int, key: str = "dora_scale") -> Made:
    """The magnitudes in the shape that writers give them, for norms of rows (axis 0) or columns (1)."""
    factors, expected = made
    magnitudes = noise(shape[axis], seed=9).abs() + 1
    dims = [i for i in range(len(shape)) if i != axis]
    view = magnitudes.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    stored = magnitudes if key != "dora_scale" else view

    def decomposed(w: Tensor) -> Tensor:
        whole = expected(w)
        return view.double() * whole / whole.square().sum(dims, keepdim=True).sqrt()

    return factors | {key: stored}, decomposed


CASES: dict[str, tuple[str, Made]] = {
    "LoRA": (LINEAR, lora((256, 32))),
    "LoRA, rank 1": (LINEAR, lora((256, 32), 1)),
    "LoRA without alpha": (LINEAR, lora_without_alpha()),
    "LoRA with alpha 0": (LINEAR, lora_of_alpha_zero()),
    "LoRA with scale": (LINEAR, lora_with_scale()),
    "LoRA of a 1x1 convolution": (ONE, lora((32, 32, 1, 1), tail=(1, 1))),
    "LoRA of a linear layer for a 1x1 convolution": (ONE, lora((32, 32))),
    "LoRA of a 1x1 convolution for a linear layer": (LINEAR, lora((256, 32, 1, 1), tail=(1, 1))),
    "LoCon": (CONV, lora((64, 128, 3, 3), tail=(1, 1))),
    "LoCon in Tucker's form": (CONV, locon_tucker()),
    "LoHa": (LINEAR, loha((256, 32))),
    "LoHa of a convolution": (CONV, loha((64, 128, 3, 3))),
    "LoHa in Tucker's form": (CONV, loha_tucker()),
    "LoKr": (LINEAR, lokr()),
    "LoKr of low rank": (LINEAR, lokr_low_rank()),
    "LoKr of a convolution": (CONV, lokr_conv()),
    "LoKr in Tucker's form": (CONV, lokr_tucker()),
    "GLoRA": (LINEAR, glora((256, 32))),
    "GLoRA, square": (SQUARE, glora((32, 32))),
    "GLoRA, old": (LINEAR, old_glora((256, 32))),
    "GLoRA, old and square": (SQUARE, old_glora((32, 32))),
    "GLoRA of a convolution": (CONV, glora_conv()),
    "IA3 of outputs": (LINEAR, ia3((256, 32), on_input=False)),
    "IA3 of inputs": (LINEAR, ia3((256, 32), on_input=True)),
    "IA3 of outputs, square": (SQUARE, ia3((32, 32), on_input=False)),
    "IA3 of inputs, square": (SQUARE, ia3((32, 32), on_input=True)),
    "IA3 of a convolution": (CONV, ia3((64, 128, 3, 3), on_input=False)),
    "OFT": (LINEAR, oft((256, 32))),
    "OFT of a convolution": (CONV, oft((64, 128, 3, 3))),
    "OFT, constrained": (LINEAR, oft((256, 32), constraint=0.01)),
    "OFT, rescaled": (LINEAR, oft((256, 32), rescale=True)),
    "OFT as rotations": (LINEAR, oft((256, 32), as_rotations=True)),
    "BOFT": (LINEAR, boft((256, 32))),
    "BOFT of a convolution": (CONV, boft((64, 128, 3, 3))),
    "a difference": (CONV, full((64, 128, 3, 3))),
    "a norm": (NORM, full((32,), "w_norm")),
    "DoRA of rows": (LINEAR, dora(lora((256, 32)), (256, 32), 0)),
    "DoRA of columns": (LINEAR, dora(lora((256, 32)), (256, 32), 1)),
    "DoRA of rows, square": (SQUARE, dora(lora((32, 32)), (32, 32), 0)),
    "DoRA of columns, square": (SQUARE, dora(lora((32, 32)), (32, 32), 1)),
    "DoRA of rows of a convolution": (CONV, dora(lora((64, 128, 3, 3), tail=(1, 1)), (64, 128, 3, 3), 0)),
    "DoRA of columns of a convolution": (CONV, dora(lora((64, 128, 3, 3), tail=(1, 1)), (64, 128, 3, 3), 1)),
    "DoRA of PEFT": (SQUARE, dora(lora((32, 32)), (32, 32), 0, "lora_magnitude_vector")),
    "DoRA of ai-toolkit": (LINEAR, dora(lora((256, 32)), (256, 32), 0, "magnitude")),
    "DoRA of LoHa": (CONV, dora(loha((64, 128, 3, 3)), (64, 128, 3, 3), 1)),
    "DoRA of LoKr": (LINEAR, dora(lokr_low_rank(), (256, 32), 0)),
}

STRENGTHS = (
    "LoRA",
    "LoKr in Tucker's form",
    "IA3 of outputs",
    "OFT, rescaled",
    "BOFT",
    "DoRA of rows",
    "DoRA of columns",
)


def spelled(layer: str, factors: Factors) -> Factors:
    return {f"lora_unet_{layer.replace('.', '_')}.{factor}": tensor for factor, tensor in factors.items()}


@pytest.fixture(scope="module")
def networks(one_thread: None) -> Networks:
    """Small networks, which every test gives back as they were."""
    return small_networks()


@pytest.mark.parametrize(
    ("case", "strength"),
    [*((case, 1.0) for case in CASES), *((case, s) for case in STRENGTHS for s in (0.5, -1.0, 2.0))],
)
def test_formula(case: str, strength: float, networks: Networks, tmp_path: Path) -> None:
    layer, (factors, expected) = CASES[case]
    before = state(networks)
    merger = Merger(networks, "small")
    merger.merge([Use(open_adapter(write(tmp_path / "a.safetensors", spelled(layer, factors))), strength)])
    assert unequal(before, state(networks)) == {f"unet.{layer}.weight"}
    weight = before[f"unet.{layer}.weight"].double()
    wanted = weight + strength * (expected(weight) - weight)
    found = networks["unet"].get_parameter(f"{layer}.weight").double()
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    merger.restore()
    assert not unequal(before, state(networks))


@pytest.mark.parametrize(
    ("key", "factors", "layer"),
    [
        ("diff_b", {"diff_b": noise(256)}, LINEAR),
        ("diff_b", {"diff_b": noise(256), "diff": noise(256, 32)}, LINEAR),
        ("b_norm", {"b_norm": noise(32), "w_norm": noise(32)}, NORM),
        ("lora_B.bias", {"lora_B.bias": noise(256), **lora((256, 32))[0]}, LINEAR),
    ],
)
def test_biases(key: str, factors: Factors, layer: str, tmp_path: Path) -> None:
    networks = small_networks()
    before = state(networks)
    Merger(networks, "small").merge(
        [Use(open_adapter(write(tmp_path / "a.safetensors", spelled(layer, factors))), 0.5)]
    )
    scale = 3 / 4 if "alpha" in factors else 1.0
    found = networks["unet"].get_parameter(f"{layer}.bias")
    assert torch.allclose(found, before[f"unet.{layer}.bias"] + 0.5 * scale * factors[key], rtol=1e-6)
    assert unequal(before, state(networks)) == {
        f"unet.{layer}.bias",
        *(f"unet.{layer}.weight" for _ in factors if len(factors) > 1),
    }


def test_kinds_that_depend_on_the_weight_build_on_those_before(tmp_path: Path) -> None:
    """Differences add up whatever their order; a rotation turns what came before it."""
    _, (first, plain) = CASES["LoRA"]
    _, (second, rotated) = CASES["OFT"]
    files = [
        write(tmp_path / f"{i}.safetensors", spelled(LINEAR, factors)) for i, factors in enumerate((first, second))
    ]
    results = []
    for order in ((0, 1), (1, 0)):
        networks = small_networks()
        weight = networks["unet"].get_parameter(f"{LINEAR}.weight").double()
        Merger(networks, "small").merge([Use(open_adapter(files[i])) for i in order])
        found = networks["unet"].get_parameter(f"{LINEAR}.weight").double()
        wanted = rotated(plain(weight)) if order == (0, 1) else plain(rotated(weight))
        assert (found - wanted).norm() < 1e-6 * wanted.norm()
        results.append(found)
    assert not torch.allclose(*results, rtol=1e-3)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_few_bits_are_multiplied_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    factors = {key: tensor.to(stored) for key, tensor in lora((256, 32))[0].items()}
    networks = small_networks()
    weight = networks["unet"].get_parameter(f"{LINEAR}.weight").double()
    Merger(networks, "small").merge([Use(open_adapter(write(tmp_path / "a.safetensors", spelled(LINEAR, factors))))])
    up, down = factors["lora_up.weight"].double(), factors["lora_down.weight"].double()
    wanted = weight + 0.75 * up @ down
    assert (networks["unet"].get_parameter(f"{LINEAR}.weight").double() - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_few_bits_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two adapters that cancel out leave the base as it was, which adding in 16 bits would not."""
    factors = lora((256, 32))[0]
    networks = small_networks(dtype)
    before = state(networks)
    adapter = open_adapter(write(tmp_path / "a.safetensors", spelled(LINEAR, factors)))
    Merger(networks, "small").merge([Use(adapter, 100.0), Use(adapter, -99.0)])
    weight = before[f"unet.{LINEAR}.weight"].float()
    wanted = (weight + 0.75 * factors["lora_up.weight"] @ factors["lora_down.weight"]).to(dtype)
    found = networks["unet"].get_parameter(f"{LINEAR}.weight")
    assert found.dtype == dtype
    assert (found.float() - wanted.float()).abs().max() <= torch.finfo(dtype).eps * wanted.float().abs().max()
