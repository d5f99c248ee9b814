"""A model's text encoders behind the store of encoded prompts: read only when a prompt is not in it."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from ldmcli.checkpoints.identity import FileHashes, part_sha256
from ldmcli.checkpoints.source import ModelSource
from ldmcli.conditioning.prompt_store import PromptStore
from ldmcli.conditioning.prompts import PromptEncoder, TextEncoder
from ldmcli.conditioning.stored import Encoding, StoredEncoder
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.config import TextEncoderConfig
from ldmcli.disk.cache import open_cache


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What is kept from run to run: hashes of weight files, and encoded prompts."""

    hashes: FileHashes
    prompts: PromptStore


def remembered(*, enabled: bool) -> Remembered:
    """What the user's cache holds; nothing, then or later, unless `enabled`."""
    cache = open_cache(enabled=enabled)
    return Remembered(FileHashes(cache.hashes), PromptStore(cache.prompts))


def stored_encoders(
    source: ModelSource,
    load: Callable[[TextEncoderConfig, ClipTokenizer], TextEncoder],
    device: torch.device,
    dtype: torch.dtype,
    memory: Remembered,
) -> PromptEncoder[StoredEncoder]:
    """The source's text encoders on `device` in `dtype`; `load` reads one when a row of tokens is first missing from
    the store. What it gives must be what the source's files alone make of it: a changed encoder needs another store.

    Raises what open_weights raises.
    """
    pairs = zip(source.config.text_encoders, source.tokenizers, strict=True)
    return PromptEncoder(
        [
            StoredEncoder(
                functools.partial(load, text, tokenizer),
                tokenizer,
                Encoding(text, device, dtype, source.config.pools(text)),
                part_sha256(source, text.part, memory.hashes) if memory.prompts.enabled else None,
                memory.prompts,
            )
            for text, tokenizer in pairs
        ]
    )
