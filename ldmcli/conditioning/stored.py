"""A text encoder that is loaded only for what is not in the prompt store."""

import dataclasses
import functools
import hashlib
import json
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from ldmcli import __version__
from ldmcli.conditioning.prompt_store import PromptStore, Row, RowKind
from ldmcli.conditioning.prompts import TextEncoder
from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.config import TextEncoderConfig

_FORMAT = 1  # raise it when encoders compute otherwise


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What decides, beside the weights, what an encoder makes of token ids: its configuration, whether it gives pooled
    prompts, where it runs and with which numbers."""

    config: TextEncoderConfig
    device: torch.device
    dtype: torch.dtype
    pooled: bool = True

    @property
    def row(self) -> RowKind:
        """What one row of its output is."""
        config = self.config
        return RowKind(
            config.max_length, config.hidden_size, config.projection_dim if self.pooled else None, self.dtype
        )

    def key(self, weights: str, ids: Sequence[int], clip_skip: int) -> str:
        """The name of what the encoder with these `weights`, by their hash, makes of one row of `ids`.

        Everything that may change a bit of it counts, so that a stored row is the one that would be computed.
        """
        told = json.dumps([weights, clip_skip, list(ids)])
        return hashlib.sha256(f"{self._settings} {told}".encode()).hexdigest()

    @functools.cached_property
    def _settings(self) -> str:
        return json.dumps(
            [
                *(_FORMAT, __version__, torch.__version__, torch.get_float32_matmul_precision()),
                *(_machine(self.device), str(self.dtype), self.pooled, dataclasses.asdict(self.config)),
            ]
        )


class StoredEncoder:
    """A TextEncoder around one that `load` gives, called once, when a row is first missing from the `store`.

    `identity` is the hash of its weights; while it is not known, rows count as missing, and they are stored at the
    first flush that finds it. None: nothing is looked up or stored.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        tokenizer: ClipTokenizer,
        encoding: Encoding,
        identity: "Future[str] | None",
        store: PromptStore,
    ) -> None:
        self.tokenizer = tokenizer
        self._load = load
        self._encoding = encoding
        self._identity = identity
        self._store = store
        self._inner: TextEncoder | None = None
        self._lock = threading.Lock()

    @torch.inference_mode()
    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """As TextEncoder.encode, on the encoding's device. Rows are encoded one at a time: what is stored, and so the
        picture, does not depend on which others were asked for with it."""
        with self._lock:
            self._store.flush(0)
            rows = [self._row(row, clip_skip) for row in ids.tolist()]
        pooled = [one for _, one in rows if one is not None]
        return torch.stack([states for states, _ in rows]), torch.stack(pooled) if pooled else None

    def load(self) -> TextEncoder:
        """The encoder itself, read now unless it has been. Raises what `load` raises."""
        if self._inner is None:
            with torch.inference_mode(False):  # weights are ordinary tensors
                self._inner = self._load()
        return self._inner

    def _row(self, ids: Sequence[int], clip_skip: int) -> Row:
        encoding, identity = self._encoding, self._identity

        def key(weights: str) -> str:
            return encoding.key(weights, ids, clip_skip)

        if identity is not None and identity.done() and not identity.exception():
            found = self._store.get(key(identity.result()), encoding.row)
            if found:
                states, pooled = found
                return states.to(encoding.device), None if pooled is None else pooled.to(encoding.device)
        all_states, all_pooled = self.load().encode(torch.tensor([ids], dtype=torch.long), clip_skip=clip_skip)
        row = all_states[0], None if all_pooled is None else all_pooled[0]
        if identity is not None:
            self._store.add(identity, key, encoding.row, row)
        return row


def _machine(device: torch.device) -> list[str]:
    """The processor's kind, whose kernels may differ in the last bits. The number of threads makes no difference here:
    rows of 77 tokens came out the same with 1 to 4, in float32 and bfloat16."""
    if device.type == "cuda":
        return [device.type, torch.cuda.get_device_name(device)]
    return [device.type, platform.machine(), torch.backends.cpu.get_cpu_capability()]
