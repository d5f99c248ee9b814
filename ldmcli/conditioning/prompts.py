"""Prompts to conditioning: text encoders run on chunks, tokens weighted, encoders and chunks joined."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ldmcli.conditioning.chunks import Chunk, tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.errors import LdmError

_ROWS = 32  # chunks encoded at once: bounds the memory of a long prompt


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a U-Net is told of a prompt."""

    context: Tensor  # (n, tokens, width)
    pooled: Tensor | None  # (n, pooled width)


class TextEncoder(Protocol):
    """A text transformer with its tokenizer."""

    tokenizer: ClipTokenizer

    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, max_length, width) of ids (n, max_length) on any device, from the layer its family uses or
        clip_skip - 1 layers earlier, and the pooled projection (n, pooled width) where there is one."""


_Encoder = TypeVar("_Encoder", bound=TextEncoder)


class PromptEncoder(Generic[_Encoder]):
    """A model's text encoders as one: SDXL has two, whose states stand side by side."""

    def __init__(self, encoders: Sequence[_Encoder]) -> None:
        self.encoders = tuple(encoders)

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[str], *, syntax: str = "plain", chunked: bool = False, clip_skip: int = 1
    ) -> list[Conditioning]:
        """One Conditioning (n = 1) for each prompt; equal prompts share theirs. See `chunks.tokenize` for `syntax` and
        `chunked`.

        A chunk's tokens are max_length rows of the context; chunks follow one another, each encoded by itself. The
        pooled projection is the last encoder's, of the first chunk, and has no weights applied, as in A1111.
        """
        if not prompts:
            return []
        distinct = list(dict.fromkeys(prompts))
        # By encoder, then by prompt. Two tokenizers may cut a long prompt into different numbers of chunks.
        chunks = [
            [tokenize(encoder.tokenizer, prompt, syntax=syntax, chunked=chunked).chunks for prompt in distinct]
            for encoder in self.encoders
        ]
        counts = [max(map(len, of_prompt)) for of_prompt in zip(*chunks, strict=True)]
        encoded = []
        for encoder, of_encoder in zip(self.encoders, chunks, strict=True):
            (empty,) = tokenize(encoder.tokenizer, "").chunks
            filled = [(*row, *[empty] * (n - len(row))) for row, n in zip(of_encoder, counts, strict=True)]
            encoded.append(_encode(encoder, filled, clip_skip))
        joined = map(_side_by_side, zip(*encoded, strict=True))
        by_prompt = dict(zip(distinct, joined, strict=True))
        return [by_prompt[prompt] for prompt in prompts]


def zeros_like(conditioning: Conditioning) -> Conditioning:
    """Conditioning of the same shapes that says nothing: what SDXL was trained to take for no prompt."""
    pooled = None if conditioning.pooled is None else torch.zeros_like(conditioning.pooled)
    return Conditioning(torch.zeros_like(conditioning.context), pooled)


def _encode(encoder: TextEncoder, prompts: Sequence[Sequence[Chunk]], clip_skip: int) -> list[Conditioning]:
    """What one encoder makes of each prompt's chunks; equal rows of ids are encoded once."""
    rows = list(dict.fromkeys(chunk.ids for chunks in prompts for chunk in chunks))
    outputs = [
        encoder.encode(torch.tensor(rows[i : i + _ROWS], dtype=torch.long), clip_skip=clip_skip)
        for i in range(0, len(rows), _ROWS)
    ]
    states = torch.cat([states for states, _ in outputs])
    pooled = [p for _, p in outputs if p is not None]
    all_pooled = torch.cat(pooled) if pooled else None
    row_of = {ids: i for i, ids in enumerate(rows)}

    def join(chunks: Sequence[Chunk]) -> Conditioning:
        context = torch.cat([emphasized(states[row_of[chunk.ids]], chunk.weights) for chunk in chunks])
        first = row_of[chunks[0].ids]
        return Conditioning(context[None], None if all_pooled is None else all_pooled[first : first + 1])

    return [join(chunks) for chunks in prompts]


def emphasized(states: Tensor, weights: Sequence[float]) -> Tensor:
    """A chunk's states (tokens, width), each token's multiplied by its weight, then all by one number that gives the
    chunk its mean back. Source: A1111's "Original" emphasis.

    Raises LdmError where no number does, as with all weights 0.
    """
    if all(weight == 1 for weight in weights):
        return states
    # Doubles: weights of any size fit, and the mean, a small difference of large sums, does not depend on the device.
    exact = states.double()
    weighted = exact * torch.tensor(weights, dtype=torch.float64, device=states.device)[:, None]
    weighted = (weighted * (exact.mean() / weighted.mean())).to(states.dtype)
    if not weighted.isfinite().all():
        raise LdmError("the weights of a prompt leave nothing that can be scaled back; use weights nearer to 1.")
    return weighted


def _side_by_side(parts: Sequence[Conditioning]) -> Conditioning:
    """The encoders' contexts of one prompt joined along the width."""
    if len(parts) == 1:
        return parts[0]
    return Conditioning(torch.cat([part.context for part in parts], dim=-1), parts[-1].pooled)
