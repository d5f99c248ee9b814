"""Device, number type and attention for a run: what the user asked for, or what suits the machine."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from ldmcli.background import in_background
from ldmcli.config import TinyVAEConfig, VAEConfig
from ldmcli.disk.cache import is_news
from ldmcli.errors import UsageError, printable
from ldmcli.networks.attention import ATTENTIONS, NEED_CUDA, REMOVED, check_xformers, ready_attention, set_attention
from ldmcli.networks.unet import Encoder, UNet
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.cpu.onednn import lay_out

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
USUAL = RuntimeSpec()
_Module = TypeVar("_Module", bound=nn.Module)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and how to compute, as it was chosen. `dtype` is that of U-Net and VAE, `text_dtype` that of the text
    encoder. `alone`: attention is not to be compiled first. The rest is as in RuntimeSpec, as far as it applies on this
    device."""

    device: torch.device
    dtype: torch.dtype
    text_dtype: torch.dtype
    attention: str
    kernels: str = "torch"
    cuda_graph: bool = False
    compile: bool = False
    low_vram: bool = False
    alone: bool = False

    @property
    def half(self) -> bool:
        """Whether weights are held in 16 bits."""
        return self.dtype != torch.float32

    def to_dict(self) -> dict[str, str]:
        """What may change pixels, in the words of the command line."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            "device": str(self.device),
            "dtype": names[self.dtype],
            "attention": self.attention,
            "torch": torch.__version__,
            **({"compile": "inductor"} if self.compile else {}),
        }

    def vae_dtype(self, vae: VAEConfig | TinyVAEConfig) -> torch.dtype:
        """The number type of a VAE: float32 in place of fp16 where its activations are known to overflow that."""
        return torch.float32 if vae.force_upcast and self.dtype == torch.float16 else self.dtype

    def prepare(self, module: _Module) -> _Module:
        """A U-Net, control network or VAE laid out for speed: channels last in memory, this runtime's attention; on a
        GPU this program's own kernels, on a CPU weights as oneDNN wants them. Raises UsageError."""
        module.to(memory_format=torch.channels_last)
        set_attention(module, ready_attention if self.alone else ATTENTIONS[self.attention])
        made, steps = cast(nn.Module, module), isinstance(module, Encoder)
        if self.compile and isinstance(module, UNet):
            return module  # torch.compile lays out and fuses by itself, and does not see through what is below
        if self.device.type == "cpu":
            # A U-Net's upsamplers are a twentieth of its work, and their folded weights a sixteenth more memory. Its
            # layers are called at every step, a VAE's in most runs once.
            made = lay_out(module, fold=not steps, fewer_products=self.kernels != "torch", at_once=steps)
            return cast(_Module, made)
        from ldmcli.speed.cuda.fused import fuse, in_planes

        if self._kernels_work(next(module.parameters()).dtype):
            made = fuse(module)
        elif isinstance(module, Encoder):
            made = in_planes(module)
        return cast(_Module, made)

    def try_kernels(self, parts: Callable[[], Iterable[tuple[nn.Module, torch.dtype, Sequence[int]]]]) -> None:
        """Try this program's own GPU kernels, where they are to compute, and compile them for `parts` of the model, on
        meta, with their number types and the pixels of their maps: beside the reading of weights."""
        if self.device.type == "cuda" and self.kernels != "torch" and not self.compile:
            from ldmcli.speed.cuda.fused import compile_ahead
            from ldmcli.speed.cuda.kernels import kernels_work

            ahead = [
                in_background(functools.partial(compile_ahead, part, self.device, dtype, pixels), "compile")
                for part, dtype, pixels in parts()
            ]
            kernels_work(self.device, self.dtype)  # which says what is wrong, should that be
            for future in ahead:
                future.exception()

    def _kernels_work(self, dtype: torch.dtype) -> bool:
        """Whether this program's own kernels are to compute. Raises UsageError where they were asked for and do not
        work."""
        if self.kernels == "torch":
            return False
        from ldmcli.speed.cuda.kernels import kernels_work

        works = kernels_work(self.device, dtype)
        if not works and self.kernels == "triton":
            raise UsageError("--kernels triton cannot be used here (see above); use --kernels auto or torch.")
        return works


def choose_runtime(spec: RuntimeSpec = USUAL, *, alone: bool = False) -> Runtime:
    """Resolve what was asked for. For a picture that is drawn `alone`, a GPU is to compute with what need not be
    compiled first: on an H100, this program's own kernels and cuDNN's attention take a second to load and ten to
    compile, and save 0.2 s of 20 steps of Stable Diffusion 1.5. Raises UsageError where it cannot be met."""
    device = _choose_device(spec.device, remember=spec.cache)
    cuda = device.type == "cuda"
    dtype = spec.dtype
    if dtype == "auto":
        dtype = "fp16" if cuda else "bf16" if cpu_has_bf16() else "fp32"
    elif dtype == "fp16" and not cuda:
        raise UsageError("dtype fp16 is for GPUs and very slow on a CPU; use --dtype bf16 or fp32 there.")
    if spec.kernels == "triton" and not cuda:
        raise UsageError("--kernels triton needs a CUDA device; use --kernels auto or torch on a CPU.")
    alone = alone and cuda and dtype != "fp32" and not spec.compile  # in float32, pictures of all commands are equal
    if spec.low_vram and not cuda:
        _log.info("--low-vram is for GPUs and does nothing on a CPU")
    return Runtime(
        device,
        DTYPES[dtype],
        # On a CPU the text encoder is a small part of the work, and float32 keeps the prompt exact.
        DTYPES[dtype] if cuda else torch.float32,
        _choose_attention(spec.attention, device, DTYPES[dtype]),
        "torch" if alone and spec.kernels == "auto" else spec.kernels,
        # Recordings would hold what comes and goes to save memory.
        cuda_graph=cuda and spec.cuda_graph and not spec.low_vram,
        compile=spec.compile,
        low_vram=cuda and spec.low_vram,
        alone=alone and spec.attention == "auto",
    )


@contextlib.contextmanager
def computing(threads: int) -> Iterator[None]:
    """Inside the block a CPU computes with so many threads."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def wait_for(device: torch.device) -> Callable[[], object] | None:
    """What waits for a device that computes by itself."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


def _choose_device(name: str, *, remember: bool) -> torch.device:
    """`remember`: that there is none is said once a machine."""
    available = torch.cuda.is_available()
    if name == "auto":
        if is_news("cuda" if available else "no-cuda", remember=remember) and not available:
            _log.info("no CUDA device found; running on the CPU")
        return torch.device("cuda", torch.cuda.current_device()) if available else torch.device("cpu")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not available:
        reason = "this torch was built without CUDA" if not torch.version.cuda else "no CUDA device is visible"
        raise UsageError(f"device {name} was asked for, but {reason}; use --device cpu.")
    count = torch.cuda.device_count()
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index >= count:
        raise UsageError(f"device {name} was asked for, but there are only {count} (cuda:0 … cuda:{count - 1}).")
    return torch.device("cuda", index)


def _choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name in REMOVED:
        raise UsageError(REMOVED[name])
    if name == "auto" and device.type == "cuda":
        return "sdpa"
    if name == "auto":
        # torch's fused kernel gains nothing from a CPU's own bfloat16 products; in float32, and where bfloat16 is
        # emulated, it is the faster by far.
        return "chunked" if dtype == torch.bfloat16 and cpu_has_bf16() else "sdpa"
    if name in NEED_CUDA and device.type != "cuda":
        raise UsageError(f"attention {name} needs a CUDA device; use --attention sdpa or auto on a CPU.")
    if name == "xformers":
        try:
            check_xformers(device, dtype)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            reason = printable(str(error).strip().partition("\n")[0])
            raise UsageError(f"attention xformers cannot be used here ({reason}); use --attention sdpa.") from error
    return name


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; without, it is emulated and slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
