"""A VAE given on its own: what it must be to be taken, and what is made of it."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import ldm
from conftest import open_session
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import open_model
from ldmcli.checkpoints.vae_source import open_vae
from ldmcli.config import ModelConfig, TinyVAEConfig, VAEConfig
from ldmcli.errors import BadDataError, LdmError, MissingInputError
from ldmcli.networks.taesd import TinyVAE
from ldmcli.spec import GenerationRequest
from ldmcli.speed.policy import Runtime

State = dict[str, Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def config(model_folder: Path) -> ModelConfig:
    return open_model(model_folder).config


@pytest.fixture(scope="module")
def kl_state(model_folder: Path) -> State:
    """The model's own VAE, diffusers' keys."""
    return load_file(model_folder / "vae" / WEIGHTS)


@pytest.fixture(scope="module")
def tiny_state() -> State:
    """A small TAESD decoder, its original keys."""
    state = TinyVAE(TinyVAEConfig(channels=8)).state_dict()
    parts = [(key.split(".", 3)[2:], tensor) for key, tensor in state.items()]
    return {f"{int(number) + 1}.{rest}": tensor for (number, rest), tensor in parts}


def written(state: State, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def refusal(path: Path, config: ModelConfig, kind: type[LdmError] = BadDataError) -> str:
    """What opening and loading a VAE says."""
    with pytest.raises(kind) as caught:
        load_vae(open_vae(path, config), torch.device("cpu"), torch.float32)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    return message


# ---- what is refused ----

OTHERS: dict[str, tuple[State, str]] = {
    "LoRA": ({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(2)}, "is a LoRA, no VAE"),
    "U-Net": (
        {f"{name}.weight": torch.zeros(2) for name in ("conv_in", "time_embedding.linear_1", "down_blocks.0")},
        "is a U-Net only (diffusers keys), no VAE",
    ),
    "text encoder": (
        {f"text_model.{name}.weight": torch.zeros(2) for name in ("encoder.layers.0", "embeddings.token_embedding")},
        "is a CLIP text encoder only, no VAE",
    ),
    "unknown": ({"some.weight": torch.zeros(2)}, "is no VAE that this version knows (some.weight)"),
    "empty": ({}, "is no VAE that this version knows ()"),
    "TAESD's encoder": (
        {f"{name}.weight": torch.zeros(2) for name in ("0", "1.conv.0", "2", "3.conv.0", "3.conv.2")},
        "has only TAESD's encoder; pictures need its decoder: name taesd_decoder.safetensors",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_weights(what: str, config: ModelConfig, tmp_path: Path) -> None:
    state, told = OTHERS[what]
    assert told in refusal(written(state, tmp_path / "vae.safetensors"), config)


def test_checkpoint_without_vae(config: ModelConfig, model_file: Path, tmp_path: Path) -> None:
    state = {key: t for key, t in load_file(model_file).items() if not key.startswith("first_stage_model.")}
    message = refusal(written(state, tmp_path / "model.safetensors"), config)
    assert (
        "is a Stable Diffusion 1.x checkpoint without its VAE, no VAE; name a KL or VQ autoencoder or TAESD" in message
    )


def test_missing_and_strange_paths(config: ModelConfig, model_folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.safetensors", config, MissingInputError)
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refusal(tmp_path / "pipe", config)
    (tmp_path / "empty").mkdir()
    assert "is a folder without config.json or model_index.json" in refusal(tmp_path / "empty", config)
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    with pytest.raises(MissingInputError, match="the model has no VAE"):
        open_vae(tmp_path / "empty", config)
    assert "is a UNet2DConditionModel, not a VAE" in refusal(model_folder / "unet", config)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"act_fn": "silu"}, "says act_fn 'silu', which this version cannot run"),
        ({"scaling_factor": 0}, "says scaling_factor 0, which is no number above 0"),
        ({"scaling_factor": "1"}, "says scaling_factor '1', which is no number above 0"),
    ],
)
def test_tiny_folder_of_another_network(
    fields: dict[str, object], told: str, config: ModelConfig, tmp_path: Path
) -> None:
    written(TinyVAE(TinyVAEConfig(channels=8)).state_dict(), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"} | fields))
    with pytest.raises(BadDataError, match="config.json " + told):
        open_vae(tmp_path, config)


def test_damaged_vae(config: ModelConfig, kl_state: State, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    lacking = {key: tensor for key, tensor in kl_state.items() if key != "decoder.conv_out.weight"}
    assert "the tensor decoder.conv_out.weight is missing" in refusal(written(lacking, path), config)
    lacking = {key: tensor for key, tensor in kl_state.items() if key != "decoder.conv_norm_out.bias"}
    told = "is not the vae it should be: it lacks tensors (decoder.conv_norm_out.bias)."
    assert told in refusal(written(lacking, path), config)
    flat = kl_state | {"decoder.conv_in.weight": torch.zeros(3)}
    assert "has tensors of shapes that fit no VAE" in refusal(written(flat, path), config)
    strange = kl_state | {"decoder.other": torch.zeros(3)}
    assert "it has tensors of no use here (decoder.other)." in refusal(written(strange, path), config)


def test_damaged_taesd(config: ModelConfig, tiny_state: State, tmp_path: Path) -> None:
    path = tmp_path / "taesd.safetensors"
    lacking = {key: tensor for key, tensor in tiny_state.items() if key != "19.weight"}
    assert "is an incomplete TAESD: the tensor 20.weight is missing" in refusal(written(lacking, path), config)
    grey = tiny_state | {"19.weight": torch.zeros(1, 8, 3, 3), "19.bias": torch.zeros(1)}
    assert "gives pictures of 1 channels" in refusal(written(grey, path), config)
    flat = tiny_state | {"1.weight": torch.zeros(3)}
    assert "has tensors of shapes that fit no TAESD" in refusal(written(flat, path), config)
    misshapen = tiny_state | {"4.conv.2.bias": torch.zeros(3)}
    assert "tensors of the wrong shape (4.conv.2.bias: [3] for [8])" in refusal(written(misshapen, path), config)
    many = tiny_state | {f"{layer}.conv.0.weight": torch.zeros(0) for layer in range(3, 200)}
    many = {key: tensor for key, tensor in many.items() if key != "7.weight"} | {"200.weight": torch.zeros(3, 8, 3, 3)}
    many = {key: t for key, t in many.items() if key in ("1.weight", "200.weight") or ".conv." in key}
    assert "has tensors of shapes that fit no TAESD (197 blocks)" in refusal(written(many, path), config)


# ---- a model without one ----


@pytest.fixture
def lacking_file(model_file: Path, tmp_path: Path) -> Path:
    """The model but for its VAE."""
    state = {key: t for key, t in load_file(model_file).items() if not key.startswith("first_stage_model.")}
    return written(state, tmp_path / "lacking.safetensors")


def test_a_model_without_a_vae_is_drawn_with_another(
    lacking_file: Path, model_file: Path, kl_state: State, tmp_path: Path
) -> None:
    vae = written(kl_state, tmp_path / "vae.safetensors")
    settings = ("--steps", "2", "-W", "64", "-H", "64", "--seed", "1", "a fox")
    whole = ldm("txt2img", "-m", model_file, "-o", tmp_path / "whole.png", *settings)
    drawn = ldm("txt2img", "-m", lacking_file, "--vae", vae, "-o", tmp_path / "drawn.png", *settings)
    assert (whole.code, drawn.code) == (0, 0), (whole, drawn)
    with Image.open(tmp_path / "whole.png") as one, Image.open(tmp_path / "drawn.png") as other:
        assert one.tobytes() == other.tobytes()
    refused = ldm("txt2img", "-m", lacking_file, "a fox")
    assert refused.code == 65
    assert refused.err.endswith(
        "is a Stable Diffusion 1.x checkpoint without its VAE, not a whole model; name a VAE for it with --vae.\n"
    )


def test_only_a_vae_may_be_lacking(model_file: Path, tmp_path: Path) -> None:
    """Whether or not another VAE is named, what else a file is shows: GLIGEN, a U-Net alone, a damaged VAE."""
    state = load_file(model_file)
    boxed = {key: t for key, t in state.items() if not key.startswith("first_stage_model.")}
    boxed["model.diffusion_model.position_net.weight"] = torch.zeros(1)
    alone = {key: t for key, t in state.items() if key.startswith("model.diffusion_model.")}
    damaged = {key: t for key, t in state.items() if key != "first_stage_model.post_quant_conv.weight"}
    for made, told in ((boxed, "GLIGEN"), (alone, "U-Net only"), (damaged, "post_quant_conv.weight is missing")):
        with pytest.raises(BadDataError, match=told):
            open_model(written(made, tmp_path / "model.safetensors"), own_vae=False)


# ---- what fits the model ----


def test_other_latents(config: ModelConfig, kl_state: State, tiny_state: State, tmp_path: Path) -> None:
    """Flux's VAE has 16 channels, others another factor: no picture of this model can come of them."""
    path = tmp_path / "vae.safetensors"
    wide = kl_state | {"decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}
    told = "has 16 latent channels, the model's VAE 4; name a VAE of the model's family."
    assert told in refusal(written(wide, path), config)
    assert told in refusal(written(tiny_state | {"1.weight": torch.zeros(8, 16, 3, 3)}, path), config)
    shallow = dataclasses.replace(config, vae=dataclasses.replace(config.vae, block_channels=(32, 64, 64)))
    told = "makes 8 pixels of a latent's side, the model's VAE 4; name a VAE of the model's family."
    assert told in refusal(written(kl_state, path), shallow)
    assert told in refusal(written(tiny_state, path), shallow)


def test_scaling_factor(
    config: ModelConfig, model_folder: Path, model_file: Path, kl_state: State, tmp_path: Path
) -> None:
    """A folder and a whole checkpoint know theirs; that of a file alone is the model's."""
    path = written(kl_state, tmp_path / "vae.safetensors")
    model = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=0.13025))
    assert open_vae(path, config).config.scaling_factor == 0.18215
    assert open_vae(path, model).config.scaling_factor == 0.13025
    assert open_vae(model_file, model).config.scaling_factor == 0.18215
    assert open_vae(model_folder, model).config.scaling_factor == 0.18215


def test_scale_that_a_checkpoint_was_trained_with(model_file: Path, tmp_path: Path) -> None:
    """CompVis' `scale_by_std` keeps it as a buffer; one that is the usual but for rounding changes nothing."""
    state, path = load_file(model_file), tmp_path / "model.safetensors"
    for number, wanted in ((0.3, 0.3), (0.18215, 0.18215)):
        written(state | {"scale_factor": torch.tensor(number).bfloat16()}, path)
        assert open_model(path).config.vae.scaling_factor == pytest.approx(wanted, rel=1e-2)
    assert open_model(path).config.vae.scaling_factor == 0.18215
    for wrong in (torch.tensor(-0.2), torch.tensor(0.0), torch.ones(2)):
        with pytest.raises(BadDataError, match="scale_factor"):
            open_model(written(state | {"scale_factor": wrong}, path))


def test_doubtful_scaling_factor_is_said(
    config: ModelConfig, model_folder: Path, tiny_state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=0.13025))
    with caplog.at_level(logging.WARNING):
        open_vae(model_folder, config)
        open_vae(written(tiny_state, tmp_path / "taesd.safetensors"), model)
        assert caplog.messages == []
        open_vae(model_folder, model)
    assert caplog.messages[0].endswith(
        "has the scaling factor 0.18215, the model's VAE 0.13025: it may be made for another family of models"
    )


@pytest.mark.parametrize("models", [False, True])
def test_upcast(config: ModelConfig, model_folder: Path, kl_state: State, tmp_path: Path, models: bool) -> None:
    """32 bits only where both the model and the VAE need them; a file alone cannot say."""
    model = dataclasses.replace(config, vae=dataclasses.replace(config.vae, force_upcast=models))
    assert open_vae(written(kl_state, tmp_path / "vae.safetensors"), model).config.force_upcast is models
    fields = json.loads((model_folder / "vae" / "config.json").read_text())
    written(kl_state, tmp_path / WEIGHTS)
    for own in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"force_upcast": own}))
        assert open_vae(tmp_path, model).config.force_upcast is (own and models)


def test_looking_at_a_vae_needs_no_torch(model_folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from ldmcli.checkpoints.source import open_model
from ldmcli.checkpoints.vae_source import open_vae
path = Path(sys.argv[1])
open_vae(path, open_model(path).config)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(model_folder)], check=True)


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "wanted"),
    [
        (torch.float16, True, torch.float32),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.float32),
    ],
)
def test_a_vae_that_overflows_is_kept_out_of_fp16(dtype: torch.dtype, force_upcast: bool, wanted: torch.dtype) -> None:
    runtime = Runtime(torch.device("cpu"), dtype, dtype, "sdpa")
    assert runtime.vae_dtype(VAEConfig(force_upcast=force_upcast)) == wanted


def test_a_picture_is_read_by_the_models_own_vae_where_another_can_only_decode(
    model_folder: Path, tiny_state: State, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    request = GenerationRequest("a", image=picture, strength=0.5, steps=2)
    with open_session(model_folder, vae=str(written(tiny_state, tmp_path / "taesd.safetensors"))) as session:
        (drawn,) = session.draw([request])
        assert drawn.pixels().shape == (64, 64, 3)
    with open_session(model_folder) as session:
        (other,) = session.draw([request])
        assert torch.equal(drawn.latents, other.latents)
