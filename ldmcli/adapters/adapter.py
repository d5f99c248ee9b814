"""An adapter on disk: its header read, sorted by module and checked, without torch and without reading a number."""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldmcli.adapters.change import PARTS, Change, configured
from ldmcli.adapters.kinds import SCALARS, kind_of, split
from ldmcli.checkpoints.file_kinds import describe_single_file, with_article
from ldmcli.checkpoints.files import WeightFile, open_weights
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.layout import ADAPTER_FILES, INDEX, PEFT_FILE
from ldmcli.disk.opening import bad_file, open_regular

if TYPE_CHECKING:
    from ldmcli.adapters.spellings import Place

BUNDLED = "bundle_emb."  # begins the keys of embeddings that come with an adapter
ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")  # of files; all but the first are pickles
_CURE = "name the file of a LoRA or another adapter"
_NUMBERED = re.compile(r"\w+:\d+:(?:up|down)")  # a layer's place among its kind
_AGAIN = "download it again, or ask its author for a sound file"


@dataclasses.dataclass(frozen=True, eq=False)  # a file that was written anew is another, alike as its header may be
class Adapter:
    """A checked adapter: its changes by the modules' names as the files spell them. `others` are keys that are part of
    no change, `bundled` those of embeddings."""

    path: Path
    changes: Mapping[str, Change]
    others: tuple[str, ...]
    bundled: tuple[str, ...]
    metadata: Mapping[str, str]

    @functools.cached_property
    def files(self) -> tuple[WeightFile, ...]:
        """The files that hold its changes."""
        return tuple({change.file.path: change.file for change in self.changes.values()}.values())

    @functools.cached_property
    def context_width(self) -> int | None:
        """The width of the text that the U-Net which it is for reads; None where no change tells."""
        names = (name for name in self.changes if "attn2" in name and name.endswith(("to_k", "to_v")))
        return next((width for name in names if (width := self.changes[name].inputs)), None)

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256, in hex, of what its files hold after their headers, by which AUTOMATIC1111 knows a LoRA; of
        whole files where they are pickles."""
        digest = hashlib.sha256()
        for path in sorted(file.path for file in self.files):
            with open_regular(path) as file:
                if path.suffix == ".safetensors":
                    file.seek(8 + int.from_bytes(file.read(8), "little"))
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Use:
    """An adapter with the strengths it is merged with: the U-Net's, and that of the text encoders."""

    adapter: Adapter
    weight: float = 1.0
    text_weight: float = 1.0

    def strength(self, place: "Place") -> float:
        """The strength for a module."""
        return self.weight if place.part == "unet" else self.text_weight


def open_adapter(path: Path, *, allow_pickle: bool = False) -> Adapter:
    """Look at an adapter's file, or at a folder of PEFT or diffusers, whose parts may lie in folders named after them.

    Raises MissingInputError (nothing there) or BadDataError: no adapter, or a damaged one.
    """
    changes: dict[str, Change] = {}
    others: list[str] = []
    bundled: list[str] = []
    metadata: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file_path, prefix in _files(path):
        file = open_weights(file_path, allow_pickle=allow_pickle, cure=_CURE)
        metadata |= file.metadata
        shapes |= {key: info.shape for key, info in file.tensors.items()}
        found, left = _sorted(file, prefix)
        changes |= configured({name: _checked(name, keys, file) for name, keys in found.items()}, file, prefix)
        bundled += [key for key in left if key.startswith(BUNDLED)]
        others += [prefix + key for key in left if not key.startswith(BUNDLED)]
    if any(map(_NUMBERED.fullmatch, others)):
        what = "is a LoRA of cloneofsimo's lora, whose layers have numbers in place of names"
        raise bad_file(path, what, "convert it to diffusers' names, or ask its author for another file")
    if not changes:
        kind = describe_single_file(shapes)
        what = "has no LoRA or other adapter in it" if kind == "unknown" else f"is {with_article(kind)}, not a LoRA"
        raise bad_file(path, what, _CURE)
    return Adapter(path, changes, tuple(others), tuple(bundled), metadata)


def is_adapter_folder(path: Path) -> bool:
    """Whether it is a folder of PEFT or diffusers that holds an adapter, and no model."""
    inside = (path, *(path / part for part in PARTS))
    there = any(os.path.lexists(folder / name) for folder in inside for name in ADAPTER_FILES)
    return there and not os.path.lexists(path / INDEX)


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Each file of an adapter, with what its keys lack in front where PEFT's folder is named after a part."""
    found = [path]
    if os.path.isdir(path):  # unlike Path.is_dir, never raises
        folders = (path, *(path / part for part in PARTS))
        found = [folder / name for folder in folders for name in ADAPTER_FILES if os.path.lexists(folder / name)]
    if not found:
        raise bad_file(path, f"is a folder without {' or '.join(ADAPTER_FILES)}", "name the adapter's file")
    for file in found:
        part = file.absolute().parent.name
        yield file, f"{part}." if file.name == PEFT_FILE and part in PARTS else ""


def _sorted(file: WeightFile, prefix: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The keys of each module's factors, by our names of those; and the keys that are part of no change."""
    modules: dict[str, dict[str, str]] = {}
    left = []
    for key in file.tensors:
        found = None if key.startswith(BUNDLED) else split(key)
        if found is None:
            left.append(key)
            continue
        name, factor = found
        other = modules.setdefault(prefix + name, {}).setdefault(factor, key)
        if other != key:
            raise bad_file(file.path, f"has both “{other}” and “{key}”", _AGAIN)
    # A lone weight is a network's own, not IA3's; alphas alone change nothing.
    for name in [name for name, keys in modules.items() if keys.keys() <= {"weight", *SCALARS} - {"on_input"}]:
        left += modules.pop(name).values()
    return modules, left


def _checked(name: str, keys: dict[str, str], file: WeightFile) -> Change:
    """The change that these factors make up. Raises BadDataError where one lacks or cannot be one."""
    kind = kind_of(keys)
    if kind is None:
        what = f"holds {', '.join(sorted(keys))} for “{name}”, which make up no adapter of a known kind"
        raise bad_file(file.path, what, _AGAIN)
    change = Change(kind, file, keys)
    for factor, info in change.infos.items():
        if factor not in SCALARS and info.dtype not in FLOATING:  # some writers store an alpha as a whole number
            raise bad_file(file.path, f"holds “{keys[factor]}” as {info.dtype}, not as floating numbers", _AGAIN)
        if math.prod(info.shape) == 0:
            raise bad_file(file.path, f"holds “{keys[factor]}” with no numbers, as {list(info.shape)}", _AGAIN)
        if factor in SCALARS and math.prod(info.shape) != 1:
            raise bad_file(file.path, f"holds “{keys[factor]}” as {list(info.shape)}, not as one number", _AGAIN)
        if not info.shape and factor not in SCALARS:
            raise bad_file(file.path, f"holds “{keys[factor]}” as one number, not as a matrix", _AGAIN)
    return change
