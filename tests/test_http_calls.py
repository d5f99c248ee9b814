"""Calls over HTTP that are hostile, wrong or unusual, against a server in this process that rarely needs to draw."""

import base64
import contextlib
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_support import chunk, pixels, tiny_model, until
from http_support import RUNTIME, call, connected, serving
from paper_models import class_map, small, write_model
from PIL import Image

from ldmcli import GenerationRequest, ModelSpec, Session
from ldmcli.errors import UsageError
from ldmcli.serving.http import limits, listening
from ldmcli.serving.http.a1111_fields import read_asked
from ldmcli.serving.http.asked import Asked
from ldmcli.serving.http.limits import Refused
from ldmcli.serving.http.multipart import read_form
from ldmcli.serving.http.openai_fields import read_edit, read_generation
from ldmcli.serving.jobs import Busy
from ldmcli.serving.work import Work

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
TOKEN = "correct-horse-battery"


def png(width: int = 16, height: int = 16, mode: str = "RGB", colour: Any = 128, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), colour).save(file, kind)
    return file.getvalue()


PNG = base64.b64encode(png()).decode()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tiny_model(), lora_dir=tmp_path_factory.mktemp("loras")) as address:
        yield address


def asked(given: dict[str, Any], *, on_image: bool = False) -> Asked:
    return read_asked(given, on_image=on_image)


# ---- fields ----


def test_what_clients_send_by_default_is_drawn_as_they_mean_it() -> None:
    webui = {
        "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
        "hr_checkpoint_name": None, "hr_sampler_name": None, "hr_prompt": "", "denoising_strength": 0.7,
        "firstphase_width": 0, "prompt": "a cat", "styles": [], "seed": 5, "subseed": -1, "subseed_strength": 0.0,
        "seed_resize_from_h": 0, "batch_size": 2, "n_iter": 2, "steps": 20, "cfg_scale": 7.0, "width": 512,
        "height": 768, "restore_faces": False, "tiling": False, "do_not_save_samples": False, "negative_prompt": "dog",
        "eta": 1.0, "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
        "override_settings_restore_afterwards": True, "sampler_name": "Euler a", "scheduler": "automatic",
        "sampler_index": "Euler a", "script_name": None, "script_args": [], "send_images": True, "save_images": False,
        "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}},
    }  # fmt: skip
    found = asked(webui)
    first = found.requests[0]
    assert [request.seed for request in found.requests] == [5, 6, 7, 8]
    assert (first.prompt, first.negative_prompt, first.steps, first.guidance_scale) == ("a cat", "dog", 20, 7.0)
    assert (first.width, first.height, first.sampler, first.hires) == (512, 768, "euler-a", None)
    assert first.prompt_syntax == "weighted"
    assert found.warnings == []


def test_what_is_left_out_is_the_models_own() -> None:
    first = asked({"prompt": "a cat", "steps": None}).requests[0]
    assert (first.steps, first.guidance_scale, first.width, first.sampler) == (None, None, None, None)


@pytest.mark.parametrize(
    ("name", "scheduler", "found"),
    [
        ("Euler", "", ("euler", "normal")),
        ("euler a", "Automatic", ("euler-a", "normal")),
        ("DPM++ 2M Karras", None, ("dpmpp-2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp-2m", "karras")),
        ("DPM++ 2M", "karras", ("dpmpp-2m", "karras")),
        ("dpmpp_2m_sde", "SGM Uniform", ("dpmpp-2m-sde", "sgm_uniform")),
        ("DPM++ 2M SDE", None, ("dpmpp-2m-sde", "exponential")),
        ("k_euler_a", "", ("euler-a", "normal")),
        ("UniPC", "", ("unipc", None)),
    ],
)
def test_samplers_have_the_names_they_have_there(
    name: str, scheduler: str | None, found: tuple[str, str | None]
) -> None:
    first = asked({"prompt": "", "sampler_name": name, "scheduler": scheduler}).requests[0]
    assert (first.sampler, first.schedule) == found


def test_a_second_pass_has_its_fields() -> None:
    first = asked({"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Lanczos", "hr_second_pass_steps": 7}).requests[0]
    assert (first.hires, first.hires_upscaler, first.hires_steps, first.hires_strength) == ("1.5", "lanczos", 7, 0.75)
    sized = {"enable_hr": True, "hr_resize_x": 96, "width": 64, "height": 32, "denoising_strength": 0.5}
    assert asked(sized).requests[0].hires == "96x48"


def test_a_mask_has_the_defaults_it_has_there() -> None:
    given = {"init_images": [f"data:image/png;base64,{PNG}"], "mask": PNG}
    first = asked(given, on_image=True).requests[0]
    assert (first.strength, first.mask_blur, first.masked_content) == (None, 4.0, "fill")
    assert (first.inpaint_area, first.mask_padding, first.invert_mask, first.resize) == ("masked", 0, False, "stretch")
    assert (first.image, first.mask) == (base64.b64decode(PNG), base64.b64decode(PNG))


def test_settings_for_one_call_choose_model_and_clip_skip() -> None:
    settings = {"sd_model_checkpoint": "tiny [abc]", "CLIP_stop_at_last_layers": 2, "samples_save": True}
    found = asked({"override_settings": settings})
    assert (found.model, found.requests[0].clip_skip, found.keeps_model) == ("tiny [abc]", 2, False)
    assert asked({"override_settings": settings, "override_settings_restore_afterwards": False}).keeps_model


def test_clip_skip_counts_layers_as_it_does_there() -> None:
    found = asked({"override_settings": {"CLIP_stop_at_last_layers": 2}})
    base, large = (
        SimpleNamespace(family=family, unet=SimpleNamespace(reads=""), guidable=True)
        for family in ("Stable Diffusion 1", "Stable Diffusion XL base")
    )
    assert found.adapted(found.requests[0], base).clip_skip == 2
    assert found.adapted(found.requests[0], large).clip_skip == 1


def test_models_that_edit_pictures_get_their_own_guidance(caplog: pytest.LogCaptureFixture) -> None:
    found = asked({"init_images": [PNG], "image_cfg_scale": 1.2, "denoising_strength": 0.75}, on_image=True)
    edits, draws = (
        SimpleNamespace(family="", unet=SimpleNamespace(reads=reads), guidable=True) for reads in ("image", "")
    )
    edited, drawn = (found.adapted(found.requests[0], config) for config in (edits, draws))
    assert (edited.strength, edited.image_guidance_scale) == (None, 1.2)
    assert (drawn.strength, drawn.image_guidance_scale) == (0.75, None)
    assert "denoising_strength changes nothing" in caplog.text


def test_what_is_not_known_is_warned_of() -> None:
    assert asked({"prompt": "", "distilled_cfg_scale": 3.5}).warnings == [
        "distilled_cfg_scale is not known here, and changes nothing"
    ]


def test_fields_that_are_not_known_are_each_or_together_warned_of() -> None:
    warnings = asked({"prompt": ""} | {f"x{i}": 1 for i in range(23)}).warnings
    assert len(warnings) == 21
    assert warnings[-1] == "3 more fields are not known here, and change nothing"


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ({"guidance_scale": 2}, "cfg_scale is"), ({"strength": 0.5}, "denoising_strength is"),
        ({"hires": "2"}, "enable_hr is"), ({"loras": ["a"]}, "<lora:NAME:WEIGHT> in the prompt is"),
        ({"crop_left": 8}, "calls."), ({"control_net": ["a"]}, "calls."), ({"depth": "a.png"}, "calls."),
    ],
)  # fmt: skip
def test_this_programs_own_names_are_refused_and_lead_to_theirs(given: dict[str, Any], instead: str) -> None:
    with pytest.raises(Refused, match=instead) as refused:
        asked(given)
    assert refused.value.field == next(iter(given))
    assert asked(dict.fromkeys(given)).warnings == []  # null is left out


def test_fields_of_the_other_call_change_nothing_where_they_are_off() -> None:
    both = {"init_images": [], "mask": None, "resize_mode": 1, "inpainting_fill": 2, "mask_blur": 9}
    assert asked({"prompt": ""} | both).warnings == []
    both = {"init_images": [PNG], "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_cfg": 3}
    assert asked(both, on_image=True).warnings == []


@pytest.mark.parametrize("sends", [asked, lambda given: read_generation(given)[0]], ids=["a1111", "openai"])
def test_what_models_read_that_read_no_prompts_can_be_sent(sends: Any) -> None:
    boxes = [{"label": 3, "box": [0.1, 0, 0.5, 1]}]
    assert sends({"label": 207}).requests[0].label == 207
    assert sends({"label": "tree frog"}).requests[0].label == "tree frog"
    for layout in (boxes, json.dumps(boxes)):
        assert sends({"layout": layout}).requests[0].layout == ((3, 0.1, 0.0, 0.5, 1.0),)
    assert sends({"map": f"data:image/png;base64,{PNG}"}).requests[0].map == png()
    wrong = {
        "label": ["", " ", -1, 1.5, True, [1], "x" * 10_000, 1 << 40],
        "layout": ["/etc/passwd", "boxes.json", "[" * 5000, 7, {"label": 1}, [[1, 2]], [[0, 0, 0, 2, 2]], [[]] * 1001],
        "map": ["/etc/passwd", "http://127.0.0.1/map.png", "", 7, base64.b64encode(bomb()).decode()],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(Refused) as refused:
                sends({name: value})
            assert refused.value.field == name


@pytest.mark.parametrize("sends", [asked, lambda given: read_generation(given)[0]], ids=["a1111", "openai"])
def test_files_of_embeddings_are_not_opened_for_clients(sends: Any) -> None:
    with pytest.raises(Refused) as refused:
        sends({"prompt": "a", "image_embedding": "/etc/passwd"})
    assert "image_embedding" in str(refused.value)


def test_a_form_may_have_what_models_read_that_read_no_prompts() -> None:
    first = read_edit({"label": "3", "layout": "[[3, 0, 0, 1, 1]]"}, {"image": [png()], "map": [png()]})[0].requests[0]
    assert (first.label, first.layout, first.map) == (3, ((3, 0.0, 0.0, 1.0, 1.0),), png())
    assert read_edit({}, {"image": [png()], "map": [png()]})[0].requests[0].map == png()
    for given, maps in (({}, [png(), png()]), ({"map": PNG}, [png()])):
        with pytest.raises(Refused, match="map is given twice"):
            read_edit(given, {"image": [png()], "map": maps})


def test_guidance_that_clients_always_send_is_left_out_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    found = asked({"map": PNG, "cfg_scale": 7})
    config = SimpleNamespace(family="", unet=SimpleNamespace(reads=""), guidable=False)
    assert found.adapted(found.requests[0], config).guidance_scale is None
    assert "cfg_scale changes nothing" in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {"tiling": True}, {"restore_faces": True}, {"styles": ["x"]}, {"subseed_strength": 0.5}, {"s_churn": 1},
        {"script_name": "x/y/z plot"}, {"refiner_checkpoint": "xl"}, {"sampler_name": "Euler a", "eta": 0.5},
        {"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, {"alwayson_scripts": {"x": {"args": [1]}}},
        {"override_settings": {"sd_vae": "other.pt"}}, {"override_settings": {"whatever": 1}},
        {"enable_hr": True, "hr_prompt": "other"}, {"enable_hr": True, "hr_sampler_name": "DDIM"},
        {"enable_hr": True, "hr_upscaler": "/etc/passwd"}, {"sampler_name": "DPM adaptive"}, {"scheduler": "Turbo"},
        {"seed_resize_from_w": 512}, {"initial_noise_multiplier": 0.9}, {"disable_extra_networks": True},
        {"firstpass_image": PNG}, {"token_merging_ratio": 0.5}, {"controlnet_units": [{}]}, {"init_images": [PNG]},
        {"batch_size": 10, "n_iter": 10}, {"steps": 10_000}, {"prompt": "x" * 40_000}, {"width": 1 << 30},
    ],
)  # fmt: skip
def test_what_would_change_a_picture_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        asked(given)
    assert list(given)[-1].split("_")[0] in str(refused.value).lower().replace("×", "_")


def test_openais_fields_and_those_beyond() -> None:
    given = {
        "prompt": "a cat", "n": 2, "size": "512x768", "quality": "hd", "output_format": "jpeg",
        "output_compression": 50, "seed": 3, "steps": 4, "negative_prompt": "dog", "guidance_scale": 2,
        "sampler": "ddim", "user": "me", "moderation": "low", "stream": True, "partial_images": 2,
    }  # fmt: skip
    found, stream = read_generation(given)
    first = found.requests[0]
    assert stream
    assert found.views == 2
    assert read_generation(given | {"stream": False})[0].views == 0
    assert [request.seed for request in found.requests] == [3, 4]
    assert (first.width, first.height, first.steps, first.guidance_scale, first.sampler) == (512, 768, 4, 2.0, "ddim")
    assert (found.encoding.format, found.encoding.quality) == ("jpeg", 50)
    assert found.warnings == ["quality hd changes nothing; steps does"]
    assert read_generation({"prompt": "", "size": "auto"})[0].requests[0].width is None


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": "url"}, {"background": "transparent"}, {"output_format": "gif"}, {"size": "big"},
        {"size": "0x5"}, {"n": 11}, {"n": 0}, {"n": 1.5}, {"output_compression": 50}, {"foo": 1}, {"image": PNG},
        {"image": "/etc/passwd"}, {"hires_upscaler": "/etc/passwd"}, {"loras": ["/etc/passwd"]}, {"mask": "alpha"},
    ],
)  # fmt: skip
def test_openais_fields_that_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        read_generation({"prompt": "a cat"} | given)
    assert refused.value.field == list(given)[-1]


def test_an_edit_repaints_what_is_transparent() -> None:
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 8, 16))
    file = io.BytesIO()
    mask.save(file, "PNG")
    found, _ = read_edit({"prompt": "a cat"}, {"image": [png()], "mask": [file.getvalue()]})
    first = found.requests[0]
    assert isinstance(first.mask, bytes)
    grey = Image.open(io.BytesIO(first.mask))
    assert (grey.mode, grey.getpixel((2, 2)), grey.getpixel((12, 2)), first.strength) == ("L", 255, 0, 1.0)
    assert read_edit({"prompt": "a cat"}, {"image[]": [file.getvalue()]})[0].requests[0].mask == "alpha"
    assert read_edit({"prompt": "a cat", "strength": "0.5"}, {"image": [png()]})[0].requests[0].strength == 0.5


def test_forms_are_read_to_the_byte() -> None:
    data = b"\r\n--not the end\r\n\0\xff\r\n"
    body = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na "cat"\r\n'
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\nContent-Type: image/png\r\n\r\n'
        + data
        + b"\r\n--b--\r\n"
    )
    assert read_form(body, "multipart/form-data; boundary=b") == ({"prompt": 'a "cat"'}, {"image": [data]})
    for wrong in (
        body[:-20],
        body.replace(b'name="prompt"', b""),
        b"",
        b"--",
        body * 40,
        body.replace(b"cat", b"\xff"),
    ):
        with pytest.raises(Refused):
            read_form(wrong, "multipart/form-data; boundary=b")
    with pytest.raises(Refused):
        read_form(body, "multipart/form-data")


# ---- wrong types ----

_WRONG: list[Any] = [[], {}, "x", "", -1, 1e999, 10**400, 1.5, True, [[1]], "1; DROP", "\0", "\ud800"]
_TYPED = (
    "steps", "cfg_scale", "width", "height", "seed", "batch_size", "n_iter", "prompt", "negative_prompt", "eta",
    "sampler_name", "scheduler", "enable_hr", "override_settings", "alwayson_scripts", "init_images", "mask",
    "denoising_strength", "mask_blur", "inpainting_fill", "resize_mode", "send_images",
)  # fmt: skip


@pytest.mark.parametrize("name", _TYPED)
def test_wrong_types_are_refused_and_never_a_fault(name: str) -> None:
    for value in _WRONG:
        given = {"prompt": "", "init_images": [PNG], "mask": PNG} | {name: value}
        for on_image in (False, True):
            with contextlib.suppress(Refused):
                for request in asked(given, on_image=on_image).requests:
                    assert request.steps is None or 1 <= request.steps <= limits.MAX_STEPS


@pytest.mark.parametrize(
    "name", ["prompt", "n", "size", "steps", "seed", "stream", "output_format", "model", "sampler"]
)
def test_wrong_types_for_openai(name: str) -> None:
    for value in _WRONG:
        with contextlib.suppress(Refused):
            assert read_generation({"prompt": "a cat"} | {name: value})[0].requests


# ---- bodies ----


@pytest.mark.parametrize("path", [TXT2IMG, GENERATE, "/sdapi/v1/options", "/sdapi/v1/png-info"])
@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        (b"", (400, 422)),
        (b"{", (400, 422)),
        (b"[]", (400, 422)),
        (b"null", (400, 422)),
        (b"\xff\xfe", (400, 422)),
        (b'{"prompt": NaN}', (400, 422)),
        (b'{"steps": ' + b"9" * 5000 + b"}", (400, 422)),
        (b"[" * 9_000, (400, 422)),
        (b'{"a":' * 2_000 + b"1" + b"}" * 2_000, (400, 422)),
        (json.dumps({f"key{i}": i for i in range(10_000)}).encode(), (413,)),
        (b"[" + b"1," * 100_000 + b"1]", (413,)),
    ],
)
def test_bodies_that_are_no_request(url: str, path: str, body: bytes, statuses: tuple[int, ...]) -> None:
    assert call(url, path, body)[0] in statuses


def test_what_is_repeated_may_hold_any_character(url: str) -> None:
    given = {"prompt": "a", "steps": 1, "width": 16, "height": 16, "zzz\ud800": ["\ud800", "é", 1e300]}
    status, _, answer = call(url, TXT2IMG, given)
    assert (status, answer["parameters"]) == (200, given)
    assert call(url, TXT2IMG, given | {"prompt": "\ud800"})[0] == 422
    assert call(url, TXT2IMG, b'{"zzz": 1e999}')[0] == 422


def test_a_body_of_100_megabytes_is_refused_and_not_kept(url: str) -> None:
    status, _, answer = call(url, GENERATE, b'{"prompt": "' + b"x" * (100 << 20) + b'"}')
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    assert b"ldm_http_held_bytes 0" in call(url, "/metrics")[2]


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(limits, "MAX_HELD", 1000)
    status, headers, _ = call(url, GENERATE, {"prompt": "x" * 2000})
    assert (status, headers["retry-after"]) == (503, "5")
    assert b"ldm_http_held_bytes 0" in call(url, "/metrics")[2]


def test_heads_and_bodies_that_never_end_are_given_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(listening, "_HEAD_S", 0.5)
    monkeypatch.setattr(limits, "BODY_S", 0.5)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    silent, slow, stuck = connected(url), connected(url), connected(url)
    slow.sendall(head.encode())
    stuck.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert b" 408 " in stuck.recv(1000)
    for each in (silent, slow, stuck):
        with each:
            assert each.recv(1000) == b"" or each.recv(1000) == b""


def test_a_client_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(listening, "_UNREAD_S", 0.5)
    body = json.dumps({"prompt": "", "steps": 1, "width": 16, "height": 16, "echoed": "x" * (24 << 20)}).encode()
    head = f"POST {TXT2IMG} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(url) as client:
        ends = [f"{port:04X}" for port in (client.getpeername()[1], client.getsockname()[1])]

        def given_up() -> bool:
            rows = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            states = [state for *both, state in rows if [each.partition(":")[2] for each in both] == ends]
            return states != ["01"]  # the server's end is established no more

        assert not given_up()
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(given_up, "the end")


@pytest.mark.parametrize("head", [b"x: " + b"y" * (1 << 20), b"x: y\r\n" * 50_000])
def test_heads_without_end_are_refused(url: str, head: bytes) -> None:
    with connected(url) as client:
        try:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n")
            answer = client.recv(1000)
        except OSError:
            answer = b""
    assert b" 200 " not in answer
    assert call(url, "/healthz")[0] == 200


# ---- pictures that are sent ----


def bomb() -> bytes:
    """A small PNG that says it has 10^10 pixels."""
    head = (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "sent",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "../../etc/passwd",
        base64.b64encode(b"no picture").decode(),
        base64.b64encode(bomb()).decode(),
        base64.b64encode(png(5000, 5000, "1", 1)).decode(),
        base64.b64encode(png()[:50]).decode(),
        base64.b64encode(png(kind="TIFF")).decode(),
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        "",
        7,
    ],
)
def test_pictures_that_are_none_are_refused(url: str, sent: Any) -> None:
    for given in ({"init_images": [sent]}, {"init_images": [PNG], "mask": sent or 7}):
        assert call(url, IMG2IMG, {"prompt": "a cat", "width": 16, "height": 16} | given)[0] == 422
    assert call(url, "/sdapi/v1/png-info", {"image": sent})[0] == 422


def test_no_address_is_fetched(url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        assert call(url, IMG2IMG, {"init_images": [address]})[0] == 422
        assert call(url, GENERATE, {"prompt": "a cat", "image": address})[0] == 400
        trap.settimeout(0.2)
        with pytest.raises(TimeoutError):
            trap.accept()


@pytest.mark.parametrize("name", ["/etc/passwd", "../tiny", "org/model", "tiny/../tiny", "C:\\x", "x" * 400])
def test_only_models_that_are_served_can_be_named(url: str, name: str) -> None:
    status, _, answer = call(url, GENERATE, {"prompt": "a cat", "model": name})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert call(url, TXT2IMG, {"override_settings": {"sd_model_checkpoint": name}})[0] == 404
    assert call(url, "/sdapi/v1/options", {"sd_model_checkpoint": name})[0] == 404


def test_loras_are_only_found_in_their_folder(url: str, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"")
    for name in (tmp_path / "other.safetensors", tmp_path / "other", "../other", "org/other"):
        status, _, answer = call(url, TXT2IMG, {"prompt": f"a cat <lora:{name}:1>", "width": 16, "height": 16})
        assert status == 422
        assert "names no LoRA" in answer["detail"]


@pytest.mark.parametrize(
    "given",
    [
        {"width": 4096, "height": 4096},
        {"width": 2048, "height": 2048, "n_iter": 32},
        {"width": 16, "height": 16, "enable_hr": True, "hr_resize_x": 8192, "hr_resize_y": 8192},
        {"width": 1024, "height": 1024, "enable_hr": True, "hr_scale": 4},
        {"width": 17, "height": 16},
    ],
)
def test_sizes_are_limited(url: str, given: dict[str, Any]) -> None:
    assert call(url, TXT2IMG, {"prompt": "a cat"} | given)[0] == 422


# ---- models that read no prompts ----


@pytest.mark.parametrize("kind", ["label", "layout", "map"])
def test_models_that_read_no_prompts_draw_what_is_sent(kind: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(class_map(16, 16, 5)).save(file, "PNG")
    name, sent, meant = {
        "label": ("cin256-v2", "tench", 1),
        "layout": ("layout2img", [[3, 0.1, 0, 0.5, 1]], ((3, 0.1, 0.0, 0.5, 1.0),)),
        "map": ("semantic", base64.b64encode(file.getvalue()).decode(), file.getvalue()),
    }[kind]
    model = tmp_path / "model.safetensors"
    write_model(model, small(name))
    model.with_suffix(".classes.txt").write_text("goldfish\ntench\n")
    session = Session(ModelSpec(str(model)), RUNTIME)

    def drawn(**fields: Any) -> list[Any]:
        (picture,) = session.draw(
            [GenerationRequest("", seed=1, steps=2, width=16, height=16, **{kind: meant} | fields)]
        )
        return pixels(session.encode(picture)).tolist()

    with serving(model) as url:
        status, _, answer = call(url, GENERATE, {kind: sent, "seed": 1, "steps": 2, "size": "16x16"})
        assert status == 200, answer
        assert pixels(base64.b64decode(answer["data"][0]["b64_json"])).tolist() == drawn()
        size = {"width": 16, "height": 16, "steps": 2, "seed": 1, "sampler_name": "DDIM", "eta": 0}
        status, _, answer = call(url, TXT2IMG, {kind: sent, "prompt": "", "cfg_scale": 7.0} | size)
        assert status == 200, answer
        guidance = 7.0 if kind == "label" else None
        info = json.loads(answer["info"])
        assert pixels(base64.b64decode(answer["images"][0])).tolist() == drawn(guidance_scale=guidance)
        assert [one.partition(" ")[0] for one in info["warnings"]] == ([] if guidance else ["cfg_scale"])
        assert "map" not in answer["parameters"] or answer["parameters"]["map"] is None
        for path, given in ((GENERATE, {"size": "16x16"}), (TXT2IMG, size)):
            status, _, answer = call(url, path, {kind: sent, "prompt": "a fox", **given})
            assert status in (400, 422)
            assert "prompt is not for this model" in str(answer)


def test_models_that_read_prompts_refuse_by_name_what_they_do_not_read(url: str) -> None:
    for name, sent in (("label", 1), ("layout", [[1, 0, 0, 1, 1]]), ("map", PNG)):
        for path in (GENERATE, TXT2IMG):
            status, _, answer = call(url, path, {"prompt": "a fox", name: sent})
            assert status in (400, 422)
            assert f"{name} is not for this model" in str(answer)


# ---- who may come in ----


def test_pages_of_other_sites_are_kept_out(url: str) -> None:
    host = url.removeprefix("http://")
    assert call(url, "/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert call(url, "/healthz", headers={"Host": f"evil.example:{host.partition(':')[2]}"})[0] == 403
    assert call(url, "/v1/models", headers={"Host": "localhost:1"})[0] == 200
    assert call(url, "/v1/models", headers={"Origin": "https://evil.example"})[0] == 403
    assert call(url, "/v1/models", headers={"Origin": "null"})[0] == 403
    assert call(url, "/v1/models", headers={"Origin": url})[0] == 200
    assert call(url, "/sdapi/v1/interrupt", headers={"Origin": "https://evil.example"}, method="POST")[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"):
        assert call(url, GENERATE, b'{"prompt": "a cat"}', {"Content-Type": kind})[0] == 415
    assert call(url, EDIT, {"prompt": "a cat"})[0] == 415
    status, headers, _ = call(url, GENERATE, headers={"Origin": "https://evil.example"}, method="OPTIONS")
    assert status in (403, 405)
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_token_opens_and_nothing_else_does(caplog: pytest.LogCaptureFixture) -> None:
    basic = base64.b64encode(f"user:{TOKEN}".encode()).decode()
    with caplog.at_level(logging.DEBUG), serving(tiny_model(), token=TOKEN) as url:
        for given in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Basic {basic}"):
            assert call(url, "/v1/models", headers={"Authorization": given})[0] == 200
        wrong = [
            "",
            "Bearer",
            "Bearer x",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"Basic {TOKEN}",
            "Basic !",
            TOKEN,
        ]
        for given in wrong:
            for path in ("/v1/models", "/sdapi/v1/options", "/metrics", "/nothing"):
                status, headers, _ = call(url, path, headers={"Authorization": given})
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert call(url, "/healthz")[0] == 200
        assert call(url, "/v1/models")[2]["error"]["code"] == "invalid_api_key"
    assert TOKEN not in caplog.text
    assert basic not in caplog.text


@pytest.mark.parametrize("token", [None, "", "short", "has a space in it", "ünïcödé-token"])
def test_other_machines_need_a_sound_token(token: str | None) -> None:
    with pytest.raises(UsageError):
        listening.check_token("0.0.0.0", token)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7860", ("127.0.0.1", 7860)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:9", ("::1", 9)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert listening.parse_address(text) == found


@pytest.mark.parametrize("text", ["", ":", "host:", ":80", "host:port", "1:99999", "-1", "٧"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        listening.parse_address(text)


# ---- the rest ----


def test_paths_that_are_none_and_methods_that_do_not_go(url: str) -> None:
    assert call(url, "/v1/nothing")[0] == 404
    assert call(url, "/../../etc/passwd")[0] == 404
    assert call(url, "/v1/models/..%2f..%2fetc%2fpasswd")[2]["error"]["code"] == "model_not_found"
    assert call(url, GENERATE)[0] == 405
    assert call(url, "/v1/models", {})[0] == 405


def test_a_full_queue_says_when_to_come_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_named: object) -> None:
        raise Busy(6.2)

    monkeypatch.setattr(Work, "submit", full)
    for path in (GENERATE, TXT2IMG):
        status, headers, _ = call(url, path, {"prompt": "a cat", "steps": 1})
        assert (status, headers["retry-after"]) == (503, "7")


def test_a_fault_is_said_without_its_inside(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object, **_named: object) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(Work, "submit", broken)
    status, _, answer = call(url, GENERATE, {"prompt": "a cat"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "secret" not in str(answer)


def test_an_interrupt_ends_the_clients_call_and_gives_what_there_is(url: str) -> None:
    answers = []
    given = {"prompt": "a cat", "steps": 200, "n_iter": 30, "width": 16, "height": 16, "sampler_name": "Euler"}
    thread = threading.Thread(target=lambda: answers.append(call(url, TXT2IMG, given)))
    thread.start()
    until(lambda: call(url, "/sdapi/v1/progress")[2]["progress"], "progress")
    call(url, "/sdapi/v1/interrupt", method="POST")
    thread.join()
    status, _, answer = answers[0]
    assert status == 200
    assert len(answer["images"]) < 30
    assert json.loads(answer["info"])["all_seeds"] == sorted(json.loads(answer["info"])["all_seeds"])
    assert call(url, "/sdapi/v1/progress")[2]["state"]["job_count"] == 0


def test_what_clients_look_at_first_is_there(url: str) -> None:
    for name in ("samplers", "schedulers", "sd-models", "loras", "options", "upscalers", "scripts", "cmd-flags"):
        assert call(url, f"/sdapi/v1/{name}")[0] == 200
    assert call(url, "/sdapi/v1/sd-models")[2][0]["model_name"] == "tiny"
    assert call(url, "/sdapi/v1/options", {"sd_model_checkpoint": "tiny.safetensors [0123456789]"})[0] == 200
    assert call(url, "/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})[0] == 422


def test_a_server_that_ends_tells_who_waits() -> None:
    answers = []
    with serving(tiny_model()) as own:
        given = {"prompt": "a cat", "steps": 200, "n_iter": 30, "width": 16, "height": 16}
        thread = threading.Thread(target=lambda: answers.append(call(own, TXT2IMG, given)))
        thread.start()
        until(lambda: call(own, "/sdapi/v1/progress")[2]["progress"], "progress")
    thread.join()
    assert (answers[0][0], answers[0][2]["detail"]) == (503, "the work was cancelled.")
