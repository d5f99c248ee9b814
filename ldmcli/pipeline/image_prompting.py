"""Pictures that are prompts, made ready for a batch: keys and values that a U-Net attends to beside the text's."""

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmcli.config import ModelConfig
from ldmcli.fitting import FittedRequest
from ldmcli.image_prompt import ImagePrompt
from ldmcli.images.canvas import Canvas
from ldmcli.images.image_prompt_picture import attention_mask, image_prompt
from ldmcli.images.pixels import facts_of
from ldmcli.networks.attention import KeysValues
from ldmcli.networks.unet import UNetContext, combined
from ldmcli.pipeline.steering import Steerers
from ldmcli.sampling.noise import to_device
from ldmcli.speed.offload import Stage

_KEPT = 64  # pictures' features, from batch to batch
_BLANK = ""  # in place of a picture's hash: the mean of all colours, which says nothing


@dataclasses.dataclass(frozen=True)
class ImagePrompts:
    """What each adapter has the pictures of a batch, `size` of them, attend to, with their prompts and with their
    negative prompts."""

    size: int
    negatives: tuple[UNetContext, ...]
    positives: tuple[UNetContext, ...]

    def beside(self, negatives: int, positives: int) -> list[UNetContext]:
        """For a batch of so many negative prompts, then prompts: the pictures' once or several times, or none."""
        found = []
        for negative, positive in zip(self.negatives, self.positives, strict=True):
            groups = [negative] * (negatives // self.size) + [positive] * (positives // self.size)
            found.append(functools.reduce(lambda one, other: combined(one, other, _stacked), groups))
        return found


def _stacked(one: KeysValues, other: KeysValues) -> KeysValues:
    """Keys, values and weights of both batches; a weight of one for all stays that."""
    if not one:
        return one
    *keys_values, weight = (torch.cat(each) for each in zip(one, other, strict=True))
    return (*keys_values, one[2] if len(one[2]) == 1 else weight)


def image_prompts(
    requests: Sequence[FittedRequest],
    canvases: Sequence[Canvas],
    networks: Steerers,
    stage: Stage,
    model: ModelConfig,
) -> ImagePrompts:
    """The image prompts of a batch, whose pictures and masks are read."""
    negatives, positives = list[UNetContext](), list[UNetContext]()
    for place, settings in enumerate(requests[0].image_prompts):
        prompts = [request.image_prompts[place] for request in requests]
        adapter = networks.adapters.named(settings.adapter)
        encoder, reads = networks.encoder_of(settings.adapter), adapter.config.reads
        features = torch.cat([features_of(networks, stage, encoder, prompt.image, reads) for prompt in prompts])
        if reads == "embedding":
            blank = torch.zeros_like(features[:1])
        else:
            blank = features_of(networks, stage, encoder, None, reads)
        masks = None
        if settings.mask is not None:
            masks = torch.from_numpy(np.stack([*map(_mask, requests, canvases or itertools.repeat(None), prompts)]))
        stage.bring(adapter)
        dtype = next(adapter.parameters()).dtype
        of_levels = [each.to(dtype) for each in _weights(settings.strength, masks, requests[0], model, stage.device)]
        counting = settings.transformers(model.unet)
        levels = {each.transformer: each.level for each in adapter.config.places}
        weights = {name: of_levels[levels[name]] for name in counting}
        for found, each in ((positives, features), (negatives, blank.expand_as(features))):
            found.append(adapter.keys_values(adapter.tokens(each.to(dtype)), weights, model.unet))
    return ImagePrompts(len(requests), tuple(negatives), tuple(positives))


def features_of(networks: Steerers, stage: Stage, encoder: str, image: str | bytes | None, reads: str) -> Tensor:
    """What an image encoder says of a picture (1, …), or of none."""
    key = encoder, reads, _BLANK if image is None else facts_of(image).sha256
    network = networks.encoders.named(encoder)
    reader, found = networks.features.get(key, (None, None))
    if found is None or reader is None or reader() is not network:
        size = network.config.image_size
        pixels = np.zeros((3, size, size), np.float32) if image is None else image_prompt(image, size)
        stage.bring(network)
        found = network.read(to_device(torch.from_numpy(pixels)[None], stage.device), reads)
        while len(networks.features) >= _KEPT:
            networks.features.pop(next(iter(networks.features)))
        networks.features[key] = weakref.ref(network), found
    return found


def _mask(request: FittedRequest, canvas: Canvas | None, prompt: ImagePrompt) -> np.ndarray:
    assert prompt.mask is not None
    return attention_mask(request, prompt.mask, canvas)


def _weights(
    strength: float, masks: Tensor | None, request: FittedRequest, model: ModelConfig, device: torch.device
) -> list[Tensor]:
    """How much a picture counts, for each level of the U-Net: one number for all, or where there are masks (batch,
    height, width) one for each pixel (batch, 1, tokens, 1), the masks resized as diffusers does."""
    levels = len(model.unet.block_channels)
    if masks is None:
        return [torch.full((1, 1, 1, 1), strength, device=device)] * levels
    factor, found = model.vae.factor, []
    height, width = request.height // factor, request.width // factor
    for _ in range(levels):
        resized = F.interpolate(masks[:, None], size=(height, width), mode="bicubic")
        found.append(to_device(strength * resized.flatten(2)[..., None], device))
        height, width = -(-height // 2), -(-width // 2)
    return found
