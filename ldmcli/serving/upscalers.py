"""Networks that enlarge pictures, which stay in memory."""

import dataclasses

from ldmcli.spec import RuntimeSpec
from ldmcli.upscaling.upscaler import Upscaler, UpscalerFile, open_upscaler

_KEPT = 2


@dataclasses.dataclass(frozen=True)
class UpscalerSpec:
    """Which network enlarges, and where and in what numbers it computes."""

    name: str
    allow_pickle: bool = False
    device: str = "auto"
    dtype: str = "auto"


class Upscalers:
    """The networks that enlarged last, in memory. The thread that works uses it."""

    def __init__(self) -> None:
        self._held: dict[UpscalerSpec, tuple[UpscalerFile, Upscaler]] = {}

    def get(self, spec: UpscalerSpec) -> Upscaler:
        """The network, read anew where its file has changed. Raises LdmError."""
        from ldmcli.speed.policy import choose_runtime

        runtime = choose_runtime(RuntimeSpec(device=spec.device, dtype=spec.dtype))  # which says what it chose
        held = self._held.pop(spec, None)
        if held is None or held[0].weights.changed:
            file = open_upscaler(spec.name, allow_pickle=spec.allow_pickle)
            held = file, Upscaler(file, runtime, asked=spec.dtype != "auto")
        self._held[spec] = held
        while len(self._held) > _KEPT:
            del self._held[next(iter(self._held))]
        return held[1]
