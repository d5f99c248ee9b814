"""What an adapter does to one module, and the scale that PEFT and diffusers write beside the factors."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ldmcli.adapters.kinds import Kind
from ldmcli.checkpoints.files import WeightFile
from ldmcli.checkpoints.folder_config import Fields
from ldmcli.checkpoints.header import HeaderError, TensorInfo, parse_json_object
from ldmcli.checkpoints.layout import ADAPTER_CONFIG, PEFT_FILE
from ldmcli.disk.opening import bad_file

PARTS = ("unet", "text_encoder", "text_encoder_2")
_METADATA = "lora_adapter_metadata"


@dataclasses.dataclass(frozen=True)
class Change:
    """A kind, and the keys of its factors in `file`. `scale` is what a configuration gives in place of alpha / rank."""

    kind: Kind
    file: WeightFile
    keys: Mapping[str, str]
    scale: float | None = None

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """The header's description of each factor, by our name of it."""
        return {factor: self.file.tensors[key] for factor, key in self.keys.items()}

    @property
    def rank(self) -> int | None:
        """The rank, of a kind that has one."""
        infos = self.infos
        return next((infos[name].shape[axis] for name, axis in self.kind.ranks if name in infos), None)

    @property
    def inputs(self) -> int | None:
        """How many inputs the changed module has, of the kinds whose shapes tell."""
        found = (self.infos.get(factor) for factor in ("down", "hada_w1_b", "diff"))
        return next((info.shape[1] for info in found if info and len(info.shape) > 1), None)


def configured(changes: dict[str, Change], file: WeightFile, prefix: str) -> dict[str, Change]:
    """The changes, those without a scale in the file with that of a configuration: PEFT's, beside the file, whose keys
    begin with `prefix`; or diffusers', in its metadata, by part. Raises BadDataError."""
    found = dict(changes)
    for begin, config in _configurations(file, prefix):
        for name, change in changes.items():
            if name.startswith(begin) and not {"alpha", "scale"} & change.keys.keys() and change.kind.ranks:
                found[name] = dataclasses.replace(change, scale=_scale(config, name, change))
    return found


def _configurations(file: WeightFile, prefix: str) -> Iterator[tuple[str, Fields]]:
    """Each configuration with what the names it is for begin with."""
    beside = file.path.parent / ADAPTER_CONFIG
    if file.path.name == PEFT_FILE and os.path.lexists(beside):
        yield prefix, Fields(beside)
    elif _METADATA in file.metadata:
        try:
            whole = parse_json_object(file.metadata[_METADATA].encode())
        except HeaderError as error:
            raise bad_file(file.path, f"has a {_METADATA} that {error}", "download it again") from None
        for part in PARTS:
            own = {key.removeprefix(f"{part}."): value for key, value in whole.items() if key.startswith(f"{part}.")}
            if own:
                yield f"{part}.", Fields(file.path, own)


def _scale(config: Fields, name: str, change: Change) -> float:
    """alpha / rank of one module, or alpha / √rank where the rank is stabilized (Kalajdzievski 2023, rsLoRA)."""
    if change.kind.name == "LoRA":
        rank = float(change.rank or 1)
        alpha = _of_module(config, "alpha_pattern", name, config.number("lora_alpha", 8.0))
    else:  # PEFT's LoHa and LoKr, whose rank the shapes may not tell
        rank = _of_module(config, "rank_pattern", name, config.whole("r", 8))
        alpha = _of_module(config, "alpha_pattern", name, config.number("alpha", 8.0))
    return alpha / (math.sqrt(rank) if config.flag("use_rslora") else rank)


def _of_module(config: Fields, pattern: str, name: str, usual: float) -> float:
    """A module's own number, of those that a pattern gives by the ends of modules' names."""
    table: Any = config.get(pattern) or {}
    if not isinstance(table, dict):
        config.refuse(pattern, table, "a table of numbers")
    for end, value in table.items():
        plain = end.removeprefix("^")
        if name == plain or name.endswith(f".{plain}"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                config.refuse(pattern, value, "a number above 0")
            return value
    return usual
