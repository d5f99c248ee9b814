"""The paper's first stages encode and decode as CompVis' code and diffusers do, whatever file they come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from oracle.compvis_layout import vae_state
from oracle.make_first_stages import CODES, NARROW, SIZE, digest, stride
from oracle.seeded import seeded_pixels, seeded_state
from oracle.test_key_lists import write_hollow
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.load import load_vae, on_meta
from ldmcli.checkpoints.vae_source import open_autoencoder
from ldmcli.networks.tiling import decode_tiled, encode_tiled
from ldmcli.networks.vae import Autoencoder, AutoencoderVQ, autoencoder_of
from ldmcli.pipeline.starting import as_image

State = dict[str, Tensor]
FACTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("first_stages.json").read_text())
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def of_diffusers(name: str, *, narrow: bool) -> Any:
    """diffusers' autoencoder of the published configuration."""
    from diffusers import AutoencoderKL, VQModel

    params = FACTS[name]["params"]
    config = params["ddconfig"]
    levels = len(config["ch_mult"])
    sides = [config["resolution"] >> level for level in range(levels)]
    attends = [side in config["attn_resolutions"] for side in sides]
    settings = {
        "block_out_channels": [(NARROW if narrow else config["ch"]) * times for times in config["ch_mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(attends)],
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": config["z_channels"],
        "mid_block_add_attention": config.get("attn_type") != "none",
    }
    if "n_embed" not in params:
        return AutoencoderKL(**settings)
    codes = CODES if narrow else params["n_embed"]
    return VQModel(**settings, num_vq_embeddings=codes, vq_embed_dim=params["embed_dim"])


def original(model: Any) -> State:
    """Its tensors by their original names, without prefix."""
    return {key.removeprefix("first_stage_model."): tensor for key, tensor in vae_state(model.state_dict()).items()}


@pytest.fixture(scope="module")
def theirs(name: str) -> Any:
    """diffusers' model with few channels and the weights that CompVis' code had."""
    model = of_diffusers(name, narrow=True)
    names = {key: tuple(tensor.shape) for key, tensor in original(model).items()}
    weights = dict(zip(names, model.state_dict(), strict=True))  # both in one order
    state = model.state_dict()
    model.load_state_dict(
        {weights[key]: each.view_as(state[weights[key]]) for key, each in seeded_state(names).items()}
    )
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def file(name: str, theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as CompVis published it: alone, with what only training needs."""
    path = tmp_path_factory.mktemp("stages") / f"{name}.safetensors"
    save_file(
        {key: each.contiguous() for key, each in original(theirs).items()} | {"loss.logvar": torch.zeros(1)}, path
    )
    return path


def loaded(path: Path) -> Autoencoder:
    vae = load_vae(open_autoencoder(path), torch.device("cpu"), torch.float32)
    assert isinstance(vae, Autoencoder)
    return vae


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return as_image(torch.from_numpy(seeded_pixels(*SIZE))[None])


def apart(ours: Tensor, theirs: list[float]) -> float:
    return relative(ours.flatten()[:: stride(ours)], torch.tensor(theirs))


@torch.inference_mode()
def test_as_the_original_code(name: str, file: Path, picture: Tensor) -> None:
    facts, vae = FACTS[name], loaded(file)
    latents = vae.encode(picture).mean
    assert list(latents.shape) == facts["shape"]
    assert apart(latents, facts["latents"]) < TOLERANCE
    assert apart(vae.decode(latents), facts["decoded"]) < TOLERANCE
    if isinstance(vae, AutoencoderVQ):
        assert vae.quantize.nearest(latents).flatten().tolist() == facts["codes"]
        assert vae.config.scaling_factor == 1
    else:
        assert "codes" not in facts


@torch.inference_mode()
def test_as_diffusers(name: str, theirs: Any, file: Path, picture: Tensor, tmp_path: Path) -> None:
    """From its folder, and by strips."""
    theirs.save_pretrained(tmp_path)
    for vae in (loaded(tmp_path), loaded(file)):
        found = theirs.encode(picture)
        wanted = found.latent_dist.mode() if "latent_dist" in found else found.latents
        assert relative(vae.encode(picture).mean, wanted) < TOLERANCE
        assert relative(vae.decode(wanted), theirs.decode(wanted).sample) < TOLERANCE
    assert relative(encode_tiled(vae, picture).mean, wanted) < TOLERANCE
    assert relative(decode_tiled(vae, wanted), theirs.decode(wanted).sample) < TOLERANCE


@torch.inference_mode()
def test_inside_a_checkpoint(name: str, file: Path, picture: Tensor, tmp_path: Path) -> None:
    state = {f"first_stage_model.{key}": tensor for key, tensor in load_file(file).items()}
    save_file(state | {"model_ema.decay": torch.zeros(()), "betas": torch.zeros(1000)}, tmp_path / "model.safetensors")
    assert apart(loaded(tmp_path / "model.safetensors").encode(picture).mean, FACTS[name]["latents"]) < TOLERANCE


def test_every_tensor_of_the_published_file_has_its_place(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = of_diffusers(name, narrow=False)
    state = original(model)
    assert digest(state) == FACTS[name]["digest"]
    source = open_autoencoder(write_hollow(tmp_path / "stage.safetensors", state))
    ours = on_meta(lambda: autoencoder_of(source.config)).state_dict()
    assert {key: tuple(each.shape) for key, each in ours.items()} == {
        key: tuple(each.shape) for key, each in model.state_dict().items()
    }
    assert {names[0] for names in disk_names(ours, source.config, original=True).values()} == set(state)
    params = FACTS[name]["params"]
    assert source.config.factor == 2 ** (len(params["ddconfig"]["ch_mult"]) - 1)
    assert (source.config.codes, source.config.latent_channels) == (params.get("n_embed", 0), params["embed_dim"])
