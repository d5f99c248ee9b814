"""The ways to compute attention differ in speed only."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmcli.models import attention
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
@pytest.mark.parametrize("name", ["sdpa", "chunked"])
def test_equals_math(name: str, shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = tensors(*shape, dtype)
    right = math_attention(query.double(), key.double(), value.double())
    out = ATTENTIONS[name](query, key, value)
    assert out.shape == query.shape
    assert out.dtype == dtype
    assert ((out.double() - right).norm() / right.norm()).item() < tolerance


@pytest.mark.parametrize("shape", [(130, 70, 40), (128, 64, 80), (1, 77, 160)])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("scores", "chunk"), [(0, 64), (0, 129), (1 << 22, 64)])
def test_chunks(
    shape: tuple[int, int, int], batch: int, scores: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head by head in chunks that may not divide the queries evenly, and all heads at once; of views, as the modules
    give them."""
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "CHUNK", chunk)
    tokens, keys, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(batch, n, 3, head_dim, generator=generator, dtype=torch.float64).transpose(1, 2)
        for n in (tokens, keys, keys)
    )
    out = ATTENTIONS["chunked"](query, key, value)
    torch.testing.assert_close(out, math_attention(query, key, value), rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Notes the numbers in the largest tensor that any operation inside makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(("tokens", "keys"), [(4096, 4096), (4096, 77), (1024, 1024), (256, 256)])
def test_chunked_attention_holds_few_scores(tokens: int, keys: int) -> None:
    query, key, value = (torch.zeros(1, 8, n, 8) for n in (tokens, keys, keys))
    with LargestTensor() as seen:
        ATTENTIONS["chunked"](query, key, value)
    assert seen.largest <= max(attention.CHUNK * keys, attention.SCORES)
    assert seen.largest >= min(attention.CHUNK, tokens) * keys  # the scores were seen
    if keys == 4096:
        with LargestTensor() as seen:
            ATTENTIONS["math"](query[:, :1], key[:, :1], value[:, :1])
        assert seen.largest == tokens * keys


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
