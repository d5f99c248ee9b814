"""Networks that steer by pictures, made ready for a batch: a wrapper of a U-Net's model gets from them what is added
inside the U-Net."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldmcli.config import ModelConfig
from ldmcli.control import TYPES, Control
from ldmcli.fitting import FittedRequest
from ldmcli.images.canvas import Canvas
from ldmcli.images.control_image import control_picture
from ldmcli.networks.control_net import ControlNet
from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.t2i_adapter import T2IAdapter
from ldmcli.networks.unet import Residuals, UNetContext
from ldmcli.pipeline.image_prompting import ImagePrompts, image_prompts
from ldmcli.pipeline.steering import Steerers
from ldmcli.sampling.noise import to_device
from ldmcli.sampling.schedule import Step
from ldmcli.speed.offload import Stage
from ldmcli.steering_config import AdapterConfig

Network = ControlNet | T2IAdapter
Hold = Callable[..., object]
_Part = Callable[[Tensor, Step], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Steered:
    """A network with the pictures (batch, planes, height, width) in 0…1 that a batch is to follow, from the time step
    `first`, the noisiest, to `last`."""

    control: Control
    network: Network
    pictures: Tensor
    first: float
    last: float

    def active(self, step: Step) -> bool:
        """Whether it steers in this step; known on the host."""
        return self.last <= step.timestep <= self.first

    @property
    def positive_only(self) -> bool:
        """Whether it does not steer what is computed for negative prompts."""
        return self.control.positive_only or (isinstance(self.network, ControlNet) and self.network.control.pooled)

    @property
    def kind(self) -> int:
        """The number of the pictures' type, for Union networks."""
        return TYPES.get(self.control.type, 0)

    @functools.cached_property
    def features(self) -> Sequence[Tensor]:
        """What the network reads of the pictures, once for all steps."""
        if isinstance(self.network, ControlNet):
            return self.network.read(self.pictures, self.kind)
        return self.network.read(self.pictures)


@dataclasses.dataclass(frozen=True)
class Steering:
    """All that steers a batch: networks, and pictures that are prompts."""

    parts: tuple[Steered, ...]
    prompts: ImagePrompts | None = None

    @property
    def networks(self) -> list[Network]:
        return list({part.network: None for part in self.parts})

    @property
    def key(self) -> tuple[object, ...]:
        """What the computation depends on beside tensors and the active parts."""
        return tuple((part.control.settings, id(part.network)) for part in self.parts)

    def form(self, step: Step) -> tuple[bool, ...]:
        """Which parts are active in a step."""
        return tuple(part.active(step) for part in self.parts)

    def beside(self, negatives: int, positives: int) -> list[UNetContext]:
        """Keys and values of the pictures that are prompts, for a batch of so many negative prompts and prompts."""
        return self.prompts.beside(negatives, positives) if self.prompts else []

    def residuals(
        self,
        negative: Conditioning | None,
        positive: Conditioning | None,
        both: Conditioning,
        steps: Sequence[Step],
        hold: Hold,
    ) -> Callable[[Tensor, Step], Residuals]:
        """What is added for a batch of these conditions, the negative prompts' before the prompts' where there are
        both; all computed once a step."""
        found: list[tuple[Steered, _Part]] = []
        for part in self.parts:
            if part.positive_only and positive is None:
                continue
            alone = part.positive_only and negative is not None
            assert both.context is not None
            groups = len(both.context) // len(part.pictures)  # of all pictures each: negative prompts', and prompts'
            own = positive if alone else both
            assert own is not None
            features = [torch.cat([each] * (1 if alone else groups)) for each in part.features]
            if isinstance(part.network, ControlNet):
                compute = _weighted(_net(part, part.network, own, features, steps, hold), part)
            else:
                compute = _maps(part, features, hold)
            found.append((part, _behind_zeros(compute, groups) if alone else compute))
        return functools.partial(_sum, found)


def _net(
    part: Steered, network: ControlNet, own: Conditioning, features: list[Tensor], steps: Sequence[Step], hold: Hold
) -> _Part:
    halves = len(features[0]) // len(part.pictures)
    return network.prepare(own, steps, features, kind=part.kind, halves=halves, hold=hold)


def _weighted(compute: _Part, part: Steered) -> _Part:
    """The residuals multiplied as the mode says; those of pooled ones alike."""
    control = part.control
    if isinstance(part.network, ControlNet) and part.network.control.pooled:
        control = dataclasses.replace(control, mode="balanced")

    def run(latents: Tensor, step: Step) -> list[Tensor]:
        found = compute(latents, step)
        weights = control.weights(len(found))
        return [each if weight == 1 else each * weight for each, weight in zip(found, weights, strict=True)]

    return run


def _maps(part: Steered, features: list[Tensor], hold: Hold) -> _Part:
    """An adapter's maps, the same in all steps."""
    weights = part.control.map_weights(len(features))
    held = hold([each * weight for each, weight in zip(features, weights, strict=True)])
    return lambda latents, step: list(held)  # type: ignore[call-overload]


def _behind_zeros(compute: _Part, groups: int) -> _Part:
    """Of a batch of so many groups, the last the prompts' and the others negative prompts', what is computed of the
    last alone; the others get nothing."""

    def run(latents: Tensor, step: Step) -> list[Tensor]:
        found = compute(latents.chunk(groups)[-1], step)
        return [torch.cat([*[torch.zeros_like(each)] * (groups - 1), each]) for each in found]

    return run


def _sum(parts: Sequence[tuple[Steered, _Part]], latents: Tensor, step: Step) -> Residuals:
    """The residuals and maps of all parts that are active, added up."""
    added: dict[bool, list[Tensor]] = {}
    for part, compute in parts:
        if part.active(step):
            is_net = isinstance(part.network, ControlNet)
            found, before = compute(latents, step), added.get(is_net)
            added[is_net] = found if before is None else [one + two for one, two in zip(before, found, strict=True)]
    *skips, middle = added.get(True, [None])
    return Residuals([skip for skip in skips if skip is not None], middle, added.get(False, ()))


def steering_of(
    requests: Sequence[FittedRequest],
    canvases: Sequence[Canvas],
    taken: Sequence[Step],
    networks: Steerers,
    stage: Stage,
    model: ModelConfig,
) -> Steering | None:
    """What steers a batch whose steps to be taken are `taken`, its pictures read; None where nothing does."""
    parts = []
    for place, control in enumerate(requests[0].controls):
        inside = [taken[i].timestep for i in control.active(len(taken))]
        if not inside:
            continue
        network = networks.controls.named(control.net)
        planes = network.config.planes if isinstance(network.config, AdapterConfig) else 3
        drawn_on = itertools.zip_longest(requests, canvases)
        found = [control_picture(request, request.controls[place], canvas, planes) for request, canvas in drawn_on]
        pictures = to_device(torch.from_numpy(np.stack(found)), stage.device)
        part = Steered(control, network, pictures, max(inside), min(inside))
        stage.bring(network)
        part.features  # noqa: B018  now, while the network is alone there
        parts.append(part)
    prompts = None
    if requests[0].image_prompts:
        prompts = image_prompts(requests, canvases, networks, stage, model)
    return Steering(tuple(parts), prompts) if parts or prompts else None
