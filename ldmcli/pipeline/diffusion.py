"""A U-Net and its prompts as a denoiser: the chain of wrappers around the prepared network."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldmcli.conditioning.condition_encoder import ConditionEncoder
from ldmcli.conditioning.pairs import is_guided, pairs
from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.config import ModelConfig
from ldmcli.fitting import FittedRequest
from ldmcli.networks.inputs import Conditioning, joined, without_channels
from ldmcli.networks.unet import UNet
from ldmcli.sampling.denoiser import Denoiser, Model, predicting
from ldmcli.sampling.guidance import (
    controlled,
    guided,
    guided_on_image,
    in_interval,
    in_patches,
    paired,
    with_channels,
    within,
)
from ldmcli.sampling.schedule import Step
from ldmcli.speed.offload import Stage
from ldmcli.speed.policy import Runtime

if TYPE_CHECKING:
    from ldmcli.adapters.adapter import Use
    from ldmcli.adapters.merging import Merger
    from ldmcli.pipeline.controlling import Steering
    from ldmcli.speed.cuda.graph import Graphs

_ALWAYS = (0.0, float("inf"))  # the guidance interval that leaves out no step


@dataclasses.dataclass
class DiffusionModel:
    """A U-Net and what encodes its conditions on their device. `call` computes in place of the U-Net where a compiler
    made it; `graphs` records its steps and replays them."""

    config: ModelConfig
    runtime: Runtime
    unet: UNet
    prompts: PromptEncoder | ConditionEncoder
    call: Callable[..., Tensor] | None = None
    graphs: "Graphs | None" = None
    merger: "Merger | None" = None  # where adapters were merged

    def adapt(self, uses: "Sequence[Use]", stage: Stage) -> None:
        """Have the weights be the model's with these adapters merged; see `Merger.merge`."""
        if self.merger is None:
            from ldmcli.adapters.merging import Merger

            texts = zip(self.config.text_encoders, self.prompts.encoders, strict=True)
            networks = {text.part: encoder.model for text, encoder in texts}
            self.merger = Merger({"unet": self.unet, **networks}, self.config.family)
        if tuple(uses) != self.merger.uses:
            stage.clear()  # weights in host memory are the ones that last
            stage.wait()
            self.prompts.forget()
            self.merger.merge(uses)

    def denoiser(
        self,
        requests: Sequence[FittedRequest],
        steps: Sequence[Step],
        stage: Stage,
        channels: Tensor | None = None,
        vectors: Tensor | None = None,
        steering: "Steering | None" = None,
    ) -> Denoiser:
        """The denoiser of a batch of requests that agree in all but prompts, seed and pictures, for latents of this
        batch, behind which it joins `channels` if it reads any, steered by `steering`; what does not depend on the
        latents is computed here, once. `steps` are those of the whole run; `vectors` (batch, width), of embeddings, are
        added to their time embeddings, and zeros guided away from."""
        found = pairs(self.config, self.prompts, requests)
        if channels is not None and self.config.unet.reads:
            found = [
                (dataclasses.replace(one, channels=own), dataclasses.replace(other, channels=own))
                for (one, other), own in zip(found, channels.split(1), strict=True)
            ]
        if vectors is not None:
            found = [
                (dataclasses.replace(one, vector=torch.zeros_like(own)), dataclasses.replace(other, vector=own))
                for (one, other), own in zip(found, vectors.split(1), strict=True)
            ]
        networks = steering.networks if steering else []
        stage.bring(self.unet, *networks)
        if self.graphs:
            self.graphs.watch(networks)
        negative, positive = ([pair[i] for pair in found] for i in (0, 1))
        model = self._chain(negative, positive, requests[0], steps, steering)
        return predicting(model, self.config.schedule.prediction_type)

    def _chain(
        self,
        negative: Sequence[Conditioning],
        positive: Sequence[Conditioning],
        settings: FittedRequest,
        steps: Sequence[Step],
        steering: "Steering | None",
    ) -> Model:
        """The wrappers around the prepared network, the outermost last."""
        scale, rescale, interval = settings.guidance_scale, settings.guidance_rescale, settings.guidance_interval
        image_scale = settings.image_guidance_scale
        if self.graphs:
            self.graphs.begin(calls=len(steps))
        prepared = functools.partial(self._prepared, steps=steps, settings=settings, steering=steering)
        is_pair = is_guided(self.config, settings)
        edits = is_pair and image_scale != 1 and self.config.unet.reads == "image"
        if edits:
            negative = [*map(without_channels, negative), *negative]
        if not is_pair:
            model = prepared([], positive)
        elif negative[0].tokens == positive[0].tokens:
            model = prepared(negative, positive)
        else:
            model = paired(prepared(negative, []), prepared([], positive), len(positive))
        if is_pair:
            model = guided_on_image(model, scale, image_scale, rescale) if edits else guided(model, scale, rescale)
            if interval != _ALWAYS:
                model = in_interval(interval, model, prepared([], positive))
        if self.graphs is None:
            return model
        from ldmcli.speed.cuda.graph import recorded

        def form(step: Step) -> tuple[object, ...]:
            return is_pair and within(interval, step), steering and steering.form(step)

        key = scale, rescale, image_scale, settings.patch, steering and steering.key
        return recorded(model, self.graphs, key=key, form=form)

    def _prepared(
        self,
        negative: Sequence[Conditioning],
        positive: Sequence[Conditioning],
        steps: Sequence[Step],
        settings: FittedRequest,
        steering: "Steering | None",
    ) -> Model:
        """The network prepared for these conditions, and before it what joins the latents and what steers."""
        scale = settings.guidance_scale
        placed = self.runtime.device, self.runtime.dtype
        condition = joined([*negative, *positive]).to(*placed)
        hold = self.graphs.hold if self.graphs else _as_it_is
        beside = steering.beside(len(negative), len(positive)) if steering else ()
        model = self.unet.prepare(condition, steps, guidance_scale=scale, call=self.call, hold=hold, beside=beside)
        if settings.patch:
            model = in_patches(model, settings.patch)
        if condition.channels is not None:
            model = with_channels(model, hold(condition.channels))
        if steering is None or not steering.parts:
            return model
        one, other = (joined(each).to(*placed) if each else None for each in (negative, positive))
        return controlled(model, steering.residuals(one, other, condition, steps, hold))

    def free_graphs(self) -> None:
        """Give back the memory of recorded steps; where they are called again they are recorded again."""
        if self.graphs:
            self.graphs.free()


def _as_it_is(prepared: Any) -> Any:
    return prepared
