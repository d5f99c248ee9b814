"""Models that draw pictures larger, used as an upscaler is."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldmcli.disk.opening import shown
from ldmcli.errors import BadDataError
from ldmcli.session.session import Progress, Session
from ldmcli.spec import GenerationRequest

if TYPE_CHECKING:
    from ldmcli.upscaling.upscaler import OnTile

_FIELDS = ("steps", "sampler", "guidance_scale", "eta", "noise_level", "seed", "prompt", "negative_prompt")


class DiffusionUpscaler:
    """A session's model that makes pictures `scale` times as large; `settings` say how: a prompt, steps, a seed."""

    def __init__(self, session: Session, settings: Mapping[str, Any], tile: int | None = None) -> None:
        """`settings` are fields of a request, an `eta` of None being the model's own; `tile` is what will be asked for.
        Raises BadDataError where the model is none that does, UsageError where it cannot draw as they say."""
        config = session.config
        if config.unet.reads != "low_res":
            raise BadDataError(f"{shown(Path(session.name))} is a {config.family} model, and enlarges no pictures.")
        self.name, self.scale = session.name, config.enlarges
        eta = settings["eta"]
        if eta is None:
            eta = 0.0 if config.noising else 1.0  # as their authors draw
        self._session, self._request = session, GenerationRequest(**dict(settings) | {"eta": eta})
        session.fit(self._of(np.zeros((8, 8, 3), np.uint8), tile))  # to know that it can

    @property
    def settings(self) -> Mapping[str, str]:
        """What pictures depend on beside the model."""
        found = {name: getattr(self._request, name) for name in _FIELDS}
        return {name.replace("_", " "): str(value) for name, value in found.items() if value not in (None, "")}

    def load(self) -> None:
        """Read the model."""
        self._session.load()

    def enlarged(self, pixels: np.ndarray, *, tile: int | None = None, on_tile: "OnTile | None" = None) -> np.ndarray:
        """`pixels` (height, width, 3 or 4) uint8, `scale` times as large; transparency is enlarged by Lanczos. Large
        pictures are computed by patches of `tile` pixels a side that overlap, 0 all at once. Raises LdmError."""

        def step(progress: Progress) -> None:
            if on_tile:
                on_tile(progress.done, progress.steps)

        (picture,) = self._session.draw([self._of(pixels, tile)], on_step=step)
        found: Any = picture.pixels()
        if pixels.shape[2] == 4:
            alpha = Image.fromarray(pixels[..., 3]).resize(found.shape[1::-1], Image.Resampling.LANCZOS)
            found = np.dstack([found, np.asarray(alpha)])
        return found

    def _of(self, pixels: np.ndarray, tile: int | None) -> GenerationRequest:
        """The request for these pixels."""
        height, width = (side * self.scale for side in pixels.shape[:2])
        data = io.BytesIO()
        Image.fromarray(pixels[..., :3]).save(data, "PNG", compress_level=1)
        return dataclasses.replace(self._request, image=data.getvalue(), width=width, height=height, patch=tile)
