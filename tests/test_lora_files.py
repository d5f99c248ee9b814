"""Files of LoRAs by real processes: hostile ones, those of the hub, and what `ldm info` says of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import write
from cli_support import EMBEDDED, assert_refused, ldm_here, tiny_model
from fork_server import LEAN, quick
from hub_server import Hub
from test_lora import lora_for

pytestmark = pytest.mark.timeout(300)
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DRAW = ("txt2img", "x", "-m", tiny_model(), "-s", "1", "--steps", "1", "--device", "cpu", "-o", "out")


def factors(rank: int = 2, out: int = 8, into: int = 8) -> dict[str, torch.Tensor]:
    return {f"{TO_Q}.lora_up.weight": torch.ones(out, rank), f"{TO_Q}.lora_down.weight": torch.ones(rank, into)}


def many(count: int) -> dict[str, torch.Tensor]:
    """A LoRA of as many modules that no model has."""
    one = torch.ones(1, 1)
    return {f"lora_unet_x{i}.lora_{side}.weight": one for i in range(count // 2) for side in ("up", "down")}


# Before torch is there, from the header alone.
LEAN_ONES: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], str]] = {
    "100,000 keys": (lambda: many(100_000), "far beyond any model"),
    "rank 0": (lambda: factors(rank=0), "no numbers"),
    "no partner": (lambda: dict(list(factors().items())[:1]), "make up no adapter"),
    "an embedding": (lambda: {"emb_params": torch.ones(1, 32)}, "embedding, not a LoRA"),
    "another family": (
        lambda: {f"{TO_Q.replace('attn1_to_q', 'attn2_to_k')}.lora_{side}.weight": torch.ones(2, 2048).T[:, :2]
                 if side == "up" else torch.ones(2, 2048) for side in ("up", "down")},
        "is for Stable Diffusion XL with text of 2048 numbers a token, and the model is",
    ),
}  # fmt: skip
# Once the model is loaded.
OTHERS: dict[str, tuple[Callable[[], dict[str, torch.Tensor]], str]] = {
    "shapes that do not fit": (lambda: factors(out=7), "does not fit"),
    "NaN": (lambda: factors() | {f"{TO_Q}.alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
    "50,000 keys": (lambda: many(50_000), "none of the 25000 modules"),
    "numbers too large": (lambda: {key: tensor * 1e30 for key, tensor in factors().items()}, "use a smaller weight"),
}


@pytest.mark.parametrize("name", LEAN_ONES)
def test_a_hostile_file_is_refused_before_the_model_loads(name: str, tmp_path: Path) -> None:
    made, words = LEAN_ONES[name]
    path = write(tmp_path / "a.safetensors", made())
    result = quick(*DRAW, "--lora", path, cwd=tmp_path)
    assert_refused(result, 65, "a.safetensors", words)
    assert result.peak < LEAN
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_a_hostile_file_leaves_no_picture(name: str, tmp_path: Path) -> None:
    made, words = OTHERS[name]
    path = write(tmp_path / "a.safetensors", made())
    result = quick(*DRAW, "--lora", path, cwd=tmp_path)
    assert_refused(result, 65, "a.safetensors", words)
    assert not list(tmp_path.glob("out/*.png"))


def test_a_checkpoint_is_no_lora(tmp_path: Path) -> None:
    unet = EMBEDDED.parent / "unet" / "diffusion_pytorch_model.safetensors"
    assert_refused(quick(*DRAW, "--lora", unet, cwd=tmp_path), 65, "not a LoRA")
    assert_refused(quick(*DRAW, "--lora", tmp_path, cwd=tmp_path), 65, "is a folder without")
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 100)
    assert_refused(quick(*DRAW, "--lora", "a.safetensors", cwd=tmp_path), 65, "a.safetensors")


def test_a_bad_file_fails_its_rows_alone(tmp_path: Path) -> None:
    """One that only merging finds bad, between two good rows."""
    good = lora_for(tiny_model(), tmp_path / "good.safetensors")
    bad = write(tmp_path / "bad.safetensors", factors(out=7))
    rows = [{"prompt": "x", "loras": [str(path)]} for path in (good, bad, good)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ldm_here(
        "batch", tmp_path / "p.jsonl", "-m", tiny_model(), "--steps", "1", "--device", "cpu", "-b", "3", "-o",
        tmp_path / "out",
    )  # fmt: skip
    assert result.code == 3
    assert len(result.paths) == 2
    assert "row 2" in result.err
    assert "does not fit" in result.err


def test_peft_folders_are_described(tmp_path: Path) -> None:
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    folder = tmp_path / "style"
    (folder / "unet").mkdir(parents=True)
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4)}
    write(folder / "unet" / "adapter_model.safetensors", tensors)
    (folder / "unet" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    for path in (folder, folder / "unet"):
        facts = json.loads(ldm_here("info", "--json", path).out)
        assert (facts["is"], facts["kinds"], facts["rank"]) == ("LoRA", {"LoRA": 1}, 4)
    ia3 = write(tmp_path / "ia3.safetensors", {f"{TO_Q}.weight": torch.ones(32), f"{TO_Q}.on_input": torch.tensor(0)})
    assert json.loads(ldm_here("info", "--json", ia3).out)["kinds"] == {"IA3": 1}
    half = write(tmp_path / "half.safetensors", dict(list(factors().items())[:1]))
    facts = json.loads(ldm_here("info", "--json", half).out)
    assert facts["parameters"] == 16
    assert "make up no adapter" in facts["problem"]


# ---- the hub ----


@pytest.fixture
def draw(tmp_path: Path) -> Any:
    """Draw with LoRAs of a hub, in a process."""
    with Hub().running() as hub:

        def run(*arguments: str | Path, **env: str) -> Any:
            hub.requests.clear()
            own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
            return quick(*DRAW, "--overwrite", *arguments, env=own | env, cwd=tmp_path)

        run.hub = hub  # type: ignore[attr-defined]
        yield run


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "any.safetensors"])
def test_a_lora_of_the_hub(file: str, draw: Any, tmp_path: Path) -> None:
    data = lora_for(tiny_model(), tmp_path / "a.safetensors").read_bytes()
    config = {"adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'}
    draw.hub.add("lab/style", {file: data, "README.md": b"no"} | (config if "adapter" in file else {}))
    for name in ("lab/style:0.5", f"lab/style/{file}:0.5", "lab/style@main:0.5"):
        result = draw("--lora", name, "--json")
        assert result.code == 0, result
        (lora,) = json.loads(result.out)["loras"]
        assert lora["path"] == name.removesuffix(":0.5")
        assert lora["weight"] == 0.5
    assert draw("--lora", "lab/style", HF_HUB_OFFLINE="1").code == 0
    cached = {path.name for path in (tmp_path / "hf").rglob("*") if path.is_symlink()}
    assert cached == {file, *(config if "adapter" in file else {})}


def test_what_the_hub_has_not(draw: Any, tmp_path: Path) -> None:
    draw.hub.add("lab/two", {"a.safetensors": b"x", "b.safetensors": b"x"})
    assert_refused(draw("--lora", "lab/two"), 66, "lab/two/a.safetensors, lab/two/b.safetensors")
    draw.hub.add("lab/none", {"README.md": b"x"})
    assert_refused(draw("--lora", "lab/none"), 66, "no safetensors file")
    assert_refused(draw("--lora", "lab/style", HF_HUB_OFFLINE="1"), 66, "HF_HUB_OFFLINE")
