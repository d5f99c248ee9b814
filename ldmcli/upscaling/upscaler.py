"""Networks that enlarge pictures: ESRGAN, Real-ESRGAN, Compact, SwinIR, DAT, HAT and others, by spandrel, which tells
them by their tensors. The only module that imports it."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.file_kinds import describe_single_file, family_named, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights, read_tensors
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.layout import UPSCALER
from ldmcli.checkpoints.source import embedded_folder
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import bad_file
from ldmcli.errors import LdmError, NotFiniteError, UsageError, printable
from ldmcli.speed.memory import is_out_of_memory
from ldmcli.speed.startup import whole_torch
from ldmcli.upscaling.target import check_memory
from ldmcli.upscaling.tiles import MIN_TILE, OVERLAP, TILE, tiles

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldmcli.speed.policy import Runtime

EMBEDDED_UPSCALER = "embedded"  # what the one that comes with this program is called by
_EMBEDDED, _FILE = "realesr-animevideov3", "model.safetensors"
_CURE = "name the weights of an upscaler, such as ESRGAN's"
_MAX_NUMBER = 2000  # in a tensor's name: spandrel builds as many blocks as names count
_PICTURE_CHANNELS = {1, 3, 12, 48}  # of grey and RGB, as they are or with 2×2 or 4×4 pixels beside one another
_MAX_TOLD_BYTES = 1 << 30  # of what is read to be told; the largest upscalers have a tenth
_WRAPPERS = ("params_ema.", "params-ema.", "params.", "model_state_dict.", "net.")  # tables in files, the best first
_log = logging.getLogger(__name__)

OnTile = Callable[[int, int], object]  # tiles done, and of how many


@dataclasses.dataclass(frozen=True, eq=False)
class UpscalerFile:
    """The weights of an upscaler, looked at once and not read."""

    name: str
    weights: WeightFile

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file, in hex."""
        return FileHashes().sha256(self.weights.path)


def open_upscaler(name: str, *, allow_pickle: bool = False) -> UpscalerFile:
    """Look at the file called `name`; "embedded" is the general network that comes with this program. Without
    torch.

    Raises UsageError for no name, MissingInputError where there is no file, BadDataError where it is something else,
    naming that.
    """
    if not name:
        raise UsageError(f"the upscaler has an empty name; {_CURE}.")
    path, title = Path(os.path.expanduser(name)), ""
    if re.fullmatch(r"[1-9][0-9.]*x?", name) and not path.exists():
        raise UsageError(
            f"an upscaler is a file, or embedded, and {name} is neither; ldm upscale --scale takes a scale."
        )
    if name == EMBEDDED_UPSCALER:
        path, title = embedded_folder(_EMBEDDED, _FILE, "-m") / _FILE, _EMBEDDED
    elif path.as_posix().endswith(f"/{UPSCALER}"):
        title = f"{path.parents[1].name} upscaler"  # of the model in whose folder it is
    weights = open_weights(path, allow_pickle=allow_pickle, cure=_CURE)
    kind = describe_single_file({key: info.shape for key, info in weights.tensors.items()})
    if kind != "unknown":
        family = family_named(kind)
        cure = "enlarge what is drawn with it by ldm upscale -m" if family and family.enlarges else _CURE
        raise bad_file(path, f"is {with_article(kind)}, not an upscaler", cure)
    for key, info in weights.tensors.items():
        if len(info.shape) == 4 and info.dtype not in FLOATING:  # others may be places in a window, and such
            raise bad_file(path, f"has a convolution that holds no floating numbers ({key}: {info.dtype})", _CURE)
    return UpscalerFile(title or path.stem, weights)


def upscaler_facts(weights: WeightFile) -> dict[str, Any]:
    """What can be said of weights of no other kind if they are an upscaler's: their architecture, its size as spandrel
    words it, and how many times as large it makes pictures; else nothing. They are read whole, where some tensor may be
    the first convolution of a network for pictures."""
    channels = {info.shape[1] for info in weights.tensors.values() if len(info.shape) == 4}
    read = sum(info.end - info.start for info in weights.tensors.values())
    if not channels & _PICTURE_CHANNELS or read > _MAX_TOLD_BYTES:
        return {}
    with contextlib.suppress(LdmError):
        net = _loaded(weights)
        return {"is": "upscaler", "architecture": net.architecture.name, "size": " ".join(net.tags), "scale": net.scale}
    return {}


class Upscaler:
    """A network in memory that makes pictures `scale` times as large. Threads may share it; it enlarges one picture at
    a time."""

    def __init__(self, file: UpscalerFile, runtime: "Runtime", *, asked: bool = False) -> None:
        """Read `file` to the runtime's device. What cannot compute in the runtime's numbers does so in float32, or, if
        these were `asked` for, is refused. Raises BadDataError, UsageError."""
        import torch

        self.name, self._weights = file.name, file.weights
        self._net = _loaded(file.weights)
        self.scale = int(self._net.scale)
        supported = {torch.float16: self._net.supports_half, torch.bfloat16: self._net.supports_bfloat16}
        dtype = runtime.dtype
        if not supported.get(dtype, True):
            if asked:
                raise UsageError(f"{self._net.architecture.name} cannot compute in {dtype}; use --dtype fp32.")
            dtype = torch.float32
        self._device = runtime.device
        self._overflowed = False
        self._prepare(dtype)
        self._lock = threading.Lock()

    @property
    def architecture(self) -> str:
        """What spandrel calls it."""
        return str(self._net.architecture.name)

    @property
    def settings(self) -> Mapping[str, str]:
        """Nothing."""
        return {}

    def enlarged(self, pixels: "np.ndarray", *, tile: int | None = None, on_tile: OnTile | None = None) -> "np.ndarray":
        """`pixels` (height, width, 3 or 4) uint8, `scale` times as large; RGB, or RGBA, whose transparency the network
        enlarges apart. Memory: both pictures and what a tile of `tile` pixels a side (256) takes; 0 takes all at once.

        Tiles differ from the whole only where what lies further away than OVERLAP tells. Numbers that are not finite
        are repeated in float32; out of memory, with smaller tiles. Raises LdmError where that does not help.
        """
        import torch

        height, width = pixels.shape[:2]
        tile = TILE if tile is None else tile
        check_memory(width * self.scale, height * self.scale)
        with self._lock, torch.inference_mode(), _without_warnings():
            while True:
                try:
                    return self._enlarged(pixels, tile, on_tile)
                except _OverflowError:
                    _log.info("%s overflows 16 bits; computing in float32", self.name)
                    self._net = _loaded(self._weights)  # what is in memory has lost digits
                    self._prepare(torch.float32)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        reason = printable(str(error).strip().partition("\n")[0])
                        raise LdmError(f"the upscaler {printable(self.name)} failed: {reason}.") from error
                    smaller = (tile or max(height, width)) // 2
                    if smaller < MIN_TILE:
                        raise LdmError("out of memory, even in the smallest tiles; give a smaller picture.") from None
                    _log.info("out of memory; going on in tiles of %d", smaller)
                    tile = smaller
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _enlarged(self, pixels: "np.ndarray", tile: int, on_tile: OnTile | None) -> "np.ndarray":
        import numpy as np

        height, width, channels = pixels.shape
        result = np.empty((height * self.scale, width * self.scale, channels), np.uint8)
        whole = tile == 0 or self._net.tiling.name == "INTERNAL"
        cut = list(tiles(width, height, max(width, height) if whole else tile, OVERLAP))
        opaque = channels == 3 or bool((pixels[..., 3] == pixels[0, 0, 3]).all())
        for done, part in enumerate(cut, 1):
            source = pixels[part.source]
            target, inner = result[part.target(self.scale)], part.inner(self.scale)
            target[..., :3] = self._computed(source[..., :3])[inner]
            if channels == 4:
                alpha = pixels[0, 0, 3] if opaque else self._computed(source[..., 3:].repeat(3, 2))[inner].mean(2)
                target[..., 3] = np.rint(alpha)
            if on_tile:
                on_tile(done, len(cut))
        return result

    def _computed(self, pixels: "np.ndarray") -> "np.ndarray":
        """One tile (height, width, 3) uint8. Raises _OverflowError."""
        import torch

        values = torch.from_numpy(pixels.copy()).to(self._device).permute(2, 0, 1)[None]
        values = values.float().div(255).to(self._dtype)
        self._overflowed = False
        if self._net.input_channels == 1:
            found = torch.cat([self._net(values[:, i : i + 1].contiguous()) for i in range(3)], 1)
        else:
            found = self._net(values.contiguous(memory_format=torch.channels_last))
        if self._overflowed:
            if self._dtype == torch.float32:
                raise NotFiniteError("the upscaler gave numbers that are not finite; its weights may be damaged.")
            raise _OverflowError
        return found[0].float().mul(255).round().byte().permute(1, 2, 0).cpu().numpy()

    def _look(self, _module: Any, _inputs: Any, output: "torch.Tensor") -> None:
        """Before spandrel limits the values, which turns infinity into white."""
        self._overflowed |= not bool(output.isfinite().all())

    def _prepare(self, dtype: "torch.dtype") -> None:
        import torch

        self._dtype = dtype
        self._net.to(self._device, dtype).eval()
        self._net.model.to(memory_format=torch.channels_last)
        self._net.model.register_forward_hook(self._look)


class _OverflowError(Exception):
    """A network gave infinity or no number at all."""


def _loaded(weights: WeightFile) -> Any:
    """spandrel's descriptor of the network. Raises BadDataError."""
    spandrel = _spandrel()
    names = _names(list(weights.tensors))
    numbers = (int(number) for name in names for number in re.findall(r"\d+", name)[:8] if len(number) < 10)
    if max(numbers, default=0) > _MAX_NUMBER:
        raise bad_file(weights.path, f"counts beyond {_MAX_NUMBER} in its tensors' names", _CURE)
    tensors = {names[name]: tensor for name, tensor in read_tensors(weights, names, "cpu", None)}
    try:
        with _without_warnings():
            net = spandrel.MAIN_REGISTRY.load(spandrel.canonicalize_state_dict(tensors))
    except spandrel.UnsupportedModelError:
        first = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
        raise bad_file(weights.path, f"is no upscaler that is known (its first tensors: {first})", _CURE) from None
    except Exception as error:  # of any kind, from some forty architectures
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise bad_file(weights.path, f"looks like an upscaler and is none: {reason}", _CURE) from None
    if not isinstance(net, spandrel.ImageModelDescriptor) or net.purpose not in ("SR", "Restoration"):
        kind = f"is a network for {net.purpose.lower()} ({net.architecture.name})"
        raise bad_file(weights.path, kind, _CURE)
    if (net.input_channels, net.output_channels) not in ((1, 1), (3, 3)):
        raise bad_file(weights.path, f"makes {net.output_channels} channels of {net.input_channels}, not RGB", _CURE)
    return net


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside the block nothing warns of what architectures call that will change one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _spandrel() -> Any:
    whole_torch()  # torchvision, which spandrel imports, needs it
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision that does not go with torch
        reason = printable(str(error).strip().partition("\n")[0])
        raise LdmError(f"upscaling needs the package spandrel, which cannot be imported: {reason}.") from None
    return spandrel


def _names(keys: list[str]) -> dict[str, str]:
    """The tensors of a network by their names in the file, with the names that they have there without tables around
    them; of several tables, as trainers keep beside one another, the best."""
    for wrapper in _WRAPPERS:
        if inside := {key: key.removeprefix(wrapper) for key in keys if key.startswith(wrapper)}:
            return inside
    # ESRGAN's own first names are "model.0.", "model.1." and so on.
    if all(re.match(r"model\.[^0-9]", key) for key in keys):
        return {key: key.removeprefix("model.") for key in keys}
    return {key: key for key in keys}
