"""The ways to compute attention differ in speed only."""

import logging
import subprocess
import sys

import pytest
import torch
from oracle.comparing import relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmcli.errors import UsageError
from ldmcli.networks import attention
from ldmcli.networks.attention import (
    ATTENTIONS,
    NEED_CUDA,
    Attend,
    Attention,
    math_attention,
    or_sdpa,
    ready_attention,
    sdpa_attention,
    set_attention,
)
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.policy import choose_runtime

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
TORCH_KERNELS = ("flash", "cudnn", "efficient")
# (tokens, keys, head_dim): the head sizes of SD1's U-Net, 2.x's and XL's 64, the VAE's 512, and CLIP's 77 keys.
SHAPES = [
    (64, 64, 40),
    (64, 77, 40),
    (36, 77, 80),
    (16, 16, 160),
    (9, 77, 160),
    (63, 77, 8),
    (1, 77, 64),
    (35, 77, 40),
    (81, 81, 80),
    (45, 154, 64),
    (49, 49, 512),
]


def tensors(tokens: int, keys: int, head_dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Views of (batch, tokens, heads, head_dim), as the modules give them."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, n, 3, head_dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in (tokens, keys, keys)
    )
    return query, key, value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (FP32, 1e-5), (BF16, 2e-2)])
def test_they_agree(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks too that may not divide the queries evenly, head by head and all heads at once."""
    query, key, value = tensors(*shape, dtype)
    right = math_attention(query.double(), key.double(), value.double())
    for scores, chunk in ((attention.SCORES, attention.CHUNK), (0, 16), (0, 35)):
        monkeypatch.setattr(attention, "SCORES", scores)
        monkeypatch.setattr(attention, "CHUNK", chunk)
        for name in ("sdpa", "chunked"):
            out = ATTENTIONS[name](query, key, value)
            assert (out.shape, out.dtype) == (query.shape, dtype)
            assert relative(out, right) < tolerance


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


class Operators(TorchDispatchMode):
    """Notes the operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TORCH_KERNELS)
def test_a_kernel_of_torch_is_called_itself(name: str) -> None:
    """Nothing is decided and no flag set on the way to it. On the meta device: no number is computed."""
    query = torch.empty(2, 9, 8, 40, dtype=torch.float16, device="meta").transpose(1, 2)
    key = torch.empty(2, 77, 8, 40, dtype=torch.float16, device="meta").transpose(1, 2)
    with Operators() as seen:
        out = ATTENTIONS[name](query, key, key)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    fused = [called for called in seen.called if "scaled_dot_product" in called]
    assert fused == [f"aten::_scaled_dot_product_{name}_attention"]


@pytest.mark.parametrize("name", TORCH_KERNELS)
def test_what_a_kernel_refuses_torch_computes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a CPU, or the VAE's wide heads; one word for each size of heads."""
    caplog.set_level(logging.INFO, "ldmcli")
    attend = or_sdpa(ATTENTIONS[name].__wrapped__)  # type: ignore[attr-defined]
    for head_dim in (8, 8, 16):
        query, key, value = tensors(4, 4, head_dim, FP32)
        assert attend(query, key, value).equal(sdpa_attention(query, key, value))
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"{name}_attention refused heads of {head_dim} numbers" for head_dim in (8, 16)
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), torch.AcceleratorError("lost")], ids=repr)
def test_a_fault_is_not_a_refusal(error: Exception) -> None:
    def fails(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise error

    attend = or_sdpa(fails)
    for _ in range(2):
        with pytest.raises(type(error)):
            attend(*tensors(4, 4, 8))


@pytest.mark.parametrize(
    ("name", "told"),
    [*((name, f"attention {name} needs a CUDA device") for name in NEED_CUDA), ("measured", "--attention sdpa")],
)
def test_a_choice_that_cannot_be_met_is_refused(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        choose_runtime(RuntimeSpec(device="cpu", dtype="fp32", attention=name))


def test_one_picture_alone_is_drawn_without_what_is_compiled_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    many, one = (choose_runtime(RuntimeSpec(), alone=alone) for alone in (False, True))
    assert (many.kernels, many.alone) == ("auto", False)
    assert (one.kernels, one.alone) == ("torch", True)
    chosen = choose_runtime(RuntimeSpec(kernels="triton", attention="flash"), alone=True)
    assert (chosen.kernels, chosen.alone, chosen.attention) == ("triton", False, "flash")
    for other in (RuntimeSpec(compile=True), RuntimeSpec(dtype="fp32")):  # whose pictures are those of a server
        assert choose_runtime(other, alone=True).kernels == "auto"
    assert choose_runtime(RuntimeSpec(device="cpu", dtype="fp32"), alone=True) == choose_runtime(
        RuntimeSpec(device="cpu", dtype="fp32")
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_among_a_prompts_tokens(causal: bool) -> None:
    query, key, value = tensors(77, 77, 8)
    hidden = torch.full((77, 77), -torch.inf).triu(1) if causal else torch.zeros(77, 77)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + hidden
    assert torch.allclose(ready_attention(query, key, value, causal=causal), scores.softmax(-1) @ value, atol=1e-5)


def test_xformers_is_not_imported_before_it_is_used() -> None:
    """Nor Triton: the import of either takes long."""
    modules = "ldmcli.networks.attention, ldmcli.speed.policy"
    code = f"import sys, {modules}; print(*{{'xformers', 'triton'}} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""


# (batch, heads, tokens, keys, head_dim) that real models call: SD1.5, 2.1 and XL, and VAEs.
REAL = [
    (2, 8, 4096, 4096, 40),
    (2, 8, 4096, 77, 40),
    (2, 8, 1024, 1024, 80),
    (2, 8, 1024, 154, 80),
    (2, 8, 256, 256, 160),
    (2, 8, 64, 77, 160),
    (32, 8, 64, 64, 160),
    (2, 5, 9216, 77, 64),
    (2, 10, 2304, 2304, 64),
    (2, 20, 1024, 1024, 64),
    (2, 20, 1024, 154, 64),
    (2, 8, 3003, 77, 40),
    (1, 1, 4096, 4096, 512),
]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def on_card(shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the modules give them: views of (batch, tokens, channels)."""
    batch, heads, tokens, keys, head_dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(n: int) -> Tensor:
        flat = torch.randn(batch, n, heads * head_dim, generator=generator, device="cuda").to(dtype)
        return flat.unflatten(-1, (heads, -1)).transpose(1, 2)

    return draw(tokens), draw(keys), draw(keys)


def error(out: Tensor, *inputs: Tensor) -> float:
    """Of the last sample, relative to the definition in double precision."""
    return relative(out[-1:], math_attention(*(tensor[-1:].double() for tensor in inputs)))


def recorded(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a call on `inputs`, and where it leaves its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*inputs)
    return graph, out


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-3), (FP16, 2e-3), (BF16, 2e-2)], ids=str)
@pytest.mark.parametrize("name", [*ATTENTIONS, "ready"])
def test_real_shapes_on_a_gpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """As exact as the number type allows, called at once, and from a CUDA graph with other numbers in the same
    place."""
    if name == "xformers":
        pytest.importorskip("xformers")
        try:
            attention.check_xformers(torch.device("cuda"), dtype)
        except (NotImplementedError, RuntimeError) as refusal:  # it was built for another torch
            pytest.skip(str(refusal).partition("\n")[0])
    attend, errors = (ATTENTIONS | {"ready": ready_attention})[name], {}
    for shape in REAL:
        inputs = on_card(shape, dtype, 0)
        at_once = error(attend(*inputs), *inputs)
        graph, out = recorded(attend, inputs)
        for place, other in zip(inputs, on_card(shape, dtype, 1), strict=True):
            place.copy_(other)
        graph.replay()
        errors[shape] = at_once, error(out, *inputs)
    assert {shape: found for shape, found in errors.items() if not max(found) < tolerance} == {}


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
