"""Models that draw pictures larger, used as an upscaler is."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.disk.opening import shown
from ldmcli.errors import BadDataError
from ldmcli.session.session import Progress, Session
from ldmcli.spec import GenerationRequest

if TYPE_CHECKING:
    import numpy as np

    from ldmcli.upscaling.upscaler import OnTile


class DiffusionUpscaler:
    """A session's model that makes pictures `scale` times as large; `request` says how: a prompt, steps, a seed."""

    def __init__(self, session: Session, request: GenerationRequest) -> None:
        """Raises BadDataError where the model is none that does."""
        config = session.config
        if config.unet.reads != "low_res":
            raise BadDataError(f"{shown(Path(session.name))} is a {config.family} model, and enlarges no pictures.")
        self.name, self.scale = session.name, config.enlarges
        self._session, self._request = session, request

    @property
    def settings(self) -> Mapping[str, str]:
        """What pictures depend on beside the model."""
        fields = ("steps", "sampler", "guidance_scale", "eta", "noise_level", "seed", "prompt", "negative_prompt")
        found = {name: getattr(self._request, name) for name in fields}
        return {name.replace("_", " "): str(value) for name, value in found.items() if value not in (None, "")}

    def load(self) -> None:
        """Read the model."""
        self._session.load()

    def enlarged(
        self, pixels: "np.ndarray", *, tile: int | None = None, on_tile: "OnTile | None" = None
    ) -> "np.ndarray":
        """`pixels` (height, width, 3 or 4) uint8, `scale` times as large; transparency is enlarged by Lanczos. Large
        pictures are computed by patches of `tile` pixels a side that overlap, 0 all at once. Raises LdmError."""
        import numpy as np
        from PIL import Image

        height, width = pixels.shape[:2]
        size = width * self.scale, height * self.scale
        data = io.BytesIO()
        Image.fromarray(pixels[..., :3]).save(data, "PNG", compress_level=1)
        request = dataclasses.replace(self._request, image=data.getvalue(), width=size[0], height=size[1], patch=tile)

        def step(progress: Progress) -> None:
            if on_tile:
                on_tile(progress.done, progress.steps)

        (picture,) = self._session.draw([request], on_step=step)
        found: Any = picture.pixels()
        if pixels.shape[2] == 4:
            alpha = Image.fromarray(pixels[..., 3]).resize(size, Image.Resampling.LANCZOS)
            found = np.dstack([found, np.asarray(alpha)])
        return found
