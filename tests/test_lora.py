"""`--lora`: adapters merged into a model, from the command line to the record in the picture."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_support import write
from cli_support import assert_refused, ldm_here, pixels, tiny_model
from safetensors import safe_open

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.spec import LoRA

DRAWN = (
    "txt2img",
    "a red apple",
    "-s",
    "1",
    "--steps",
    "3",
    "-g",
    "5",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--no-cache",
)


def lora_for(folder: Path, path: Path, *, seed: int = 0, size: float = 0.3) -> Path:
    """A LoRA of rank 2 in sd-scripts' names, of every projection of queries in a model folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        (weights,) = (folder / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        for key, (rows, columns) in ((k, s) for k, s in shapes.items() if k.endswith(("to_q.weight", "q_proj.weight"))):
            name = prefix + key.removesuffix(".weight").replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = size * torch.randn(2, columns, generator=generator)
            tensors[f"{name}.lora_up.weight"] = size * torch.randn(rows, 2, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return write(path, tensors, {"ss_tag_frequency": json.dumps({"10_x": {"glow toy": 3}})})


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_for(tiny_model(), tmp_path_factory.mktemp("lora") / "style.safetensors")


def drawn(path: Path, *loras: str) -> np.ndarray:
    """The picture of these `--lora` options."""
    options = [word for one in loras for word in ("--lora", one)]
    result = ldm_here(*DRAWN, "-m", tiny_model(), *options, "-o", path)
    assert result.code == 0, result.err
    return pixels(path)


def test_weights_of_zero_are_the_model_and_others_are_not(tmp_path: Path, lora: Path) -> None:
    base = drawn(tmp_path / "base.png")
    assert np.array_equal(drawn(tmp_path / "zero.png", f"{lora}:0"), base)
    whole, unet, text = (
        drawn(tmp_path / f"{i}.png", f"{lora}{weights}") for i, weights in enumerate(("", ":1:0", ":0:1"))
    )
    pictures = [base, whole, unet, text]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert np.array_equal(drawn(tmp_path / "twice.png", f"{lora}:0.5", f"{lora}:0.5"), whole) or (
        np.abs(drawn(tmp_path / "t.png", f"{lora}:0.5", f"{lora}:0.5").astype(int) - whole).max() <= 1
    )


def test_the_picture_is_diffusers(tmp_path: Path, lora: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_model(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(1)
    (theirs,) = pipeline(
        "a red apple", num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="np"
    ).images
    ours = drawn(tmp_path / "ours.png", str(lora))
    assert np.abs(ours.astype(int) - (255 * theirs).round().astype(int)).max() <= 1


def test_a_picture_records_its_loras_and_is_drawn_again_from_that(tmp_path: Path, lora: Path) -> None:
    first = drawn(tmp_path / "first.png", f"{lora}:0.7:0.2")
    (recorded,) = read_record(tmp_path / "first.png")["model"]["loras"]
    header = int.from_bytes(lora.read_bytes()[:8], "little")
    sha256 = hashlib.sha256(lora.read_bytes()[8 + header :]).hexdigest()
    assert recorded == {
        "name": "style", "path": str(lora), "sha256": sha256, "weight": 0.7, "text_weight": 0.2,
    }  # fmt: skip
    assert f'Lora hashes: "style: {sha256[:12]}"' in (read_parameters(tmp_path / "first.png") or "")
    again = ldm_here("txt2img", "--from-image", tmp_path / "first.png", "-o", tmp_path / "again.png")
    assert again.code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), first)
    lora_for(tiny_model(), tmp_path / "style.safetensors", seed=1)
    other = ldm_here(
        "txt2img", "--from-image", tmp_path / "first.png", "--lora", tmp_path / "style.safetensors",
        "-o", tmp_path / "other.png",
    )  # fmt: skip
    assert "the LoRA style is not the one the picture was made with" in other.err


def test_a_batch_draws_with_loras_and_knows_its_own(tmp_path: Path, lora: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red apple", "seed": 1}\n')
    common = ("batch", tmp_path / "p.jsonl", "-m", tiny_model(), *DRAWN[2:], "-o", tmp_path / "out")
    result = ldm_here(*common, "--lora", f"{lora}:0.5")
    assert result.code == 0, result.err
    assert np.array_equal(pixels(result.paths[0]), drawn(tmp_path / "one.png", f"{lora}:0.5"))
    assert_refused(ldm_here(*common), 65, "another run", "loras")


def test_another_familys_lora_is_an_error_that_names_it(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_7_attn2_to_k"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.ones(640, 2)}
    path = write(tmp_path / "xl.safetensors", factors)
    result = ldm_here(*DRAWN, "-m", tiny_model(), "--lora", path, "-o", tmp_path / "x.png")
    assert_refused(result, 65, "xl.safetensors", "Stable Diffusion XL")
    assert not (tmp_path / "x.png").exists()
    assert_refused(ldm_here(*DRAWN, "-m", tiny_model(), "--lora", "none.safetensors"), 66, "none.safetensors")
    assert_refused(ldm_here(*DRAWN, "--lora", f"{path}:nan"), 2, "FILE:WEIGHT")


def test_a_lora_is_described(lora: Path) -> None:
    facts = json.loads(ldm_here("info", "--json", lora).out)
    assert facts["rank"] == 2
    assert facts["trigger_words"] == ["glow toy"]
    assert_refused(ldm_here("txt2img", "x", "-m", lora), 65, "LoRA", "--lora")


def test_a_session_takes_loras(lora: Path) -> None:
    spec = ModelSpec(str(tiny_model()), loras=(LoRA(str(lora), 0.5, 0.5),))
    request = GenerationRequest("a red apple", seed=1, steps=3)
    runtime = RuntimeSpec(device="cpu", dtype="fp32", cache=False)
    with Session(spec, runtime) as session, Session(ModelSpec(str(tiny_model())), runtime) as plain:
        (with_lora,), (without,) = list(session.draw([request])), list(plain.draw([request]))
        assert not np.array_equal(with_lora.pixels(), without.pixels())
