"""`make bench-gpu`: its targets, parts and summary. All on the CPU; no test looks at how long anything took."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import tiny_model

from ldmcli.bench import gpu, throughput
from ldmcli.bench.contenders import chosen_peers
from ldmcli.bench.targets import MISS, NOT_RUN, PASS, TARGETS, Target, judged
from ldmcli.bench.targets import to_markdown as verdicts_to_markdown
from ldmcli.errors import UsageError

# ---- the targets ----


def record(step: float = 1.0, **more: Any) -> dict[str, Any]:
    """A contender's part of `ldm bench --json`."""
    medians = {clock: {"median": more.pop(clock, step)} for clock in ("image", "step", "cold")}
    plain = {"failure": None, "parity": {"passed": True, "latents": 1e-3}, "medians": medians, "peaks": {},
             "times_floor": {"image": None, "step": None}}  # fmt: skip
    return plain | more


def word_of(target: Target, ours: dict[str, Any], other: dict[str, Any] | None = None, **named: Any) -> str:
    found = {"contenders": {"ldm": ours, **({"peer": other} if other else {}), **named}}
    (verdict,) = judged({"part": found}, [target])
    return f"{verdict.word} {verdict.seen}" if verdict.reason == "" else f"{verdict.word}: {verdict.reason}"


def test_a_target_is_met_or_missed() -> None:
    rate = Target("steps", "part", "rate", 200)
    assert word_of(rate, record(1 / 250)) == f"{PASS} 250.0"
    assert word_of(rate, record(1 / 160)) == f"{MISS} 160.0"
    share = Target("share", "part", "floor", 0.5)
    assert word_of(share, record(times_floor={"step": 1.6})) == f"{PASS} 0.625"
    assert word_of(share, record(times_floor={"step": 4.0})) == f"{MISS} 0.25"
    beside = Target("ratio", "part", "ratio", 0.5, "image", "peer")
    assert word_of(beside, record(image=1.0), record(image=2.0)) == f"{PASS} 0.5"
    assert word_of(beside, record(image=3.0), record(image=2.0)) == f"{MISS} 1.5"
    peak = Target("peak", "part", "peak", 1, "gpu_allocated", "peer")
    small, large = {"gpu_allocated": [3, 4]}, {"gpu_allocated": [8, 5]}
    assert word_of(peak, record(peaks=small), record(peaks=large)) == f"{PASS} 0.5"
    assert word_of(peak, record(peaks=large), record(peaks=small)) == f"{MISS} 2.0"
    error = Target("error", "part", "error", 1, against="peer")
    good, bad = {"passed": True, "latents": 0.25}, {"passed": True, "latents": 0.5}
    assert word_of(error, record(parity=good), record(parity=bad)) == f"{PASS} 0.5"
    assert word_of(error, record(parity=bad), record(parity=good)) == f"{MISS} 2.0"


def test_what_does_not_count_is_not_run() -> None:
    beside = Target("ratio", "part", "ratio", 0.5, "step", "peer")
    assert judged({}, [beside])[0].word == NOT_RUN
    assert word_of(beside, record()) == f"{NOT_RUN}: peer took no part"
    assert word_of(beside, record(), record(failure="out of ink")) == f"{NOT_RUN}: peer failed"
    assert word_of(beside, record(parity={"passed": False}), record()) == f"{NOT_RUN}: ldm draws something else"
    assert word_of(beside, record(), record(medians={})) == f"{NOT_RUN}: not measured"
    anew = dataclasses.replace(beside, ours="ldm --no-cache", clock="cold")
    cold = {"ldm --no-cache": record(cold=1.0, parity={})}
    assert word_of(anew, record(), record(cold=4.0), **cold) == f"{PASS} 0.25"
    assert word_of(anew, record(parity={"passed": False}), record(), **cold) == f"{NOT_RUN}: ldm draws something else"


def test_the_table_of_targets() -> None:
    targets = [Target("steps", "part", "rate", 200), Target("r", "part", "ratio", 0.45, "step", "peer")]
    text = verdicts_to_markdown(judged({"part": {"contenders": {"ldm": record(0.01)}}}, targets))
    assert "| steps | ≥ 200 it/s | 100 | MISS |" in text
    assert "| r | ≤ 0.45 × peer |  | not run: peer took no part |" in text


def test_every_target_is_of_something_that_is_measured() -> None:
    parts = {part.name: part for part in gpu.PARTS}
    for target in TARGETS:
        part = parts[target.part]
        assert part.program == "bench"
        assert not target.against or target.against in part.against
        clocks = part.words[part.words.index("--clock") + 1].split(",")
        assert target.measure in ("peak", "error") or target.clock in clocks


# ---- the command ----


def setting(out: Path, **more: Any) -> gpu.Setting:
    return gpu.Setting(out, out / "scratch", **more)


def test_parts_come_in_their_own_order() -> None:
    assert [part.name for part in gpu.chosen_parts("sdxl, sd15 tests")] == ["tests", "sd15", "sdxl"]
    assert gpu.chosen_parts(" ") == list(gpu.PARTS)
    with pytest.raises(UsageError, match="'tea' is not known; choose from tests, sd15"):
        gpu.chosen_parts("tea")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_what_a_part_runs_is_understood(part: gpu.Part, device: str, tmp_path: Path) -> None:
    from ldmcli.cli.bench import bench as command

    python, _, module, *words = gpu.command_of(setting(tmp_path, device=device), part, tmp_path / "model")
    assert python == sys.executable
    if part.program == "tests":
        assert (module, words[:2]) == ("pytest", ["-m", "cuda"])
    elif part.program == "throughput":
        found = throughput._options(words)
        assert (found.batch_sizes, found.model, found.size) == ([16, 64], tmp_path / "model", 512)
    else:
        assert words.pop(0) == "bench"
        options = command.make_context("bench", words).params
        assert (options["steps"], options["width"], options["height"]) == (part.steps, part.size, part.size)
        names = [peer.name for peer in chosen_peers(options["against"])]
        lost = {"ldm-xformers"} if device == "cpu" else set()
        assert set(part.against) - set(names) == lost & set(part.against)
        assert options["batch_size"] == 1 or "cold" not in options["clocks"]


def test_random_weights_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def write(_: gpu.Setting, kind: str, family: str, folder: str) -> str:
        assert kind == "weights"
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model_index.json").write_text("{}")
        written.append(family)
        return ""

    monkeypatch.setattr(gpu, "_groundwork", write)
    parts = {part.name: part for part in gpu.PARTS}
    folders = {name: gpu._model(setting(tmp_path), parts[name]) for name in ("sd15", "cold", "sdxl", "tests")}
    assert written == ["sd15", "sdxl"]
    assert folders["sd15"] == folders["cold"] == tmp_path / "scratch" / "sd15"
    assert folders["tests"] is None
    own = setting(tmp_path, model=tmp_path / "own")
    assert gpu._model(own, parts["sd15"]) == tmp_path / "own"


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"contenders": {"ldm": record(0.004), "diffusers": record(0.02)}}
    code = {
        "sd15": f"import json; json.dump({found!r}, open({str(tmp_path / 'sd15.json')!r}, 'w')); print('a table')",
        "cold": "import sys; print('ldm: warning: peer takes no further part: no | ink', file=sys.stderr); sys.exit(3)",
        "compile": "import time; time.sleep(1000)",
        "profile": "import os; print(sorted(name for name in os.environ if name.startswith('LDM_')))",
    }
    monkeypatch.setenv("LDM_STEPS", "3")
    monkeypatch.setattr(gpu, "_device", lambda _: {"kind": "cuda", "name": "Some GPU", "memory": 1.4e11, "torch": "9"})
    monkeypatch.setattr(gpu, "_model", lambda *_: None)
    monkeypatch.setattr(gpu, "command_of", lambda _, part, __: [sys.executable, "-c", code[part.name]])
    (tmp_path / "cold.json").write_text("{}")  # of an earlier call
    assert gpu.run(setting(tmp_path, limit=3.0), gpu.chosen_parts("sd15 cold compile profile")) == 1
    text = capsys.readouterr().out
    assert text == (tmp_path / "summary.md").read_text()
    assert text.startswith("Some GPU, 140 GB, torch 9\n")
    rows = {line.split(":")[0]: line for line in text.splitlines()}
    assert "| ok |" in rows["| sd15"]
    assert "| failed (3) |" in rows["| cold"]
    assert "peer takes no further part: no ∣ ink |" in rows["| cold"]
    assert "| took too long | 3" in rows["| compile"]
    assert "| ok |" in rows["| profile"]
    assert "| not run |" in rows["| sdxl"]
    assert "guided steps a second | ≥ 200 it/s | 250 | PASS |" in text
    assert "a step beside diffusers | ≤ 0.45 × diffusers | 0.2 | PASS |" in text
    assert "not run: no results of the part cold |" in text
    assert (tmp_path / "sd15.md").read_text() == "a table\n"
    assert (tmp_path / "profile.md").read_text() == "[]\n"
    assert not (tmp_path / "cold.json").exists()
    # Another call adds to what is there; a slower run of the same part replaces it.
    found["contenders"]["ldm"] = record(0.01)
    code["sd15"] = f"import json; json.dump({found!r}, open({str(tmp_path / 'sd15.json')!r}, 'w'))"
    assert gpu.run(setting(tmp_path), gpu.chosen_parts("sd15")) == 0
    text = capsys.readouterr().out
    assert "guided steps a second | ≥ 200 it/s | 100 | MISS |" in text
    assert "a step beside diffusers | ≤ 0.45 × diffusers | 0.5 | MISS |" in text
    assert "| failed (3) |" in text
    assert gpu.main(["--out", str(tmp_path), "--summary"]) == 0
    assert capsys.readouterr().out == text


def test_a_model_that_cannot_be_written_fails_its_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise UsageError("no room.")

    monkeypatch.setattr(gpu, "_groundwork", refuse)
    done = gpu.run_part(setting(tmp_path), gpu.chosen_parts("sd15")[0])
    assert (done.code, done.note) == (2, "no room.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldmcli.bench.gpu", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ldm: error: this measures on an NVIDIA GPU, and there is none to be had here")


def test_the_whole_command_on_a_cpu(
    tmp_path: Path, embedded_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same code as on a GPU, with another part: two pictures at once, profiled, beside diffusers and ldm itself,
    with every option that goes on to ldm."""
    words = (
        "--dtype", "fp32", "--threads", "1", "--runs", "1", "-b", "2", "--clock", "image,step", "--profile",
        "--kernels", "torch", "--no-cuda-graph", "--low-vram",
    )  # fmt: skip
    part = gpu.Part("all", "everything at once", against=("diffusers", "ldm-plain", "ldm-xformers"), words=words)
    monkeypatch.setattr(gpu, "PARTS", (part,))
    arguments = ["--out", tmp_path, "--device", "cpu", "--model", embedded_folder, "--steps", "2", "--size", "64"]
    assert gpu.main([*map(str, arguments)]) == 0, (tmp_path / "all.log").read_text()
    found = json.loads((tmp_path / "all.json").read_text())
    task, ran = found["task"], found["contenders"]
    assert (task["batch_size"], task["graph"], task["low_vram"], task["steps"]) == (2, False, True, 2)
    assert set(ran) == {"ldm", "diffusers", "ldm-plain"}
    assert ran["diffusers"]["parity"]["latents"] < 1e-4
    assert ran["diffusers"]["parity"]["max_level"] <= 1
    assert ran["ldm-plain"]["parity"]["latents"] == 0
    assert len(ran["ldm-plain"]["samples"]["image"]) == 1
    assert found["ratios_to"] == "diffusers"
    assert found["profile"]["kinds"]["convolution"]["seconds"] > 0
    text = (tmp_path / "all.md").read_text()
    for words_ in (
        "2 pictures at once",
        "picture it/s",
        "profile: one step of ldm by kinds of work",
        "| convolution |",
    ):
        assert words_ in text
    assert text.index("step: one guided") < text.index("profile: ") < text.index("parity: ")
    told = capsys.readouterr().out
    assert told.startswith("CPU, torch ")
    assert "| all: everything at once | ok, a trial |" in told
    assert NOT_RUN in told
    assert MISS not in told


def test_a_trial_is_held_against_no_target(tmp_path: Path) -> None:
    results = {"contenders": {"ldm": record(0.001), "diffusers": record(1.0)}}
    (tmp_path / "sd15.json").write_text(json.dumps(results))
    done = gpu.Done("sd15", 0, 1.0, "", trial=True)
    (tmp_path / "sd15.part.json").write_text(json.dumps(dataclasses.asdict(done)))
    assert PASS not in gpu.summary(tmp_path)
    (tmp_path / "sd15.part.json").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(done, trial=False))))
    assert PASS in gpu.summary(tmp_path)
    assert not setting(tmp_path).is_trial
    assert all(setting(tmp_path, **own).is_trial for own in ({"device": "cpu"}, {"steps": 2}, {"size": 16}))


# ---- ldm batch under way ----


def test_further_batches_alone_count() -> None:
    row = throughput.summed(16, 4, [5.0, 6.0, 5.5], [13.5, 13.0, 20.0])
    assert (row["seconds_a_batch"], row["images_per_second"]) == (2.0, 8.0)
    assert "| 16 | 8 | 2 | 5.5 |" in throughput.table([row])
    assert throughput.summed(16, 4, [5.0], [4.0])["images_per_second"] is None


def test_throughput_of_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "_PICTURES", 4)
    file = tmp_path / "found.json"
    words = ["--model", tiny_model(), "--device", "cpu", "--steps", "2", "--size", "16", "--batch-sizes", "2"]
    assert throughput.main([*map(str, words), "--runs", "1", "--threads", "1", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["batch_size"], row["batches"], len(row["short"]), len(row["long"])) == (2, 2, 1, 1)
    assert "| 2 |" in capsys.readouterr().out
    assert throughput.main(["--model", str(tmp_path / "none"), "--batch-sizes", "2"]) != 0
    assert capsys.readouterr().err.startswith("ldm: error: ")
