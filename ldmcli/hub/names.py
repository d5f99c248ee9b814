"""How models of the Hugging Face hub are named, here and in its cache. Pure: no file, no network."""

import dataclasses
import re
from pathlib import Path

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_NAME}/{_NAME}(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w[\w./+-]{0,199}", re.ASCII)
_WEIGHTS = (".safetensors", ".ckpt")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A repository in diffusers layout, or one `file` of a repository; at a branch, tag or commit."""

    repository: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        """As it is typed."""
        return self.repository + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def parse(model: str) -> HubModel | None:
    """ORG/NAME[@REVISION] or ORG/NAME/FILE.safetensors[@REVISION] as a HubModel; None for anything else."""
    whole, at, revision = model.partition("@")
    organisation, _, rest = whole.partition("/")
    name, _, file = rest.partition("/")
    repository = f"{organisation}/{name}"
    sound = _REPOSITORY.fullmatch(repository) and not name.endswith(_WEIGHTS)
    if not sound or whole.endswith("/") or (at and not _REVISION.fullmatch(revision)):
        return None
    if file and (not file.endswith(".safetensors") or any(part in ("", ".", "..") for part in file.split("/"))):
        return None
    return HubModel(repository, file, revision)


def snapshot_name(path: Path) -> str | None:
    """The NAME of ORG/NAME where `path` is a repository's folder in the cache, which is called by its commit."""
    repository = path.parent.parent.name
    inside = path.parent.name == "snapshots" and repository.startswith("models--")
    return repository.rpartition("--")[2] if inside else None
