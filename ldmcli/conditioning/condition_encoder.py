"""Requests to the conditionings of a network that is told something else than prompts: classes, layouts, maps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldmcli.conditions import Box
from ldmcli.config import ClassesConfig, LayoutConfig, ModelConfig
from ldmcli.fitting import FittedRequest
from ldmcli.networks.inputs import Conditioning

_WHOLE = (0.0, 0.0, 1.0, 1.0)  # left, top, right and bottom of what is drawn of a picture


class ConditionEncoder:
    """What makes conditionings of a model that reads no prompts; `network` is what encodes its condition, where it has
    one. `read_map` gives a request's semantic map (height, width), of whole numbers. `bring` is called with the network
    before it computes, for those that wait elsewhere for their turn."""

    encoders = ()  # of text

    def __init__(
        self,
        config: ModelConfig,
        network: nn.Module | None,
        read_map: Callable[[FittedRequest], Any],
        bring: Callable[[nn.Module], object] = lambda network: None,
    ) -> None:
        self.config, self.network, self.read_map, self.bring = config, network, read_map, bring

    def forget(self) -> None:
        """Nothing is remembered."""

    @torch.inference_mode()
    def pairs(self, requests: Sequence[FittedRequest], *, guided: bool) -> list[tuple[Conditioning, Conditioning]]:
        """The conditionings of each request, without its condition and with it; twice the latter where not guided."""
        if self.network is None:
            return [(Conditioning(), Conditioning())] * len(requests)
        self.bring(self.network)
        wanted = _ENCODE[self.config.conditions[0]](self, requests)
        if not guided:
            return list(zip(wanted, wanted, strict=True))
        conditioner = self.config.conditioner
        assert isinstance(conditioner, ClassesConfig)
        assert conditioner.null is not None
        return [(self._of_class(conditioner.null), one) for one in wanted]

    def classes(self, requests: Sequence[FittedRequest]) -> list[Conditioning]:
        return [self._of_class(cast(int, request.label)) for request in requests]

    def layouts(self, requests: Sequence[FittedRequest]) -> list[Conditioning]:
        config = self.config.conditioner
        assert isinstance(config, LayoutConfig)
        assert self.network is not None
        rows = [self._placed([layout_tokens(request.layout or (), config)]) for request in requests]
        return [Conditioning(self.network(row)[0]) for row in rows]

    def maps(self, requests: Sequence[FittedRequest]) -> list[Conditioning]:
        assert self.network is not None
        maps = [self._placed(self.read_map(request))[None] for request in requests]
        return [Conditioning(channels=self.network(one)) for one in maps]

    def _of_class(self, label: int) -> Conditioning:
        assert self.network is not None
        return Conditioning(self.network(self._placed([label])))

    def _placed(self, numbers: Any) -> Tensor:
        """Whole numbers where the network is."""
        assert self.network is not None
        return torch.as_tensor(numbers, dtype=torch.int64, device=next(self.network.parameters()).device)


_ENCODE: dict[str, Callable[[ConditionEncoder, Sequence[FittedRequest]], list[Conditioning]]] = {
    "label": ConditionEncoder.classes,
    "layout": ConditionEncoder.layouts,
    "map": ConditionEncoder.maps,
}


def layout_tokens(layout: Sequence[Box], config: LayoutConfig) -> list[int]:
    """The tokens of objects in their boxes: of each its class, its left upper and its right lower corner; then nothing,
    up to as many as there may be; last the corners of what is drawn, which is all (Rombach et al. 2022, section 4.3.1;
    Esser et al. 2021, taming-transformers)."""
    grid = math.isqrt(config.vocab_size)

    def corners(sides: Sequence[float]) -> list[int]:
        left, top, right, bottom = (round(side * (grid - 1)) for side in sides)
        return [top * grid + left, bottom * grid + right]

    found = [token for label, *sides in layout for token in (cast(int, label), *corners(sides))]
    return [*found, *[config.nothing] * (3 * (config.objects - len(layout))), *corners(_WHOLE)]
