"""Models of the Hugging Face hub, from the cache that its tools share, or fetched. The only huggingface_hub import.

The library writes the cache, but for large weight files, whose interrupted downloads resume.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ldmcli import __version__
from ldmcli.checkpoints.layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    GENERATION,
    INDEX,
    LEARNED,
    PEFT_FILE,
    needed_files,
    safetensors_hint,
)
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import read_json
from ldmcli.errors import LdmError, MissingInputError, StorageError, printable
from ldmcli.hub.faults import reworded

if TYPE_CHECKING:
    from tqdm import tqdm

_log = logging.getLogger(__name__)
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_NAME}/{_NAME}(?<!\.git)(?<!\.safetensors)(?<!\.ckpt)", re.ASCII)
_REVISION = re.compile(r"(?!.*(?:\.\.|//))\w[\w./+-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# First parts of names that are paths, whatever the hub may have: what people call folders of models.
_CUSTOMARY = {"checkpoints", "ckpts", "embeddings", "loras", "model", "models", "stable-diffusion", "vae", "weights"}
_MAX_JSON = 32 << 20  # the shard index of the largest models has some MB


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A repository in diffusers layout, or one `file` of a repository; at a branch, tag or commit."""

    repository: str
    file: str = ""
    revision: str = ""

    def __str__(self) -> str:
        """As it is typed."""
        return self.repository + (f"/{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


@dataclasses.dataclass(frozen=True)
class CachedModel:
    """A revision of a repository in the cache: what to type for it, where it is, and its bytes on disk."""

    name: str
    path: Path
    size: int


@dataclasses.dataclass(frozen=True)
class _Listing:
    """What a repository holds at one commit: file sizes, and the SHA-256 of large files."""

    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]


def parse(model: str) -> HubModel | None:
    """ORG/NAME[@REVISION] or ORG/NAME/FILE.safetensors[@REVISION] as a HubModel; None for anything else."""
    whole, at, revision = model.partition("@")
    organisation, name, file = [*whole.split("/", 2), "", ""][:3]
    repository = f"{organisation}/{name}"
    if not _REPOSITORY.fullmatch(repository) or whole.endswith("/") or (at and not _REVISION.fullmatch(revision)):
        return None
    if file and (not file.endswith(".safetensors") or any(part in ("", ".", "..") for part in file.split("/"))):
        return None
    return HubModel(repository, file, revision)


def locate(model: str, *, half: bool) -> Path:
    """Where a hub model is on disk, fetched if need be; what is no name of one is a path as it stands.

    The fp16 variant is fetched where `half`; a whole copy in the cache will do in either. Raises LdmError.
    """
    path = Path(os.path.expanduser(model))
    wanted = parse(model)
    if wanted is None:
        return path
    if why := why_path(wanted):
        _log.warning("%s, so %s is a path; a model of the hub would be %s@main", why, wanted, wanted)
        return path
    kept, lack = _kept(wanted, half)
    if _hub().constants.HF_HUB_OFFLINE:
        return _offline(wanted, kept, lack)
    if kept and _COMMIT.fullmatch(wanted.revision):
        return kept
    if kept is None:
        _log.info("there is no %s here; asking the hub (%s)", wanted, printable(_hub().constants.ENDPOINT))
    try:
        listing = _ask(wanted)
        if kept and listing.commit in kept.parts:
            if not wanted.file and GENERATION in listing.sizes:  # tools that do not read it left it out
                with _errors(wanted):
                    _download(wanted, GENERATION, listing.commit)
            return kept
    except LdmError as error:
        if kept is None:
            raise
        _log.warning("%s; the copy fetched before is used", str(error).removesuffix("."))
        return kept
    return _fetch(wanted, listing, half)


def why_path(name: HubModel) -> str:
    """Why what could be a name of the hub is a path; "" where it is none. With a revision it never is."""
    folder = name.repository.partition("/")[0]
    if name.revision:
        return ""
    if os.path.isdir(folder):
        return f"there is a folder {folder} here"
    return f"{folder} is what folders are called" if folder.lower() in _CUSTOMARY else ""


def locate_adapter(name: str) -> Path:
    """Where an adapter of the hub is on disk, ORG/NAME[/FILE][@REVISION], fetched if need be with PEFT's configuration;
    what is no name of one is a path as it stands. Of a repository it is the file that PEFT or diffusers writes, or else
    its only .safetensors file. Raises LdmError."""
    wanted = parse(name)
    if wanted is None or why_path(wanted):
        return locate(name, half=False)
    names, failure = _names_of(wanted)
    if not wanted.file:
        found = [file for file in ADAPTER_FILES if file in names][:1]
        found = found or [file for file in names if file.endswith(".safetensors")]
        if not found and failure:
            raise failure
        if len(found) != 1:
            hint = safetensors_hint(str(wanted), names)
            raise MissingInputError(f"{wanted} has no LoRA to take; it has {hint or 'no safetensors file'}.")
        wanted = dataclasses.replace(wanted, file=found[0])
    beside = str(PurePosixPath(wanted.file).with_name(ADAPTER_CONFIG))
    path = locate(str(wanted), half=False)
    if wanted.file.endswith(PEFT_FILE) and beside in names and not (path.parent / ADAPTER_CONFIG).exists():
        with _errors(wanted):
            _download(wanted, beside, wanted.revision or "main")
    return path


def _names_of(wanted: HubModel) -> tuple[list[str], LdmError | None]:
    """A repository's files, or those of it in the cache, and why there are no more."""
    failure: LdmError | None = None
    if not _hub().constants.HF_HUB_OFFLINE:
        try:
            return sorted(_ask(wanted).sizes), None
        except LdmError as error:
            failure = error
    at = f"{wanted.repository}@{wanted.revision}" if wanted.revision not in ("", "main") else wanted.repository
    kept = next((model.path for model in cached_models() if model.name == at), None)
    if kept is None:
        return [], failure or _not_here(f"{wanted} is not in the hub cache ({printable(_cache())})")
    return sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()), failure


def _not_here(lack: str) -> MissingInputError:
    return MissingInputError(f"{lack}, and HF_HUB_OFFLINE is set; unset it and run the same again.")


def fetch(wanted: HubModel, *, half: bool) -> Path:
    """Fetch what is not in the cache yet, in the variant asked for, and return where it is. Raises LdmError."""
    if _hub().constants.HF_HUB_OFFLINE:
        return _offline(wanted, *_kept(wanted, half))
    return _fetch(wanted, _ask(wanted), half)


def cached_models() -> list[CachedModel]:
    """All revisions of model repositories in the cache, by name."""
    try:
        repositories = _hub().scan_cache_dir().repos
    except (_hub().errors.CacheNotFound, RuntimeError):  # the latter where there is no home folder for one
        return []
    found = []
    for repository in (entry for entry in repositories if entry.repo_type == "model"):
        for revision in repository.revisions:
            ref = "main" if "main" in revision.refs else min(revision.refs, default=revision.commit_hash)
            name = repository.repo_id if ref == "main" else f"{repository.repo_id}@{ref}"
            found.append(CachedModel(name, revision.snapshot_path, revision.size_on_disk))
    return sorted(found, key=lambda model: model.name)


def stay_offline() -> None:
    """Ask the hub nothing from now on: what is in its cache is all there is."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for when the library is imported
    if "huggingface_hub" in sys.modules:
        _hub().constants.HF_HUB_OFFLINE = True


@functools.cache
def _hub() -> Any:
    """The library, kept off the terminal, and from asking the hub, or telling it, more than models take."""
    import huggingface_hub.errors
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    constants = huggingface_hub.constants
    constants.HF_HUB_DISABLE_TELEMETRY = True
    hub_logging.set_verbosity_error()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # else the environment has decided, and the library would warn
        disable_progress_bars()
    return huggingface_hub


def _kept(wanted: HubModel, half: bool) -> tuple[Path | None, str]:
    """The whole copy in the cache, or None and what it lacks."""
    with _errors(wanted):
        # The latter where the repository is a VAE or an embedding.
        names = [wanted.file] if wanted.file else [INDEX, "config.json", *LEARNED]
        found = next(filter(None, (_cached(wanted, name, wanted.revision or "main") for name in names)), None)
    if found is None:
        return None, f"{wanted} is not in the hub cache ({printable(_cache())})"
    if wanted.file:
        return found, ""
    folder = found.parent
    files = {os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names}
    files = {file for file in files if (folder / file).exists()}  # a link may have lost what it led to
    try:
        needed_files(str(wanted), files, lambda file: read_json(folder / file, _MAX_JSON), half=half)
    except LdmError as error:
        return None, f"the copy in the hub cache is not whole: {str(error).rstrip('.')}"
    return folder, ""


def _offline(wanted: HubModel, kept: Path | None, lack: str) -> Path:
    if kept is None:
        raise MissingInputError(f"{lack}, and HF_HUB_OFFLINE is set; unset it and run: ldm pull {wanted}.")
    return kept


def _ask(wanted: HubModel) -> _Listing:
    """What the repository holds now. Raises LdmError."""
    constants, utils = _hub().constants, _hub().utils
    # HfApi().model_info sends the same, but importing it takes 0.15 s.
    url = f"{constants.ENDPOINT}/api/models/{wanted.repository}/revision/{quote(wanted.revision or 'main', safe='')}"
    with _errors(wanted):
        response = utils.get_session().get(
            url, params={"blobs": True}, headers=_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        utils.hf_raise_for_status(response)
        about = response.json()
        if not _COMMIT.fullmatch(about["sha"]):
            raise ValueError("no commit")
        files = {str(file["rfilename"]): file for file in about["siblings"]}
        sizes = {name: int(file.get("size") or 0) for name, file in files.items()}
        hashes = {name: str(file["lfs"].get("sha256")) for name, file in files.items() if file.get("lfs")}
        return _Listing(about["sha"], sizes, {name: sha for name, sha in hashes.items() if _SHA256.fullmatch(sha)})


def _fetch(wanted: HubModel, listing: _Listing, half: bool) -> Path:
    """Bring what is lacking of the commit into the cache."""

    def read(file: str) -> Mapping[str, Any]:
        return read_json(_download(wanted, file, listing.commit), _MAX_JSON)

    if wanted.file and wanted.file not in listing.sizes:
        hint = safetensors_hint(str(dataclasses.replace(wanted, file="")), listing.sizes)
        raise MissingInputError(
            f"{wanted.repository} has no file {printable(wanted.file)}; it has {hint or 'no safetensors file'}."
        )
    with _errors(wanted):
        files = [wanted.file] if wanted.file else needed_files(str(wanted), listing.sizes, read, half=half)
        lacking = [file for file in files if _cached(wanted, file, listing.commit) is None]
        if lacking:
            _announce(wanted, listing, lacking)
        for file in lacking:
            if file in listing.hashes:
                _receive_blob(wanted, file, listing)
            _download(wanted, file, listing.commit)
        # The name of a branch or tag is written down last: until then it stands for the copy that was whole before.
        first = _download(wanted, files[0], listing.commit)
        if wanted.revision != listing.commit and _cached(wanted, files[0], wanted.revision or "main") != first:
            _download(wanted, files[0], wanted.revision or "main")
    return first if wanted.file else first.parent


def _download(wanted: HubModel, file: str, revision: str) -> Path:
    """Where the cache has the file, fetched if need be; nothing is asked where `revision` is a commit and it has."""
    found = _hub().hf_hub_download(
        wanted.repository, file, revision=revision, library_name="ldmcli", library_version=__version__
    )
    return Path(found)


def _announce(wanted: HubModel, listing: _Listing, lacking: list[str]) -> None:
    """Say what is fetched, where there is room for it. Raises StorageError where there is not."""
    parts = (_blob(wanted, listing.hashes[file], ".incomplete") for file in lacking if file in listing.hashes)
    size = sum(listing.sizes[file] for file in lacking) - sum(part.stat().st_size for part in parts if part.exists())
    existing = next(folder for folder in (Path(_cache()), *Path(_cache()).absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise StorageError(
            f"{wanted} needs {size / 1e9:.2f} GB more in the hub cache {printable(_cache())}, which has "
            f"{free / 1e9:.2f} GB free; make room or set HF_HOME to a folder elsewhere."
        )
    _log.info("fetching %s: %d files, %.1f MB", wanted, len(lacking), max(size, 0) / 1e6)


def _receive_blob(wanted: HubModel, file: str, listing: _Listing) -> None:
    """Receive a large file into the cache's `blobs`, where the library will find it; what came before a cut is kept
    beside it. The library resumes within one process only, and begins a file anew in the next:
    https://github.com/huggingface/huggingface_hub/issues/4196
    """
    from huggingface_hub.file_download import http_get

    sha256, size = listing.hashes[file], listing.sizes[file]
    blob, part = _blob(wanted, sha256), _blob(wanted, sha256, ".incomplete")
    lock = Path(_cache()) / ".locks" / blob.parent.parent.name / f"{sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with _hub().utils.WeakFileLock(lock):
        if blob.exists():
            return
        with open(part, "ab") as out:
            if out.tell() > size:
                out.truncate(0)
            http_get(
                _hub().hf_hub_url(wanted.repository, file, revision=listing.commit),
                out,
                resume_size=out.seek(0, os.SEEK_END),
                headers=_headers() | {"Accept-Encoding": "identity"},
                expected_size=size,
                displayed_filename=file,
                tqdm_class=_bar(),
            )
            out.flush()
            os.fsync(out.fileno())
        if FileHashes().sha256(part) != sha256:
            part.unlink()
            raise StorageError(f"{wanted}: {printable(file)} arrived damaged and was removed; run the same again.")
        os.replace(part, blob)


def _bar() -> "type[tqdm[Any]]":
    """A bar for the terminal; none where stderr is no terminal or the user wants none."""
    from tqdm import tqdm

    show = _log.isEnabledFor(logging.INFO) and not _hub().constants.HF_HUB_DISABLE_PROGRESS_BARS

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str = "", **options: Any) -> None:
            super().__init__(*args, **options | {"disable": None if show else True, "file": sys.stderr})

    return Bar


def _headers() -> Any:
    """The user's token, where there is one, and this program's name."""
    return _hub().utils.build_hf_headers(library_name="ldmcli", library_version=__version__)


def _cached(wanted: HubModel, file: str, revision: str) -> Path | None:
    found = _hub().try_to_load_from_cache(wanted.repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _blob(wanted: HubModel, sha256: str, suffix: str = "") -> Path:
    return Path(_cache(), f"models--{wanted.repository.replace('/', '--')}", "blobs", sha256 + suffix)


def _cache() -> str:
    return str(_hub().constants.HF_HUB_CACHE)


@contextlib.contextmanager
def _errors(wanted: HubModel) -> Iterator[None]:
    """Turn what the library raises into LdmErrors."""
    try:
        yield
    except LdmError:
        raise
    except Exception as error:
        said = reworded(error, wanted.repository, wanted.revision, _hub().constants.ENDPOINT, _cache())
        if said is None:
            raise
        raise said from None
