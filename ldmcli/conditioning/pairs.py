"""Requests to the conditionings of a U-Net: of each its negative prompt's and its prompt's."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmcli.conditioning.condition_encoder import ConditionEncoder
from ldmcli.conditioning.prompts import EncodedPrompt, PromptEncoder
from ldmcli.config import ModelConfig, UNetConfig
from ldmcli.fitting import FittedRequest
from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.layers import sinusoids

# The aesthetic scores that condition SDXL's refiner, for prompts and for negative prompts: its authors' numbers.
_AESTHETIC, _NEGATIVE_AESTHETIC = 6.0, 2.5

Pair = tuple[Conditioning, Conditioning]


def is_guided(config: ModelConfig, request: FittedRequest) -> bool:
    """Whether a request is drawn with its negative prompt too: not by a model that reads the guidance scale itself."""
    return request.guidance_scale != 1 and not config.unet.guidance_dim


def pairs(
    config: ModelConfig, prompts: PromptEncoder | ConditionEncoder, requests: Sequence[FittedRequest]
) -> list[Pair]:
    """The conditionings of each request's negative prompt and prompt, or of nothing and what stands in a prompt's
    place; without guidance, twice the latter. The requests agree in all but prompts and seed."""
    settings = requests[0]
    guided = is_guided(config, settings)
    if isinstance(prompts, ConditionEncoder):
        return prompts.pairs(requests, guided=guided)
    zeros = [config.zero_empty_negative and not r.negative_prompt for r in requests]
    texts = [r.prompt for r in requests]
    if guided:
        texts += [r.negative_prompt for r, none in zip(requests, zeros, strict=True) if not none]
    encoded = prompts.encode(
        texts,
        syntax=settings.prompt_syntax,
        chunked=settings.on_long_prompt == "chunk",
        clip_skip=settings.clip_skip,
        words=prompts.words(settings),
    )
    positives, negatives = encoded[: len(requests)], iter(encoded[len(requests) :])
    found = []
    for request, positive, none in zip(requests, positives, zeros, strict=True):
        wanted = unwanted = _conditioning(config.unet, request, positive)
        if guided:
            negative = positive.zeros if none else next(negatives)
            unwanted = _conditioning(config.unet, request, negative, negative=True)
        found.append((unwanted, wanted))
    return found


def context_chunks(
    config: ModelConfig, prompts: PromptEncoder | ConditionEncoder, request: FittedRequest
) -> tuple[int, int]:
    """How many chunks long the contexts of the request's negative prompt and prompt are; requests drawn together must
    agree in both: padded to its neighbours' length a prompt would give a picture that depends on its batch."""
    chunked = request.on_long_prompt == "chunk"
    if (not chunked and request.prompt_syntax == "plain") or isinstance(prompts, ConditionEncoder):
        return 1, 1
    read = functools.partial(
        prompts.chunks, syntax=request.prompt_syntax, chunked=chunked, words=prompts.words(request)
    )
    positive = read(request.prompt)
    if config.zero_empty_negative and not request.negative_prompt:
        return positive, positive
    return read(request.negative_prompt), positive


def added_vector(pooled: Tensor, numbers: Tensor, config: UNetConfig) -> Tensor:
    """What is added to every time embedding, (batch, width): pooled prompts (batch, pooled_dim) and sinusoids of sizes
    (batch, added_numbers) in SDXL (Podell et al. 2023, section 2.2); embeddings and their noise level in unCLIP."""
    waves = sinusoids(numbers.flatten(), config.added_number_dim, config.flip_sin_to_cos, config.freq_shift)
    return torch.cat([pooled, waves.unflatten(0, numbers.shape).flatten(1).to(pooled)], dim=1)


def _conditioning(
    config: UNetConfig, request: FittedRequest, encoded: EncodedPrompt, *, negative: bool = False
) -> Conditioning:
    if config.classes:
        return Conditioning(encoded.context, torch.tensor([request.noise_level], device=encoded.context.device))
    if not config.added_numbers or encoded.pooled is None:
        return Conditioning(encoded.context)
    numbers = torch.tensor([_numbers(config, request, negative=negative)], dtype=torch.float32)
    return Conditioning(encoded.context, added_vector(encoded.pooled, numbers, config))


def _numbers(config: UNetConfig, r: FittedRequest, *, negative: bool) -> list[float]:
    """What SDXL is conditioned on: a picture's original size, its crop and its size; the refiner, in place of the last,
    its aesthetic score."""
    numbers: list[float] = [r.original_height, r.original_width, r.crop_top, r.crop_left]
    if config.added_numbers == len(numbers) + 2:
        return [*numbers, r.height, r.width]
    return [*numbers, _NEGATIVE_AESTHETIC if negative else _AESTHETIC]
