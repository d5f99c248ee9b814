"""What `ldmcli.bench.attention_shapes` measures: the shapes that networks call, and how it is told."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import load
from torch import Tensor

from ldmcli.bench import attention_shapes
from ldmcli.bench.attention_rows import Problem
from ldmcli.bench.attention_shapes import KEYS, SAMPLES, WORKS, main, planned, unet_calls, vae_calls
from ldmcli.bench.random_weights import FAMILIES, family_config
from ldmcli.checkpoints.load import on_meta
from ldmcli.config import ModelConfig
from ldmcli.networks.attention import ATTENTIONS, math_attention, sdpa_attention, set_attention
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.spec import GenerationRequest

CPU = torch.device("cpu")


def refusing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("not today\nor ever")


# The shapes


def by_hand(config: ModelConfig, size: int, keys: int) -> Counter[tuple[int, int, int, int]]:
    """Calls of a U-Net's step by its configuration alone."""
    unet, side = config.unet, size // 8
    found: Counter[tuple[int, int, int, int]] = Counter()
    last = len(unet.heads) - 1
    places = [(i, layers, 2 * unet.layers_per_block + 1) for i, layers in enumerate(unet.attention)]
    for level, layers, times in [*places, (last, unet.middle_attention, 1)]:
        heads, pixels = unet.heads[level], (side >> level) ** 2
        for context in (pixels, keys):
            found[heads, pixels, context, unet.block_channels[level] // heads] += layers * times
    return +found


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_configurations(family: str) -> None:
    config = family_config(family)
    unet = on_meta(lambda: UNet(config.unet))
    assert unet_calls(unet, 32, 154) == by_hand(config, 256, 154)


def test_shapes_that_are_known() -> None:
    config = family_config("sd15")
    called = unet_calls(on_meta(lambda: UNet(config.unet)), 64, 77)
    assert [called[8, n, 77, d] for n, d in ((4096, 40), (1024, 80), (256, 160), (64, 160))] == [5, 5, 5, 1]
    assert [called[8, n, n, d] for n, d in ((4096, 40), (1024, 80), (256, 160), (64, 160))] == [5, 5, 5, 1]
    vae = on_meta(lambda: AutoencoderKL(config.vae))
    assert vae_calls(vae, 64) == {(1, 4096, 4096, 512): 1}


def test_a_run_calls_the_shapes_that_are_measured(embedded_folder: Path) -> None:
    """Guidance doubles the samples, pictures are decoded one by one, and a prompt is a text encoder's length."""
    pipeline = load(embedded_folder)
    called: dict[str, set[tuple[int, ...]]] = {"unet": set(), "vae": set()}

    def noting(part: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        called[part].add((len(query), query.shape[1], query.shape[2], key.shape[2], query.shape[3]))
        return sdpa_attention(query, key, value)

    set_attention(pipeline.model.unet, lambda *inputs: noting("unet", *inputs))
    set_attention(pipeline.vae, lambda *inputs: noting("vae", *inputs))
    config, pictures = pipeline.config, 2
    size = config.unet.sample_size * config.vae.factor
    settings = {"steps": 1, "guidance_scale": 5.0, "sampler": "ddim"}
    pipeline.draw([GenerationRequest("a red apple", seed=i, **settings) for i in range(pictures)])
    unet = unet_calls(on_meta(lambda: UNet(config.unet)), size // config.vae.factor, config.text_encoders[0].max_length)
    assert called["unet"] == {(2 * pictures, *shape) for shape in unet}
    vae = vae_calls(on_meta(lambda: AutoencoderKL(config.vae)), size // config.vae.factor)
    assert called["vae"] == {(1, *shape) for shape in vae}
    assert SAMPLES == (2 * 1, 2 * 16)
    assert {family_config(family).text_encoders[0].max_length for family in FAMILIES} == {KEYS[0]}


def test_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """All families, and XL's VAE in float32, since it overflows in fp16; in bf16 it does not."""
    assert {*WORKS} == {*FAMILIES}
    monkeypatch.setattr(attention_shapes, "WORKS", {"sd15": (64,), "sdxl": (64,)})
    monkeypatch.setattr(attention_shapes, "unet_calls", lambda unet, latents, keys: Counter({(8, 64, keys, 40): 5}))
    plan = planned(torch.float16)
    assert {problem.dtype for problem in plan["sdxl 64×64, VAE"]} == {"float32"}
    assert {problem.dtype for problem in plan["sd15 64×64, VAE"]} == {"float16"}
    assert plan["sd15 64×64, 154 keys, a step of 32"] == {Problem(32, 8, 64, 154, 40, "float16"): 5}
    assert len(plan) == 2 * (2 * 2 + 1)
    assert {problem.dtype for problem in planned(torch.bfloat16)["sdxl 64×64, VAE"]} == {"bfloat16"}


# The program


def test_the_program_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention_shapes, "ROUNDS", 2)
    monkeypatch.setattr(attention_shapes, "BATCH_SECONDS", 1e-9)
    monkeypatch.setitem(ATTENTIONS, "chunked", refusing)
    main(["--device", "cpu", "--quick", "--json", str(tmp_path / "shapes.json")])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "shapes.json").read_text())
    problems = [Problem(**row["problem"]) for row in report["rows"]]
    assert problems == list(dict.fromkeys(p for work in planned(torch.float32, quick=True).values() for p in work))
    for row in report["rows"]:
        assert row["seconds"].keys() == row["errors"].keys() == {"sdpa", "math"}
        assert max(row["errors"].values()) < 1e-5
        assert min(row["seconds"].values()) > 0
        assert row["refused"] == {"chunked": "not today"}
        assert row["picked"] in ("flash", "math")
    assert len(report["works"]) == 2
    assert said.count("chunked refused (not today)") == len(problems)


def test_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_shapes, "ROUNDS", 1)
    monkeypatch.setitem(ATTENTIONS, "chunked", lambda q, k, v: 1.01 * math_attention(q, k, v))
    found = attention_shapes.measure(Problem(2, 2, 9, 7, 8, "float32"), CPU)
    assert found.errors["chunked"] == pytest.approx(0.01, rel=1e-3)
    found.seconds["chunked"] = 0.0
    assert found.best != "chunked"


def test_a_kernel_that_cannot_be_recorded_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention_shapes._timer

    def timer(run: partial[Tensor], device: torch.device) -> Callable[[], float]:
        if run.args[0] is ATTENTIONS["chunked"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return whole(run, device)

    monkeypatch.setattr(attention_shapes, "_timer", timer)
    found = attention_shapes.measure(Problem(2, 2, 9, 7, 8, "float32"), CPU)
    assert found.seconds.keys() == found.errors.keys() == {"sdpa", "math"}
    assert found.refused == {"chunked": "operation not permitted when stream is capturing"}


def test_time_that_is_out_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention_shapes, "SECONDS", -1.0)
    main(["--device", "cpu", "--quick", "--json", str(tmp_path / "shapes.json")])
    report = json.loads((tmp_path / "shapes.json").read_text())
    assert (report["rows"], report["works"]) == ([], {})
    assert "out of time: 9 shapes are left out" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--device", "cpu", "--table", "t.py"], ["--device", "cuda"]])
def test_what_the_program_does_not_do(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(options)
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_program_on_a_gpu(tmp_path: Path) -> None:
    """Every kernel that takes a shape is exact there, in a graph, and the table that comes of it can be read."""
    paths = [str(tmp_path / name) for name in ("shapes.json", "table.py")]
    main(["--quick", "--json", paths[0], "--table", paths[1]])
    report = json.loads(Path(paths[0]).read_text())
    for row in report["rows"]:
        assert max(row["errors"].values()) < 2e-3, row
        assert "sdpa" in row["seconds"], row
        wide = row["problem"]["head_dim"] > 128  # which cuDNN may refuse, depending on how torch was built
        assert not {"flash", "efficient", "" if wide else "cudnn"} & {*row["refused"]}, row
    exec(compile(Path(paths[1]).read_text(), "table", "exec"), {})
