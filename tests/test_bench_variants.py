"""What `ldm bench` has for GPUs: variants of ldm itself, batches, the profile of a step; here on the CPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import assert_refused, ldm, tiny_model
from ldmcli.speed.tuning import Tuning

from ldmcli.bench import contenders, groundwork, parity, peer_diffusers, step_profile
from ldmcli.bench import run as bench_run
from ldmcli.bench.contenders import OURS, REFERENCE, VARIANTS, check_peers, chosen_peers, job_for
from ldmcli.bench.measure import Record
from ldmcli.bench.plan import Plan, Results, environment, make_task
from ldmcli.bench.report import to_dict, to_markdown, to_text
from ldmcli.bench.step_profile import KINDS, kind_of, summed
from ldmcli.bench.task import Job, Task
from ldmcli.errors import LdmError, UsageError
from ldmcli.speed.policy import PLAIN

TASK = Task("models/some", width=16, height=16, steps=3, threads=1)
CPU = {"device": "cpu", "dtype": "fp32", "bf16_native": False}
CUDA = {"device": "cuda:0", "dtype": "fp16", "bf16_native": False}


# ---- ldm with one setting changed ----


def test_each_variant_is_ldm_with_its_setting() -> None:
    def settings(name: str) -> tuple[str, Tuning]:
        task = job_for(VARIANTS[name], TASK, CUDA).task
        return task.attention, task.tuning

    assert settings("ldm-eager") == ("auto", Tuning(graph=False))
    assert settings("ldm-torch-kernels") == ("auto", Tuning(kernels="torch"))
    assert settings("ldm-plain") == ("auto", PLAIN)
    assert settings("ldm-sdpa") == ("sdpa", Tuning())
    assert settings("ldm-xformers") == ("xformers", Tuning())
    assert settings("ldm-compile") == ("auto", Tuning(compiled=True))
    assert settings("ldm-low-vram") == ("auto", Tuning(low_vram=True))
    assert all(variant.is_ours and job_for(variant, TASK, CUDA).dtype == "fp16" for variant in VARIANTS.values())
    assert not contenders.PEERS["diffusers"].is_ours


def test_the_reference_has_nothing_that_makes_it_fast() -> None:
    fast = dataclasses.replace(TASK, dtype="fp16", attention="xformers", kernels="triton", compiled=True, low_vram=True)
    task = dataclasses.replace(fast, **dict(REFERENCE.settings))
    assert (task.dtype, task.attention, task.tuning) == ("fp32", "sdpa", PLAIN)
    assert dict(REFERENCE.environment) == {"NVIDIA_TF32_OVERRIDE": "0"}


def test_what_cannot_run_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="ldm-xformers runs on a GPU, the others on cpu; use --device cuda"):
        job_for(VARIANTS["ldm-xformers"], TASK, CPU)
    monkeypatch.setattr(contenders, "_installed", lambda package: package != "xformers")
    with pytest.raises(UsageError, match="pip install xformers"):
        chosen_peers("ldm-xformers")


def test_ratios_are_to_a_peer_before_a_variant() -> None:
    def base_of(*names: str) -> str | None:
        base = Results("some", TASK, {name: Record(name) for name in names}).base
        return base.name if base else None

    assert base_of("ldm", "ldm --no-cache", "ldm-eager", "diffusers") == "diffusers"
    assert base_of("ldm", "ldm --no-cache", "ldm-plain", "ldm-eager") == "ldm-plain"
    assert base_of("ldm", "ldm --no-cache") is None


def test_a_single_file_may_meet_variants(tmp_path: Path) -> None:
    check_peers([VARIANTS["ldm-eager"]], tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="openvino draws one picture at a time, and 2 at once"):
        check_peers([contenders.PEERS["openvino"]], tmp_path, 2)


def test_options_reach_the_program_that_starts_cold() -> None:
    task = dataclasses.replace(TASK, kernels="torch", graph=False, compiled=True, low_vram=True, attention="math")
    words = bench_run._command(task, 4, "p.png")
    given = {"--kernels=torch", "--no-cuda-graph", "--compile", "--low-vram", "--attention=math", "--steps=4"}
    assert given <= set(words)
    flags = {"--no-cuda-graph", "--compile", "--low-vram", "--vae-tiling"}
    assert not flags & set(bench_run._command(TASK, 4, "p.png"))


def test_compiled_code_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    own, kept = environment(1, tmp_path / "own"), environment(1, tmp_path / "own", tmp_path / "kept")
    assert all(Path(own[name]).parent == tmp_path / "own" for name in names)
    assert all(Path(kept[name]).parent == tmp_path / "kept" for name in names)
    assert kept["XDG_CACHE_HOME"] == own["XDG_CACHE_HOME"]


def test_a_first_start_finds_nothing_on_disk(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    bench = bench_run._Bench.__new__(bench_run._Bench)
    bench._folder = tmp_path
    bench._cold = lambda *_, extra: seen.append(extra)  # type: ignore[method-assign]
    for _ in range(2):
        bench._cold_anew(Job(TASK, "ldm"), 1)
    folders = [{str(Path(folder).parent) for folder in extra.values()} for extra in seen]
    assert {"XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"} == set(seen[0])
    assert len(folders[0]) == len(folders[1]) == 1
    assert folders[0] != folders[1]


@pytest.mark.parametrize(("device", "unet", "decoder"), [("cpu", {}, None), ("cuda:0", "max-autotune", "max-autotune")])
def test_how_diffusers_is_compiled(monkeypatch: pytest.MonkeyPatch, device: str, unet: Any, decoder: Any) -> None:
    compiled: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda part, **how: compiled.setdefault(part, how))

    class Pipe:
        unet = "unet"

        class vae:
            decoder = "decoder"

    peer_diffusers._compile(Pipe, device)
    assert compiled["unet"].get("mode", {}) == unet
    assert compiled.get("decoder", {}).get("mode") == decoder


# ---- batches ----


def test_parity_is_that_of_the_worst_picture(tmp_path: Path) -> None:
    latents, pixels = np.full((3, 4, 2, 2), 3.0, np.float32), np.full((3, 4, 4, 3), 100, np.uint8)
    other, changed = latents.copy(), pixels.copy()
    other[1] *= 1.5
    changed[2] += 7
    parity.keep(str(tmp_path / "a.npz"), latents, pixels)
    parity.keep(str(tmp_path / "b.npz"), other, changed)
    found = parity.compare(tmp_path / "a.npz", tmp_path / "b.npz", "fp16")
    assert found["latents"] == pytest.approx(0.5)
    assert found["passed"] is False
    assert (found["max_level"], found["mean_level"]) == (7, 7.0)


def test_seeds_of_a_batch_are_in_range() -> None:
    settings = {"seed": 2**64 - 2, "batch_size": 2}
    assert make_task(Plan(tiny_model(), None, settings), tiny_model()).batch_size == 2
    with pytest.raises(UsageError, match="seed"):
        make_task(Plan(tiny_model(), None, settings | {"batch_size": 3}), tiny_model())


def test_the_floor_of_a_batch(monkeypatch: pytest.MonkeyPatch, embedded_folder: Path) -> None:
    from ldmcli.bench import floor

    monkeypatch.setattr(floor, "measure_rate", lambda *_: floor.Rate(1e9, "linear", {}))
    task = Task(str(embedded_folder), width=64, height=64, steps=3, threads=1)
    one = groundwork._floor(Job(task, "ldm"))
    three = groundwork._floor(Job(dataclasses.replace(task, batch_size=3), "ldm"))
    assert three["step"] == pytest.approx(3 * one["step"])
    prompts = 2 * (one["flops"]["text"] + one["flops"]["context"]) / 1e9  # the same for all pictures
    assert three["image"] - prompts == pytest.approx(3 * (one["image"] - prompts))
    assert sum(one["kinds"].values()) == pytest.approx(one["step"])
    assert set(one["kinds"]) == {"convolution", "matrix product", "attention"} < set(KINDS)


def batch_results(pictures: int) -> Results:
    record = Record("ldm", {"versions": {}, "dtype": "fp16", "weights": 4}, {"passed": True})
    record.add("image", 2.0)
    record.add("step", 0.5)
    record.note_peak("gpu_allocated", 3_000_000_000)
    record.note_peak("gpu_reserved", 5_000_000_000)
    return Results(
        "some", dataclasses.replace(TASK, batch_size=pictures), {"ldm": record}, None, {"cpu": "C", "cpus": 2}
    )


def test_tables_of_batches() -> None:
    image, step = to_markdown(batch_results(8)).split("step: one")
    assert "| ldm | 2 s | 2 s–2 s | 4 | 3.00 GB | 5.00 GB |" in image
    assert "guided U-Net step, 8 pictures at once" in step
    assert "| ldm | 0.500 s | 0.500 s–0.500 s | 2 | 16 |" in step
    assert "picture it/s" not in to_text(batch_results(1))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-b", "2"], 2, ["--clock image,step"]),
        (["--against", "ldm-fast"], 2, ["ldm-fast", "ldm-eager"]),
        (["--against", "ldm-xformers", "--device", "cpu", "--clock", "step"], 2, ["ldm-xformers", "cuda"]),
        (["--json-file", "nowhere/at/all.json"], 73, ["nowhere/at"]),
        (["--kernels", "triton", "--device", "cpu", "--clock", "step"], 2, ["triton", "CUDA"]),
    ],
)
def test_usage_errors(arguments: list[str], code: int, words: list[str]) -> None:
    assert_refused(ldm("bench", *arguments), code, *words)


def test_help_names_every_contender() -> None:
    from ldmcli.cli.bench import bench as command

    (against,) = (parameter for parameter in command.params if parameter.name == "against")
    assert all(name in against.help for name in VARIANTS)


# ---- the profile ----


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("_5x_cudnn::Kernel<cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128_32x4_nhwc>", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x64_64x4_tn_align8>", "matrix product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __half, __half>", "matrix product"),
        ("aten::addmm", "matrix product"),
        ("aten::bmm", "matrix product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128>>", "attention"),
        ("fmha_cutlassF_f16_aligned_64x128_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half, float, float>", "norm"),
        ("void at::native::elementwise_kernel<GroupNormKernelImplInternal<c10::Half>::{lambda}>", "norm"),
        ("norm_group", "norm"),
        ("channel_moments", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("gate", "elementwise"),
        ("add_rows", "elementwise"),
        ("triton_poi_fused_add_convolution_silu_3", "elementwise"),
        ("triton_red_fused_native_group_norm_0", "norm"),
        ("void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true>", "copy, layout"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy, layout"),
        ("Memcpy DtoD (Device -> Device)", "copy, layout"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>>", "copy, layout"),
        ("void at::native::upsample_nearest2d_nhwc_out_frame<c10::Half>", "copy, layout"),
        ("some_kernel_nobody_knows", "other"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profile_adds_up() -> None:
    rows = [("aten::mm", 0.5, 10), ("aten::conv2d", 2.0, 4), ("aten::addmm", 0.25, 2)]
    found = summed(rows, steps=2, seconds=4.0)
    assert found["step"] == 2.0
    assert found["kinds"]["matrix product"] == {"seconds": 0.375, "calls": 6.0}
    assert found["kinds"]["convolution"] == {"seconds": 1.0, "calls": 2.0}
    assert found["idle"] == 2.0 - 1.375
    assert found["longest"][0] == ["aten::conv2d", "convolution", 1.0, 2.0]
    results = dataclasses.replace(
        batch_results(1),
        profile=found,
        floor={"step": 0.5, "image": 1.0, "dtype": "fp16", "flops_per_second": 1e9, "product": "p",
               "kinds": {"convolution": 0.25}},
    )  # fmt: skip
    text = to_markdown(results)
    assert "| convolution | 1000.000 | 50.0% | 2 | 250.000 | 4.00 |" in text
    assert "| none of these | 625.000 | 31.2% |  |  |  |" in text
    assert "| the step | 2000.000 | 100.0% |" in text
    assert to_dict(results)["profile"] == found
    assert "floor ms" not in to_markdown(dataclasses.replace(results, floor=None))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graph", [True, False])
def test_a_step_on_the_gpu_is_told_apart(embedded_folder: Path, graph: bool) -> None:
    """In a process of its own, as `ldm bench` does it: kernels inside a graph must show."""
    task = Task(str(embedded_folder), width=64, height=64, device="cuda", graph=graph)
    code = (
        "import sys; from ldmcli.bench.groundwork import main; sys.argv = ['x', 'profile', sys.argv[1]]; main()"
    )  # fmt: skip
    job = Job(task, "ldm", "cuda:0", "fp16").to_json()
    done = subprocess.run([sys.executable, "-c", code, job], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kinds"]["convolution"]["calls"] >= 10
    assert found["kinds"]["matrix product"]["calls"] >= 10
    assert found["kinds"]["attention"]["calls"] >= 2
    assert 0 < found["idle"] < found["step"]


def test_no_kernels_are_no_profile(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(step_profile, "_rows", lambda *_, **__: iter(()))
    with pytest.raises(LdmError, match="saw no kernel"):
        step_profile.profile(Job(dataclasses.replace(TASK, model=str(tiny_model()), device="cpu"), "ldm"))


def test_ours_keeps_its_name() -> None:
    assert OURS.is_ours
    assert contenders.is_ours("ldm --no-cache")
    assert contenders.is_ours("ldm-compile")
    assert not contenders.is_ours("diffusers")
