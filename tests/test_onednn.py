"""Layers laid out for oneDNN give the plain layers' numbers, lay each weight out once, and stay what they were."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import UNetConfig, VAEConfig
from ldmcli.networks.layers import Upsample
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.cpu import onednn
from ldmcli.speed.cpu.onednn import PackedConv2d, PackedLinear, lay_out
from ldmcli.speed.policy import choose_runtime

VAE = VAEConfig(block_channels=(8, 16), layers_per_block=1, norm_groups=4)
UNET = UNetConfig(block_channels=(32, 64), attention=(1, 1), heads=(2, 2), context_dim=16, norm_groups=8)
CHANNELS_LAST = torch.channels_last

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=CHANNELS_LAST) if values.ndim == 4 else values


def twins(module: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A module with random weights as it is built, and the same laid out."""
    randomise(module, torch.Generator().manual_seed(0))
    plain = module.requires_grad_(False).eval().to(dtype, memory_format=CHANNELS_LAST)
    return plain, lay_out(copy.deepcopy(plain), fold=True)


def is_packed(layer: Any) -> bool:
    return bool(layer.weight.is_mkldnn)


@pytest.fixture
def reorders(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of oneDNN's operators is called from here on."""
    calls: Counter[str] = Counter()

    def counting(name: str, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[name] += 1
            return operator(*args)

        return call

    operators = {name: counting(name, operator) for name, operator in onednn._operators().items()}
    monkeypatch.setattr(onednn, "_operators", lambda: operators)
    return calls


@pytest.mark.parametrize(
    ("batch", "into", "out", "kernel", "stride", "size", "bias"),
    [
        (1, 4, 32, 3, 1, (9, 7), True),
        (2, 64, 4, 3, 1, (16, 16), True),
        (1, 96, 64, 3, 1, (8, 8), False),
        (3, 64, 64, 3, 2, (13, 6), True),
        (2, 160, 320, 1, 1, (4, 4), True),
        (1, 40, 80, 1, 1, (1, 1), True),
        (3, 33, 17, 3, 1, (1, 5), True),
    ],
)
def test_convolution(
    batch: int, into: int, out: int, kernel: int, stride: int, size: tuple[int, int], bias: bool
) -> None:
    plain, fast = twins(nn.Conv2d(into, out, kernel, stride=stride, padding=kernel // 2, bias=bias))
    x = normal(batch, into, *size)
    with torch.inference_mode():
        first = fast(x)
        assert not is_packed(fast)
        for _ in range(2):
            assert relative(fast(x), plain(x)) < 1e-6
            assert torch.equal(fast(x), first)  # a picture must not depend on those drawn before it
            assert is_packed(fast)
        contiguous = x.contiguous(memory_format=torch.contiguous_format)
        assert relative(fast(contiguous), plain(x)) < 1e-6
        other = normal(batch + 1, into, size[0] + 1, size[1])
        for _ in range(3):
            assert relative(fast(other), plain(other)) < 1e-6
    assert is_packed(fast)


def test_a_layer_that_is_sure_to_be_called_again_is_laid_out_at_once(reorders: Counter[str]) -> None:
    """The numbers are those of a layer that waits, the weight is laid out once, and inputs of other shapes in turn find
    it plain: laying it out for each would cost more than it saves."""
    plain, waiting = twins(nn.Conv2d(32, 64, 3, padding=1))
    fast = lay_out(copy.deepcopy(plain), fold=False, at_once=True)
    x, other = normal(2, 32, 9, 7), normal(1, 32, 9, 7)
    with torch.inference_mode():
        first = fast(x)
        assert is_packed(fast)
        assert reorders["_reorder_convolution_weight"] == 1
        assert torch.equal(first, waiting(x))
        assert torch.equal(fast(x), first)
        assert reorders["_reorder_convolution_weight"] == 1
        for one in (other, x, other):
            assert torch.equal(fast(one), waiting(one))
            assert not is_packed(fast)


def test_a_unet_is_laid_out_at_its_first_step_and_a_vae_is_not() -> None:
    unet, vae = UNet(UNET).requires_grad_(False).eval(), AutoencoderKL(VAE).requires_grad_(False).eval()
    runtime = choose_runtime(RuntimeSpec(device="cpu", dtype="fp32"))
    for module in (unet, vae):
        randomise(module, torch.Generator().manual_seed(0))
        assert runtime.prepare(module) is module
    with torch.inference_mode():
        latents = normal(2, 4, 8, 8)
        unet(latents, unet.embed_time(torch.tensor([500.0])), unet.project_context(normal(2, 7, 16)))
        vae.decode(latents)  # once, as in most runs: laying it out would not pay
    convolutions = [part for part in unet.modules() if isinstance(part, nn.Conv2d)]
    assert all(map(is_packed, convolutions))
    assert not any(is_packed(part) for part in vae.modules() if isinstance(part, nn.Conv2d))


def test_memory_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each weight: what is given back has to be cleared by the kernel before it is used again."""
    trims = []
    monkeypatch.setattr(onednn, "MUCH", 100_000)
    monkeypatch.setattr(onednn, "_left", 0)
    monkeypatch.setattr(onednn, "give_back_free_memory", trims.append)
    layers: Any = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(9))  # of 36,864 bytes each
    layers = lay_out(layers, fold=False, at_once=True)
    with torch.inference_mode():
        for layer in layers.requires_grad_(False).to(memory_format=CHANNELS_LAST):
            layer(normal(1, 32, 5, 5))
    assert trims == [0, 0, 0]


@pytest.mark.parametrize("shape", [(1, 64), (2, 77, 64), (2, 256, 64), (3, 1, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_product(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as a CPU without bfloat16 can tell nothing of that."""
    monkeypatch.setattr(PackedLinear, "dtypes", (torch.float32, torch.bfloat16))
    plain, fast = twins(nn.Linear(64, 136, bias=bias))
    x = normal(*shape)
    with torch.inference_mode():
        first = fast(x)
        assert not is_packed(fast)
        for _ in range(2):
            assert relative(fast(x), plain(x)) < 1e-6
            assert torch.equal(fast(x), first)
            assert is_packed(fast)


@pytest.mark.parametrize(
    ("layer", "times"), [(nn.Conv2d(48, 64, 3, padding=1), 1.1), (nn.Linear(48, 64), 1.1), (Upsample(48), 1.6)]
)
def test_bfloat16(layer: nn.Module, times: float) -> None:
    """Laid out where this CPU can, plain where it cannot: either way as near the exact numbers as the plain layer. The
    upsampler's summed weights are rounded to 16 bits once more, an error of the same size as rounding its result."""
    plain, fast = twins(layer, torch.bfloat16)
    x = normal(2, 9, 7, 48, dtype=torch.bfloat16)
    if not isinstance(plain, nn.Linear):
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=CHANNELS_LAST)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.inference_mode():
        for _ in range(3):
            out = fast(x)
            assert out.dtype == torch.bfloat16
            assert relative(out, exact) < times * relative(plain(x), exact) < 1e-2


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3), (8, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_folded_upsampling(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    plain, fast = twins(Upsample(24), dtype)
    x = normal(2, 24, *size, dtype=dtype)
    doubled, odd = (2 * size[0], 2 * size[1]), (2 * size[0] - 1, 2 * size[1])
    with torch.inference_mode():
        for target in (odd, odd, doubled, None, odd):
            out = fast(x, target)
            assert relative(out, plain(x, target)) < tolerance
            assert out.is_contiguous(memory_format=CHANNELS_LAST)
    assert [conv.kernel_size for conv in fast._folded] == [(2, 2)] * 4


def unet_call(unet: UNet, x: Tensor) -> Tensor:
    context = unet.project_context(normal(len(x), 5, 16).to(x.dtype))
    return unet(x, unet.embed_time(torch.tensor([500.0])), context)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 7, 9)])
def test_no_weight_of_a_unet_is_laid_out_twice(
    shape: tuple[int, ...], reorders: Counter[str], one_thread: None
) -> None:
    """Over a run's steps, and for a second run of the same shape; with the same bits at every step."""
    plain, fast = twins(UNet(UNET))
    with torch.inference_mode():
        right, first = unet_call(plain, normal(*shape)), unet_call(fast, normal(*shape))
        for _ in range(4):
            assert torch.equal(unet_call(fast, normal(*shape)), first)
        assert relative(first, right) < 1e-5
    convolutions = [part for part in fast.modules() if isinstance(part, PackedConv2d)]
    if shape[2] % 2 == 0:  # else the upsampler's own convolution is called, as others are
        # An upsampler's own convolution is never called: four smaller ones are.
        assert reorders["_reorder_convolution_weight"] == len(convolutions) + 3
        assert sum(map(is_packed, convolutions)) == len(convolutions) - 1


def used(module: nn.Module) -> Any:
    """A U-Net laid out and called until its weights are packed."""
    with torch.inference_mode():
        for _ in range(2):
            unet_call(module, normal(2, 4, 8, 8))
    assert is_packed(module.mid_block.resnets[0].conv1)
    return module


def test_converted_weights_are_plain() -> None:
    """There and back, as when a picture is drawn again in float32."""
    plain, fast = twins(UNet(UNET))
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in used(fast).named_parameters()] == names
    right = unet_call(plain.double(), normal(2, 4, 8, 8, dtype=torch.float64))
    converted = used(fast).double()
    assert all(torch.equal(*pair) for pair in zip(converted.parameters(), plain.parameters(), strict=True))
    assert relative(unet_call(converted, normal(2, 4, 8, 8, dtype=torch.float64)), right) < 1e-12
    again = used(fast.float())
    with torch.inference_mode():
        assert relative(unet_call(again, normal(2, 4, 8, 8)), right) < 1e-5


def test_the_plain_module_keeps_its_layers() -> None:
    """Layers are replaced on their parent, by others with the same parameters."""
    layer = nn.Conv2d(3, 3, 3)
    parent = nn.ModuleList([layer, layer])
    fast: Any = lay_out(parent, fold=True)
    assert fast is parent
    assert type(layer) is nn.Conv2d
    assert isinstance(fast[0], PackedConv2d)
    assert fast[0] is fast[1]
    assert fast[0].weight is layer.weight


def test_gradients_still_flow() -> None:
    plain, fast = twins(UNet(UNET))
    gradients = []
    for module in (plain, used(fast)):
        x = normal(2, 4, 8, 8).requires_grad_()
        unet_call(module, x).square().sum().backward()
        gradients.append(x.grad)
    assert relative(*gradients) < 1e-4


def test_without_the_operators_all_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_operators", dict)
    unet = UNet(UNET)
    before = list(unet.modules())
    assert list(lay_out(unet, fold=True).modules()) == before


@pytest.mark.parametrize("refused", ["_reorder_convolution_weight", "_convolution_pointwise"])
def test_a_refusing_operator_is_tried_once(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a number type that the CPU has no kernel for: plain weights serve on, with the same numbers."""
    tried = []

    def refuse(*_args: Any) -> Tensor:
        tried.append(1)
        raise RuntimeError("needs another CPU")

    operators = onednn._operators() | {refused: refuse}
    monkeypatch.setattr(onednn, "_operators", lambda: operators)
    plain, fast = twins(nn.Conv2d(8, 8, 3, padding=1))
    x = normal(1, 8, 5, 5)
    with torch.inference_mode():
        first = fast(x)
        for _ in range(4):
            assert torch.equal(fast(x), first)
        assert relative(first, plain(x)) < 1e-6
    assert not is_packed(fast)
    assert len(tried) == 1


def test_what_is_replaced_is_freed_without_the_collector() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    layers = [weakref.ref(layer) for layer in module]
    gc.disable()
    try:
        made = lay_out(module, fold=False)
        assert isinstance(made.get_submodule("0"), PackedConv2d)
        assert [layer() for layer in layers] == [None, None]
    finally:
        gc.enable()
