"""Prompts to what text encoders make of them: chunks encoded, tokens weighted, encoders and chunks joined."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldmcli.conditioning.chunks import Chunk, TokenizedPrompt, tokenize
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.conditioning.words import NO_WORDS, Word, Words, occurring
from ldmcli.errors import LdmError
from ldmcli.fitting import FittedRequest
from ldmcli.networks.clip import TextTransformer

_MAX_BYTES = 128 << 20  # a prompt takes 0.2 to 0.6 MB, more where it is read in chunks


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """What text encoders make of a prompt: `context` (1, tokens, width) and, where one pools, `pooled` (1, width)."""

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
    def encode(self, ids: Tensor, *, clip_skip: int = 1, words: Sequence[Word] = ()) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, max_length, width) of ids (n, max_length), from the layer its family uses or clip_skip - 1
        layers earlier, and the pooled projection (n, pooled width) where there is one; on the model's device. Negative
        ids stand for the vectors of these words, as in `Chunk`."""
        self.bring(self.model)
        device = self.model.final_layer_norm.weight.device
        part = self.model.config.part
        vectors = torch.cat([word.vectors.of_part(part) for word in words]).to(device) if words else None
        return self.model(ids.to(device), vectors, clip_skip=clip_skip, pooled=self.pooled)


class PromptEncoder:
    """A model's text encoders as one: SDXL has two, whose states stand side by side. It remembers the prompts that were
    used last, `max_bytes` of them. `words` gives those that stand for vectors in a request's prompts."""

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        words: Callable[[FittedRequest], Words] = lambda request: NO_WORDS,
        *,
        max_bytes: int = _MAX_BYTES,
    ) -> None:
        self.encoders = tuple(encoders)
        self.words = words
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[object, ...], EncodedPrompt] = OrderedDict()
        self._bytes = 0

    def encode(
        self,
        prompts: Sequence[str],
        *,
        syntax: str = "plain",
        chunked: bool = False,
        clip_skip: int = 1,
        words: Words = NO_WORDS,
    ) -> list[EncodedPrompt]:
        """Each prompt encoded, unless it is held. See `chunks.tokenize` for `syntax`, `chunked` and `words`."""
        keys = [(prompt, syntax, chunked, clip_skip, *occurring(words, prompt).values()) for prompt in prompts]
        found = {key: self._held[key] for key in keys if key in self._held}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        read = functools.partial(tokenize, syntax=syntax, chunked=chunked, words=words)
        found |= zip(missing, self._encoded(list(missing.values()), read, clip_skip), strict=True)
        self._bytes += sum(found[key].size for key in missing)
        self._held |= found
        for key in found:
            self._held.move_to_end(key)
        while self._bytes > self._max_bytes:
            self._bytes -= self._held.popitem(last=False)[1].size
        return [found[key] for key in keys]

    def forget(self) -> None:
        """Remember no prompt: the encoders' weights have changed."""
        self._held.clear()
        self._bytes = 0

    def chunks(self, prompt: str, *, syntax: str, chunked: bool, words: Words = NO_WORDS) -> int:
        """How many chunks the prompt is read in."""
        found = (tokenize(e.tokenizer, prompt, syntax=syntax, chunked=chunked, words=words) for e in self.encoders)
        return max(len(tokenized.chunks) for tokenized in found)

    @torch.inference_mode()
    def _encoded(
        self, prompts: Sequence[str], read: Callable[[ClipTokenizer, str], TokenizedPrompt], clip_skip: int
    ) -> list[EncodedPrompt]:
        """Distinct prompts, all by one encoder before the next. Two tokenizers may cut a long prompt into different
        numbers of chunks. The pooled projection is the last encoder's."""
        tokenized = [[read(encoder.tokenizer, prompt) for prompt in prompts] for encoder in self.encoders]
        counts = [max(len(one.chunks) for one in of_prompt) for of_prompt in zip(*tokenized, strict=True)]
        parts = []
        for encoder, of_encoder in zip(self.encoders, tokenized, strict=True):
            empty = tokenize(encoder.tokenizer, "").chunks
            parts.append(
                [
                    _encode(encoder, one.chunks + empty * (count - len(one.chunks)), one.words, clip_skip)
                    for one, count in zip(of_encoder, counts, strict=True)
                ]
            )
        return [
            EncodedPrompt(torch.cat([part.context for part in of_prompt], dim=-1), of_prompt[-1].pooled)
            for of_prompt in zip(*parts, strict=True)
        ]


def _encode(encoder: TextEncoder, chunks: Sequence[Chunk], words: Sequence[Word], clip_skip: int) -> EncodedPrompt:
    """What one encoder makes of a prompt. A chunk's tokens are max_length rows of the context; chunks follow one
    another, each encoded by itself, so that its numbers do not depend on its neighbours. What is pooled is the first
    chunk, without weights, as in A1111."""
    outputs = [encoder.encode(torch.tensor([chunk.ids]), clip_skip=clip_skip, words=words) for chunk in chunks]
    states = [emphasized(states[0], chunk.weights) for (states, _), chunk in zip(outputs, chunks, strict=True)]
    return EncodedPrompt(torch.cat(states)[None], outputs[0][1])


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
