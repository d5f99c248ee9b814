"""Prompts to what text encoders make of them: chunks encoded, tokens weighted, encoders and chunks joined."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldmcli.conditioning.chunks import Chunk, tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.errors import LdmError
from ldmcli.networks.clip import TextTransformer

_MAX_HELD = 512  # prompts
_MAX_BYTES = 128 << 20  # of theirs; a prompt takes 0.2 to 0.6 MB, more where it is read in chunks


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as text encoders tell it: `context` (1, tokens, width) and, where one pools, `pooled` (1, width)."""

    context: Tensor
    pooled: Tensor | None

    @property
    def zeros(self) -> "EncodedPrompt":
        """What SDXL was trained to take for no prompt, in the same shapes."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return EncodedPrompt(torch.zeros_like(self.context), pooled)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text transformer with its tokenizer; it computes the pooled projection only where `pooled`. `bring` is called
    with the transformer before it computes, for those that wait elsewhere for their turn."""

    model: TextTransformer
    tokenizer: ClipTokenizer
    pooled: bool = True
    bring: Callable[[nn.Module], object] = lambda model: None

    @torch.inference_mode()
    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, max_length, width) of ids (n, max_length), from the layer its family uses or clip_skip - 1
        layers earlier, and the pooled projection (n, pooled width) where there is one; on the model's device."""
        self.bring(self.model)
        device = self.model.final_layer_norm.weight.device
        return self.model(ids.to(device), clip_skip=clip_skip, pooled=self.pooled)


class PromptEncoder:
    """A model's text encoders as one: SDXL has two, whose states stand side by side. It remembers the prompts that were
    used last, bounded in number and size."""

    def __init__(
        self, encoders: Sequence[TextEncoder], *, max_held: int = _MAX_HELD, max_bytes: int = _MAX_BYTES
    ) -> None:
        self.encoders = tuple(encoders)
        self._max_held, self._max_bytes = max_held, max_bytes
        self._held: OrderedDict[tuple[str, str, bool, int], EncodedPrompt] = OrderedDict()
        self._bytes = 0

    def encode(
        self, prompts: Sequence[str], *, syntax: str = "plain", chunked: bool = False, clip_skip: int = 1
    ) -> list[EncodedPrompt]:
        """Each prompt encoded, those together that are not held. See `chunks.tokenize` for `syntax` and `chunked`."""
        how = syntax, chunked, clip_skip
        missing = [p for p in dict.fromkeys(prompts) if (p, *how) not in self._held]
        encoded = self._encoded(missing, syntax=syntax, chunked=chunked, clip_skip=clip_skip)
        fresh = dict(zip(missing, encoded, strict=True))
        # Looked up before anything is added: what is added may push out what this call needs.
        wanted = [fresh[p] if p in fresh else self._used((p, *how)) for p in prompts]
        for prompt, one in fresh.items():
            self._add((prompt, *how), one)
        return wanted

    def chunks(self, prompt: str, *, syntax: str, chunked: bool) -> int:
        """How many chunks the prompt is read in."""
        found = (tokenize(e.tokenizer, prompt, syntax=syntax, chunked=chunked) for e in self.encoders)
        return max(len(tokenized.chunks) for tokenized in found)

    @torch.inference_mode()
    def _encoded(self, prompts: Sequence[str], *, syntax: str, chunked: bool, clip_skip: int) -> list[EncodedPrompt]:
        """Distinct prompts. A chunk's tokens are max_length rows of the context; chunks follow one another, each
        encoded by itself. The pooled projection is the last encoder's, of the first chunk, and has no weights applied,
        as in A1111."""
        if not prompts:
            return []
        # By encoder, then by prompt. Two tokenizers may cut a long prompt into different numbers of chunks.
        chunks = [
            [tokenize(encoder.tokenizer, prompt, syntax=syntax, chunked=chunked).chunks for prompt in prompts]
            for encoder in self.encoders
        ]
        counts = [max(map(len, of_prompt)) for of_prompt in zip(*chunks, strict=True)]
        encoded = []
        for encoder, of_encoder in zip(self.encoders, chunks, strict=True):
            (empty,) = tokenize(encoder.tokenizer, "").chunks
            filled = [(*row, *[empty] * (n - len(row))) for row, n in zip(of_encoder, counts, strict=True)]
            encoded.append(_encode(encoder, filled, clip_skip))
        return [_side_by_side(parts) for parts in zip(*encoded, strict=True)]

    def _used(self, key: tuple[str, str, bool, int]) -> EncodedPrompt:
        self._held.move_to_end(key)
        return self._held[key]

    def _add(self, key: tuple[str, str, bool, int], encoded: EncodedPrompt) -> None:
        # A view of what was pooled for many prompts would hold all of it.
        pooled = None if encoded.pooled is None else encoded.pooled.clone()
        self._held[key] = EncodedPrompt(encoded.context, pooled)
        self._bytes += self._held[key].size
        while len(self._held) > self._max_held or self._bytes > self._max_bytes:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.size


def _encode(encoder: TextEncoder, prompts: Sequence[Sequence[Chunk]], clip_skip: int) -> list[EncodedPrompt]:
    """What one encoder makes of each prompt's chunks; equal rows of ids are encoded once, each by itself, so that a
    prompt's numbers do not depend on its neighbours."""
    rows = list(dict.fromkeys(chunk.ids for chunks in prompts for chunk in chunks))
    outputs = [encoder.encode(torch.tensor([row], dtype=torch.long), clip_skip=clip_skip) for row in rows]
    states = torch.cat([states for states, _ in outputs])
    pooled = [p for _, p in outputs if p is not None]
    all_pooled = torch.cat(pooled) if pooled else None
    row_of = {ids: i for i, ids in enumerate(rows)}

    def join(chunks: Sequence[Chunk]) -> EncodedPrompt:
        context = torch.cat([emphasized(states[row_of[chunk.ids]], chunk.weights) for chunk in chunks])
        first = row_of[chunks[0].ids]
        return EncodedPrompt(context[None], None if all_pooled is None else all_pooled[first : first + 1])

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


def _side_by_side(parts: Sequence[EncodedPrompt]) -> EncodedPrompt:
    """The encoders' contexts of one prompt joined along the width."""
    if len(parts) == 1:
        return parts[0]
    return EncodedPrompt(torch.cat([part.context for part in parts], dim=-1), parts[-1].pooled)
