"""`make bench` and `make bench-gpu`: contenders in their processes, parity, random weights, targets. All on the CPU; no
test looks at how long anything took."""

import dataclasses
import json
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import __main__ as make_bench
from bench import (
    card_check,
    gpu,
    measuring,
    ours,
    peer_diffusers,
    peer_openvino,
    processes,
    report,
    several,
    step_profile,
)
from bench.contenders import CONTENDERS, OURS, PROMPT, REFERENCE, Contender, Job, chosen, job_for, obstacle
from bench.measuring import Plan
from bench.ours import cold_words
from bench.processes import ContenderError, Worker, environment, python
from bench.random_weights import FAMILIES, write_random_model
from bench.serving import parity
from bench.targets import TARGETS, Target, judged, to_markdown
from cli_support import tiny_model, until
from safetensors.torch import load_file

from ldmcli.checkpoints.source import open_model
from ldmcli.conditioning.chunks import tokenize
from ldmcli.errors import UsageError

pytestmark = pytest.mark.timeout(600)
JOB = Job("ldm", "models/some", width=64, height=64, guidance_scale=7.5, steps=3, device="cpu", dtype="fp32", threads=1)
FACTS = {"device": "cpu", "dtype": "bf16", "bf16_native": True}

# A contender of any kind, by its job's name. It draws what the reference draws, whose file is beside the one asked for.
FAKE = """
import json, os, subprocess, time
from pathlib import Path
import numpy as np
from bench import serving
from PIL import Image

class Fake(serving.Serving):
    def greet(self):
        tokens = [[0]] if self.job.name == "babel" else json.loads(os.environ["TOKENS"])
        return {"versions": {"fake": "1"}, "dtype": "fp32", "tokens": tokens}
    def compare(self, steps, file, decode=True):
        with np.load(Path(file).with_name("reference.npz")) as right:
            np.savez(file, latents=right["latents"] * (1.01 if self.job.name == "forger" else 1))
        return {}
    def draw(self, steps, prompt, decode=True):
        print("not an answer")
        if self.job.name == "dying":
            raise RuntimeError("no more " + "paint")
        return {"seconds": 1.0, "steps": [0.25] * (steps - 1), "png": 1}
    def pictures(self, steps, prompt, on_step, *, decode):
        on_step(None)
        return [Image.new("RGB", (8, 8))]
    def sleep(self):
        time.sleep(1000)
    def leave(self):
        return {"pid": subprocess.Popen(["sleep", "1000"]).pid}

if __name__ == "__main__":
    serving.main(Fake)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which the module `fake_contender` can be run."""
    (tmp_path / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ids = [list(tokenize(each, PROMPT).chunks[0].ids) for each in open_model(tiny_model()).tokenizers]
    monkeypatch.setenv("TOKENS", json.dumps(ids))
    return environment(tmp_path, 1)


def fake_worker(fake: dict[str, str], name: str = "one") -> Worker:
    return Worker(python("fake_contender", "serve", dataclasses.replace(JOB, name=name).to_json()), fake)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- processes ----


def test_a_worker_answers_and_leaves_nothing_behind(fake: dict[str, str]) -> None:
    worker = fake_worker(fake)
    assert worker.ask("draw", steps=3, prompt="x")["steps"] == [0.25, 0.25]
    grandchild = worker.ask("leave")["pid"]
    assert is_alive(grandchild)
    worker.kill()
    until(lambda: not is_alive(grandchild), "the end of a worker's child")


def test_a_dead_worker_is_told_of_by_its_last_words(fake: dict[str, str]) -> None:
    worker = fake_worker(fake, "dying")
    for _ in range(2):
        with pytest.raises(ContenderError, match=r"^ended with code 1: RuntimeError: no more paint$"):
            worker.ask("draw", steps=3, prompt="x")
    worker.kill()


def test_answers_do_not_take_for_ever(fake: dict[str, str]) -> None:
    worker = fake_worker(fake)
    worker.ask("greet")
    with pytest.raises(ContenderError, match=r"no answer within 0\.2 s"):
        worker.ask("sleep", limit=0.2)
    worker.kill()
    with pytest.raises(ContenderError, match=r"no answer within 0\.2 s"):
        processes.run([sys.executable, "-c", "import time; time.sleep(1000)"], fake, limit=0.2)
    with pytest.raises(ContenderError, match=r"^ended with code 3: out of ink$"):
        processes.run([sys.executable, "-c", "import sys; print('out of ink', file=sys.stderr); sys.exit(3)"], fake)


def test_contenders_environment_is_not_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LDM_STEPS", "3")
    found = environment(tmp_path / "own", 7, tmp_path / "kept")
    assert "LDM_STEPS" not in found
    assert found["OMP_NUM_THREADS"] == "7"
    assert Path(found["XDG_CACHE_HOME"]).parent == tmp_path / "own"
    assert Path(found["TRITON_CACHE_DIR"]).parent == Path(found["CUDA_CACHE_PATH"]).parent == tmp_path / "kept"


# ---- contenders ----


@pytest.mark.parametrize(
    ("name", "device", "native", "dtype"),
    [("diffusers", "cpu", True, "fp32"), ("diffusers", "cuda:0", False, "fp16"),
     ("diffusers-channels-last", "cpu", False, "bf16"), ("diffusers-compile", "cpu", False, "fp32"),
     ("openvino", "cpu", True, "bf16"), ("ldm-eager", "cpu", True, "bf16")],
)  # fmt: skip
def test_number_types(name: str, device: str, native: bool, dtype: str) -> None:
    job = dataclasses.replace(JOB, device=device)
    assert job_for(CONTENDERS[name], job, FACTS | {"bf16_native": native}).dtype == dtype


def test_a_missing_package_leaves_out_its_contender_alone(tmp_path: Path) -> None:
    here = dataclasses.replace(JOB, model=str(tmp_path))
    lost = obstacle(CONTENDERS["openvino"], here, {"diffusers": True}.get)
    assert lost == "needs openvino, which this Python does not have (pip install openvino)"
    assert obstacle(CONTENDERS["diffusers"], here, {"diffusers": True}.get) == ""
    assert "cuda alone" in obstacle(CONTENDERS["ldm-xformers"], here, lambda _: True)
    assert "2 at once" in obstacle(CONTENDERS["openvino"], dataclasses.replace(here, batch_size=2), lambda _: True)
    assert "single file" in obstacle(CONTENDERS["diffusers"], JOB, lambda _: True)
    assert obstacle(CONTENDERS["ldm-eager"], JOB, lambda _: True) == ""
    with pytest.raises(UsageError, match="'photoshop' is not known; choose from diffusers"):
        chosen("diffusers, photoshop")
    plain = job_for(REFERENCE, dataclasses.replace(JOB, settings={"kernels": "triton", "vae_tiling": True}), FACTS)
    assert plain.settings == {"attention": "sdpa", "kernels": "torch", "cuda_graph": False, "vae_tiling": True}


def test_settings_reach_the_program_that_starts_cold() -> None:
    settings = {"kernels": "torch", "cuda_graph": False, "compile": True, "vae_tiling": False, "cache": False}
    words = cold_words(dataclasses.replace(JOB, settings=settings), "p.png")
    assert {"--kernels=torch", "--no-cuda-graph", "--compile", "--no-cache", "--steps=3", "--seed=0"} < set(words)
    assert not {"--vae-tiling", "--no-cuda-graph"} & set(cold_words(JOB, "p.png"))
    assert words[-2:] == ["--", PROMPT]


@pytest.mark.parametrize(("factor", "dtype", "passed"), [(1.0005, "fp32", True), (1.01, "fp32", False),
                                                         (1.1, "bf16", True), (1.3, "bf16", False)])  # fmt: skip
def test_parity_is_that_of_the_worst_picture(tmp_path: Path, factor: float, dtype: str, passed: bool) -> None:
    latents, pixels = np.full((3, 4, 2, 2), 3.0, np.float32), np.full((3, 4, 4, 3), 100, np.uint8)
    other, changed = latents.copy(), pixels.copy()
    other[1] *= factor
    changed[2] += 7
    np.savez(tmp_path / "a.npz", latents=latents, pixels=pixels)
    np.savez(tmp_path / "b.npz", latents=other, pixels=changed)
    np.savez(tmp_path / "c.npz", latents=latents[:, :, :1])
    found = parity(tmp_path / "a.npz", tmp_path / "b.npz", dtype)
    assert found["passed"] is passed
    assert found["latents"] == pytest.approx(factor - 1, rel=1e-3)
    assert (found["max_level"], found["mean_level"]) == (7, 7.0)
    assert parity(tmp_path / "a.npz", tmp_path / "c.npz", dtype)["passed"] is False


# ---- runs ----


def run_with(*names: str, clocks: tuple[str, ...] = ("image", "step"), runs: int = 2, **given: Any) -> dict[str, Any]:
    """A run of the tiny model in float32 against fakes of these names, without the floor."""
    peers = tuple(CONTENDERS.get(name) or Contender(name, "fake_contender", dtype="fp32") for name in names)
    given = {"steps": 3, "threads": 1, "device": "cpu", "dtype": "fp32"} | given
    return measuring.measure(Plan(tiny_model(), peers, given, clocks, runs))


@pytest.fixture
def no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring._Run, "apart", lambda *_: None)


@pytest.mark.usefixtures("fake", "no_floor")
def test_a_contender_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """All run one after the other, where memory is short."""
    monkeypatch.setattr(measuring, "_available_memory", lambda: 1 << 20)
    found = run_with("dying", "forger", "babel", "good")
    records = found["contenders"]
    assert found["together"] is False
    assert records["babel"]["parity"]["reason"] == "other token ids"
    assert not report.passed(found)
    assert records["dying"]["failure"] == "ended with code 1: RuntimeError: no more paint"
    assert records["dying"]["samples"] == {}
    assert records["forger"]["parity"]["latents"] == pytest.approx(0.01, rel=1e-3)
    assert [name for name in records if report.flawed(records[name])] == ["dying", "forger", "babel"]
    assert records["good"]["samples"] == {"image": [1.0] * 2, "step": [0.25] * 4}
    own = records["ldm"]["samples"]
    assert (len(own["image"]), len(own["step"])) == (2, 4)
    assert records["ldm"]["parity"]["max_level"] == 0
    text = report.to_markdown(found)
    assert "| forger (FAILED) | ~~1 s~~ |" in text
    assert "failed: dying: ended with code 1: RuntimeError: no more paint" in text
    assert str(tiny_model()) not in json.dumps(found)


@pytest.mark.usefixtures("fake", "no_floor")
def test_cold_starts_beside_another() -> None:
    found = run_with("ldm-no-cache", "good", clocks=("cold",), runs=1, steps=1)
    assert list(found["contenders"]) == ["ldm", "ldm-no-cache", "good"]
    for record in found["contenders"].values():
        assert (len(record["samples"]["cold"]), len(record["phases"])) == (1, 1)
        assert sum(record["phases"][0].values()) == pytest.approx(record["samples"]["cold"][0])
    assert report.base(found) == "good"
    assert "× good" in report.to_markdown(found)


def test_beside_diffusers_and_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--clock image,step --runs 1 --steps 2 --batch-size 2 --device cpu --dtype fp32 --threads 1 --profile"
    file = tmp_path / "found.json"
    assert make_bench.main([*words.split(), "--against", "diffusers,ldm-xformers", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    records, text = found["contenders"], capsys.readouterr().out
    assert set(records) == {"ldm", "diffusers"}
    assert records["diffusers"]["parity"]["latents"] < 1e-4
    assert records["diffusers"]["parity"]["max_level"] <= 1
    assert records["diffusers"]["greeting"]["tokens"] == records["ldm"]["greeting"]["tokens"]
    assert found["floor"]["step"] > 0
    assert found["profile"]["kinds"]["convolution"]["seconds"] > 0
    assert (found["task"]["width"], found["task"]["batch_size"]) == (64, 2)
    assert "left out: ldm-xformers runs on cuda alone" in text
    assert text.index("image: warm") < text.index("step: one") < text.index("profile: ") < text.index("parity: ")


# ---- random weights ----


@pytest.fixture(scope="module", params=FAMILIES)
def random_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(request.param, tmp_path_factory.mktemp("weights") / request.param, small=True)


def test_diffusers_reads_and_draws_the_same(random_folder: Path, tmp_path: Path, one_thread: None) -> None:
    job = dataclasses.replace(JOB, model=str(random_folder), prompt="a pear", batch_size=2)
    assert_same(job, tmp_path, peer_diffusers.Diffusers(job))


def assert_same(job: Job, folder: Path, other: Any) -> None:
    """Another contender has the tokens that this program has, and draws the same."""
    own = ours.Ours(job)
    for name, contender in (("ours", own), ("theirs", other)):
        contender.compare(3, str(folder / f"{name}.npz"))
    found = parity(folder / "ours.npz", folder / "theirs.npz", "fp32")
    assert found["latents"] < 1e-4
    assert found["max_level"] <= 1
    assert other.greet()["tokens"] == own.greet()["tokens"]
    assert own.greet()["fitted"] == {"width": 64, "height": 64, "guidance_scale": 7.5}


# What is asked of OpenVINO, played by torch: a network is kept whole, and called as it is.
PLAYED = """
import torch
__version__ = "played"
networks = {}
def convert_model(module, example_input, input):
    assert [len(i.shape) for i in example_input] == [len(shape) for shape in input]
    return module
def save_model(module, path, compress_to_fp16):
    networks[path] = module
class Core:
    def compile_model(self, path, device, options):
        assert options["INFERENCE_PRECISION_HINT"] == "f32"
        return lambda inputs: [networks[path](*map(torch.as_tensor, inputs)).detach().numpy()]
"""


def test_openvino_draws_the_same(
    random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    module = types.ModuleType("openvino")
    exec(PLAYED, vars(module))
    monkeypatch.setitem(sys.modules, "openvino", module)
    job = dataclasses.replace(JOB, model=str(random_folder), prepared=str(tmp_path))
    if random_folder.name == "sdxl":
        with pytest.raises(SystemExit, match="two text encoders"):
            peer_openvino.prepare(job)
        return
    peer_openvino.prepare(job)
    other = peer_openvino.OpenVINO(job)
    assert_same(job, tmp_path, other)
    assert len(other.draw(3, prompt="whatever")["steps"]) == 2
    assert {"text", "denoise", "vae"} <= set(other.watch.report()["phases"])


def test_weights_keep_signals_of_size_one(random_folder: Path) -> None:
    weights = load_file(random_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    for name, weight in weights.items():
        if weight.numel() > 500 and weight.ndim > 1:
            gain = 1 / 0.596 if name == "conv_out.weight" else 1
            assert float(weight.float().std()) == pytest.approx(gain * weight[0].numel() ** -0.5, rel=0.15), name
    with pytest.raises(UsageError, match="'sd3'; choose sd15, sd21, sdxl"):
        write_random_model("sd3", random_folder.parent / "model")


# ---- the campaign ----


def record(step: float = 1.0, **more: Any) -> dict[str, Any]:
    """A contender's part of the results."""
    samples = {clock: [more.pop(clock, step)] for clock in ("image", "step", "cold")}
    plain = {"failure": None, "parity": {"passed": True, "latents": 1e-3}, "samples": samples, "peaks": {}}
    return plain | more


@pytest.mark.parametrize(
    ("target", "ours", "other", "seen", "word"),
    [
        (Target("t", "p", "rate", 200), record(1 / 250), None, 250, "PASS"),
        (Target("t", "p", "rate", 200), record(1 / 160), None, 160, "MISS"),
        (Target("t", "p", "floor", 0.5), record(0.4), None, 0.625, "PASS"),
        (Target("t", "p", "ratio", 0.5, "image", "peer"), record(image=1.0), record(image=2.0), 0.5, "PASS"),
        (Target("t", "p", "ratio", 0.5, "image", "peer"), record(image=3.0), record(image=2.0), 1.5, "MISS"),
        (Target("t", "p", "peak", 1, "g", "peer"), record(peaks={"g": [4, 3]}), record(peaks={"g": [8]}), 0.5, "PASS"),
        (Target("t", "p", "error", 1, against="peer"), record(), record(parity={"latents": 5e-4}), 2, "MISS"),
        (Target("t", "p", "ratio", 1, against="peer"), record(), None, None, "not run: peer took no part"),
        (Target("t", "p", "ratio", 1, against="peer"), record(), record(failure="ink"), None, "not run: peer failed"),
        (Target("t", "p", "ratio", 1, against="peer"), record(parity={"passed": False}), record(), None,
         "not run: ldm failed"),
        (Target("t", "p", "ratio", 1, against="peer"), record(), record(samples={}), None, "not run: not measured"),
    ],
)  # fmt: skip
def test_a_target_is_met_or_missed(target: Target, ours: Any, other: Any, seen: float | None, word: str) -> None:
    found = {"contenders": {"ldm": ours, **({"peer": other} if other else {})}, "floor": {"step": 0.25}}
    number, told = judged(target, found)
    assert told == word
    assert number == (seen if seen is None else pytest.approx(seen))
    assert "| t | " in to_markdown({"p": found}, [target])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_target_is_of_something_that_is_measured() -> None:
    for target in TARGETS:
        words = gpu.PARTS[target.part].words
        assert target.measure in ("rate", "floor") or target.against in words
        assert target.measure in ("peak", "error") or target.clock in words
    assert to_markdown({}).count("not run") == len(TARGETS)


@pytest.mark.parametrize("name", gpu.PARTS)
def test_what_a_part_runs_is_understood(name: str, tmp_path: Path) -> None:
    *before, (python_, *flags, module, _) = [[*c[:4], c[4:]] for c in gpu.commands(name, tmp_path, tmp_path, "cuda")]
    assert (python_, flags) == (sys.executable, ["-P", "-m"])
    assert module == gpu.PARTS[name].module
    assert bool(before) == bool(gpu.PARTS[name].family)
    if module == "bench":
        o = make_bench.parser().parse_args(gpu.commands(name, tmp_path, tmp_path, "cuda")[-1][4:])
        assert chosen(o.against)
        assert o.batch_size is None or "cold" not in o.clock


def test_a_part_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"contenders": {"ldm": record(0.004), "diffusers": record(0.02)}, "floor": None}
    code = {
        "sd15": f"import json; json.dump({found!r}, open({str(tmp_path / 'sd15.json')!r}, 'w')); print('a table')",
        "cold": "import sys; sys.exit(3)",
        "compile": "overdue",
    }
    run = subprocess.run

    def ended(command: list[str], **settings: Any) -> Any:
        if "overdue" in command:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        return run(command, **settings)

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(gpu, "commands", lambda name, *_: [[sys.executable, "-c", code[name]]])
    assert gpu.main(["--out", str(tmp_path), "--parts", "compile sd15 cold", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert text == (tmp_path / "summary.md").read_text()
    assert "| sd15 | ok |" in text
    assert "| cold | failed (3) |" in text
    assert "| compile | took too long |" in text
    assert "guided steps a second | ≥ 150 it/s | 250 | PASS |" in text
    assert "a step | ≤ 0.45 × diffusers | 0.2 | PASS |" in text
    assert (tmp_path / "sd15.md").read_text() == "a table\n"


def test_several_batch_sizes_in_one_run(
    embedded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ldm and diffusers, which draw the same."""
    words = f"--model {embedded_folder} --size 64 --steps 3 --batches 1,2 --rounds 1 --device cpu --dtype fp32"
    assert several.main([str(tmp_path / "found.json"), *words.split()]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["diffusers, error"]["passed"]
    assert {name: len(found[name]["image"]) for name in found if "error" not in name} == {
        "ldm, 1": 1, "diffusers, 1": 1, "ldm, 2": 1, "diffusers, 2": 1,
    }  # fmt: skip
    assert "ldm × 2: a step" in capsys.readouterr().out


def test_the_cards_check_runs_as_a_toy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_check, "SECONDS", 0.01)
    assert card_check.main([str(tmp_path), "--cpu", "--parts", "env,kernels,steps,techniques,profile,gn"]) == 0
    found = json.loads((tmp_path / "card.json").read_text())
    assert {"nchw eager", "fused graph", "fused graph math", "without gate", "profile", "gn 2560 8"} < set(found)
    assert all(values["error"] < 1e-4 for values in found.values() if "its" in values)
    assert "aten::" in (tmp_path / "kernels.txt").read_text()
    assert "it/s  error" in capsys.readouterr().out


def test_a_line_that_fails_is_noted_and_a_late_one_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_check.Card, "error", lambda *_: 1 / 0)
    notes = card_check.Notes(tmp_path, 1000)
    card_check.Card(notes, torch.device("cpu")).variant("a step")
    late = card_check.Card(card_check.Notes(tmp_path, 0), torch.device("cpu"))
    late.variant("another")
    assert json.loads((tmp_path / "card.json").read_text()) == notes.found
    assert "ZeroDivisionError" in notes.found["a step"]["failed"]
    assert late.notes.found == {}


def test_throughput_of_a_small_model(tmp_path: Path) -> None:
    words = f"--model {tiny_model()} --device cpu --steps 2 --batch-sizes 2 --pictures 4 --runs 1 --json {tmp_path}/f"
    command = [*python("bench.throughput"), *shlex.split(words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path, 1), check=False)
    assert done.returncode == 0, done.stderr
    assert "| 2 | " in done.stdout
    assert len(json.loads((tmp_path / "f").read_text())["2"][0]) == 2


# ---- the profile ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x64_64x4_tn_align8>", "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half, float, float>", "norm"),
        ("part_moments", "norm"),
        ("triton_poi_fused_add_convolution_silu_3", "elementwise"),
        ("add_rows", "elementwise"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>", "copy, layout"),
        ("some_kernel_nobody_knows", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert step_profile.kind_of(name) == kind


def test_a_profile_adds_up() -> None:
    rows = [("aten::mm", 0.5, 10), ("aten::conv2d", 2.0, 4), ("aten::addmm", 0.25, 2)]
    found = step_profile.summed(rows, steps=2, seconds=4.0)
    assert found["step"] == 2.0
    assert found["kinds"]["matrix product"] == {"seconds": 0.375, "calls": 6.0}
    assert found["idle"] == 2.0 - 1.375
    assert found["longest"][0] == ["aten::conv2d", 1.0, 2.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graph", [True, False])
def test_a_step_on_the_gpu_is_told_apart(embedded_folder: Path, tmp_path: Path, graph: bool) -> None:
    """In a process of its own: kernels inside a graph must show."""
    job = dataclasses.replace(JOB, model=str(embedded_folder), device="cuda:0", dtype="fp16",
                              settings={"cuda_graph": graph})  # fmt: skip
    env = environment(tmp_path, None) | step_profile.ENVIRONMENT
    worker = Worker(python(OURS.module, "serve", job.to_json()), env)
    found = worker.ask("profile")
    worker.kill()
    assert found["kinds"]["convolution"]["calls"] >= 10
    assert found["kinds"]["attention"]["calls"] >= 2
    assert 0 < found["idle"] < found["step"]
