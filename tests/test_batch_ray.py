"""The Ray engine on a local cluster of two CPU workers, one of which is killed. Skips itself without Ray."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_support import batches, items, lines_of, pictures, setup_in, statuses
from cli_support import until
from oracle.comparing import pixels_apart

from ldmcli.batch import ray_engine
from ldmcli.batch.dispatch import StartError, Stop
from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.local import run_local
from ldmcli.batch.ray_engine import run_ray
from ldmcli.errors import LdmError, UsageError

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def drawers() -> list[int]:
    """The processes of Ray's actors, which name themselves so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::RayWorker"):
                found.append(int(path.parent.name))
    return found


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'ldmcli\[ray\]'"):
        next(run_ray(setup_in(tmp_path), [], stop=Stop()))


@pytest.mark.parametrize(
    ("resources", "workers", "on_cpu", "wanted"),
    [
        ({"GPU": 8.0, "CPU": 64.0}, None, False, (8, {"num_gpus": 1.0, "num_cpus": 1})),
        ({"GPU": 2.0, "CPU": 64.0}, 4, False, (4, {"num_gpus": 0.5, "num_cpus": 1})),
        ({"GPU": 2.0, "CPU": 8.0}, 2, True, (2, {"num_cpus": 4})),
        ({"CPU": 2.0}, 3, False, (3, {"num_cpus": 1})),
        ({"CPU": 4.0}, None, False, (1, {"num_cpus": 4})),
    ],
)
def test_shares(resources: dict[str, float], workers: int | None, on_cpu: bool, wanted: tuple[int, dict]) -> None:
    assert ray_engine._shares(resources, workers, on_cpu=on_cpu) == wanted


@with_ray
def test_a_killed_worker_loses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = items(24, steps=50)
    found: list[Outcome] = []
    before = signal.getsignal(signal.SIGTERM)
    for outcome in run_ray(setup_in(tmp_path / "ray"), batches(row, 2), workers=2, stop=Stop()):
        found.append(outcome)
        if len(found) == 1:
            assert signal.getsignal(signal.SIGTERM) == before
            assert (os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])) == ("token", 64)
        if len(found) == 5:
            os.kill(drawers()[0], signal.SIGKILL)
    assert statuses(found) == dict.fromkeys(range(24), "done")
    assert all(set(lines) == {"done"} for lines in lines_of(tmp_path / "ray").values())
    # The other, and on a machine that is not too busy the one that took its place as well.
    assert len({outcome.worker for outcome in found}) >= 2
    alone = list(run_local(setup_in(tmp_path / "local"), batches(row, 3), ["cpu"], stop=Stop()))
    assert pixels_apart(pictures(tmp_path / "ray", found), pictures(tmp_path / "local", alone)) <= 1
    assert drawers() == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster that another process started, with the token that it wants in this one's environment."""
    ray_engine._require_token()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = f"import sys; sys.argv = ['ray', 'start', '--head', '--block', '--port={port}', '--num-cpus=2', "
    start += "'--include-dashboard=false', '--disable-usage-stats']; from ray.scripts.scripts import main; main()"
    head = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), "the start of the cluster")
    time.sleep(3)  # its node joins after its head answers
    yield f"127.0.0.1:{port}"
    head.terminate()
    head.wait(30)


@with_ray
def test_a_cluster_that_is_there_already(tmp_path: Path, cluster: str) -> None:
    stop, found = Stop(), []
    setup = setup_in(tmp_path / "stopped")
    for outcome in run_ray(setup, batches(items(200, steps=50), 2), address=cluster, workers=2, stop=stop):
        stop.request()
        found.append(outcome)
    assert 2 <= len(found) <= 8
    assert set(lines_of(tmp_path / "stopped")) == set(statuses(found))

    def breaking() -> Iterator[list[Item]]:
        yield items(2)
        raise LdmError("the input is damaged.")

    with pytest.raises(LdmError, match="damaged"):
        list(run_ray(setup_in(tmp_path / "broken"), breaking(), address=cluster, stop=Stop()))
    with pytest.raises(LdmError, match="does not exist"):
        list(run_ray(setup_in(tmp_path, model="/none"), batches(items(2), 1), address=cluster, stop=Stop()))
    with pytest.raises(StartError, match=r"127\.0\.0\.1:1 cannot be used .*refused"):
        list(run_ray(setup_in(tmp_path), [], address="127.0.0.1:1", stop=Stop()))
