"""The fused GPU kernels: that they compile for a card and give right numbers (in Triton's interpreter, or on a card),
and that a fused model stays what it was."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_kernels import check, normal
from oracle.comparing import relative
from oracle.random_model import randomise
from torch import Tensor, nn

from ldmcli.config import TinyVAEConfig, UNetConfig, VAEConfig
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.tiling import decode_tiled
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.speed.cuda import kernels
from ldmcli.speed.cuda.fused import fuse
from ldmcli.speed.cuda.kernels import add_and_norm, add_bias_residual, geglu, group_norm_silu, kernels_work

TESTS = Path(__file__).parent
CHANNELS_LAST = torch.channels_last
UNET = UNetConfig(block_channels=(32, 64), attention=(1, 1), heads=(2, 2), context_dim=16, norm_groups=8)
VAE = VAEConfig(block_channels=(16, 32), norm_groups=4)
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def random(module: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    randomise(module, torch.Generator().manual_seed(0))
    return module.requires_grad_(False).eval().to(device, dtype, memory_format=CHANNELS_LAST)


def fused_copy(module: Any) -> Any:
    return fuse(copy.deepcopy(module))


def variant(**fields: Any) -> Callable[[], nn.Module]:
    """Makes a U-Net as the latent diffusion paper's models have it."""
    return lambda: UNet(UNetConfig(**vars(UNET) | fields))


def predict(unet: UNet, size: tuple[int, int] = (10, 6), rounded: torch.dtype = torch.float32) -> Tensor:
    """A U-Net's prediction for a guided pair of latents, with inputs that are rounded to a number type."""
    weight, config = unet.conv_in.weight, unet.config
    latents, context, time = (
        normal(*shape, dtype=rounded, device=str(weight.device)).to(weight.dtype, memory_format=torch.preserve_format)
        for shape in ((2, 4, *size), (2, 77, max(1, config.context_dim)), (1, 4 * config.block_channels[0]))
    )
    return unet(latents, time, unet.project_context(context))


def decode(vae: Any) -> Tensor:
    return vae.decode(normal(1, 4, 6, 5, dtype=next(vae.parameters()).dtype))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "unet": (lambda: UNet(UNET), predict),
    "linear unet": (lambda: UNet(UNetConfig(**vars(UNET) | {"linear_projection": True})), predict),
    "unet that attends to itself": (variant(context_dim=0), predict),
    "unet whose resnets resample": (variant(context_dim=0, resnet_resampling=True), predict),
    "unet of cross-attention": (variant(only_cross_attention=(True, False), classes=3), predict),
    "vae": (lambda: AutoencoderKL(VAE), decode),
    "tiny vae": (lambda: TinyVAE(TinyVAEConfig(channels=8)), decode),
}


def test_in_the_interpreter() -> None:
    """tests/interpreted_kernels.py, in a process whose Triton interprets."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "interpreted_kernels.py", "--color=no"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [75, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a card that is not there, down to machine code, reading 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code: Any = kernels._code()
    pointers = ["x", "out", "weight", "bias", "shift", "h", "residual", "residual_bias", "norm_bias", "normed"]
    norm = {"ROWS": 16, "COLUMNS": 128, "WIDTH": 40, "TOGETHER": 3, "MEMBERS": 4}
    blocks = {
        "part_moments": norm,
        "norm_parts": norm | {"PARTS": 64},
        "gate": {"ROWS": 8, "COLUMNS": 256},
        "add_rows": {"ROWS": 32, "COLUMNS": 64},
        "add_and_norm_rows": {"ROWS": 1, "COLUMNS": 2048},
    }
    for name, constants in blocks.items():
        kernel = getattr(code, name)
        types = dict.fromkeys(kernel.arg_names, "i32") | {"eps": "fp32"} | dict.fromkeys(pointers, "*fp16")
        types |= dict.fromkeys(("means", "squares"), "*fp32") | dict.fromkeys(constants, "constexpr")
        signature = {argument: types[argument] for argument in kernel.arg_names}
        whole = ("channels", "inner")  # multiples of 16 in real models
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, (argument, kind) in enumerate(signature.items())
            if kind[0] == "*" or argument in whole
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": 4}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        assert compiled.metadata.shared < 48 << 10
        assert "ld.global.v4.b32" in compiled.asm["ptx"], name


def test_a_run_on_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; from ldmcli.speed.cuda.fused import fuse\n"
        "from ldmcli.speed.cuda.kernels import kernels_work\n"
        "from ldmcli.config import UNetConfig; from ldmcli.networks.unet import UNet\n"
        "unet = UNet(UNetConfig(block_channels=(32, 32), attention=(1, 0), heads=(1, 1), context_dim=8)).eval()\n"
        "fuse(unet); context = unet.project_context(torch.zeros(1, 3, 8))\n"
        "unet.requires_grad_(False)(torch.zeros(1, 4, 4, 4), unet.embed_time(torch.zeros(1)), context)\n"
        "assert not kernels_work(torch.device('cpu'), torch.float32)\n"
        "sys.exit(str([name for name in sys.modules if name.split('.')[0] == 'triton'] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "triton" not in done.stderr.replace("Triton", ""), done.stderr
    assert done.stderr.strip().startswith("this program's own GPU kernels cannot be used"), done.stderr


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: __import__("no_such_triton"))
    kernels._code.cache_clear()
    kernels_work.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not kernels_work(torch.device("cuda", 0), torch.float16)
            assert not kernels_work(torch.device("cuda", 0), torch.float16)
    finally:
        kernels._code.cache_clear()
        kernels_work.cache_clear()
    assert caplog.messages == ["this program's own GPU kernels cannot be used (Triton is not installed); torch's are"]


def test_torch_computes_the_plain_formulas() -> None:
    x, weight, bias, shift = normal(2, 8, 3, 5), normal(8, seed=2), normal(8, seed=3), normal(2, 8, seed=4)
    shifted = x + shift[:, :, None, None]
    parts = shifted.reshape(2, 4, -1)
    normed = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    normed = normed.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    assert relative(group_norm_silu(x, 4, weight, bias, 1e-5, shift=shift, activate=False), normed) < 1e-6
    assert relative(group_norm_silu(x, 4, weight, bias, 1e-5, shift=shift), normed * normed.sigmoid()) < 1e-6
    value, gate = x.chunk(2, dim=-1) if x.shape[-1] % 2 == 0 else x[..., :4].chunk(2, dim=-1)
    both = torch.cat([value, gate], -1).contiguous()
    assert relative(geglu(both), value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))) < 1e-6
    assert relative(add_bias_residual(x, weight, shifted, bias), x + (weight + bias)[:, None, None] + shifted) < 1e-6
    tokens = normal(2, 5, 8)
    total, normed = add_and_norm(tokens, weight, tokens, weight, bias, 1e-5)
    assert relative(total, 2 * tokens + weight) < 1e-6
    apart = total - total.mean(-1, keepdim=True)
    variance = total.var(-1, unbiased=False, keepdim=True)
    assert relative(normed, apart / (variance + 1e-5).sqrt() * weight + bias) < 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_fused_is_the_same_by_torch(kind: str) -> None:
    build, run = MODELS[kind]
    plain = random(build())
    fast = fused_copy(plain)
    assert relative(run(fast), run(plain)) < 2e-6
    assert any("Fused" in type(part).__name__ for part in fast.modules()) == (kind != "tiny vae")
    if kind == "vae":
        latents = normal(1, 4, 6, 5)
        assert relative(decode_tiled(fast, latents), plain.decode(latents)) < 2e-6
        images = normal(1, 3, 12, 10)
        assert relative(fast.encode(images).mean, plain.encode(images).mean) < 2e-6


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_weights_are_held_once_and_can_be_converted(kind: str) -> None:
    build, run = MODELS[kind]
    plain = random(build())
    fast = fused_copy(plain)

    def held(module: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    assert held(fast) == held(plain)
    right = run(copy.deepcopy(plain).half().float())
    fast = fast.half().float()
    assert relative(run(fast), right) < 2e-4  # sums of biases are rounded once more


REAL_MAPS = [  # batch, channels, height, width: Stable Diffusion 1.x's U-Net, guided, and its VAE
    (2, 320, 64, 64),
    (2, 960, 64, 64),
    (2, 640, 32, 32),
    (2, 1920, 32, 32),
    (2, 1280, 16, 16),
    (2, 2560, 8, 8),
    (1, 320, 65, 47),
    (16, 640, 64, 64),
    (1, 512, 64, 64),
    (1, 256, 512, 512),
    (1, 128, 512, 512),
]


@pytest.mark.cuda
@needs_card
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_real_sizes_on_a_card(dtype: torch.dtype) -> None:
    """As near to what is exact as torch's result in the same number type."""
    on: Any = {"dtype": dtype, "device": "cuda"}
    for shape in REAL_MAPS:
        x, h = (normal(*shape, **on, seed=seed) * 2 + 1 for seed in (1, 2))
        weight, bias = normal(shape[1], **on, seed=3), normal(shape[1], **on, seed=4)
        for settings in ({}, {"shift": normal(shape[0], shape[1], **on, seed=5)}, {"activate": False}):
            check(group_norm_silu, x, 32, weight, bias, 1e-5, slack=1.05, **settings)
        check(add_bias_residual, h, bias, x, weight, slack=1.05)
    for tokens, inner in ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120), (3055, 1280)):
        check(geglu, normal(2, tokens, 2 * inner, **on) * 3, slack=1.05)
    for shape in ((2, 4096, 320), (2, 1024, 640), (32, 256, 1280), (1, 3055, 320)):
        h, residual = (normal(*shape, **on, seed=seed) * 2 + 1 for seed in (1, 2))
        bias, weight, norm_bias = (normal(shape[-1], **on, seed=seed) for seed in (3, 4, 5))
        check(add_and_norm, h, bias, residual, weight, norm_bias, 1e-5, slack=1.05)


@pytest.mark.cuda
@needs_card
@pytest.mark.slow
def test_more_than_two_billion_numbers_on_a_card() -> None:
    shape = (1, 64, 8192, 4104)  # 2^31 and a little; 4.3 GB
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=CHANNELS_LAST).normal_()
    x[:, :, -8:] += 4
    means = torch.stack([rows.double().mean((0, 2, 3)) for rows in x.split(512, 2)]).mean(0)
    squares = torch.stack([rows.double().square().mean((0, 2, 3)) for rows in x.split(512, 2)]).mean(0)
    mean = means.unflatten(0, (32, 2)).mean(1).repeat_interleave(2)
    variance = squares.unflatten(0, (32, 2)).mean(1).repeat_interleave(2) - mean**2
    right = (x[:, :, -8:].double() - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    ones, zeros = torch.ones(64, dtype=x.dtype, device="cuda"), torch.zeros(64, dtype=x.dtype, device="cuda")
    assert relative(group_norm_silu(x, 32, ones, zeros, 1e-5, activate=False)[:, :, -8:], right) < 3e-4
    right = x[:, :, -8:].double() * 2 + 1
    assert relative(add_bias_residual(x, ones, x.clone(memory_format=torch.preserve_format))[:, :, -8:], right) < 3e-4


@pytest.mark.cuda
@needs_card
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_real_unet_on_a_card(dtype: torch.dtype) -> None:
    """Stable Diffusion 1.x's own shapes; and the same once more by a CUDA graph."""
    assert kernels_work(torch.device("cuda", torch.cuda.current_device()), dtype)
    plain = random(UNet(UNetConfig()), device="cuda", dtype=dtype)
    fast = fused_copy(plain)
    theirs, ours = predict(plain, (64, 64), dtype), predict(fast, (64, 64), dtype)
    right = predict(plain.double(), (64, 64), dtype)
    assert relative(ours, right) < 1.05 * relative(theirs, right)
    latents, context, time = (normal(*n, dtype=dtype, device="cuda") for n in ((2, 4, 64, 64), (2, 77, 768), (1, 1280)))
    keys_values = fast.project_context(context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = fast(latents, time, keys_values)
    replayed.zero_()
    graph.replay()
    assert relative(replayed, right) < 1.05 * relative(theirs, right)


@pytest.mark.cuda
@needs_card
@torch.inference_mode()
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_a_real_vae_on_a_card(dtype: torch.dtype) -> None:
    plain = random(AutoencoderKL(VAEConfig()), device="cuda", dtype=dtype)
    fast = fused_copy(plain)
    latents = normal(1, 4, 64, 64, dtype=dtype, device="cuda")
    theirs, ours = plain.decode(latents), fast.decode(latents)
    right = plain.double().decode(latents.double())
    assert relative(ours, right) < 1.05 * relative(theirs, right)
