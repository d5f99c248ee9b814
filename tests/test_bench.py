"""`ldm bench`: its statistics and tables, its processes, and the command itself on the embedded model. No test looks at
how long anything took."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Result, assert_refused, ldm, start, tiny_model, until

from ldmcli.bench import contenders, parity
from ldmcli.bench import run as bench_run
from ldmcli.bench.contenders import Contender, chosen_peers, job_for
from ldmcli.bench.crew import fits_together
from ldmcli.bench.measure import Record, median_phases, ratio, summarize
from ldmcli.bench.peer_diffusers import phases
from ldmcli.bench.plan import Plan, Results, environment, make_task
from ldmcli.bench.processes import ContenderError, Processes
from ldmcli.bench.report import Table, to_dict, to_markdown, to_text
from ldmcli.bench.task import PROMPT, Job, Task
from ldmcli.errors import UsageError

pytestmark = pytest.mark.timeout(300)
TASK = Task("models/some", width=64, height=64, steps=3)

# A contender of any kind, chosen by its job's name. It draws what the reference draws: the bench asks `ldm` first, and
# the file that it left is beside the one asked for.
FAKE = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path
from ldmcli.bench.task import Job
from ldmcli.bench.worker import serve
from ldmcli.errors import UsageError

def main():
    kind = sys.argv[1]
    if kind == "leave":
        print(subprocess.Popen(["sleep", "1000"]).pid)
    elif kind == "hold":
        held = b"x" * 300_000_000
    elif kind == "fail":
        sys.exit("first\\nfake: no such thing\\n")
    elif kind == "slow":
        time.sleep(1000)
    elif kind == "cold":
        Path(sys.argv[3]).write_bytes(b"png")
        print(json.dumps({"phases": {"imports": 0.0}, "first_step_at": time.monotonic()}))
    else:
        serve(lambda: answers(Job.from_json(sys.argv[2])))

def answers(job):
    def greet():
        return {"versions": {"fake": "1"}, "dtype": "fp32", "weights": 5, "tokens": json.loads(os.environ["TOKENS"])}

    def compare(steps, file, decode=True):
        if job.name == "forger":
            import numpy as np
            with np.load(Path(file).with_name("ldm.npz")) as right:
                np.savez(file, latents=right["latents"] * 1.01, pixels=right["pixels"])
        else:
            shutil.copy(Path(file).with_name("ldm.npz"), file)
        return {}

    def draw(steps, prompt, decode=True):
        if job.name == "dying":
            raise RuntimeError("no more " + "paint")
        return {"seconds": 1.0, "steps": [0.25] * (steps - 1), "png": 1}

    def refuse():
        raise UsageError("not so.")

    def leave():
        return {"pid": subprocess.Popen(["sleep", "1000"]).pid}

    memory = lambda: {"host": 7}
    sleep = lambda: time.sleep(1000)
    return {"greet": greet, "compare": compare, "draw": draw, "memory": memory, "refuse": refuse, "sleep": sleep,
            "leave": leave}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Processes in which the module `fake_contender` can be imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("TOKENS", "[[1, 2]]")
    with Processes(tmp_path, environment(1, tmp_path)) as processes:
        yield processes


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# ---- numbers ----


def test_summaries_and_ratios() -> None:
    assert dataclasses.astuple(summarize([3.0, 1.0, 2.0, 10.0])) == (2.5, 1.0, 10.0, 4)
    ours, theirs, silent = Record("ldm"), Record("peer"), Record("silent")
    ours.add("step", 1.0, 3.0, 2.0)
    theirs.add("step", 8.0)
    assert ratio(ours, theirs, "step") == 0.25
    assert ratio(theirs, theirs, "step") is None
    assert ratio(ours, silent, "step") is None
    assert ratio(ours, None, "step") is None


def test_phases_are_medians_and_the_times_between_stamps() -> None:
    record = Record("ldm", phases=[{"imports": 1.0, "vae": 5.0}, {"imports": 3.0}, {"imports": 2.0, "vae": 1.0}])
    assert median_phases(record) == {"imports": 2.0, "vae": 1.0}
    stamps = {"png": 21.0, "vae": 15.0, "start": 0.0, "imports": 1.0, "weights": 3.0, "text": 6.0, "denoise": 10.0}
    assert dict(phases(stamps)) == {"imports": 1, "weights": 2, "text": 3, "denoise": 4, "vae": 5, "png": 6}


def test_a_task_survives_json() -> None:
    job = Job(dataclasses.replace(TASK, prompt='ä "q"\n'), "peer", "cuda:1", "bf16", True, True, "there")
    assert Job.from_json(job.to_json()) == job
    assert Task.from_json(TASK.to_json()) == TASK
    assert job.with_steps(9).task.steps == 9
    with pytest.raises(TypeError):
        Task.from_json('{"model": "m", "stepz": 3}')


def test_the_task_has_the_models_own_settings() -> None:
    given = {"width": None, "steps": 5, "prompt": "a pear", "threads": 3}
    task = make_task(Plan(tiny_model(), None, given), tiny_model())
    assert (task.width, task.height, task.guidance_scale, task.steps) == (16, 16, 7.5, 5)
    assert (task.prompt, task.sampler, task.threads) == ("a pear", "ddim", 3)
    assert make_task(Plan(tiny_model(), None, {}), tiny_model()).prompt
    with pytest.raises(UsageError):
        make_task(Plan(tiny_model(), None, {"width": 17}), tiny_model())


def test_contenders_environment_is_not_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LDM_STEPS", "3")
    found = environment(7, tmp_path)
    assert "LDM_STEPS" not in found
    assert found["OMP_NUM_THREADS"] == "7"
    assert found["XDG_CACHE_HOME"].startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "device", "native", "dtype"),
    [
        ("diffusers", "cpu", True, "fp32"),
        ("diffusers", "cuda:0", False, "fp16"),
        ("diffusers-channels-last", "cpu", False, "bf16"),
        ("diffusers-bf16", "cpu", False, "bf16"),
        ("diffusers-compile", "cpu", False, "fp32"),
        ("diffusers-compile", "cpu", True, "bf16"),
        ("openvino", "cpu", True, "bf16"),
    ],
)
def test_number_types_of_peers(name: str, device: str, native: bool, dtype: str) -> None:
    greeting = {"device": device, "dtype": "bf16", "bf16_native": native}
    assert job_for(contenders.PEERS[name], TASK, greeting).dtype == dtype


def test_openvino_does_not_race_a_gpu() -> None:
    greeting = {"device": "cuda:0", "dtype": "fp16", "bf16_native": True}
    with pytest.raises(UsageError, match="--device cpu"):
        job_for(contenders.PEERS["openvino"], TASK, greeting)


def test_contenders_live_together_where_memory_allows() -> None:
    assert fits_together([1 << 30, 4 << 30], 16 << 30)
    assert not fits_together([7 << 30, 7 << 30], 16 << 30)


@pytest.mark.parametrize(("factor", "dtype", "passed"), [(1.0005, "fp32", True), (1.01, "fp32", False),
                                                         (1.1, "bf16", True), (1.3, "bf16", False)])  # fmt: skip
def test_parity_has_bounds(tmp_path: Path, factor: float, dtype: str, passed: bool) -> None:
    latents, pixels = np.full((1, 4, 2, 2), 3.0, np.float32), np.full((4, 4, 3), 250, np.uint8)
    other = pixels.copy()
    other[0, 0, 0] = 10
    parity.keep(str(tmp_path / "a.npz"), latents, pixels)
    parity.keep(str(tmp_path / "b.npz"), latents * factor, other)
    found = parity.compare(tmp_path / "a.npz", tmp_path / "b.npz", dtype)
    assert found["passed"] is passed
    assert found["latents"] == pytest.approx(factor - 1, rel=1e-3)
    assert (found["max_level"], found["mean_level"]) == (240, 240 / 48)
    parity.keep(str(tmp_path / "c.npz"), latents[:, :, :1], None)
    assert parity.compare(tmp_path / "a.npz", tmp_path / "c.npz", dtype)["passed"] is False


# ---- tables ----


@pytest.fixture
def results() -> Results:
    ours = Record("ldm", {"versions": {"ldmcli": "9"}, "dtype": "fp32", "weights": 4_000_000}, {"passed": True})
    ours.add("step", 1.0, 2.0, 4.0)
    ours.note_peak("host", 2_500_000_000)
    theirs = Record("peer", {"versions": {"peer": "8"}, "dtype": "fp32"}, {"passed": False, "latents": 0.5})
    theirs.add("step", 8.0)
    floor = {"step": 0.5, "image": 3.0, "dtype": "fp32", "flops_per_second": 1e11, "product": "linear"}
    return Results("some", TASK, {"ldm": ours, "peer": theirs}, floor, {"cpu": "Chip", "cpus": 2})


def row_of(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_tells_median_spread_and_ratios(results: Results) -> None:
    text = to_text(results)
    assert row_of(text, "ldm  ") == ["ldm", "2 s", "1 s–4 s", "0.25", "0.5", "4.00", "2.50 GB"]
    assert row_of(text, "contender")[:4] == ["contender", "median", "min–max", "× peer"]
    table = text[text.index("step: one guided") :].split("\n\n")[0].splitlines()[1:]
    assert len({line.index("s", 12) for line in table[1:]}) == 1  # medians end in one column
    assert "Chip" in text
    assert "ldm 4 MB (fp32)" in text
    assert "floor: 0.500 s a step" in text
    assert "100 GFLOP/s (linear)" in text


def test_what_failed_is_told_as_such(results: Results) -> None:
    assert "peer (FAILED)" in to_text(results)
    assert "| peer (FAILED) | ~~8 s~~ |" in to_markdown(results)
    assert "| ldm | 2 s |" in to_markdown(results)
    assert to_dict(results)["passed"] is False
    results.records["peer"].failure = "ended with code 1: out of ink"
    assert "failed: peer ended with code 1: out of ink" in to_text(results)


def test_json_has_every_sample(results: Results) -> None:
    found = json.loads(json.dumps(to_dict(results)))
    assert found["contenders"]["ldm"]["samples"] == {"step": [1.0, 2.0, 4.0]}
    assert found["contenders"]["ldm"]["times_floor"] == {"image": None, "step": 4.0}
    assert found["contenders"]["ldm"]["ratios"] == {"step": 0.25}
    assert found["ratios_to"] == "peer"
    assert found["task"]["prompt"] == TASK.prompt
    assert "models/some" not in json.dumps(found)


def test_an_empty_column_is_left_out() -> None:
    table = Table("t", ("contender",), (("a",),))
    assert table.flawed == frozenset()
    lone = Record("ldm", {"versions": {}, "dtype": "fp32"})
    lone.add("image", 2.0)
    text = to_text(Results("some", TASK, {"ldm": lone}, None, {"cpu": "Chip", "cpus": 2}))
    assert "floor" not in text
    assert "×" not in text.split("image:")[1]


# ---- processes ----


def test_a_worker_answers_and_what_it_prints_does_not_matter(fake: Processes) -> None:
    worker = fake.worker("one", "fake_contender", "serve", Job(TASK, "one").to_json())
    assert worker.ask("memory") == {"host": 7}
    assert worker.ask("draw", steps=3, prompt="x")["steps"] == [0.25, 0.25]


def test_a_dead_worker_is_named_with_its_last_words(fake: Processes) -> None:
    worker = fake.worker("one", "fake_contender", "serve", Job(TASK, "dying").to_json())
    with pytest.raises(ContenderError, match=r"^one: ended with code 1: RuntimeError: no more paint$"):
        worker.ask("draw", steps=3, prompt="x")
    with pytest.raises(ContenderError, match="no more paint"):
        worker.ask("memory")


def test_a_refusal_keeps_its_exit_code(fake: Processes) -> None:
    worker = fake.worker("one", "fake_contender", "serve", Job(TASK, "one").to_json())
    with pytest.raises(ContenderError, match=r"^one: not so\.$") as caught:
        worker.ask("refuse")
    assert caught.value.exit_code == UsageError.exit_code


def test_answers_do_not_take_for_ever(fake: Processes) -> None:
    worker = fake.worker("one", "fake_contender", "serve", Job(TASK, "one").to_json())
    worker.ask("memory")
    with pytest.raises(ContenderError, match=r"no answer to “sleep” within 0\.2 s"):
        worker.ask("sleep", timeout=0.2)
    with pytest.raises(ContenderError, match=r"did not end within 0\.2 s"):
        fake.run("two", "fake_contender", "slow", timeout=0.2)


def test_no_process_is_left(fake: Processes) -> None:
    worker = fake.worker("one", "fake_contender", "serve", Job(TASK, "one").to_json())
    grandchild = worker.ask("leave")["pid"]
    assert is_alive(grandchild)
    worker.kill()
    until(lambda: not is_alive(grandchild), "the end of a worker's child")
    left = int(fake.run("two", "fake_contender", "leave").out)
    until(lambda: not is_alive(left), "the end of what a process left")


def test_a_process_that_fails_is_told_of(fake: Processes) -> None:
    with pytest.raises(ContenderError, match=r"^two: ended with code 1: fake: no such thing$"):
        fake.run("two", "fake_contender", "fail")


def test_a_peak_is_the_process_own(fake: Processes) -> None:
    # This process may have held more itself, and then the kernel cannot tell.
    code = (
        "import os, pathlib; from ldmcli.bench.processes import Processes\n"
        "with Processes(pathlib.Path('.'), dict(os.environ)) as p:\n"
        "    print(p.run('a', 'fake_contender', 'hold').peak, p.run('b', 'fake_contender', 'cold', '', 'x').peak)"
    )
    import subprocess

    folder = Path(os.environ["PYTHONPATH"]).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    held, little = done.stdout.split()
    assert 3e8 < int(held) < 4e8
    assert little == "None" or int(little) < 1e8


# ---- runs ----


def run_with(
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    clocks: tuple[str, ...],
    tokens: list[list[int]] | None = None,
    runs: int = 2,
) -> Results:
    """A run on the random model, in this process, against fakes of these names, who read `tokens`, by default as ldm
    does; without the floor."""
    from ldmcli.checkpoints.source import open_model
    from ldmcli.conditioning.chunks import tokenize

    monkeypatch.setattr(bench_run._Bench, "measure_floor", lambda _: None)
    right = [tokenize(each, PROMPT).chunks[0].ids for each in open_model(tiny_model()).tokenizers]
    monkeypatch.setenv("TOKENS", json.dumps(right if tokens is None else tokens))
    peers = tuple(Contender(name, "fake_contender") for name in names)
    return bench_run.run_bench(
        Plan(tiny_model(), None, {"steps": 3, "threads": 1, "device": "cpu"}, peers, clocks, runs)
    )


@pytest.mark.usefixtures("fake")
def test_a_contender_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_with(monkeypatch, "dying", "forger", "good", clocks=("image", "step"))
    assert results.flawed
    assert results.records["dying"].failure == "ended with code 1: RuntimeError: no more paint"
    assert results.records["dying"].samples == {}
    assert results.records["forger"].parity["passed"] is False
    assert results.records["forger"].parity["latents"] == pytest.approx(0.01, rel=1e-3)
    assert results.records["good"].parity == {
        "latents": 0.0, "bound": 1e-3, "passed": True, "max_level": 0, "mean_level": 0.0
    }  # fmt: skip
    assert results.records["good"].samples == {"image": [1.0] * 2, "step": [0.25] * 4}
    ours = results.records["ldm"]
    assert (len(ours.samples["image"]), len(ours.samples["step"])) == (2, 4)
    assert min(ours.samples["image"]) > max(ours.samples["step"])
    assert ours.peaks["host"][0] > ours.greeting["weights"] > 0


@pytest.mark.usefixtures("fake")
def test_other_tokens_are_no_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "fits_together", lambda *_: False)  # one process after the other
    results = run_with(monkeypatch, "good", clocks=("step",), tokens=[[0]], runs=1)
    assert results.records["good"].parity["reason"] == "other token ids"
    assert results.records["good"].flawed
    assert len(results.records["ldm"].samples["step"]) == 2
    assert not results.together


def bench(*arguments: str | Path, **settings: Any) -> Result:
    return ldm("bench", "--device", "cpu", "--dtype", "fp32", "--threads", "1", *arguments, **settings)


def test_one_step_is_timed_behind_another() -> None:
    """The first of a run is none to go by: where one is asked for, two are made."""
    result = bench("--clock", "step", "--runs", "1", "--steps", "1", "--json")
    assert result.code == 0, result.err
    (found,) = result.records
    assert len(found["contenders"]["ldm"]["samples"]["step"]) == 1


def test_cold_starts_of_the_embedded_model(tmp_path: Path) -> None:
    result = bench("--clock", "cold", "--runs", "1", "--steps", "2", "--json", env={"TMPDIR": str(tmp_path)})
    assert result.code == 0, result.err
    (found,) = result.records
    assert found["model"] == "tiny-emoji"
    assert found["floor"] is None
    for name in ("ldm", "ldm --no-cache"):
        record = found["contenders"][name]
        (whole,), (first,), (phases_,) = record["samples"]["cold"], record["samples"]["first_step"], record["phases"]
        assert 0 < first < whole
        assert {"imports", "weights", "denoise", "vae", "png", "rest"} <= set(phases_)
        assert sum(phases_.values()) == pytest.approx(whole, abs=1e-3)
        assert record["peaks"]["cold"][0] >= record["peaks"]["first_step"][0] > 1e8
    assert list(tmp_path.iterdir()) == []


def test_against_diffusers_on_the_embedded_model() -> None:
    result = bench("--clock", "step", "--runs", "1", "--steps", "3", "--against", "diffusers", "--json")
    assert result.code == 0, result.err
    (found,) = result.records
    record = found["contenders"]["diffusers"]
    assert record["parity"]["latents"] < 1e-4
    assert record["parity"]["passed"] is True
    assert record["greeting"]["tokens"] == found["contenders"]["ldm"]["greeting"]["tokens"]
    assert record["greeting"]["weights"] == found["contenders"]["ldm"]["greeting"]["weights"] > 4e7
    assert len(record["samples"]["step"]) == 2
    assert found["floor"]["step"] > 0
    assert found["passed"] is True


def test_an_image_of_the_embedded_model_as_a_table() -> None:
    result = bench("--clock", "image", "--runs", "1", "--steps", "2")
    assert result.code == 0, result.err
    text = result.out.decode()
    assert "image: warm, prompt to PNG" in text
    assert len(row_of(text, "ldm  ")) == 6
    assert "tiny-emoji: 64×64, 2 steps" in text


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start("bench", "--clock", "step", "--runs", "1000", "--device", "cpu", env={"TMPDIR": str(tmp_path)})
    assert process.stderr is not None
    lines = iter(process.stderr.readline, b"")
    assert any(b"warm, round 1 " in line for line in lines)
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if parent_of(path) == process.pid]
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read().splitlines()[-1] == b"ldm: error: interrupted."
    assert not [pid for pid in children if is_alive(pid)]
    assert list(tmp_path.iterdir()) == []


def parent_of(stat: Path) -> int:
    with contextlib.suppress(OSError):
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "diffusers,photoshop"], ["photoshop", "diffusers-compile"]),
        (["--clock", "cold,tea"], ["image"]),
        (["--model", "x", "--random-weights", "sd15"], ["--random-weights"]),
        (["--json", "--markdown"], ["--markdown"]),
        (["--random-weights", "sd9"], ["sd15"]),
        (["--width", "65"], ["65", "multiples"]),
        (["--steps", "0"], ["steps"]),
    ],
)
def test_usage_errors(arguments: list[str], words: list[str]) -> None:
    assert_refused(ldm("bench", *arguments), 2, *words)


def test_the_command_offers_what_there_is() -> None:
    from ldmcli.bench.measure import CLOCKS
    from ldmcli.bench.random_weights import FAMILIES
    from ldmcli.cli.bench import bench as command

    offered = {parameter.name: parameter for parameter in command.params}
    assert tuple(offered["random_weights"].type.choices) == FAMILIES
    assert offered["clocks"].default == ",".join(CLOCKS)
    assert all(name in offered["against"].help for name in contenders.PEERS)


def test_a_missing_peer_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_installed", lambda package: package != "openvino")
    with pytest.raises(UsageError, match=r"contender openvino needs openvino, .* run pip install openvino"):
        chosen_peers("diffusers, openvino")
    monkeypatch.setattr(contenders, "_installed", lambda _: True)
    assert [peer.name for peer in chosen_peers("openvino,diffusers,openvino,")] == ["openvino", "diffusers"]


def test_peers_read_no_single_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").touch()
    assert_refused(ldm("bench", "-m", tmp_path / "m.safetensors", "--against", "diffusers"), 2, "folder")


def test_the_bench_itself_imports_nothing_heavy() -> None:
    # Its own peak is the least that it can tell of a contender.
    import subprocess

    modules = "run report plan contenders crew processes measure parity task"
    imports = "; ".join(f"import ldmcli.bench.{name}" for name in modules.split())
    code = f"import sys; {imports}; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
