"""What identifies a model: the SHA-256 of its weights. Reads them all, without torch."""

import hashlib
import threading
from concurrent.futures import Future

from ldmcli.checkpoints.files import file_sha256
from ldmcli.checkpoints.source import ModelSource


def model_sha256(source: ModelSource) -> "Future[str]":
    """The model's identity, computed in a thread beside the sampling: the SHA-256 of its file; for a folder, that of
    the list of its weight files' hashes."""
    future: Future[str] = Future()

    def compute() -> None:
        try:
            future.set_result(_sha256(source))
        except Exception as error:
            future.set_exception(error)

    # A daemon, so that an interrupted run does not wait for gigabytes to be hashed.
    threading.Thread(target=compute, name="sha256", daemon=True).start()
    return future


def _sha256(source: ModelSource) -> str:
    paths = source.weight_paths()
    if source.single_file:
        return file_sha256(paths[0])
    lines = [f"{file_sha256(path)}  {path.relative_to(source.path).as_posix()}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
