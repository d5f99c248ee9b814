"""An autoencoder without a model: pictures to latents, and back."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import PartSource
from ldmcli.config import VAEConfig
from ldmcli.errors import LdmError, NotFiniteError
from ldmcli.networks.tiling import decode_tiled, encode_tiled
from ldmcli.networks.vae import Autoencoder, AutoencoderVQ, Posterior
from ldmcli.pipeline.pipeline import rounded
from ldmcli.pipeline.starting import as_image
from ldmcli.sampling.noise import SeededNoise
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.memory import is_out_of_memory
from ldmcli.speed.policy import choose_runtime, computing

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A picture's latents (channels, height, width) float32, not scaled; and, of a codebook, the codes (height, width)
    int32 nearest to them."""

    latents: np.ndarray
    codes: np.ndarray | None = None


class Autoencoding:
    """An autoencoder on its device, or the half of it that is needed. Pictures are computed one at a time: what runs
    out of memory is done in strips, what overflows 16 bits in float32."""

    def __init__(
        self, source: PartSource[VAEConfig], spec: RuntimeSpec, *, encoder: bool = True, decoder: bool = True
    ) -> None:
        """Read the weights. Raises BadDataError, UsageError."""
        runtime = choose_runtime(spec)
        self._device, self._threads, self._tiled = runtime.device, spec.threads, spec.vae_tiling
        vae = load_vae(source, runtime.device, runtime.vae_dtype(source.config), encoder=encoder, decoder=decoder)
        assert isinstance(vae, Autoencoder)
        self._vae = runtime.prepare(vae)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, seed: int | None = None) -> Encoded:
        """What pixels (height, width, 3) uint8, of sides that the factor divides, are encoded as: the likeliest
        latents, or those that are drawn with this seed. Raises LdmError."""
        picture = as_image(torch.from_numpy(pixels.copy())[None].to(self._device))

        def latents(encode: Callable[[Tensor], Posterior]) -> Tensor:
            found = encode(self._placed(picture))
            if seed is None:
                return found.mean.float()
            shape = found.mean.shape[1], found.mean.shape[2], found.mean.shape[3]
            return found.at(SeededNoise([seed], shape, self._device)().to(found.mean)).float()

        with self._computing():
            result = self._finite(latents, self._vae.encode, functools.partial(encode_tiled, self._vae))
            codes = None
            if isinstance(self._vae, AutoencoderVQ):
                codes = self._vae.quantize.nearest(result)[0].int().cpu().numpy()
        return Encoded(np.ascontiguousarray(result[0].cpu().numpy()), codes)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pixels (height, width, 3) uint8 of latents (channels, height, width), or of codes (height, width) of the
        codebook. Raises LdmError."""

        def image(decode: Callable[[Tensor], Tensor]) -> Tensor:
            placed = latents[None].to(self._device)
            if latents.ndim == 2:
                assert isinstance(self._vae, AutoencoderVQ)
                placed = self._vae.quantize(placed)
            return decode(self._placed(placed)).float()

        with self._computing():
            found = self._finite(image, self._vae.decode, functools.partial(decode_tiled, self._vae))
        return rounded(found).cpu().numpy()

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self._vae.parameters()).dtype, memory_format=torch.channels_last)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with computing(self._threads or torch.get_num_threads()):
            yield

    def _finite(
        self,
        work: Callable[[Any], Tensor],
        whole: Callable[..., object],
        strips: Callable[..., object],
    ) -> Tensor:
        """What `work` makes by the autoencoder, as a `whole` or by `strips`."""
        try:
            found = work(strips if self._tiled else whole)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._tiled:
                raise LdmError("out of memory, even in strips; give a smaller picture.") from None
            _log.info("out of memory; going on in strips")
            self._tiled = True
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return self._finite(work, whole, strips)
        if found.isfinite().all():
            return found
        if next(self._vae.parameters()).dtype == torch.float32:
            raise NotFiniteError("the autoencoder gave numbers that are not finite; its weights may be damaged.")
        _log.warning("the autoencoder overflowed in 16 bits; computing in float32")
        self._vae.float()
        return self._finite(work, whole, strips)
