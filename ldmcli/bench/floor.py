"""The floor under a model's times: how much arithmetic it takes, over how fast this machine does arithmetic at best.

Arithmetic is counted in floating-point operations, two for each multiplication with its addition, of convolutions,
matrix products and attention; norms, activations and additions are not counted, since a perfect program would hide them
behind the rest. Convolutions are counted as they are written: in fewer multiplications (runtime/winograd.py) they may
come out below the floor. Counted are the networks as `models` builds them, on the meta device: no number is computed.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldmcli.checkpoints.load import on_meta
from ldmcli.config import ModelConfig
from ldmcli.networks.attention import math_attention, set_attention
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL

_Result = TypeVar("_Result")

_BATCH = 2  # of a guided step
_SECONDS = 7.0  # that measuring a rate may take, about
_CALL_SECONDS = 0.2  # that one call may take, about: larger products are cut to fewer rows
_FIRST_CALL = 4e10  # operations of the first call on a CPU, whose speed is not known yet
_MOST_OF_A_KIND = 3  # shapes that are timed of convolutions, and of linear layers


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a model's parts at one picture size.

    `unet` is one step of one sample, of which `unet_attention` are the two products of attention (not the projections
    around them) and `unet_convolution` the convolutions; a guided step takes twice as many. Keys and values that the
    U-Net makes of a prompt are in `context`, once per prompt; embeddings of time and size, about a millionth, nowhere.
    `vae` is the decoding of one picture, with `vae_attention` in it; `text` all encoders for one prompt of one chunk,
    each attending as if it were not causal.
    """

    unet: int
    vae: int
    text: int
    context: int
    unet_attention: int
    unet_convolution: int
    vae_attention: int


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution, or a linear layer over height × width rows, for a batch; `height` and `width` are the output's."""

    weight: tuple[int, ...]  # (out, in, height, width) or (out, in)
    height: int
    width: int
    batch: int = _BATCH

    @property
    def flops(self) -> int:
        """Of one call, two per multiplication; borders count as if the padding were multiplied as well."""
        return 2 * self.batch * self.height * self.width * math.prod(self.weight)

    def __str__(self) -> str:
        out, into, *window = self.weight
        if not window:
            return f"linear {into}→{out}, {self.batch * self.height * self.width} rows"
        return f"conv {window[0]}×{window[1]} {into}→{out}, {self.batch}×{self.height}×{self.width}"


@dataclasses.dataclass(frozen=True)
class Rate:
    """The best rate measured, in floating-point operations per second, what reached it, and every product's rate."""

    flops_per_second: float
    product: str
    all: dict[str, float]


def count_flops(config: ModelConfig, width: int, height: int) -> Flops:
    """What pictures of width × height pixels take of a model of this configuration. Takes about a second.

    Sizes that are no multiple of the VAE's factor are rounded down.
    """
    unet, vae = _on_meta(config)
    latents = _latents(config, width, height, 1)
    context = torch.empty(1, config.text_encoders[0].max_length, config.unet.context_dim, device="meta")
    time_embedding = torch.empty(1, 4 * config.unet.block_channels[0], device="meta")
    texts = [on_meta(partial(TextTransformer, text)) for text in config.text_encoders]
    ids = torch.zeros(context.shape[:2], dtype=torch.long, device="meta")
    in_context, keys_values = _counted(lambda: unet.project_context(context), unet)
    in_unet, _ = _counted(lambda: unet(latents, time_embedding, keys_values), unet)
    in_vae, _ = _counted(lambda: vae.decode(latents), vae)
    return Flops(
        unet=in_unet.all,
        vae=in_vae.all,
        text=sum(_counted(partial(text, ids), text)[0].all for text in texts),
        context=in_context.all,
        unet_attention=in_unet.attention,
        unet_convolution=in_unet.convolution,
        vae_attention=in_vae.attention,
    )


def _on_meta(config: ModelConfig) -> tuple[UNet, AutoencoderKL]:
    return on_meta(lambda: UNet(config.unet)), on_meta(lambda: AutoencoderKL(config.vae))


def _latents(config: ModelConfig, width: int, height: int, batch: int) -> Tensor:
    factor = config.vae.factor
    return torch.empty(batch, config.unet.in_channels, height // factor, width // factor, device="meta")


class _Count(NamedTuple):
    """Operations, and how many of them are attention's and convolutions'."""

    all: int
    attention: int
    convolution: int


def _counted(run: Callable[[], _Result], module: nn.Module) -> tuple[_Count, _Result]:
    """Operations of `run`, those of attention only inside `module`, and its result."""
    attended = 0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The definition, two plain products: what a counter makes of fused kernels depends on torch's version.
        nonlocal attended
        attended += 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return math_attention(query, key, value)

    set_attention(module, attend)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = run()
    convolutions = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    return _Count(counter.get_total_flops(), attended, convolutions), result


def largest_products(config: ModelConfig, width: int, height: int) -> list[Product]:
    """The products that take most of a guided U-Net step's arithmetic: convolutions, then linear layers, each from the
    one with the most arithmetic over all its calls on."""
    unet, _ = _on_meta(config)
    spent: Counter[Product] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        if isinstance(module, nn.Conv2d):
            product = Product(tuple(module.weight.shape), *output.shape[2:])
        else:
            product = Product(tuple(module.weight.shape), output[0].numel() // output.shape[-1], 1)
        spent[product] += product.flops

    for module in unet.modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.stride == (1, 1)):
            module.register_forward_hook(note)
    context = torch.empty(_BATCH, config.text_encoders[0].max_length, config.unet.context_dim, device="meta")
    time_embedding = torch.empty(1, 4 * config.unet.block_channels[0], device="meta")
    with torch.no_grad():
        keys_values = unet.project_context(context)
        spent.clear()
        unet(_latents(config, width, height, _BATCH), time_embedding, keys_values)
    ranked = [product for product, _ in spent.most_common()]
    kinds = [product for product in ranked if len(product.weight) == 4], [p for p in ranked if len(p.weight) == 2]
    return [product for kind in kinds for product in kind[:_MOST_OF_A_KIND]]


def measure_rate(
    config: ModelConfig,
    width: int,
    height: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int | None = None,
) -> Rate:
    """The best rate that this machine reaches now in the model's own largest products or in a large square one.

    Each is called for about a second and its best call counts, so that work of other programs hardly shows. Where a
    call would take long, it gets fewer rows of the same width, which are as fast. `threads`: of the CPU, as now if
    None; the number is put back afterwards. Takes about ten seconds.
    """
    cpu = device.type == "cpu"
    products = largest_products(config, width, height)
    seconds = _SECONDS / (len(products) + 1)
    rates: dict[str, float] = {}
    with _settings(threads), torch.inference_mode():
        most = _FIRST_CALL if cpu else math.inf
        for product in [_square(4096 if cpu else 8192), *products]:
            cut = _cut(product, most)
            rates[str(cut)] = _best_rate(cut, dtype, device, seconds)
            most = max(rates.values()) * _CALL_SECONDS
    best = max(rates, key=rates.__getitem__)
    return Rate(rates[best], best, rates)


def _square(size: int) -> Product:
    return Product((size, size), size, 1, batch=1)


def _cut(product: Product, most: float) -> Product:
    """The product with as few rows as keep it near `most` operations, but not below 16 rows."""
    share = most / product.flops
    if share >= 1:
        return product
    return dataclasses.replace(product, height=max(16, math.ceil(product.height * share)))


def _best_rate(product: Product, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations per second in the best of as many calls as fit into `seconds`, at least two, after a warm-up."""
    run = _runner(product, dtype, device)
    started = time.perf_counter()
    best = math.inf
    for _ in range(2 if device.type == "cpu" else 5):
        run()
    _wait(device)
    calls = 0
    while calls < 2 or time.perf_counter() - started < seconds:
        best = min(best, _seconds(run, device))
        calls += 1
    return product.flops / best


def _runner(product: Product, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The product as a call, on numbers of order one: on zeros some hardware is faster than on any real ones."""
    weight = torch.randn(product.weight, device=device).div_(math.prod(product.weight[1:]) ** 0.5).to(dtype)
    if len(product.weight) == 2:
        rows = torch.randn(product.batch * product.height * product.width, product.weight[1], device=device).to(dtype)
        return lambda: F.linear(rows, weight)
    shape = (product.batch, product.weight[1], product.height, product.width)
    x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    padding = product.weight[-1] // 2
    return lambda: F.conv2d(x, weight, padding=padding)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The time of one call; on a GPU of ten in a row, by its own clock, so that launches are hidden."""
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(10):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e4  # milliseconds of ten calls
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    """So many threads inside the block, and on a GPU the fastest convolution there is for each shape."""
    before, tried = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(before if threads is None else threads)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.benchmark = tried
