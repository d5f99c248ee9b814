"""Prompts encoded once: what the text encoders made of them is kept while a run goes on."""

from collections import OrderedDict
from collections.abc import Sequence

from ldmcli.conditioning.prompts import Conditioning, PromptEncoder

MAX_ENTRIES = 512
MAX_BYTES = 128 << 20  # on the device; a prompt takes 0.2 to 0.6 MB, more where it is read in chunks


class PromptCache(PromptEncoder):
    """A PromptEncoder that remembers: the prompts used last, bounded in number and size."""

    def __init__(self, inner: PromptEncoder, entries: int = MAX_ENTRIES, size: int = MAX_BYTES) -> None:
        super().__init__(inner.encoders)
        self._entries, self._size = entries, size
        self._held: OrderedDict[tuple[str, str, bool, int], Conditioning] = OrderedDict()
        self._bytes = 0

    def encode(
        self, prompts: Sequence[str], *, syntax: str = "plain", chunked: bool = False, clip_skip: int = 1
    ) -> list[Conditioning]:
        """As PromptEncoder.encode; only prompts that are not held are encoded."""
        missing = [p for p in dict.fromkeys(prompts) if (p, syntax, chunked, clip_skip) not in self._held]
        encoded = super().encode(missing, syntax=syntax, chunked=chunked, clip_skip=clip_skip)
        fresh = dict(zip(missing, encoded, strict=True))
        # Looked up before anything is added: what is added may push out what this call needs.
        wanted = [fresh[p] if p in fresh else self._used((p, syntax, chunked, clip_skip)) for p in prompts]
        for prompt, conditioning in fresh.items():
            self._add((prompt, syntax, chunked, clip_skip), conditioning)
        return wanted

    def _used(self, key: tuple[str, str, bool, int]) -> Conditioning:
        self._held.move_to_end(key)
        return self._held[key]

    def _add(self, key: tuple[str, str, bool, int], conditioning: Conditioning) -> None:
        # A view of what was pooled for many prompts would hold all of it.
        pooled = None if conditioning.pooled is None else conditioning.pooled.clone()
        self._held[key] = Conditioning(conditioning.context, pooled)
        self._bytes += _size(self._held[key])
        while len(self._held) > self._entries or self._bytes > self._size:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(conditioning: Conditioning) -> int:
    return conditioning.context.nbytes + (0 if conditioning.pooled is None else conditioning.pooled.nbytes)
