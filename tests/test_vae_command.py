"""`ldm vae`: an autoencoder alone, KL and VQ, by the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import assert_refused, ldm, ldm_here, pixels
from oracle.seeded import seeded_pixels, seeded_state
from PIL import Image
from safetensors.torch import load_file, save_file

from ldmcli.checkpoints.latents_file import open_latents, read_latents
from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.vae_source import open_autoencoder
from ldmcli.config import VAEConfig
from ldmcli.networks.vae import Autoencoder, AutoencoderVQ, autoencoder_of
from ldmcli.session.autoencoding import Autoencoding
from ldmcli.spec import RuntimeSpec
from ldmcli.speed import memory

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "diffusion_pytorch_model.safetensors"
CODES = 50
KL = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
}  # fmt: skip
VQ = KL | {
    "_class_name": "VQModel", "latent_channels": 6, "vq_embed_dim": 3, "num_vq_embeddings": CODES,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "mid_block_add_attention": False,
}  # fmt: skip
CONFIGS = {
    "kl": VAEConfig(block_channels=(8, 16), layers_per_block=1, norm_groups=4),
    "vq": VAEConfig(
        block_channels=(8, 16), layers_per_block=1, norm_groups=4, latent_channels=3, inner_channels=6, codes=CODES,
        attention=(False, True), middle_attention=False, scaling_factor=1.0,
    ),
}  # fmt: skip


def folder_of(path: Path, kind: str) -> Path:
    """A small autoencoder of this kind, with weights that matter."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"kl": KL, "vq": VQ}[kind]))
    shapes = {key: tuple(each.shape) for key, each in autoencoder_of(CONFIGS[kind]).state_dict().items()}
    save_file(seeded_state(shapes), path / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("autoencoders")
    return {kind: folder_of(root / kind, kind) for kind in CONFIGS}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "slope.png"
    Image.fromarray(seeded_pixels(24, 16)).save(path)
    return path


def test_the_folder_says_what_it_is(kind: str, folders: dict[str, Path]) -> None:
    assert dataclasses.replace(open_autoencoder(folders[kind]).config, force_upcast=False, scaling_factor=1.0) == (
        dataclasses.replace(CONFIGS[kind], scaling_factor=1.0)
    )
    facts = ldm_here("info", "--json", folders[kind]).records[0]
    assert facts["autoencoder"] == {"kl": "KL, f2", "vq": "VQ, f2"}[kind]
    assert facts["codes"] == {"kl": None, "vq": CODES}[kind]


def test_there_and_back(kind: str, folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    """The latents are the network's own, and what they decode to is written as it is."""
    (said,) = ldm_here(
        "vae", "encode", picture, "-m", folders[kind], "-o", tmp_path / "l.safetensors", "--json"
    ).records
    tensors = load_file(tmp_path / "l.safetensors")
    vae = load_vae(open_autoencoder(folders[kind]), torch.device("cpu"), torch.float32)
    assert isinstance(vae, Autoencoder)
    image = torch.from_numpy(pixels(picture).copy())[None].permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.inference_mode():
        wanted = vae.encode(image).mean
        decoded = ((vae.decode(wanted)[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    assert torch.allclose(tensors["latents"], wanted, atol=1e-5)
    assert said["latents"] == [1, CONFIGS[kind].latent_channels, 8, 12]
    assert ldm_here("info", "--json", tmp_path / "l.safetensors").records[0]["is"] == "file of latents"
    (path,) = ldm_here(
        "vae", "decode", tmp_path / "l.safetensors", "-m", folders[kind], "-o", tmp_path / "back.png"
    ).paths
    assert np.abs(pixels(path).astype(int) - decoded.numpy()).max() <= 1
    if isinstance(vae, AutoencoderVQ):
        assert torch.equal(tensors["codes"], vae.quantize.nearest(wanted).int())
        save_file({"codes": tensors["codes"].to(torch.int64)}, tmp_path / "codes.safetensors")
        (again,) = ldm_here(
            "vae", "decode", tmp_path / "codes.safetensors", "-m", folders[kind], "-o", tmp_path / "again.png"
        ).paths
        assert np.array_equal(pixels(again), pixels(path))
    else:
        assert set(tensors) == {"latents"}


def test_seeds_draw_other_latents_of_a_kl_autoencoder_alone(kind: str, folders: dict[str, Path], picture: Path) -> None:
    work = Autoencoding(open_autoencoder(folders[kind]), RuntimeSpec(device="cpu", dtype="fp32"))
    mean, one, same, other = (work.encode(pixels(picture), seed).latents for seed in (None, 1, 1, 2))
    assert np.array_equal(one, same)
    assert np.array_equal(one, other) == np.array_equal(mean, one) == (kind == "vq")


def test_several_pictures_in_one_file_or_a_folder(folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.fromarray(seeded_pixels(24, 16, seed=1)).save(other)
    options = ("-m", folders["kl"], "-o")
    assert ldm_here("vae", "encode", picture, other, *options, tmp_path / "both.safetensors").code == 0
    assert ldm_here("vae", "encode", picture, other, *options, tmp_path / "each").code == 0
    both = load_file(tmp_path / "both.safetensors")["latents"]
    each = [load_file(tmp_path / "each" / f"{stem}.safetensors")["latents"] for stem in ("slope", "other")]
    assert torch.equal(both, torch.cat(each))
    done = ldm_here("vae", "decode", tmp_path / "both.safetensors", *options, tmp_path / "pictures")
    assert [path.name for path in done.paths] == ["both-0.png", "both-1.png"]
    Image.fromarray(seeded_pixels(16, 16)).save(other)
    assert_refused(ldm_here("vae", "encode", picture, other, *options, tmp_path / "x.safetensors"), 2, "differ in size")


def test_a_picture_is_cut_to_whole_latents_and_that_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(seeded_pixels(25, 17)).save(tmp_path / "odd.png")
    done = ldm_here("vae", "encode", tmp_path / "odd.png", "-m", folders["kl"], "-o", tmp_path / "l.safetensors")
    assert "25×17 pixels; 24×16" in done.err
    assert load_file(tmp_path / "l.safetensors")["latents"].shape[2:] == (8, 12)


def test_strips_give_the_same(kind: str, folders: dict[str, Path], picture: Path) -> None:
    plain, strips = (
        Autoencoding(open_autoencoder(folders[kind]), RuntimeSpec(device="cpu", dtype="fp32", vae_tiling=tiled))
        for tiled in (False, True)
    )
    latents = plain.encode(pixels(picture)).latents
    assert np.allclose(latents, strips.encode(pixels(picture)).latents, atol=1e-5)
    one, other = (work.decode(torch.from_numpy(latents)).astype(int) for work in (plain, strips))
    assert np.abs(one - other).max() <= 1


def refused(tensors: dict[str, torch.Tensor], model: Path, tmp_path: Path, *words: str) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    result = ldm_here("vae", "decode", tmp_path / "bad.safetensors", "-m", model, "-o", tmp_path / "bad.png")
    assert_refused(result, 65, *words)
    assert not (tmp_path / "bad.png").exists()


def test_what_is_no_latents(folders: dict[str, Path], tmp_path: Path) -> None:
    vq = folders["vq"]
    refused({"other": torch.zeros(1, 3, 4, 4)}, vq, tmp_path, "has no tensor “latents” or “codes”")
    refused({"latents": torch.zeros(1, 4, 4, 4)}, vq, tmp_path, "4 channels, the autoencoder 3")
    refused({"latents": torch.zeros(3, 4, 4)}, vq, tmp_path, "not as (pictures, channels, height, width)")
    refused({"latents": torch.zeros(0, 3, 4, 4)}, vq, tmp_path, "not as (pictures, channels, height, width)")
    refused({"latents": torch.full((1, 3, 4, 4), torch.nan)}, vq, tmp_path, "holds NaN or infinity")
    refused({"latents": torch.zeros(1, 3, 1, 1 << 17)}, vq, tmp_path, "pixels a side")
    refused({"codes": torch.zeros(1, 4, 4)}, vq, tmp_path, "not as whole numbers")
    refused({"codes": torch.full((1, 4, 4), CODES)}, vq, tmp_path, f"codes from {CODES} to {CODES}", "0 to 49")
    refused({"codes": torch.full((1, 4, 4), -1)}, vq, tmp_path, "codes from -1 to -1")
    refused({"codes": torch.zeros(1, 4, 4, dtype=torch.int32)}, folders["kl"], tmp_path, "has no codebook")


def test_latents_of_no_picture_are_named_and_not_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    refused({"latents": torch.full((1, 4, 4, 4), 1e30)}, folders["kl"], tmp_path, "holds latents of up to 1e+30")


def test_a_picture_that_memory_cannot_hold_is_refused_before(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 20)
    Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    for way, file in (("encode", tmp_path / "large.png"), ("decode", tmp_path / "latents.safetensors")):
        save_file({"latents": torch.zeros(1, 4, 128, 128)}, tmp_path / "latents.safetensors")
        out = tmp_path / ("new.safetensors" if way == "encode" else "new.png")
        result = ldm_here("vae", way, file, "-m", folders["kl"], "-o", out)
        assert_refused(result, 2, "256×256 would need at least", "--vae-tiling")


def test_pictures_are_read_one_at_a_time(folders: dict[str, Path], tmp_path: Path) -> None:
    """However much a file holds: 300 GB here, which take no place on the disk."""
    count, size = 100_000, 3 * (1 << 9) ** 2 * 4
    info = {"dtype": "F32", "shape": [count, 3, 1 << 9, 1 << 9], "data_offsets": [0, count * size]}
    header = json.dumps({"latents": info}).encode()
    path = tmp_path / "many.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * size)
    config = open_autoencoder(folders["vq"]).config
    first = next(iter(read_latents(*open_latents(path, config)[:2], config)))
    assert first.shape == (3, 1 << 9, 1 << 9)


def test_a_file_of_more_than_can_be_written_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    refused({"codes": torch.zeros(100_001, 1, 1, dtype=torch.uint8)}, folders["vq"], tmp_path, "100001 pictures")
    save_file({"latents": torch.zeros(1, 3, 1, 8192)}, tmp_path / "wide.safetensors")
    wide = ldm_here("vae", "decode", tmp_path / "wide.safetensors", "-m", folders["vq"], "-o", tmp_path / "wide.webp")
    assert_refused(wide, 2, "16384×2 is too large for WebP")


def test_other_tensors_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = {"latents": torch.zeros(1, 3, 4, 4), "codes": torch.zeros(1, 4, 4, dtype=torch.int32)}
    for extra in ({}, {"mask": torch.zeros(1)}):
        save_file(tensors | extra, tmp_path / "l.safetensors")
        done = ldm_here(
            "vae", "decode", tmp_path / "l.safetensors", "-m", folders["vq"], "-o", tmp_path / "l.png", "--overwrite"
        )
        assert done.code == 0, done
        assert ("more than is decoded: mask" in done.err) is bool(extra)


@pytest.mark.parametrize(
    ("way", "kind", "options", "words"),
    [
        ("encode", "kl", ("--quality", "50"), "--quality is for ldm vae decode"),
        ("encode", "kl", ("--seed", "7"), "--seed is for latents that are drawn; add --sample"),
        ("encode", "vq", ("--sample",), "--sample is for KL autoencoders"),
        ("decode", "kl", ("--sample",), "--sample is for ldm vae encode"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    way: str, kind: str, options: tuple[str, ...], words: str, folders: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    assert_refused(ldm_here("vae", way, picture, "-m", folders[kind], "-o", tmp_path / "out", *options), 2, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "spatial"}, 'norm_type is "spatial"'),
        ({"lookup_from_codebook": True}, "lookup_from_codebook is true"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings is 0"),
        ({"vq_embed_dim": "3"}, "vq_embed_dim is '3'"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "do not mirror each other"),
        ({"num_vq_embeddings": 51}, "quantize.embedding.weight: [50, 3] for [51, 3]"),
        ({"norm_num_groups": 7}, "do not divide into 7 norm groups"),
        ({"in_channels": 1}, "not red, green and blue"),
    ],
)
def test_what_is_no_autoencoder(
    changes: dict[str, Any], words: str, folders: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(VQ | changes))
    (tmp_path / WEIGHTS).symlink_to(folders["vq"] / WEIGHTS)
    assert_refused(ldm_here("vae", "encode", picture, "-m", tmp_path, "-o", tmp_path / "l.safetensors"), 65, words)


def test_bad_requests(folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    model = ("-m", folders["kl"])
    encode = ("vae", "encode", picture, *model)
    assert_refused(ldm_here(*encode, "-o", tmp_path / "l.png"), 2, "latents are written as .safetensors")
    assert_refused(ldm_here(*encode, "-o", "-"), 2, "latents are written as .safetensors")
    assert_refused(ldm_here("vae", "invert", picture, *model, "-o", tmp_path), 2, "encode")
    assert_refused(ldm_here("vae", "encode", tmp_path / "none.png", *model, "-o", tmp_path / "l.safetensors"), 66)
    assert_refused(ldm_here("vae", "decode", picture, *model, "-o", tmp_path / "l.png"), 65, "PNG picture")
    out = tmp_path / "l.safetensors"
    assert_refused(ldm_here(*encode, "-o", out, "--sample", "--seed", "-2"), 2, "below 0")
    out.write_bytes(b"mine")
    assert_refused(ldm_here(*encode, "-o", out), 73, "is there already")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert_refused(ldm_here("vae", "encode", tmp_path / "dot.png", *model, "-o", tmp_path / "d"), 65, "1×1 pixels")


def test_the_embedded_model_has_one_too(picture: Path, tmp_path: Path) -> None:
    """As a real process, without a model named."""
    done = ldm("vae", "encode", picture, "-o", tmp_path / "l.safetensors")
    assert done.code == 0, done
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (1, 4, 4, 6)
