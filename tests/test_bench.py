"""`ldm bench`: this program's own clocks, on the embedded model. No test looks at how long anything took."""

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Result, assert_refused, ldm_here, start, tiny_model, tiny_model_of

from ldmcli import bench as clocks
from ldmcli.checkpoints.source import open_model
from ldmcli.cli.bench_command import _words
from ldmcli.cli.bench_command import bench as command
from ldmcli.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

pytestmark = pytest.mark.timeout(600)
SD15 = ModelConfig("sd1", UNetConfig(), VAEConfig(), (TextEncoderConfig(),), ScheduleConfig())


MEASURED = clocks.rate


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rate of products is taken for known: measuring it takes seconds."""
    monkeypatch.setattr(clocks, "rate", lambda weight, *_: 1e9 if len(weight) == 4 else 1e8)


def bench(*arguments: str | Path) -> Result:
    common = ("--device", "cpu", "--dtype", "fp32", "--threads", "1", "-m", tiny_model())
    return ldm_here("bench", *common, *arguments)


def found_by(*arguments: str | Path) -> dict[str, Any]:
    result = bench(*arguments, "--json")
    assert result.code == 0, result.err
    (found,) = result.records
    return found


def test_a_report_of_all_clocks_for_a_terminal_and_a_file(tmp_path: Path) -> None:
    result = bench("--runs", "1", "--steps", "2", "--json-file", tmp_path / "found.json")
    assert result.code == 0, result.err
    lines = {line.partition("  ")[0]: line for line in result.out.decode().splitlines()}
    assert {"cold, ldm", "cold, ldm --no-cache", "image, ldm", "step, ldm"} < set(lines)
    assert "first step after" in lines["cold, ldm"]
    assert "denoise" in lines["cold, ldm"]
    assert "× floor" in lines["step, ldm"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["model"], found["task"]["width"]) == ("tiny", 16)
    for name in ("ldm", "ldm --no-cache"):
        record = found["contenders"][name]
        (whole,), (first,), (phases,) = record["samples"]["cold"], record["samples"]["first_step"], record["phases"]
        assert 0 < first < whole
        assert {"imports", "weights", "denoise", "vae", "png", "rest"} <= set(phases)
        assert sum(phases.values()) == pytest.approx(whole, abs=1e-3)
        assert record["peaks"]["cold"][0] >= record["peaks"]["first_step"][0] > 1e8


def test_where_nothing_is_kept_one_cold_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = {"phases": {"imports": 1.0}, "marks": {"first_step": 1.5}, "peaks": {"first_step": 1}}
    monkeypatch.setattr(clocks, "_cold_start", lambda words: (2.0, reported))
    found = found_by("--clock", "cold", "--runs", "1", "--no-cache")
    assert found["floor"] is None
    assert found["contenders"]["ldm"]["samples"] == {}
    assert found["contenders"]["ldm --no-cache"]["samples"] == {"cold": [2.0], "first_step": [1.5]}
    assert found["contenders"]["ldm --no-cache"]["phases"] == [{"imports": 1.0, "rest": 1.0}]


def test_warm_pictures_and_their_steps() -> None:
    found = found_by("--clock", "image,step", "--runs", "2", "--steps", "3", "-b", "2")
    record, task = found["contenders"]["ldm"], found["task"]
    assert (len(record["samples"]["image"]), len(record["samples"]["step"])) == (2, 4)
    assert min(record["samples"]["image"]) > min(record["samples"]["step"])
    assert (task["steps"], task["width"], task["batch_size"], task["dtype"]) == (3, 16, 2, "fp32")
    assert found["floor"]["image"] > 3 * found["floor"]["step"] > 0
    assert record["peaks"]["host"][0] > 1e8


def test_a_file_is_replaced_by_a_report_where_it_is_one(tmp_path: Path) -> None:
    """One step is asked for: the first of a run is none to go by, and two are made."""
    common = ("--runs", "1", "--steps", "1", "--clock", "step", "--json-file")
    for _ in range(2):
        assert bench(*common, tmp_path / "found.json").code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["contenders"]["ldm"]["samples"]["step"]) == 1
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a pear"}\n')
    assert_refused(bench(*common, tmp_path / "prompts.jsonl"), 73, "no result of ldm bench", "--json-file")
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "a pear"}\n'


def test_a_steps_decoder_is_left_alone() -> None:
    with Session(ModelSpec(str(tiny_model())), RuntimeSpec(device="cpu", dtype="fp32", threads=1)) as session:
        requests = [GenerationRequest("a pear", steps=3, seed=seed) for seed in (1, 2)]
        seen: list[int] = []
        assert list(clocks.drawn(session, requests, lambda progress: seen.append(progress.done), decode=False)) == []
        assert seen == [0, 1, 2, 3]
        assert len(list(clocks.drawn(session, requests, lambda _: None, decode=True))) == 2


def test_a_cold_start_is_typed_as_the_bench_was() -> None:
    words = ["-m", "m", "-n", "fog", "--cfg-scale", "3", "--guidance-interval", "1:2.5", "--kernels", "torch",
             "--low-vram", "--no-cuda-graph", "--no-cache", "-b", "2", "--clock", "step", "--prompt", "-x"]  # fmt: skip
    typed = _words(command.make_context("bench", words))
    assert {"--model=m", "--negative-prompt=fog", "--guidance-scale=3.0", "--guidance-interval=1.0:2.5", "--steps=20",
            "--kernels=torch", "--low-vram", "--no-cuda-graph", "--seed=0"} < set(typed)  # fmt: skip
    assert typed[-2:] == ["--", "-x"]
    assert not any(word.startswith(("--no-cache", "--batch", "--clock", "--json")) for word in typed)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--clock", "cold,tea"], 2, ["image"]),
        (["--width", "65"], 2, ["65", "multiples"]),
        (["--steps", "0"], 2, ["steps"]),
        (["-b", "2"], 2, ["--clock image,step"]),
        (["-b", "3", "-s", str(2**64 - 2), "--clock", "step"], 2, ["seed"]),
        (["--prompt", "-"], 2, ["--prompt"]),
        (["--json-file", "nowhere/at/all.json"], 73, ["nowhere/at"]),
        (["--kernels", "triton", "--device", "cpu"], 2, ["triton", "CUDA"]),
        (["--kernels", "triton", "--device", "cpu", "--clock", "step"], 2, ["triton", "CUDA"]),
        (["-m", "./none"], 66, ["none"]),
    ],
)
def test_refusals(arguments: list[str], code: int, words: list[str]) -> None:
    assert_refused(ldm_here("bench", "-q", *arguments), code, *words)


@pytest.mark.parametrize("words", ["--against diffusers", "--random-weights sd15", "--compile-cache kept"])
def test_what_has_left_says_where_it_is(words: str) -> None:
    assert_refused(ldm_here("bench", *words.split()), 2, words.split()[0], "make bench", f'BENCH="{words.split()[0]}')
    assert_refused(ldm_here("bench", "--markdown"), 2, "--markdown", "make bench", "Markdown")


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start("bench", "--clock", "cold", "--runs", "1000", "--device", "cpu", env={"TMPDIR": str(tmp_path)})
    assert process.stderr is not None
    assert any(b"cold, round 1 " in line for line in iter(process.stderr.readline, b""))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert process.stderr.read().splitlines()[-1] == b"ldm: error: interrupted."
    assert not [path for path in Path("/proc").glob("[0-9]*/stat") if parent_of(path) == process.pid]
    assert list(tmp_path.iterdir()) == []


def parent_of(stat: Path) -> int:
    with contextlib.suppress(OSError):
        return int(stat.read_text().rpartition(")")[2].split()[1])
    return 0


def test_the_bench_itself_imports_nothing_heavy() -> None:
    # Its own peak is the least that it can tell of a cold start.
    heavy = "[m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules]"
    code = f"import sys; import ldmcli.bench, ldmcli.cli.bench_command; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the floor ----


def test_a_published_model_takes_what_is_known() -> None:
    kinds, decoding = clocks.work(SD15, 512, 512, samples=1)
    # 803 GFLOP, less the keys and values of the prompt, which are computed once.
    assert sum(kinds.values()) == pytest.approx(800.3e9, rel=1e-3)
    assert decoding == pytest.approx(2514.5e9, rel=1e-3)
    assert kinds["convolution"] == pytest.approx(443.9e9, rel=1e-3)
    assert kinds["attention"] == pytest.approx(126.1e9, rel=1e-3)


def test_a_small_model_counts_as_by_hand() -> None:
    def conv(size: int, into: int, out: int) -> int:
        return 2 * size * size * into * out * pixels

    c, v, pixels = 16, 8, 6 * 4
    unet = UNetConfig(block_channels=(c,), attention=(0,), heads=(2,), layers_per_block=1, norm_groups=4)
    vae = VAEConfig(block_channels=(v,), layers_per_block=1, norm_groups=4)
    config = ModelConfig("sd1", unet, vae, (TextEncoderConfig(),), ScheduleConfig())
    kinds, decoding = clocks.work(config, 6, 4, samples=2)
    # In, three resnets, two more whose input is twice as wide and is shortened, and out; 1×1 projections of the middle.
    way = 3 * 2 * conv(3, c, c) + 2 * (conv(3, 2 * c, c) + conv(3, c, c) + conv(1, 2 * c, c))
    assert kinds["convolution"] == 2 * (conv(3, 4, c) + way + conv(3, c, 4) + 2 * conv(1, c, c))
    assert kinds["attention"] == 2 * 2 * 2 * pixels * (pixels + 77) * c
    attention = 4 * conv(1, v, v) + 2 * 2 * pixels * pixels * v
    assert decoding == conv(1, 4, 4) + conv(3, 4, v) + 4 * 2 * conv(3, v, v) + attention + conv(3, v, 3)


@pytest.mark.parametrize("channels", [5, 8, 9])
def test_a_model_that_reads_more_than_latents_decodes_these_alone(channels: int) -> None:
    usual, other = (clocks.work(open_model(path).config, 16, 16, 2) for path in (tiny_model(), tiny_model_of(channels)))
    assert other[1] == usual[1]
    assert other[0]["convolution"] > usual[0]["convolution"]


def test_the_floor_of_a_batch() -> None:
    with Session(ModelSpec(str(tiny_model()))) as session:
        request = session.fit(GenerationRequest("a pear", steps=3))
        one, three = (
            clocks.floor(session.config, request, batch, torch.float32, torch.device("cpu")) for batch in (1, 3)
        )
    # Less what is computed for a step, whatever the batch: projections of the time embedding.
    assert three["step"] == pytest.approx(3 * one["step"], rel=0.02)
    assert three["image"] == pytest.approx(3 * one["image"], rel=0.02)
    assert sum(one["kinds"].values()) == pytest.approx(one["step"])
    assert (one["flops_per_second"], one["product"][:4]) == (1e9, "conv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_measured_of_both_kinds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(clocks, "_SECONDS", 0.0)
    assert MEASURED((6, 4, 3, 3), (2, 16, 8), dtype, torch.device("cpu")) > 0
    assert MEASURED((6, 4), (32,), dtype, torch.device("cpu")) > 0
