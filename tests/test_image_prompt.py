"""Pictures as prompts: adapters and image encoders read, refused where they do not fit, and left out where they are
off. That they are diffusers' is in tests/oracle/test_oracle_ip_adapter.py."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cli_support import assert_refused, empty_tensors, ldm, ldm_here, pixels, tiny_model
from conftest import load, loaded, open_session
from graph_support import FakeRecorder, load_plainly, recording
from image_prompt_support import random_encoder, write_ip_adapter
from oracle.comparing import fitted, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.checkpoints.ip_adapter_source import encoder_names, open_image_encoder, open_ip_adapter
from ldmcli.checkpoints.source import open_model
from ldmcli.conditioning.image_encoder import ImageEncoder
from ldmcli.config import ModelConfig, UNetConfig
from ldmcli.errors import BadDataError, MissingInputError, UsageError
from ldmcli.image_prompt import IP_ADAPTER_FIELDS
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.speed import policy

SIZE = 64


@pytest.fixture(scope="module")
def model(model_folder: Path) -> ModelConfig:
    return open_model(model_folder).config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> Path:
    """Adapters of each kind beside an image encoder, two pictures and a mask."""
    root = tmp_path_factory.mktemp("image prompts")
    for kind in ("base", "plus", "full"):
        write_ip_adapter(root, model.unet, kind)
    random_encoder().save_pretrained(root / "image_encoder")
    generator = np.random.default_rng(4)
    for name in ("a", "b"):
        small = Image.fromarray(generator.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        small.resize((80, 64), Image.Resampling.BICUBIC).save(root / f"{name}.png")
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, 30, SIZE))
    mask.save(root / "mask.png")
    return root


def request_for(folder: Path, kind: str = "base", **settings: Any) -> GenerationRequest:
    usual: dict[str, Any] = {"steps": 3, "width": SIZE, "height": SIZE, "guidance_scale": 3.0, "sampler": "ddim"}
    shown = {"ip_adapter": str(folder / f"{kind}.safetensors"), "ip_adapter_image": str(folder / "a.png")}
    return GenerationRequest("a whale", "fog", seed=3, **usual | shown | settings)


def without(request: GenerationRequest) -> GenerationRequest:
    return dataclasses.replace(request, **dict.fromkeys(IP_ADAPTER_FIELDS, ()))


def latents_of(pipeline: Pipeline, request: GenerationRequest) -> Tensor:
    return pipeline.draw(fitted(pipeline, [request])).latents


def test_strength_0_is_no_picture_bit_for_bit(model_folder: Path, folder: Path) -> None:
    session, request = open_session(model_folder), request_for(folder, ip_adapter_strength=0)
    one, other = (next(iter(session.draw([each]))).pixels() for each in (request, without(request)))
    assert np.array_equal(one, other)
    assert session.fit(request).image_prompts == ()


def test_pictures_are_read_once_a_run(model_folder: Path, folder: Path) -> None:
    session, read = open_session(model_folder), list[str]()
    original = ImageEncoder.read

    def noting(self: ImageEncoder, given: Tensor, reads: str) -> Tensor:
        read.append(f"{reads} {'blank' if not given.any() else 'picture'}")
        return original(self, given, reads)

    other = {"ip_adapter_image": str(folder / "b.png")}
    requests = [request_for(folder, "plus", **more) for more in ({}, {"width": 96}, other, {})]
    with mock.patch.object(ImageEncoder, "read", noting):
        for request in requests:
            next(iter(session.draw([request]))).pixels()
    assert read == ["patches picture", "patches blank", "patches picture"]


def test_a_picture_does_not_depend_on_its_neighbours(pipeline: Pipeline, folder: Path) -> None:
    """With masks of their own, too."""
    turned = folder / "turned.png"
    Image.open(folder / "mask.png").transpose(Image.Transpose.ROTATE_90).save(turned)
    requests = [
        request_for(folder, "plus", ip_adapter_image=str(folder / f"{name}.png"), ip_adapter_mask=str(mask))
        for name, mask in (("a", folder / "mask.png"), ("b", turned))
    ]
    together = pipeline.draw(fitted(pipeline, requests)).latents
    for i, request in enumerate(requests):
        assert relative(together[i : i + 1], latents_of(pipeline, request)) < 1e-4
    assert relative(together[0], together[1]) > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_interval": (1.0, 8.0)},
        {"prompt": "a red apple " * 40, "on_long_prompt": "chunk"},
        {"hires": "1.5", "hires_steps": 2, "hires_strength": 0.7},
        {"ip_adapter_mask": "none"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_picture_counts_beside(pipeline: Pipeline, folder: Path, settings: dict[str, Any]) -> None:
    """Without guidance, with some, with prompts of different lengths, and in second passes."""
    request = dataclasses.replace(request_for(folder), **settings)
    assert relative(latents_of(pipeline, request), latents_of(pipeline, without(request))) > 1e-3


def test_masks_say_where_a_picture_counts(pipeline: Pipeline, folder: Path) -> None:
    """One that is black is no picture at all; one that is white is none."""
    request, found = request_for(folder), dict[int, Tensor]()
    for grey in (0, 255):
        Image.new("L", (9, 9), grey).save(folder / f"{grey}.png")
        masked = dataclasses.replace(request, ip_adapter_mask=str(folder / f"{grey}.png"))
        found[grey] = latents_of(pipeline, masked)
    assert relative(found[0], latents_of(pipeline, without(request))) < 1e-5
    assert relative(found[255], latents_of(pipeline, request)) < 1e-5


def test_masks_are_cut_out_with_the_part_that_is_drawn(pipeline: Pipeline, folder: Path) -> None:
    from ldmcli.images.canvas import canvas_of
    from ldmcli.images.image_prompt_picture import attention_mask

    spot = folder / "spot.png"
    picture = Image.new("L", (80, 64))
    picture.paste(255, (10, 20, 26, 36))
    picture.save(spot)
    (one,) = fitted(
        pipeline,
        [
            request_for(
                folder,
                image=str(folder / "a.png"),
                mask=str(spot),
                inpaint_area="masked",
                mask_padding=0,
                ip_adapter_mask=str(spot),
            )
        ],
    )
    mask = attention_mask(one, str(spot), canvas_of(one))
    assert mask.shape == (SIZE, SIZE)
    assert mask.mean() > 0.9
    assert attention_mask(one, str(spot), None).mean() < 0.1


def test_recorded_steps(model_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is recorded reads keys, values and weights of the picture that is drawn."""
    monkeypatch.setattr(policy, "lay_out", lambda module, **_: module)
    plain = load_plainly(model_folder)
    graphed = recording(plain, FakeRecorder())
    for name, strength in (("a", 1.0), ("b", 0.4)):
        request = request_for(
            folder, steps=8, ip_adapter_image=str(folder / f"{name}.png"), ip_adapter_strength=strength,
            ip_adapter_mask=str(folder / "mask.png"),
        )  # fmt: skip
        assert relative(latents_of(graphed, request), latents_of(plain, request)) < 1e-4


def test_all_of_it_fits_on_a_narrow_device(model_folder: Path, folder: Path) -> None:
    session, request = open_session(model_folder), request_for(folder, "plus")
    wanted = next(iter(session.draw([request]))).pixels()
    loaded(session).offload()
    for _ in range(2):
        assert np.array_equal(next(iter(session.draw([request]))).pixels(), wanted)


def test_16_bits_and_back(model_folder: Path, folder: Path) -> None:
    request = request_for(folder)
    wide, narrow = load(model_folder), load(model_folder, "bf16")
    wanted = latents_of(wide, request)
    assert relative(latents_of(narrow, request), wanted) < 0.2
    with narrow.in_float32():
        assert relative(latents_of(narrow, request), wanted) < 0.02


def test_a_file_that_has_changed_is_read_again(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    """As a server has to, which lives long."""
    shutil.copytree(folder, tmp_path / "own")
    session, request = open_session(model_folder), request_for(tmp_path / "own")
    before = next(iter(session.draw([request]))).pixels()
    file = tmp_path / "own" / "base.safetensors"
    save_file({key: 1.5 * tensor for key, tensor in load_file(file).items()}, file)
    assert not np.array_equal(next(iter(session.draw([request]))).pixels(), before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context_dim": 768}, "is for Stable Diffusion 1.x with text of 768 numbers a token, and the model is .* 64;"),
        ({"block_channels": (32, 64, 96, 128)}, "is for 16 attentions, and this .* has 16 of other widths or places"),
        ({"layers_per_block": 1}, "is for 10 attentions, and this .* has 16"),
    ],
)
def test_a_wrong_pairing_is_one_sentence(
    model: ModelConfig, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadDataError, match=sentence):
        open_ip_adapter(write_ip_adapter(tmp_path, model.unet, "base", **change), model)


FACE = "is an IP-Adapter FaceID, which reads what a face recognition network says"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ("image_proj.proj.0.weight image_proj.norm.weight ip_adapter.1.to_k_ip.weight", FACE),
        ("image_proj.proj.0.weight ip_adapter.0.to_q_lora.down.weight ip_adapter.1.to_k_ip.weight", FACE),
        ("image_proj.perceiver_resampler.proj_in.weight ip_adapter.1.to_k_ip.weight", FACE),
        ("controlnet_cond_embedding.conv_in.weight", "is a ControlNet, no IP-Adapter"),
        ("nothing.known", "is no IP-Adapter that this version knows"),
    ],
)
def test_files_of_other_kinds_are_named(model: ModelConfig, tmp_path: Path, keys: str, sentence: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(empty_tensors({key: (4, 4) for key in keys.split()}))
    with pytest.raises(BadDataError, match=sentence):
        open_ip_adapter(path, model)


def test_image_encoders_are_found_beside_adapters_or_named(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    """As the authors' repository keeps them, too; the first that fits is taken."""
    adapter = tmp_path / "sdxl_models" / "base.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes((folder / "base.safetensors").read_bytes())
    request = request_for(adapter.parent, ip_adapter_image=str(folder / "a.png"))
    with pytest.raises(MissingInputError, match="no folder image_encoder beside it; name the CLIP vision model whose"):
        open_session(model_folder).fit(request)
    named = open_session(model_folder, image_encoder=str(folder / "image_encoder" / "model.safetensors")).fit(request)
    shutil.copytree(folder / "image_encoder", tmp_path / "models" / "image_encoder")
    other = random_encoder_folder(tmp_path / "sdxl_models" / "image_encoder", projection_dim=40)
    found = open_session(model_folder).fit(request)
    assert dict(found.inputs) == dict(named.inputs)
    with pytest.raises(BadDataError, match=r"gives embedding of 40 numbers, and .* reads 24; name the encoder it was"):
        open_session(model_folder, image_encoder=str(other)).fit(request)


def test_an_encoder_without_an_adapter_is_remarked_on_and_stays_a_name(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    session = open_session(model_folder, image_encoder="lab/encoder")
    session.fit(GenerationRequest("a fox"))
    assert "image_encoder is for a request with an ip_adapter" in caplog.text
    assert session.resolved.image_encoder == "lab/encoder"  # of the hub
    assert open_session(model_folder, image_encoder="encoder").resolved.image_encoder == str(tmp_path / "encoder")


def random_encoder_folder(path: Path, **settings: Any) -> Path:
    from image_prompt_support import ENCODER
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER | settings)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("width", "heads", "activation"), [(768, 12, "quick_gelu"), (1280, 16, "gelu"), (1664, 16, "gelu")]
)
def test_encoders_without_config_are_known_by_their_widths(
    tmp_path: Path, width: int, heads: int, activation: str
) -> None:
    path = tmp_path / "clip.safetensors"
    path.write_bytes(tower_header(width))
    config = open_image_encoder(path).config
    assert (config.heads, config.activation, config.image_size, config.layers) == (heads, activation, 224, 2)


def test_an_encoder_of_unknown_width_without_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    path.write_bytes(tower_header(32))
    with pytest.raises(BadDataError, match=r"is a tower of width 32 without config\.json, which says its heads"):
        open_image_encoder(path)


def tower_header(width: int) -> bytes:
    """The tensors that tell an encoder's dimensions; hollow but for the header."""
    tensors = {
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
        "visual_projection.weight": (24, width),
        **{f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (4, width) for i in range(2)},
    }
    return empty_tensors(tensors)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ip_adapter": "n"}, "ip_adapter has no ip_adapter_image"),
        ({"ip_adapter_image": "i"}, "ip_adapter_image is for a request with an ip_adapter"),
        ({"ip_adapter": ["n"], "ip_adapter_image": ["i", "i"]}, "ip_adapter_image has 2 entries and ip_adapter 1"),
        ({"ip_adapter": "n", "ip_adapter_blocks": "some"}, "ip_adapter_blocks 'some' is not known; choose from all, "),
        ({"ip_adapter": "n", "ip_adapter_strength": -1}, "ip_adapter_strength -1 is not a number from 0 to 10"),
    ],
)
def test_what_cannot_be_meant(model_folder: Path, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        open_session(model_folder).fit(GenerationRequest("a", width=SIZE, height=SIZE, **fields))


def test_models_without_the_blocks_are_told(folder: Path) -> None:
    from ldmcli.image_prompt import ImagePrompt

    with pytest.raises(UsageError, match="ip_adapter_blocks layout are none of this model's blocks"):
        ImagePrompt("n", "i", blocks="layout").transformers(
            UNetConfig(block_channels=(8, 8), attention=(1, 1), heads=(1, 1), added_numbers=6)
        )


def test_a_picture_that_is_a_line_is_refused(pipeline: Pipeline, folder: Path) -> None:
    Image.new("RGB", (2000, 3)).save(folder / "line.png")
    with pytest.raises(BadDataError, match="2000x3 pixels is too narrow"):
        latents_of(pipeline, request_for(folder, ip_adapter_image=str(folder / "line.png")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """An adapter of the tiny model beside an encoder."""
    root = tmp_path_factory.mktemp("tiny")
    write_ip_adapter(root, open_model(tiny_model()).config.unet, "base")
    shutil.copytree(folder / "image_encoder", root / "image_encoder")
    (root / "a.png").write_bytes((folder / "a.png").read_bytes())
    return root


DRAWING = ("--dtype", "fp32", "--steps", "2", "-W", "32", "-H", "32")


def test_the_record_says_what_was_shown_and_repeats_it(tiny: Path, folder: Path, tmp_path: Path) -> None:
    first, again, plain = (tmp_path / f"{name}.png" for name in "abc")
    drawing = ("txt2img", "-m", tiny_model(), *DRAWING, "-s", "1", "a house")
    shown = (
        "--ip-adapter", tiny / "base.safetensors", "--ip-adapter-image", tiny / "a.png",
        "--ip-adapter-strength", "0.5", "--ip-adapter-mask", folder / "mask.png",
    )  # fmt: skip
    assert ldm_here(*drawing, *shown, "-o", first).code == 0
    assert 'ControlNet 0: "Module: ip-adapter-auto, Model: base [' in (read_parameters(first) or "")
    record = read_record(first)
    assert record["request"]["ip_adapter"] == [str(tiny / "base.safetensors")]
    assert record["request"]["ip_adapter_strength"] == [0.5]
    names = ("ip_adapter", "image_encoder", "ip_adapter_image", "ip_adapter_mask")
    assert record["inputs"].keys() == {f"{name}:0" for name in names}
    assert ldm_here("txt2img", "--from-image", first, "-o", again).code == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert ldm_here(*drawing, "-o", plain).code == 0
    assert not np.array_equal(pixels(first), pixels(plain))


def test_a_picture_whose_encoder_or_prompt_is_gone_or_changed(tiny: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny, own)
    shown = ("--ip-adapter", own / "base.safetensors", "--ip-adapter-image", own / "a.png")
    assert ldm_here("txt2img", "-m", tiny_model(), *DRAWING, "a", *shown, "-o", tmp_path / "a.png").code == 0
    again = ("txt2img", "--from-image", tmp_path / "a.png", "-o")
    file = own / "image_encoder" / "model.safetensors"
    save_file({key: 1.1 * tensor for key, tensor in load_file(file).items()}, file)
    assert "not the one the picture was made with" in ldm_here(*again, tmp_path / "b.png").err
    (own / "a.png").unlink()
    assert_refused(ldm_here(*again, tmp_path / "c.png"), 66, "ip-adapter-image")


def test_rows_name_adapters_and_pictures_from_their_file_on(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "own")
    rows = [
        {"prompt": "a", "ip_adapter": "own/base.safetensors", "ip_adapter_image": "own/a.png"},
        {"prompt": "b", "ip_adapter": "own/base.safetensors", "ip_adapter_image": "own/a.png", "ip_adapter_scale": 0.5},
        {"prompt": "c", "ip_adapter": "own/base.safetensors", "ip_adapter_image": "nothing.png"},
        {"prompt": "d", "ip_adapter": "own/nothing.safetensors", "ip_adapter_image": "own/a.png"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ldm_here("batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "-m", tiny_model(), *DRAWING)
    assert result.code == 3
    assert len(result.paths) == 2
    assert "nothing.png does not exist" in result.err
    assert "nothing.safetensors" in result.err
    assert read_record(result.paths[1])["request"]["ip_adapter_strength"] == [0.5]


def test_info(tiny: Path) -> None:
    facts = json.loads(ldm_here("info", "--json", tiny / "base.safetensors").out)
    assert facts["is"] == "IP-Adapter"
    assert facts["tokens"] == 4
    assert facts["reads"] == "an image encoder's embedding of 24 numbers"


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "cut off": lambda file: file.read_bytes()[:-1000],
    "no image_proj": lambda file: empty_tensors({"ip_adapter.1.to_k_ip.weight": (4, 4)}),
    "a shape of zeros": lambda file: empty_tensors(
        {"image_proj.proj.weight": (0, 0), "ip_adapter.1.to_k_ip.weight": (0, 0)}
    ),
    "one dimension": lambda file: empty_tensors({"image_proj.proj.weight": (4,), "ip_adapter.1.to_k_ip.weight": (4,)}),
    "tokens without end": lambda file: empty_tensors(
        {
            "image_proj.latents": (1, 1 << 40, 0),
            "image_proj.proj_in.weight": (0, 1),
            "image_proj.layers.0.0.to_q.weight": (64, 0),
            "image_proj.layers.0.1.1.weight": (1, 0),
            "ip_adapter.1.to_k_ip.weight": (0, 1),
        }
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters(kind: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(HOSTILE[kind](tiny / "base.safetensors"))
    shown = ("--ip-adapter", path, "--ip-adapter-image", tiny / "a.png")
    assert_refused(ldm("txt2img", "-m", tiny_model(), "a", *shown, "-o", tmp_path / "x.png"), 65, "adapter.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        "[]", "{", '{"num_attention_heads": 0}', '{"num_attention_heads": 7}', '{"hidden_act": "swish2"}',
        '{"vision_config": {"layer_norm_eps": "x"}}',
    ],
)  # fmt: skip
def test_hostile_encoders(config: str, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "own")
    (tmp_path / "own" / "image_encoder" / "config.json").write_text(config)
    shown = ("--ip-adapter", tmp_path / "own" / "base.safetensors", "--ip-adapter-image", tiny / "a.png")
    result = ldm_here("txt2img", "-m", tiny_model(), "a", *shown, "-o", tmp_path / "x.png")
    assert_refused(result, 65, "image_encoder")


def test_python(tiny: Path) -> None:
    request = GenerationRequest(
        "a", steps=1, width=32, height=32, ip_adapter=tiny, ip_adapter_image=(tiny / "a.png").read_bytes()
    )
    with Session(ModelSpec(str(tiny_model())), RuntimeSpec("cpu", "fp32")) as session:
        assert next(iter(session.draw([request]))).pixels().shape == (32, 32, 3)


def test_the_authors_repository_has_the_encoder_of_each_family(model: ModelConfig, folder: Path) -> None:
    part = open_ip_adapter(folder / "plus.safetensors", model)
    names = {
        ("patches", 1280): "models", ("embedding", 1024): "models", ("embedding", 1280): "sdxl_models",
    }  # fmt: skip
    for (reads, width), where in names.items():
        config = dataclasses.replace(part.config, reads=reads, image_dim=width)
        alone = dataclasses.replace(part, path=Path("/nowhere/a.safetensors"), config=config)
        found = list(encoder_names("h94/IP-Adapter/models/a.safetensors", alone))
        assert found == [f"h94/IP-Adapter/{where}/image_encoder/model.safetensors"]
        assert list(encoder_names("other/IP-Adapter/a.safetensors", alone)) == []
