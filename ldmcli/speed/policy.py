"""Device, number type and attention for a run: what the user asked for, or what suits the machine."""

import dataclasses
import logging

import torch
from torch import nn

from ldmcli.config import TinyVAEConfig, UNetConfig, VAEConfig
from ldmcli.errors import UsageError, printable
from ldmcli.networks.attention import check_xformers, set_attention
from ldmcli.networks.unet import UNet
from ldmcli.speed.attention_choice import MEASURED, NEED_CUDA, attend_by_name, automatic
from ldmcli.speed.cpu.onednn import lay_out
from ldmcli.speed.cpu.threads import choose_threads
from ldmcli.speed.cuda.fused import fuse, kernels_work
from ldmcli.speed.tuning import Tuning

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
USUAL, PLAIN = Tuning(), Tuning("torch", graph=False)
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and how to compute. `dtype` is that of U-Net and VAE, `text_dtype` that of the text encoder; `tuning` is
    what applies on this device."""

    device: torch.device
    dtype: torch.dtype
    text_dtype: torch.dtype
    attention: str
    tuning: Tuning = PLAIN

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
            **({"compile": "inductor"} if self.tuning.compiled else {}),
        }

    def vae_dtype(self, vae: VAEConfig | TinyVAEConfig) -> torch.dtype:
        """The number type of a VAE: float32 in place of fp16 where its activations are known to overflow that."""
        return torch.float32 if vae.force_upcast and self.dtype == torch.float16 else self.dtype

    def prepare(self, module: nn.Module) -> None:
        """Lay a U-Net or VAE out for speed: channels last in memory, this runtime's attention; on a GPU this program's
        own kernels, on a CPU weights as oneDNN wants them. Raises UsageError."""
        module.to(memory_format=torch.channels_last)
        set_attention(module, attend_by_name(self.attention, self.device))
        if self.tuning.compiled and isinstance(module, UNet):
            return  # torch.compile lays out and fuses by itself, and does not see through what is below
        if self.device.type == "cuda" and self._kernels_work(next(module.parameters()).dtype):
            fuse(module)
        if self.device.type == "cpu":
            # A U-Net's upsamplers are a twentieth of its work, and their folded weights a sixteenth more memory. Its
            # layers are called at every step, a VAE's in most runs once.
            unet, own = isinstance(module, UNet), self.tuning.kernels != "torch"
            lay_out(module, fold=not unet, fewer_products=own, at_once=unet)

    def _kernels_work(self, dtype: torch.dtype) -> bool:
        """Whether this program's own kernels are to compute. Raises UsageError where they were asked for and do not
        work."""
        if self.tuning.kernels == "torch":
            return False
        works = kernels_work(self.device, dtype)
        if not works and self.tuning.kernels == "triton":
            raise UsageError("--kernels triton cannot be used here (see above); use --kernels auto or torch.")
        return works


def choose_runtime(
    device: str = "auto", dtype: str = "auto", attention: str = "auto", tuning: Tuning = USUAL
) -> Runtime:
    """Resolve the choices. Raises UsageError where one cannot be met."""
    chosen = _choose_device(device)
    cuda = chosen.type == "cuda"
    if dtype == "auto":
        dtype = "fp16" if cuda else "bf16" if cpu_has_bf16() else "fp32"
    elif dtype == "fp16" and not cuda:
        raise UsageError("dtype fp16 is for GPUs and very slow on a CPU; use --dtype bf16 or fp32 there.")
    # On a CPU the text encoder is a small part of the work, and float32 keeps the prompt exact.
    text_dtype = DTYPES[dtype] if cuda else torch.float32
    chosen_attention = _choose_attention(attention, chosen, DTYPES[dtype])
    return Runtime(chosen, DTYPES[dtype], text_dtype, chosen_attention, _fitting(tuning, chosen))


def use_threads(asked: int | None, unet: UNetConfig, *, pictures: int = 1, cores: int | None = None) -> None:
    """Let torch compute on a CPU with as many threads as `choose_threads` says."""
    torch.set_num_threads(choose_threads(asked, unet, pictures=pictures, cores=cores))


def _choose_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "auto":
        if not available:
            _log.info("no CUDA device found; running on the CPU")
        return torch.device("cuda", torch.cuda.current_device()) if available else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not available:
            reason = "this torch was built without CUDA" if not torch.version.cuda else "no CUDA device is visible"
            raise UsageError(f"device {name} was asked for, but {reason}; use --device cpu.")
        count = torch.cuda.device_count()
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index >= count:
            raise UsageError(f"device {name} was asked for, but there are only {count} (cuda:0 … cuda:{count - 1}).")
        return torch.device("cuda", index)
    return device


def _fitting(tuning: Tuning, device: torch.device) -> Tuning:
    """What of `tuning` applies on the device."""
    if device.type == "cuda":
        return tuning
    if tuning.kernels == "triton":
        raise UsageError("--kernels triton needs a CUDA device; use --kernels auto or torch on a CPU.")
    if tuning.low_vram:
        _log.info("--low-vram is for GPUs and does nothing on a CPU")
    return dataclasses.replace(PLAIN, kernels=tuning.kernels, compiled=tuning.compiled)


def _choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name in ("auto", MEASURED) and device.type == "cuda":
        return automatic(device)
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
