"""The ways to compute attention differ in speed only."""

import pytest
import torch
from torch import Tensor, nn

from ldmcli.models.attention import ATTENTIONS, Attention, math_attention, set_attention

# (tokens, keys, head_dim): the U-Net's head sizes in SD1, the VAE's 512, and CLIP's 77 keys.
SHAPES = [
    (64, 64, 40),
    (64, 77, 40),
    (36, 77, 80),
    (16, 16, 160),
    (9, 77, 160),
    (63, 77, 8),
    (1, 77, 64),
    (49, 49, 512),
]


def tensors(tokens: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, tokens, head_dim), (2, 3, keys, head_dim), (2, 3, keys, head_dim)]
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return query, key, value


@pytest.mark.parametrize("shape", SHAPES)
def test_math_is_the_definition(shape: tuple[int, int, int]) -> None:
    query, key, value = tensors(*shape)
    out = math_attention(query, key, value)
    for token in (0, shape[0] - 1):
        scores = key[1, 2] @ query[1, 2, token] / shape[2] ** 0.5
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(out[1, 2, token], weights @ value[1, 2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_sdpa_equals_math(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = tensors(*shape, dtype)
    right = math_attention(query.double(), key.double(), value.double())
    out = ATTENTIONS["sdpa"](query, key, value)
    assert out.shape == query.shape
    assert out.dtype == dtype
    assert ((out.double() - right).norm() / right.norm()).item() < tolerance


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_on_a_gpu(name: str, shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    query, key, value = tensors(*shape, dtype)
    right = math_attention(query.double(), key.double(), value.double())
    try:
        out = ATTENTIONS[name](query.cuda(), key.cuda(), value.cuda()).cpu()
    except (ImportError, NotImplementedError) as error:
        if name != "xformers":
            raise
        pytest.skip(f"xformers has no kernel here: {str(error)[:100]}")
    assert ((out.double() - right).norm() / right.norm()).item() < tolerance


@pytest.mark.parametrize(("heads", "context_channels", "bias"), [(1, None, True), (4, None, False), (8, 24, False)])
def test_module_is_torchs_multi_head_attention(heads: int, context_channels: int | None, bias: bool) -> None:
    torch.manual_seed(0)
    ours = Attention(32, heads, context_channels=context_channels, bias=bias).double()
    width = context_channels or 32
    theirs = nn.MultiheadAttention(32, heads, kdim=width, vdim=width, batch_first=True).double()
    x, context = torch.randn(2, 10, 32).double(), torch.randn(2, 7, width).double()
    weights = {name: getattr(ours, f"to_{name[0]}") for name in ("query", "key", "value")}
    with torch.no_grad():
        if context_channels is None:
            theirs.in_proj_weight.copy_(torch.cat([part.weight for part in weights.values()]))
        else:
            theirs.q_proj_weight.copy_(ours.to_q.weight)
            theirs.k_proj_weight.copy_(ours.to_k.weight)
            theirs.v_proj_weight.copy_(ours.to_v.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([part.bias for part in weights.values()]))
        else:
            theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.to_out[0].weight)
        theirs.out_proj.bias.copy_(ours.to_out[0].bias)
        torch.testing.assert_close(ours(x, ours.project(context)), theirs(x, context, context)[0])


def test_set_attention_reaches_every_module() -> None:
    calls: list[int] = []

    def spying(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(query.shape[2])
        return math_attention(query, key, value)

    modules = nn.ModuleList([Attention(8, 2), nn.ModuleDict({"inner": Attention(8, 1)})])
    set_attention(modules, spying)
    x = torch.randn(1, 5, 8)
    for part in (modules[0], modules[1]["inner"]):
        part(x, part.project(x))
    assert calls == [5, 5]
