"""Networks that steer by pictures: read in every layout, refused where they do not fit, and left out where they are
off."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from cli_support import assert_refused, empty_tensors, ldm, ldm_here, pixels, tiny_model
from conftest import load, open_session
from control_support import original_names, random_control, write
from graph_support import FakeRecorder, load_plainly, recording
from hypothesis import given
from hypothesis import strategies as st
from oracle.comparing import fitted, relative
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session, remarks
from ldmcli.checkpoints.control_source import open_control
from ldmcli.checkpoints.load_control import load_control
from ldmcli.checkpoints.source import ModelSource, open_model
from ldmcli.config import UNetConfig
from ldmcli.control import CONTROL_FIELDS, Control, read_control
from ldmcli.errors import BadDataError, UsageError
from ldmcli.images.edges import canny
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.networks.control_net import ControlNet
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.speed import policy

SIZE = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hint") / "disc.png"
    y, x = np.mgrid[:SIZE, :SIZE]
    Image.fromarray((((x - 20) ** 2 + (y - 36) ** 2 < 300) * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def source(model_folder: Path) -> ModelSource:
    return open_model(model_folder)


@pytest.fixture(scope="module")
def network(source: ModelSource) -> ControlNet:
    return random_control(source.config.unet)


@pytest.fixture(scope="module")
def file(network: ControlNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors", network.state_dict())


def loaded(path: Path, source: ModelSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return load_control(open_control(path, source.config), source.part("unet"), CPU, dtype).state_dict()


def base_weights(source: ModelSource, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own weights under the names that both networks have."""
    from ldmcli.checkpoints.load import load_unet

    unet = load_unet(source, CPU, torch.float32).state_dict()
    return {key: unet[key] for key in state if key in unet}


def whole(state: dict[str, Tensor], base: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    return {f"control_model.{key}": tensor for key, tensor in original_names(state, layers).items()}


def difference(state: dict[str, Tensor], base: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    rest = {key: tensor - base[key] if key in base else tensor for key, tensor in state.items()}
    return whole(rest, base, layers) | {"difference": torch.zeros(())}


def control_lora(state: dict[str, Tensor], base: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Factors of full rank over the model's matrices; norms and biases whole."""
    found: dict[str, Tensor] = {"lora_controlnet": torch.zeros(())}
    for key, tensor in state.items():
        last = "controlnet_cond_embedding.blocks.5.x"  # which the names of those after it depend on
        (original,) = original_names({key: tensor, last: tensor}, layers).keys() - {"input_hint_block.12.x"}
        if key in base and tensor.ndim > 1:
            change = (tensor - base[key]).flatten(1).double()
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            found[original.replace(".weight", ".up")] = (u * s).float()
            found[original.replace(".weight", ".down")] = v.float()
        else:
            found[original] = tensor
    return found


@pytest.mark.parametrize("layout", [original_names, whole])
def test_the_authors_layout_equals_diffusers_bit_for_bit(
    source: ModelSource, network: ControlNet, tmp_path: Path, layout: Callable[..., dict[str, Tensor]]
) -> None:
    state = network.state_dict()
    given = original_names(state, 2) if layout is original_names else whole(state, {}, 2)
    found = loaded(write(tmp_path / "net.safetensors", given), source)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("layout", [difference, control_lora])
def test_files_that_build_on_the_models_own_unet(
    source: ModelSource, network: ControlNet, tmp_path: Path, layout: Callable[..., dict[str, Tensor]]
) -> None:
    state = network.state_dict()
    given = layout(state, base_weights(source, state), 2)
    if layout is control_lora:
        del given["time_embed.0.bias"]  # what the file lacks is the U-Net's own
        state = state | {"time_embedding.linear_1.bias": base_weights(source, state)["time_embedding.linear_1.bias"]}
    found = loaded(write(tmp_path / "net.safetensors", given), source)
    assert max(float((found[key] - state[key]).abs().max()) for key in state) < 1e-5


def test_factors_of_another_model_are_refused(source: ModelSource, network: ControlNet, tmp_path: Path) -> None:
    state = network.state_dict()
    given = control_lora(state, base_weights(source, state), 2)
    path = write(tmp_path / "a.safetensors", given | {"input_blocks.1.0.in_layers.2.down": torch.zeros(32, 5)})
    with pytest.raises(BadDataError, match=r"not made for this model: its factors of input_blocks\.1\.0"):
        loaded(path, source)
    path = write(tmp_path / "b.safetensors", given | {"input_blocks.9.stray": torch.zeros(1)})
    with pytest.raises(BadDataError, match=r"of no use here .input_blocks\.9\.stray."):
        loaded(path, source)


def test_a_narrower_network_is_read_from_its_shapes(source: ModelSource, tmp_path: Path) -> None:
    unet = source.config.unet
    narrow = dataclasses.replace(unet, block_channels=(32, 32, 32, 32))
    outputs = (*unet.skip_channels, unet.block_channels[-1])
    from ldmcli.steering_config import ControlConfig

    config = ControlConfig(narrow, outputs, hint_channels=(8, 8, 16, 16))
    network = ControlNet(config)
    path = write(tmp_path / "narrow.safetensors", network.state_dict())
    assert open_control(path, source.config).config == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"context_dim": 768}, "is for Stable Diffusion 1.x with text of 768 numbers a token, and the model is .* 64;"),
        ({"block_channels": (32, 64, 96, 128)}, "has 13 residuals of other widths than this .* model;"),
        ({"layers_per_block": 1}, "has 9 residuals of other widths"),
        ({"in_channels": 9}, "reads 9 latent channels, and the model has 4;"),
    ],
)
def test_a_wrong_pairing_is_one_sentence(
    source: ModelSource, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    other: UNetConfig = dataclasses.replace(source.config.unet, **change)
    path = write(tmp_path / "other.safetensors", random_control(other).state_dict())
    with pytest.raises(BadDataError, match=sentence):
        open_control(path, source.config)


def test_a_network_that_shrinks_pictures_otherwise_is_refused(source: ModelSource, tmp_path: Path) -> None:
    path = write(tmp_path / "f4.safetensors", random_control(source.config.unet, hint=(8, 8, 8)).state_dict())
    with pytest.raises(BadDataError, match="shrinks pictures 4 times, and the model 8"):
        open_control(path, source.config)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight", "a ControlNet-LLLite"),
        ("image_proj.proj.weight ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("controlnet_blocks.0.weight transformer_blocks.0.a", "a Stable Diffusion 3 ControlNet"),
        ("ln_post.weight transformer_layes.0.ln_1.weight", "a T2I-Adapter for styles"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("nothing.known", "no ControlNet that this version knows"),
    ],
)
def test_files_of_other_kinds_are_named(source: ModelSource, tmp_path: Path, key: str, kind: str) -> None:
    path = write(tmp_path / "x.safetensors", {each: torch.zeros(1, 1) for each in key.split()})
    with pytest.raises(BadDataError, match=f"is {kind}"):
        open_control(path, source.config)


def request_for(file: Path, picture: Path, **settings: Any) -> GenerationRequest:
    usual: dict[str, Any] = {"steps": 4, "width": SIZE, "height": SIZE, "guidance_scale": 3.0, "sampler": "ddim"}
    control = {"control_net": str(file), "control_image": str(picture)}
    return GenerationRequest("a whale", "fog", seed=3, **usual | control | settings)


def latents_of(pipeline: Pipeline, request: GenerationRequest) -> Tensor:
    return pipeline.draw(fitted(pipeline, [request])).latents


def without_control(request: GenerationRequest) -> GenerationRequest:
    return dataclasses.replace(request, **dict.fromkeys(CONTROL_FIELDS, ()))


def test_strength_0_is_no_network_bit_for_bit(model_folder: Path, file: Path, picture: Path) -> None:
    session, request = open_session(model_folder), request_for(file, picture, control_strength=0)
    one, other = (next(iter(session.draw([each]))).pixels() for each in (request, without_control(request)))
    assert np.array_equal(one, other)
    assert session.fit(request).controls == ()


def test_a_network_that_no_step_reaches_changes_nothing(pipeline: Pipeline, file: Path, picture: Path) -> None:
    request = request_for(file, picture, control_start=0.9)
    latents_of(pipeline, request)  # the first after one of another size may differ in its last bits
    assert torch.equal(latents_of(pipeline, request), latents_of(pipeline, without_control(request)))


def test_a_network_that_no_step_reaches_is_warned_of(
    model_folder: Path, file: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = open_session(model_folder)
    for start, steps, said in ((0.5, 2, 0), (0.9, 3, 1)):
        remarks.sayings().clear()
        session.fit(request_for(file, picture, control_start=start, steps=steps))
        assert [record.getMessage() for record in caplog.records] == [
            f"{file.stem} changes nothing, for no step lies whole in 0.9 to 1 of 3 steps"
        ] * said


@pytest.mark.parametrize("mode", ["prompt", "control"])
def test_soft_modes_weigh_coarse_residuals_more(pipeline: Pipeline, file: Path, picture: Path, mode: str) -> None:
    """0.825 to the power of the distance from the middle, as the authors' code has it."""
    control = Control("net", "image", strength=2.0, mode=mode)
    assert control.weights(13) == [2 * 0.825 ** (12 - i) for i in range(13)]
    assert control.map_weights(4) == [0.5, 1.24, 1.65, 2.0]
    balanced, soft = (latents_of(pipeline, request_for(file, picture, control_mode=m)) for m in ("balanced", mode))
    assert relative(soft, balanced) > 1e-3


def test_a_picture_does_not_depend_on_its_neighbours(pipeline: Pipeline, file: Path, picture: Path) -> None:
    other = picture.with_name("other.png")
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    requests = [request_for(file, picture), request_for(file, other)]
    together = pipeline.draw(fitted(pipeline, requests)).latents
    for i, request in enumerate(requests):
        assert relative(together[i : i + 1], latents_of(pipeline, request)) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"control_start": 0.5}, {"control_mode": "control"}])
def test_recorded_steps(
    model_folder: Path, file: Path, picture: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: steps with the network and steps without are recorded each, and read what a batch follows."""
    monkeypatch.setattr(policy, "lay_out", lambda module, **_: module)
    plain = load_plainly(model_folder)
    graphed = recording(plain, FakeRecorder())
    for steps in (8, 6):
        request = request_for(file, picture, steps=steps, **settings)
        assert relative(latents_of(graphed, request), latents_of(plain, request)) < 1e-4


def test_prompts_of_different_lengths(pipeline: Pipeline, file: Path, picture: Path) -> None:
    long = dataclasses.replace(
        request_for(file, picture), prompt="a red apple " * 40, on_long_prompt="chunk", control_mode="control"
    )
    assert relative(latents_of(pipeline, long), latents_of(pipeline, without_control(long))) > 1e-3


def test_unguided(pipeline: Pipeline, file: Path, picture: Path) -> None:
    request = request_for(file, picture, guidance_scale=1.0, control_mode="control")
    assert relative(latents_of(pipeline, request), latents_of(pipeline, without_control(request))) > 1e-3


def test_both_networks_are_on_a_narrow_device_together(model_folder: Path, file: Path, picture: Path) -> None:
    session = open_session(model_folder)
    request = request_for(file, picture)
    wanted = next(iter(session.draw([request]))).pixels()
    assert session._drawer is not None
    session._drawer.pipeline.offload()
    for _ in range(2):
        assert np.array_equal(next(iter(session.draw([request]))).pixels(), wanted)


def test_16_bits(model_folder: Path, file: Path, picture: Path) -> None:
    request = request_for(file, picture)
    wide, narrow = (latents_of(load(model_folder, dtype), request) for dtype in ("fp32", "bf16"))
    assert relative(narrow, wide) < 0.2


def test_a_second_pass_follows_the_picture_too(pipeline: Pipeline, file: Path, picture: Path) -> None:
    request = request_for(file, picture, hires="1.5", hires_steps=2, hires_strength=0.7)
    late = dataclasses.replace(request, control_start=0.5)
    found = [latents_of(pipeline, each) for each in (request, late, without_control(request))]
    assert found[0].shape == (1, 4, 12, 12)
    assert relative(found[0], found[2]) > 1e-3
    assert relative(found[1], found[2]) > 1e-3


def test_the_drawn_part_of_a_picture_follows_the_same_part(pipeline: Pipeline, file: Path, picture: Path) -> None:
    """With --inpaint-area masked, as diffusers crops what is followed."""
    from ldmcli.images.canvas import canvas_of
    from ldmcli.images.control_image import control_picture

    mask = picture.with_name("mask.png")
    Image.new("L", (SIZE, SIZE)).save(mask)
    spot = Image.open(mask)
    spot.paste(255, (10, 20, 26, 36))
    spot.save(mask)
    request = request_for(file, picture, image=str(picture), mask=str(mask), inpaint_area="masked", mask_padding=4)
    (one,) = fitted(pipeline, [request])
    canvas = canvas_of(one)
    found = control_picture(one, one.controls[0], canvas, 3)
    assert np.array_equal(found, canvas.pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_an_adapter_takes_sizes_that_its_blocks_do_not_divide(source: ModelSource) -> None:
    from ldmcli.networks.t2i_adapter import T2IAdapter
    from ldmcli.steering_config import AdapterConfig

    adapter = T2IAdapter(AdapterConfig((8, 8, 16, 16), unshuffle=16, halving=(2,)))
    assert [tuple(each.shape[2:]) for each in adapter.read(torch.rand(1, 3, 72, 40))] == [
        (5, 3),
        (5, 3),
        (3, 2),
        (3, 2),
    ]


@given(
    st.integers(1, 24), st.integers(1, 24), st.booleans(), st.integers(0, 400), st.integers(0, 400), st.integers(0, 99)
)
def test_edges_are_opencvs(height: int, width: int, grey: bool, one: int, other: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8)
    pixels = cv2.GaussianBlur(pixels, (0, 0), 0.5 + seed % 3)
    low, high = min(one, other), max(one, other)
    assert np.array_equal(canny(pixels, low, high), cv2.Canny(pixels, low, high))


def test_canny_of_the_command_line(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (40, 31, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    result = ldm_here("canny", tmp_path / "noise.png", "-o", tmp_path / "edges.png", "--thresholds", "300,600")
    assert result.paths == [tmp_path / "edges.png"]
    edges = pixels(tmp_path / "edges.png")
    assert np.array_equal(edges, np.repeat(cv2.Canny(noise, 300, 600)[..., None], 3, 2))
    assert ldm_here("canny", tmp_path / "noise.png", "-o", tmp_path / "out/").paths == [tmp_path / "out" / "noise.png"]
    assert_refused(ldm_here("canny", tmp_path / "noise.png", "-o", tmp_path / "x.png", "--thresholds", "9,1"), 2, "9,1")


@pytest.mark.parametrize(
    ("name", "value", "entries"),
    [
        ("control_strength", 0.5, (0.5,)),
        ("control_strength", "0.5; 1", (0.5, 1.0)),
        ("control_strength", [1, 2], (1.0, 2.0)),
        ("control_net", "a.safetensors", ("a.safetensors",)),
        ("canny", True, ("100,200",)),
        ("canny", [50, 80], ("50,80",)),
        ("canny", "off;10:20", ("off", "10,20")),
        ("control_image", b"png", (b"png",)),
    ],
)
def test_entries(name: str, value: Any, entries: tuple[Any, ...]) -> None:
    assert read_control(name, value) == entries
    assert getattr(GenerationRequest("a", **{name: value}), name) == entries


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"control_net": "n"}, "control_net has no control_image"),
        ({"control_image": "i"}, "control_image is for a request with a control_net"),
        ({"canny": True}, "canny is for a request with a control_net"),
        (
            {"control_net": ["n", "m"], "control_image": "i", "control_strength": [1, 1, 1]},
            "control_strength has 3 entries and control_net 2; give one for all, or one for each",
        ),
        ({"control_net": "n", "control_image": "i", "control_end": 0}, "control_start 0 is not before control_end 0"),
        ({"control_net": "n", "control_image": "i", "control_type": "depth"}, "net follows one type of picture"),
        ({"control_net": "n", "control_image": "i", "control_type": "inpaint"}, "for a picture with a mask"),
    ],
)
def test_what_cannot_be_meant(
    model_folder: Path, file: Path, picture: Path, fields: dict[str, Any], sentence: str
) -> None:
    real = {"n": str(file), "m": str(file), "i": str(picture)}
    given = {
        name: [real.get(one, one) for one in value] if isinstance(value, list) else real.get(str(value), value)
        for name, value in fields.items()
    }
    with pytest.raises(UsageError, match=sentence):
        open_session(model_folder).fit(GenerationRequest("a", width=SIZE, height=SIZE, **given))


def test_a_file_whose_name_says_nothing_is_called_as_its_folder(
    source: ModelSource, file: Path, tmp_path: Path
) -> None:
    for name in ("model", "diffusion_pytorch_model", "depth"):
        path = tmp_path / "edges" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(file)
        assert open_control(path, source.config).name == ("depth" if name == "depth" else "edges")


@pytest.mark.parametrize("value", [-1, 11, "x", float("nan"), True, None, [0.5, "y"]])
def test_strengths_that_are_none(value: Any) -> None:
    with pytest.raises(UsageError, match=r"control_strength .* is not a number from 0 to 10"):
        GenerationRequest("a", control_strength=value)


@pytest.fixture(scope="module")
def tiny_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = open_model(tiny_model()).config
    hint = (4, 4, 8, 8)[: config.vae.factor.bit_length()]
    network = random_control(config.unet, hint=hint)
    return write(tmp_path_factory.mktemp("tiny") / "edges.safetensors", network.state_dict())


def test_the_record_says_what_steered_and_repeats_it(tiny_net: Path, picture: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    drawing = ("txt2img", "-m", tiny_model(), "--dtype", "fp32", "-s", "1", "--steps", "2", "-W", "32", "-H", "32")
    control = ("--control-net", tiny_net, "--control-image", picture, "--canny", "--control-strength", "0.5")
    assert ldm_here(*drawing, *control, "a house", "-o", first).code == 0
    parameters = read_parameters(first) or ""
    assert 'ControlNet 0: "Module: canny, Model: edges [' in parameters
    assert "Weight: 0.5, Resize Mode: Just Resize, Threshold A: 100, Threshold B: 200" in parameters
    record = read_record(first)
    assert record["request"]["control_net"] == [str(tiny_net)]
    assert record["inputs"].keys() == {"control_net:0", "control_image:0"}
    assert ldm_here("txt2img", "--from-image", first, "-o", again).code == 0
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(_drawn(drawing, "a house", tmp_path / "c.png")))


def _drawn(drawing: tuple[Any, ...], prompt: str, path: Path) -> Path:
    assert ldm_here(*drawing, prompt, "-o", path).code == 0
    return path


def test_a_picture_whose_network_is_gone_or_changed(tiny_net: Path, picture: Path, tmp_path: Path) -> None:
    net, hint = tmp_path / "net.safetensors", tmp_path / "hint.png"
    net.write_bytes(tiny_net.read_bytes())
    hint.write_bytes(picture.read_bytes())
    drawing = ("txt2img", "-m", tiny_model(), "--dtype", "fp32", "--steps", "1", "-W", "32", "-H", "32")
    drawn = ("--control-net", net, "--control-image", hint, "a house", "-o", tmp_path / "a.png")
    assert ldm_here(*drawing, *drawn).code == 0
    Image.new("RGB", (9, 9)).save(hint)
    said = ldm_here("txt2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "b.png").err
    assert "control_image" in said
    assert "not the one the picture was made with" in said
    save_file({key: tensor + 1 for key, tensor in load_file(net).items()}, net)
    hint.write_bytes(picture.read_bytes())
    said = ldm_here("txt2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "b2.png").err
    assert f"the network {net} is not the one the picture was made with" in said
    hint.unlink()
    result = ldm_here("txt2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "c.png")
    assert_refused(result, 66, "control-image")
    net.unlink()
    hint.write_bytes(picture.read_bytes())
    assert_refused(ldm_here("txt2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "c.png"), 66, "net")


def test_rows_name_networks_and_pictures_from_their_file_on(tiny_net: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "hint.png").write_bytes(picture.read_bytes())
    rows = [
        {"prompt": "a", "control_image": "hint.png"},
        {"prompt": "b", "control_image": ["hint.png"], "control_strength": 0.5, "canny": True},
        {"prompt": "c", "control_image": "nothing.png"},
        {"prompt": "d", "control_image": "hint.png", "control_mode": "wild"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("-m", tiny_model(), "--dtype", "fp32", "--steps", "1", "-W", "32", "-H", "32", "--control-net", tiny_net)
    result = ldm_here("batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out", *common)
    assert result.code == 3
    assert len(result.paths) == 2
    assert "nothing.png does not exist" in result.err
    assert "control_mode 'wild' is not known" in result.err
    assert read_record(result.paths[1])["request"]["canny"] == ["100,200"]
    (tmp_path / "hint.png").write_bytes(b"other")
    assert ldm_here("batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out", *common).code == 65


def test_info(tiny_net: Path) -> None:
    facts = json.loads(ldm_here("info", "--json", tiny_net).out)
    assert facts["is"] == "ControlNet"
    assert facts["residuals"] > 3


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "cut off": lambda net: net.read_bytes()[:-1000],
    "nothing": lambda net: b"",
    "no blocks": lambda net: empty_tensors({"input_hint_block.0.weight": (16, 3, 3, 3)}),
    "a shape of zeros": lambda net: empty_tensors(
        {"controlnet_cond_embedding.conv_in.weight": (0, 3, 3, 3), "controlnet_mid_block.weight": (0,)}
    ),
    "thousands of blocks": lambda net: empty_tensors(
        {"input_hint_block.0.weight": (0,), **{f"input_blocks.{i}.0.op.weight": (0,) for i in range(5000)}}
    ),
    "an adapter of nothing": lambda net: empty_tensors({"body.0.block1.weight": (0,), "conv_in.weight": (0, 0)}),
    "one tensor": lambda net: empty_tensors({"task_embedding": (0,), "control_add_embedding.linear_1.weight": (0,)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind: str, tiny_net: Path, picture: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(HOSTILE[kind](tiny_net))
    result = ldm(
        "txt2img", "-m", tiny_model(), "a", "--control-net", path, "--control-image", picture, "-o", tmp_path / "x.png"
    )
    assert_refused(result, 65, "net.safetensors")


def test_hostile_pictures(tiny_net: Path, tmp_path: Path) -> None:
    path = tmp_path / "hint.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nand more")
    result = ldm(
        "txt2img", "-m", tiny_model(), "a", "--control-net", tiny_net, "--control-image", path, "-o", tmp_path / "x.png"
    )
    assert_refused(result, 65, "hint.png")


def test_python(tiny_net: Path, picture: Path) -> None:
    request = GenerationRequest(
        "a", steps=1, width=32, height=32, control_net=tiny_net, control_image=picture.read_bytes()
    )
    with Session(ModelSpec(str(tiny_model())), RuntimeSpec("cpu", "fp32")) as session:
        assert next(iter(session.draw([request]))).pixels().shape == (32, 32, 3)


def test_the_embedded_network_brings_things_to_its_silhouette(tmp_path: Path) -> None:
    """Two corners of the picture: what is drawn stands where the silhouette does."""
    found = []
    for name, box in (("low", (2, 26, 36, 60)), ("high", (28, 4, 62, 38))):
        hint = Image.new("L", (64, 64))
        ImageDraw.Draw(hint).ellipse(box, fill=255)
        hint.save(tmp_path / f"{name}.png")
        request = GenerationRequest(
            "an orange on a blue background", seed=3, steps=10, control_net="silhouette",
            control_image=str(tmp_path / f"{name}.png"),
        )  # fmt: skip
        with Session(ModelSpec(), RuntimeSpec("cpu", "fp32")) as session:
            drawn = next(iter(session.draw([request]))).pixels().astype(int)
        fruit = drawn[..., 0] > drawn[..., 2]  # more red than blue
        inside = np.asarray(hint) > 127
        found.append((fruit & inside).sum() / (fruit | inside).sum())
    assert min(found) > 0.7
