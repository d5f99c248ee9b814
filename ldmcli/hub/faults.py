"""What huggingface_hub raises, said in this program's words.

Its classes are known by name: this module is read where the library is not, and httpx has been httpx2 since 2.0.
"""

import errno
from typing import Any

from ldmcli.errors import CannotCreateError, LdmError, MissingInputError, StorageError, printable

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_BROKEN_CONNECTION = {"ConnectionError", "TransportError", "LocalEntryNotFoundError", "InvalidURL", "RequestError"}
_TOKENS = "https://huggingface.co/settings/tokens"


def reworded(error: Exception, repository: str, revision: str | None, endpoint: str, cache: str) -> LdmError | None:
    """The LdmError that `error`, met while asking for `repository`, means; None where it is a fault of this program."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    response, hub = getattr(error, "response", None), printable(endpoint)
    if response is not None:
        return _answered(kinds, response, repository, revision, hub)
    if "LocalEntryNotFoundError" in kinds and isinstance(error.__cause__, Exception):
        return reworded(error.__cause__, repository, revision, endpoint, cache)
    if kinds & _BROKEN_CONNECTION:
        return _unreachable(printable(str(error)) or type(error).__name__, repository, hub)
    if "Consistency check failed" in str(error):  # other than the size that the hub lists has come
        return _unreachable("other than the whole file came", repository, hub)
    if isinstance(error, OSError):
        return _disk(error, printable(cache))
    if isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        return StorageError(f"{hub} does not answer as a model hub does; check HF_ENDPOINT.")
    return None


def _unreachable(cause: str, repository: str, hub: str) -> StorageError:
    return StorageError(
        f"cannot fetch {repository} from {hub}: {cause.rstrip('.')}; what has come so far is kept, run the same again "
        "to go on."
    )


def _answered(kinds: set[str], response: Any, repository: str, revision: str | None, hub: str) -> LdmError:
    """What the hub's refusal means."""
    status, anonymous = response.status_code, "authorization" not in response.request.headers
    if "GatedRepoError" in kinds:
        cause = f"{repository} is gated: accept its terms at {hub}/{repository}, then set HF_TOKEN to a token of that "
        cause += f"account ({_TOKENS})."
    elif "RevisionNotFoundError" in kinds:
        cause = f"{repository} has no revision {printable(repr(revision or 'main'))} on the hub."
    elif "EntryNotFoundError" in kinds:
        cause = f"the hub lists a file of {repository} that it does not have: {printable(str(response.url))}."
    elif status == 401 and anonymous:  # also where there is no such model
        cause = f"the hub ({hub}) shows no model {repository} without a token; check the name, or, where the model is "
        cause += f"private, set HF_TOKEN to a token that may read it ({_TOKENS})."
    elif status in (401, 403) or "DisabledRepoError" in kinds:
        cause = f"the hub ({hub}) refuses access to {repository} ({status}); check whether HF_TOKEN is still valid and "
        cause += f"may read it ({_TOKENS})."
    elif status == 404:
        cause = f"there is no model {repository}, neither here nor, for your token, on the hub ({hub}); check the name."
    else:
        return _unreachable(f"it answers with status {status}", repository, hub)
    return MissingInputError(cause)


def _disk(error: OSError, cache: str) -> LdmError:
    if error.errno in _FULL:
        return StorageError(
            f"the disk with the hub cache {cache} is full; make room or set HF_HOME to a folder elsewhere, then run "
            "the same again to go on."
        )
    if error.errno in _FORBIDDEN:
        return CannotCreateError(f"cannot write to the hub cache {cache}; set HF_HOME to a folder that can be written.")
    return StorageError(f"the hub cache {cache} cannot be used: {printable(str(error))}.")
