"""What huggingface_hub raises, said in this program's words.

Its classes are told by name: this module is read where the library is not, and httpx has been httpx2 since 2.0.
"""

import errno
from typing import Any

from ldmcli.errors import CannotCreateError, LdmError, MissingInputError, StorageError, printable

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOKENS = "https://huggingface.co/settings/tokens"


def reworded(error: Exception, repository: str, revision: str | None, endpoint: str, cache: str) -> LdmError | None:
    """The LdmError that `error`, met while asking for `repository`, means; None where it is a fault of this program."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    response = getattr(error, "response", None)
    if response is not None:
        return _answered(kinds, response, repository, revision, endpoint)
    if "LocalEntryNotFoundError" in kinds and isinstance(error.__cause__, Exception):
        return reworded(error.__cause__, repository, revision, endpoint, cache)
    if _is_broken_connection(error) or kinds & {"LocalEntryNotFoundError", "InvalidURL", "RequestError"}:
        return unreachable(error, repository, endpoint)
    if "Consistency check failed" in str(error):  # other than the size that the hub lists has come
        return unreachable("other than the whole file came", repository, endpoint)
    if isinstance(error, OSError):
        return _disk(error, cache)
    if isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        return StorageError(f"{printable(endpoint)} does not answer as a model hub does; check HF_ENDPOINT.")
    return None


def _is_broken_connection(error: Exception) -> bool:
    """Whether the connection failed, or the server said to come back later: what another try may mend."""
    if isinstance(error, ConnectionError) or any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) in (408, 429, 500, 502, 503, 504)


def unreachable(error: Exception | str, repository: str, endpoint: str) -> StorageError:
    """That the hub cannot be reached, or no longer."""
    cause = printable(str(error)) or type(error).__name__
    return StorageError(
        f"cannot fetch {repository} from {printable(endpoint)}: {cause.rstrip('.')}; what has come so far is kept, run "
        "the same again to go on."
    )


def _answered(kinds: set[str], response: Any, repository: str, revision: str | None, endpoint: str) -> LdmError:
    """What the hub's refusal means."""
    status, stranger = response.status_code, "authorization" not in response.request.headers
    if "GatedRepoError" in kinds:
        return MissingInputError(
            f"{repository} is gated: accept its terms at {printable(endpoint)}/{repository}, then set HF_TOKEN to a "
            f"token of that account ({_TOKENS})."
        )
    if "RevisionNotFoundError" in kinds:
        return MissingInputError(f"{repository} has no revision '{printable(revision or 'main')}' on the hub.")
    if "EntryNotFoundError" in kinds:
        return MissingInputError(
            f"the hub lists a file of {repository} that it does not have: {printable(str(response.url))}."
        )
    if status == 401 and stranger:  # also where there is no such model: strangers are not told
        return MissingInputError(
            f"the hub ({printable(endpoint)}) shows no model {repository} without a token; check the name, or, where "
            f"the model is private, set HF_TOKEN to a token that may read it ({_TOKENS})."
        )
    if status in (401, 403) or "DisabledRepoError" in kinds:
        return MissingInputError(
            f"the hub ({printable(endpoint)}) refuses access to {repository} ({status}); check whether HF_TOKEN is "
            f"still valid and may read it ({_TOKENS})."
        )
    if status == 404:
        return MissingInputError(
            f"there is no model {repository}, neither here nor, for your token, on the hub ({printable(endpoint)}); "
            "check the name."
        )
    return unreachable(f"it answers with status {status}", repository, endpoint)


def _disk(error: OSError, cache: str) -> LdmError:
    where = printable(cache)
    if error.errno in _FULL:
        return StorageError(
            f"the disk with the hub cache {where} is full; make room or set HF_HOME to a folder elsewhere, then run "
            "the same again to go on."
        )
    if error.errno in _FORBIDDEN:
        return CannotCreateError(f"cannot write to the hub cache {where}; set HF_HOME to a folder that can be written.")
    return StorageError(f"the hub cache {where} cannot be used: {printable(str(error))}.")
