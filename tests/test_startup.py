"""What a short run does not do: import what it does not need, build what is overwritten, encode twice, wait."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import ldm

from ldmcli.checkpoints.source import embedded_model
from ldmcli.config import UNetConfig
from ldmcli.speed import startup
from ldmcli.speed.cpu import threads
from ldmcli.stopwatch import PHASES, Stopwatch

TINY = embedded_model()
NEVER = {"diffusers", "torchvision", "transformers", "open_clip", "xformers", "accelerate", "sympy", "timm"}
DRAW = ("txt2img", "a star", "--seed", "3", "--steps", "3", "--no-cache")


def python(code: str, *arguments: str, **environment: str) -> Any:
    """What a fresh interpreter prints as JSON on its last line."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_run_imports_only_what_it_needs(tmp_path: Path) -> None:
    """And leaves out what torch imports without need; the picture is the same with all of torch imported before."""
    code = """
        import json, sys
        if sys.argv[1] == "whole":
            import torch, torch._meta_registrations, torch.export, torch.ao.quantization
        from ldmcli.cli import run
        assert run(sys.argv[2:]) == 0
        assert not {"ldmcli.adapters", "ldmcli.upscaling", "ldmcli.images.canvas"} & sys.modules.keys()
        from ldmcli.speed.startup import DEFERRED, _Loader
        deferred = [name for name in DEFERRED if type(sys.modules[name].__spec__.loader) is _Loader]
        print(json.dumps([sorted({name.partition(".")[0] for name in sys.modules}), deferred]))
    """
    imported, deferred = python(code, "lean", *DRAW, "-o", str(tmp_path / "lean.png"))
    assert not set(imported) & NEVER
    assert set(deferred) == startup.DEFERRED
    _, deferred = python(code, "whole", *DRAW, "-o", str(tmp_path / "whole.png"))
    assert deferred == []
    assert (tmp_path / "lean.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_what_was_deferred_is_there_when_it_is_asked_for() -> None:
    code = """
        import json, sys
        from ldmcli.speed.startup import _Loader, quicken, whole_torch
        quicken()
        import torch
        before = sys.modules["torch.export"]
        exports = torch.export.export.__module__  # as an attribute
        from torch.ao.quantization import QConfig  # by a module inside it
        same = sys.modules["torch.export"] is before is torch.export
        left = type(torch._meta_registrations.__spec__.loader) is _Loader
        whole_torch()
        from torch.utils.flop_counter import FlopCounterMode
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            torch.nn.Conv2d(3, 4, 3)(torch.randn(1, 3, 8, 8))
        print(json.dumps([exports.split(".")[:2], QConfig.__name__, same, left, counter.get_total_flops()]))
    """
    assert python(code) == [["torch", "export"], "QConfig", True, True, 2 * 36 * 36 * 3]


def test_another_torch_is_imported_whole(tmp_path: Path) -> None:
    """A release that nobody has tried this with, or a broken one, gets no help and no harm."""
    fake = tmp_path / "torch"
    (fake / "lib").mkdir(parents=True)
    (fake / "lib" / "libtorch_global_deps.so").write_text("not a library")
    (fake / "__init__.py").write_text("from torch import export\n")
    (fake / "export.py").write_text("loaded = True\n")
    (fake / "version.py").write_text("from typing import Optional\n__version__ = '2.99.0'\n")
    code = """
        import json, sys, threading
        from ldmcli.speed.startup import quicken
        quicken()
        import torch.export
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join()
        print(json.dumps([torch.__file__, "loaded" in vars(torch.export)]))
    """
    assert python(code, PYTHONPATH=str(tmp_path)) == [str(fake / "__init__.py"), True]
    # The same as a release that was checked: now it is deferred.
    (fake / "version.py").write_text(f"__version__ = '{startup.CHECKED_TORCH[0]}7+cpu'\n")
    assert python(code, PYTHONPATH=str(tmp_path)) == [str(fake / "__init__.py"), False]


def test_garbage_is_not_looked_for_before_the_model_is_there(tmp_path: Path) -> None:
    """And is again afterwards: a batch may run for days."""
    code = """
        import gc, json, sys
        from ldmcli.cli import run
        from ldmcli.speed import startup as module

        def settle_down(real=module.settle_down):
            before = gc.isenabled(), "torch" in sys.modules
            real()
            told.append([*before, gc.isenabled(), gc.get_freeze_count() > 100_000])

        told, module.settle_down = [], settle_down
        assert run(sys.argv[1:]) == 0
        print(json.dumps([*told, gc.isenabled()]))
    """
    assert python(code, *DRAW, "-o", str(tmp_path / "x.png")) == [[False, True, True, True], True]


def test_torch_is_linked_while_python_goes_on() -> None:
    """A library that takes long to link keeps a thread, and nobody else."""
    code = """
        import json, sys, threading, time
        from ldmcli.speed import startup

        started, turns, linking = time.monotonic(), 0, "link torch"
        startup.link_ahead()
        while any(thread.name == linking for thread in threading.enumerate()):
            turns += 1
            time.sleep(0)
        print(json.dumps([turns, time.monotonic() - started, "torch" in sys.modules]))
    """
    turns, seconds, imported = python(code)
    assert turns > 50 * seconds
    assert not imported


def test_the_torch_that_is_pinned_was_checked() -> None:
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    (pin,) = [line.partition("==")[2] for line in pins if line.startswith("torch==")]
    assert pin.startswith(startup.CHECKED_TORCH)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["txt2img", "--help"], ["txt2img", "--steps", "x"]])
def test_words_alone_import_nothing_heavy(arguments: list[str]) -> None:
    code = """
        import json, sys
        from ldmcli.cli import run
        run(sys.argv[1:])
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """
    heavy = NEVER | {"torch", "numpy", "tokenizers", "safetensors", "PIL", "tqdm", "huggingface_hub", "ctypes"}
    assert not set(python(code, *arguments)) & (heavy - {"ctypes"})


def test_json_tells_where_the_time_went(tmp_path: Path) -> None:
    """The process ends without taking the interpreter down: all that is printed through a pipe is out by then."""
    done = ldm(*DRAW, "-c", "2", "--json", "-o", tmp_path)
    assert done.code == 0
    first, second = done.records
    assert Path(second["path"]).read_bytes().endswith(b"IEND\xaeB`\x82")
    assert tuple(first["phases"]) == PHASES
    assert all(seconds >= 0 for seconds in first["phases"].values())
    assert first["phases"]["imports"] > 0.1
    assert set(second["phases"]) == {"text", "denoise", "vae", "png"}  # nothing is loaded again
    assert 0 < first["marks"]["ready"] <= first["marks"]["first_step"] == second["marks"]["first_step"]
    assert 50e6 < first["peaks"]["ready"] <= first["peaks"]["first_step"] == second["peaks"]["first_step"] < 5e9
    # Phases are the main thread's, none counted twice: up to the first step there were no others.
    until_ready = sum(first["phases"][name] for name in ("imports", "weights", "text"))
    assert until_ready <= first["marks"]["ready"] + 0.05


def test_a_phase_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("ldmcli.stopwatch.time.perf_counter", lambda: next(now))
    stopwatch = Stopwatch()
    with stopwatch.phase("weights"), stopwatch.phase("text"):
        pass
    with stopwatch.phase("png"):
        pass
    assert stopwatch.report()["phases"] == {"weights": 7.0, "text": 3.0, "png": 1.0}
    assert stopwatch.report()["phases"] == {}


def test_process_age_is_counted_from_its_start() -> None:
    code = "from ldmcli.stopwatch import process_age; import time; time.sleep(0.3); print(process_age())"
    assert 0.25 < python(code) < 100


LARGE, SMALL = UNetConfig(), UNetConfig(block_channels=(64, 128, 160))


def test_threads_by_cores_model_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    assert threads.choose_threads(None, LARGE) == 8
    assert threads.choose_threads(3, LARGE) == threads.choose_threads(3, SMALL) == 3
    assert threads.choose_threads(12, LARGE, cores=2) == 12
    assert threads.choose_threads(None, LARGE, cores=4) == 4
    assert threads.choose_threads(None, SMALL) == 1
    assert threads.choose_threads(None, SMALL, pictures=4) == 4
    assert threads.choose_threads(None, SMALL, pictures=16) == 8


@pytest.mark.parametrize(("given", "count"), [("2", 2), ("2,1", 2), ("99", 8), ("", 8), ("0", 8), ("two", 8)])
def test_threads_by_environment(given: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    assert threads.choose_threads(None, LARGE) == count
    assert threads.choose_threads(5, LARGE) == 5


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/elsewhere\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
        ("4:memory:/x\n1:cpu,y:/x\n", {"cpu,y/cpu.cfs_quota_us": "300000", "cpu,y/cpu.cfs_period_us": "100000"}, 3.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_control_groups_limit_the_cores(
    groups: str, files: dict[str, str], share: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert threads.cgroup_share(tmp_path, tmp_path / "groups") == share


@pytest.mark.parametrize(("share", "cores"), [(None, 2), (8.0, 2), (1.0, 1), (1.4, 1), (1.6, 2), (0.2, 1)])
def test_cores_are_those_of_the_cpu_set(share: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hardware threads of one core are one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    monkeypatch.setattr(threads, "_siblings", lambda cpu: f"{cpu % 4},{cpu % 4 + 4}")
    monkeypatch.setattr(threads, "cgroup_share", lambda: share)
    assert threads.available_cores() == cores


def test_the_command_line_sets_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the vocabulary is read once a run."""
    from ldmcli.checkpoints import source
    from ldmcli.cli import run
    from ldmcli.pipeline.pipeline import Pipeline

    found, read, draw, vocabulary = [], [], Pipeline.draw, source.vocabulary_from_folder
    monkeypatch.setattr(Pipeline, "draw", lambda *given: (found.append(torch.get_num_threads()), draw(*given))[1])
    monkeypatch.setattr(source, "vocabulary_from_folder", lambda path: (read.append(path.name), vocabulary(path))[1])
    assert run([*DRAW, "-o", str(tmp_path / "star.png"), "--threads", "3"]) == 0
    assert read == ["tokenizer"]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert run([*DRAW, "-o", str(tmp_path / "other.png")]) == 0
    assert found == [3, 1]


def test_freed_memory_is_kept_for_the_next_step() -> None:
    """Pieces as a U-Net's step asks for: the kernel gives them once. Larger ones, a VAE's, go back at once."""
    code = """
        import ctypes, json, resource, sys
        if sys.argv[1] == "kept":
            from ldmcli.speed.cpu.heap import keep_freed_memory
            keep_freed_memory()
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p

        def pages(megabytes):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                piece = ctypes.c_void_p(libc.malloc(megabytes << 20))
                ctypes.memset(piece, 1, megabytes << 20)
                libc.free(piece)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print(json.dumps([pages(64), pages(128)]))
    """
    kept, given_back = python(code, "kept"), python(code, "as usual")
    assert kept[0] < 2 * (64 << 20) // 4096 < given_back[0]
    assert kept[1] > 5 * (128 << 20) // 4096


@pytest.mark.parametrize(
    ("kernel", "own", "expected"),
    [
        ("always [madvise] never", None, ["", "glibc.malloc.hugetlb=1"]),
        ("[always] madvise never", None, [""]),
        ("always madvise [never]", None, [""]),
        ("always [madvise] never", "glibc.malloc.check=0", ["glibc.malloc.check=0"]),
    ],
)
def test_a_process_begins_again_for_large_pages(
    kernel: str, own: str | None, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text(f"{kernel}\n")
    code = """
        import json, os, pathlib, sys
        from ldmcli.speed.cpu import heap
        tunables, begun = os.environ.get("GLIBC_TUNABLES", ""), pathlib.Path(sys.argv[1], "begun")
        with begun.open("a") as file:
            file.write(f"{os.getpid()} {tunables}\\n")
        heap._LARGE_PAGES = pathlib.Path(sys.argv[1], "enabled")
        os.confstr = lambda name: "glibc 2.36"
        heap.ask_for_large_pages()
        print(json.dumps([line.split(" ") for line in begun.read_text().splitlines()]))
    """
    environment = {"GLIBC_TUNABLES": own} if own else {}
    begun = python(code, str(tmp_path), **environment)
    assert [tunables for _, tunables in begun] == expected
    assert len({process for process, _ in begun}) == 1


def test_a_large_models_commands_ask_for_large_pages(tmp_path: Path) -> None:
    code = """
        import json, sys
        import ldmcli.cli
        asked = []
        ldmcli.cli.ask_for_large_pages = lambda: asked.append(True)
        ldmcli.cli.run = lambda arguments: 0
        ldmcli.cli.os._exit = lambda code: print(json.dumps(asked))
        ldmcli.cli.main()
    """
    for words, asked in ((("-m", "sd15"), True), (("--model=sd15",), True), ((), False)):
        assert bool(python(code, "txt2img", "an apple", *words)) == asked
    assert python(code, "txt2img", "an apple", LDM_MODEL="sd15")


def test_what_the_steps_have_freed_is_given_back_if_it_is_much() -> None:
    code = """
        import ctypes, json
        from ldmcli.speed.cpu.heap import give_back_free_memory, keep_freed_memory

        def held():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 >> 20

        keep_freed_memory()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        blocks = [libc.malloc(64 << 20) for _ in range(5)]
        for block in blocks:
            ctypes.memset(block, 1, 64 << 20)
        above, told = libc.malloc(100_000), [held()]
        for block in blocks:
            libc.free(block)
        told.append(held())
        for least in (400 << 20, 256 << 20):
            give_back_free_memory(least)
            told.append(held())
        print(json.dumps(told))
    """
    before, freed, little, much = python(code)
    assert before > 320
    assert min(freed, little) > before - 10
    assert much < before - 310


def test_memory_is_given_back_between_the_steps_and_the_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import load
    from oracle.comparing import fitted

    from ldmcli.pipeline import pipeline
    from ldmcli.spec import GenerationRequest

    loaded = load(TINY)
    done: list[object] = []
    monkeypatch.setattr(pipeline, "give_back_free_memory", lambda: done.append("give back"))
    decode = loaded.vae.decode
    monkeypatch.setattr(loaded.vae, "decode", lambda latents: (done.append("decode"), decode(latents))[1])
    request = GenerationRequest("a star", steps=2, width=64, height=64)
    loaded.draw(fitted(loaded, [request, request]), lambda steps, *_: done.append(steps))
    assert done == [0, 1, 2, "give back", "decode", "decode"]
