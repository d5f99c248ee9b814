"""--compile: calls of the U-Net go through torch.compile, and nothing else changes."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import ldm, pixels, tiny_model
from torch import Tensor, nn

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.speed import compiled

CPU = torch.device("cpu")


class Backend:
    """In place of the compiler: counts what it is asked to compile, and runs it as it is."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked = 0
        self._failure = failure

    def __call__(self, module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.asked += 1
        if self._failure:
            raise self._failure
        return module.forward


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Backend:
    return use(Backend(), monkeypatch, tmp_path)


def use(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    torch.compiler.reset()
    monkeypatch.setenv("TORCH_LOGS", "-dynamo")  # so that the level of torch's own log stays as it is
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return backend


class Net(nn.Module):
    """A little network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_calls_are_compiled_once_a_shape_and_type(backend: Backend) -> None:
    plain, net = Net(), Net()
    net.load_state_dict(plain.state_dict())
    call = compiled.compiled(net, CPU)
    assert backend.asked == 0  # not before it is called
    with torch.inference_mode():
        for shape, asked in (((2, 4), 1), ((2, 4), 1), ((3, 4), 2), ((2, 4), 2)):
            x = torch.randn(shape)
            assert call(x).equal(plain(x))
            assert backend.asked == asked
        net.double()
        x = torch.randn(2, 4, dtype=torch.float64)
        assert call(x).equal(plain.double()(x))
        assert backend.asked == 3
        net.linear.weight.data = torch.zeros(4, 4, dtype=torch.float64)  # weights that move are followed
        assert call(x).equal(net.linear.bias.relu().expand(2, 4))
        net(x)
    assert "forward" not in vars(net)
    assert backend.asked == 3


@pytest.mark.parametrize("cause", [RuntimeError("no C++ compiler\nhint: install one"), ImportError("no triton")])
def test_where_it_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, cause: Exception
) -> None:
    """A word, and the run goes on without."""
    monkeypatch.setattr(logging.getLogger("ldmcli"), "propagate", True)
    backend = use(Backend(cause), monkeypatch, tmp_path)
    net = Net()
    x = torch.randn(2, 4)
    wanted = net(x)
    call = compiled.compiled(net, CPU)
    with caplog.at_level(logging.INFO, "ldmcli"):
        assert call(x).equal(wanted)
        assert call(torch.cat([x, x])).shape == (4, 4)
    assert backend.asked == 1
    (message,) = (
        record.message
        for record in caplog.records
        if record.name.startswith("ldmcli") and record.levelno >= logging.WARNING
    )
    reason = str(cause).partition("\n")[0]
    assert message == f"the U-Net could not be compiled ({reason}); going on without --compile"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("illegal access")]
)
def test_memory_or_a_device_that_is_lost_is_no_reason_to_give_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    """The batch is halved, and compiled anew; or the run ends."""

    def lost(*_: Any) -> Any:
        asked.append(1)
        if isinstance(error, torch.AcceleratorError):  # while it computes, not while it compiles
            return lambda *_: (_ for _ in ()).throw(error)
        raise error

    asked: list[int] = []
    use(lost, monkeypatch, tmp_path)
    call = compiled.compiled(Net(), CPU)
    for _ in range(2):
        with pytest.raises(type(error)):
            call(torch.randn(2, 4))
    assert len(asked) == (1 if isinstance(error, torch.AcceleratorError) else 2)


def test_pictures_through_the_tracer(one_thread: None, backend: Backend) -> None:
    """With the compiler left out: what is traced is what is drawn."""
    asked = [GenerationRequest("a star", seed=seed, steps=2, width=16, height=16) for seed in range(2)]
    plain, traced = (
        Session(ModelSpec(str(tiny_model())), RuntimeSpec(device="cpu", dtype="fp32", compile=each))
        for each in (False, True)
    )

    def draw(session: Session) -> list[np.ndarray]:
        return [picture.pixels() for picture in session.draw(asked, batch_size=2)]

    wanted = draw(plain)
    found = draw(traced)
    assert backend.asked > 0
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(found, wanted, strict=True))
    count = backend.asked
    draw(traced)
    assert backend.asked == count


# ---- where it is kept ----


def test_what_is_compiled_is_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiled.keep_on_disk()
    folder = tmp_path / "new" / "cache" / "ldmcli" / "compile"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (folder, folder.parent, folder.parent.parent))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    compiled.keep_on_disk()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


def test_code_is_not_run_from_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "ldmcli" / "compile"
    folder.parent.mkdir(mode=0o700)
    folder.mkdir()
    folder.chmod(0o777)
    compiled.keep_on_disk()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_no_compiler_is_imported_unless_asked_for(tmp_path: Path) -> None:
    code = """
        import json, sys
        from ldmcli.cli import run
        assert run(sys.argv[1:]) == 0
        print(json.dumps([name in sys.modules for name in ("torch._dynamo", "torch._inductor", "triton")]))
    """
    words = f"txt2img x -m {tiny_model()} --steps 1 --device cpu -o".split()
    command = [sys.executable, "-c", textwrap.dedent(code), *words, str(tmp_path / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [False, False, False]


# ---- the real thing ----


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_by_the_command_line(tmp_path: Path) -> None:
    """In processes of their own, with torch started quickly; the second finds what the first has left."""
    options = ("txt2img", "a red heart", "-s", "1", "--steps", "3", "--device", "cpu", "--dtype", "fp32")
    told = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": ""}
    (plain,) = ldm(*options, "-o", tmp_path / "plain.png").paths
    for name in ("first", "second"):
        done = ldm(*options, "--compile", "-o", tmp_path / f"{name}.png", env=told, timeout=600)
        assert done.code == 0, done.err
        assert "could not be compiled" not in done.err
        (picture,) = done.paths
        assert np.abs(pixels(picture).astype(int) - pixels(plain)).max() <= 2
    assert any((tmp_path / "cache" / "ldmcli" / "compile").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_compiler_on_this_machine(tmp_path: Path) -> None:
    told = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(tmp_path / "none")}
    options = ("txt2img", "a red heart", "-s", "1", "--steps", "2", "--device", "cpu")
    done = ldm(*options, "--compile", "-o", tmp_path / "a.png", env=told, timeout=600)
    assert done.code == 0, done.err
    assert "the U-Net could not be compiled" in done.err
    assert len(done.paths) == 1
