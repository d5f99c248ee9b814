"""What clients that people have make of `ldm serve --http`, a process of its own; and many of them at once."""

import base64
import concurrent.futures
import contextlib
import functools
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cli_support import assert_refused, ldm_here, pixels, start, tiny_model, until
from http_support import RUNTIME, call, connected
from test_lora import lora_for

from ldmcli import GenerationRequest, ModelSpec, Session
from ldmcli.images.formats import Encoding

APPLE = "a red apple on a blue background"
CHUNKED = {"on_long_prompt": "chunk"}
WEIGHTED = {**CHUNKED, "prompt_syntax": "weighted"}
EULER_A: dict[str, Any] = {"sampler": "euler-a", "schedule": "normal"}
GENERATE, TXT2IMG = "/v1/images/generations", "/sdapi/v1/txt2img"


class Server(NamedTuple):
    url: str
    process: int

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def memory(self) -> int:
        """Bytes of the process that are in memory."""
        return int(Path(f"/proc/{self.process}/statm").read_text().split()[1]) * 4096

    def counter(self, name: str) -> float:
        text = call(self.url, "/metrics")[2].decode()
        found = re.search(rf"^ldm_{name} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    lora_for(tiny_model(), folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(loras: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the embedded model and of one with random weights, on the CPU in float32."""
    socket = tmp_path_factory.mktemp("serve") / "socket"
    models = ("-m", tiny_model(), "--max-models", "2", "--lora-dir", loras)
    runtime = ("--device", "cpu", "--dtype", "fp32", "--threads", "1")
    process = start("serve", *models, *runtime, "--http", "127.0.0.1:0", env={"LDM_SERVER": str(socket)})
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line.decode())
        if found := re.search(r"http://127\.0\.0\.1:\d+", lines[-1]):
            break
    else:
        pytest.fail("".join(lines))
    yield Server(found[0], process.pid)
    process.terminate()
    process.communicate(timeout=60)


def drawn(
    prompt: str, seed: int, *, model: Path | None = None, encoding: Encoding = Encoding(), **fields: Any
) -> bytes:
    """The file that Python makes of a request."""
    return drawn_together(prompt, [seed], model=model, encoding=encoding, **fields)[0]


def drawn_together(
    prompt: str, seeds: Sequence[int], *, model: Path | None = None, encoding: Encoding = Encoding(), **fields: Any
) -> list[bytes]:
    """The files that Python makes of requests which differ in their seeds, drawn at once."""
    requests = [GenerationRequest(prompt, seed=seed, **fields) for seed in seeds]
    own = _session(model)
    return [own.encode(picture, encoding) for picture in own.draw(requests, batch_size=len(seeds))]


@functools.cache
def _session(model: Path | None, lora_dir: Path | None = None) -> Session:
    return Session(ModelSpec(model and str(model), lora_dir=lora_dir and str(lora_dir)), RUNTIME)


def about(png: bytes) -> dict[str, Any]:
    """What a picture says of itself."""
    from PIL import Image

    return dict(Image.open(io.BytesIO(png)).info)


def masked(box: tuple[int, int, int, int], size: int = 64) -> bytes:
    """A picture that is transparent in a box."""
    from PIL import Image

    picture = Image.new("RGBA", (size, size), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), box)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# ---- OpenAI's client ----


@pytest.fixture(scope="module")
def openai_client(server: Server) -> Any:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_what_python_draws(openai_client: Any) -> None:
    answer = openai_client.images.generate(
        prompt=APPLE, model="tiny-emoji", n=2, size="64x64", extra_body={"seed": 7, "steps": 2}
    )
    assert [image.seed for image in answer.data] == [7, 8]
    assert (answer.size, answer.output_format) == ("64x64", "png")
    wanted = drawn_together(APPLE, (7, 8), steps=2, width=64, height=64, **CHUNKED)
    assert [base64.b64decode(image.b64_json) for image in answer.data] == wanted


def test_openais_client_chooses_model_format_and_all_else(openai_client: Any) -> None:
    extra = {"seed": 1, "steps": 2, "negative_prompt": "b", "guidance_scale": 2.0, "sampler": "DPM++ 2M Karras"}
    answer = openai_client.images.generate(
        prompt="a", model="tiny", output_format="jpeg", output_compression=70, extra_body=extra
    )
    fields = {"steps": 2, "negative_prompt": "b", "guidance_scale": 2.0, "sampler": "dpmpp-2m", "schedule": "karras"}
    wanted = drawn("a", 1, model=tiny_model(), encoding=Encoding("jpeg", 70), **fields, **CHUNKED)
    assert base64.b64decode(answer.data[0].b64_json) == wanted


def test_openais_client_streams(openai_client: Any) -> None:
    stream = openai_client.images.generate(
        prompt="a", model="tiny", n=2, stream=True, extra_body={"seed": 3, "steps": 1}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    wanted = drawn_together("a", (3, 4), model=tiny_model(), steps=1, **CHUNKED)
    assert sorted(base64.b64decode(event.b64_json) for event in events) == sorted(wanted)


def test_openais_client_sees_pictures_grow(openai_client: Any) -> None:
    stream = openai_client.images.generate(
        prompt=APPLE, model="tiny-emoji", n=2, stream=True, partial_images=3, extra_body={"seed": 3, "steps": 12}
    )
    events = list(stream)
    assert {event.size for event in events} == {"64x64"}
    done = [event for event in events if event.type == "image_generation.completed"]
    views = [event for event in events if event.type == "image_generation.partial_image"]
    assert len(done) == 2
    for picture in done:
        own = [event for event in views if event.seed == picture.seed]
        assert [event.partial_image_index for event in own] == [0, 1, 2]
        assert events.index(own[-1]) < events.index(picture)
        off = [np.abs(opened(event).astype(int) - opened(picture)).mean() for event in own]
        assert off[0] > off[2]


def opened(event: Any) -> np.ndarray:
    """The pixels that an event of a stream brings."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))))


def test_openais_client_edits(openai_client: Any) -> None:
    picture = drawn(APPLE, 7, steps=4)
    mask = masked((16, 16, 48, 48))
    answer = openai_client.images.edit(
        image=("apple.png", picture),
        mask=("mask.png", mask),
        prompt="a green apple",
        extra_body={"seed": 2, "steps": 2},
    )
    edited = pixels(base64.b64decode(answer.data[0].b64_json))
    before = pixels(picture)
    inside = (slice(16, 48), slice(16, 48))
    assert (edited[inside] != before[inside]).any()
    changed = (edited != before).any(-1)
    changed[inside] = False
    assert not changed.any()
    whole = openai_client.images.edit(
        image=("apple.png", picture),
        prompt="a green apple",
        model="tiny-emoji",
        extra_body={"seed": 2, "steps": 4, "strength": 0.5},
    )
    assert base64.b64decode(whole.data[0].b64_json) == drawn(
        "a green apple", 2, image=picture, strength=0.5, steps=4, **CHUNKED
    )


def test_openais_client_understands_refusals(openai_client: Any) -> None:
    import openai

    names = [model.id for model in openai_client.models.list()]
    assert names == ["tiny", "tiny-emoji"]
    assert openai_client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.BadRequestError, match="b64_json") as refused:
        openai_client.images.generate(prompt="a", response_format="url")
    assert (refused.value.param, refused.value.type) == ("response_format", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.images.generate(prompt="a", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="multiples of"):
        openai_client.images.generate(prompt="a", model="tiny-emoji", size="63x64")


# ---- webuiapi ----


@pytest.fixture(scope="module")
def webui(server: Server) -> Any:
    webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed")
    client = webuiapi.WebUIApi(host="127.0.0.1", port=server.port, steps=2)
    client.util_set_model("emoji")
    return client


def test_webuiapi_gets_what_python_draws(webui: Any) -> None:
    answer = webui.txt2img(
        prompt=APPLE, negative_prompt="a (dog:1.2)", seed=7, width=64, height=64, batch_size=2, n_iter=2
    )
    assert (answer.info["all_seeds"], answer.info["warnings"]) == ([7, 8, 9, 10], [])
    fields = {"negative_prompt": "a (dog:1.2)", "steps": 2, "guidance_scale": 7.0, **EULER_A}
    files = list(map(base64.b64decode, answer.json["images"]))
    assert files == drawn_together(APPLE, (7, 8, 9, 10), width=64, height=64, **fields, **WEIGHTED)
    assert [about(png)["parameters"] for png in files] == answer.info["infotexts"]
    assert (answer.info["sampler_name"], answer.info["steps"], answer.info["cfg_scale"]) == ("Euler a", 2, 7.0)
    told = webui.png_info(answer.image)
    assert told.info == answer.info["infotexts"][0]
    assert {
        "Prompt": APPLE,
        "Negative prompt": "a (dog:1.2)",
        "Seed": "7",
        "Size": "64x64",
    }.items() <= told.parameters.items()


def test_webuiapi_draws_on_pictures(webui: Any) -> None:
    from PIL import Image

    picture = drawn(APPLE, 7, steps=4)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    file = io.BytesIO()
    mask.save(file, "PNG")
    sent = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(sent, "PNG")
    answer = webui.img2img(
        images=[Image.open(io.BytesIO(picture))], mask_image=mask, prompt="a green apple", seed=3, width=64, height=64,
        denoising_strength=0.6, inpainting_fill=1, inpaint_full_res=False, mask_blur=2, steps=4,
    )  # fmt: skip
    fields = {"strength": 0.6, "masked_content": "original", "inpaint_area": "whole", "mask_blur": 2.0, "steps": 4}
    fields |= {"guidance_scale": 7.0, **EULER_A, "width": 64, "height": 64, "mask_padding": 0}
    wanted = drawn("a green apple", 3, image=picture, mask=file.getvalue(), **fields, **WEIGHTED)
    assert (pixels(base64.b64decode(answer.json["images"][0])) == pixels(wanted)).all()
    assert (answer.parameters["init_images"], answer.info["warnings"]) == (None, [])


def test_webuiapi_draws_a_second_pass(webui: Any) -> None:
    answer = webui.txt2img(
        prompt=APPLE, seed=1, width=64, height=64, enable_hr=True, hr_scale=1.5, hr_second_pass_steps=1
    )
    fields = {"hires": "1.5", "hires_strength": 0.7, "hires_steps": 1, "hires_upscaler": "latent", "steps": 2}
    wanted = drawn(APPLE, 1, width=64, height=64, guidance_scale=7.0, **EULER_A, **fields, **WEIGHTED)
    assert base64.b64decode(answer.json["images"][0]) == wanted
    assert (answer.image.size, answer.info["warnings"]) == ((96, 96), [])


def test_webuiapi_chooses_a_model_and_its_loras(webui: Any, loras: Path) -> None:
    assert [each["model_name"] for each in webui.get_sd_models()] == ["tiny", "tiny-emoji"]
    webui.util_set_model("tiny", find_closest=False)
    try:
        titles = webui.util_get_model_names()
        webui.set_options({"sd_model_checkpoint": next(title for title in titles if title.startswith("tiny ["))})
        assert webui.util_get_current_model().startswith("tiny [")
        assert [each["name"] for each in webui.get_loras()] == ["style"]
        answer = webui.txt2img(prompt="a <lora:style:0.5>", seed=1, width=16, height=16)
        fields = {"width": 16, "height": 16, "steps": 2, "guidance_scale": 7.0, **EULER_A}
        own = _session(tiny_model(), loras)
        request = GenerationRequest("a <lora:style:0.5>", seed=1, **fields, **WEIGHTED)
        wanted = pixels(own.encode(next(own.draw([request]))))
        assert (pixels(base64.b64decode(answer.json["images"][0])) == wanted).all()
        assert "Lora hashes" in answer.info["infotexts"][0]
    finally:
        webui.set_options({"sd_model_checkpoint": "tiny-emoji"})


def test_webuiapi_sees_samplers_and_refusals(webui: Any) -> None:
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(webui.util_get_sampler_names())
    assert {"automatic", "karras", "normal"} <= set(webui.util_get_scheduler_names())
    assert webui.get_progress()["progress"] == 0.0
    webui.util_wait_for_ready(check_interval=0.1)
    with pytest.raises(RuntimeError, match="tiling"):
        webui.txt2img(prompt="a", tiling=True, width=64, height=64)


# ---- many, and those that go ----


def test_64_clients_at_once_each_get_their_own_pictures(server: Server) -> None:
    """Two hundred pictures: whatever shares a batch with them, they are those that Python draws alone."""
    tiny = tiny_model()

    def ask(i: int) -> tuple[int, list[bytes]]:
        if i % 2:
            given = {"prompt": f"picture {i}", "model": "tiny", "seed": i, "steps": 1 + i % 3, "n": 1 + i % 2}
            status, _, answer = call(server.url, GENERATE, given)
            assert status == 200, answer
            return i, [base64.b64decode(image["b64_json"]) for image in answer["data"]]
        settings = {"sd_model_checkpoint": "tiny"}
        given = {"prompt": f"picture {i}", "seed": i, "steps": 1 + i % 3, "override_settings": settings}
        status, _, answer = call(server.url, TXT2IMG, given)
        assert status == 200, answer
        return i, [base64.b64decode(image) for image in answer["images"]]

    def everyone(clients: concurrent.futures.Executor, calls: int) -> None:
        for i, found in clients.map(ask, range(calls)):
            syntax = CHUNKED if i % 2 else WEIGHTED
            wanted = [drawn(f"picture {i}", i + k, model=tiny, steps=1 + i % 3, **syntax) for k in range(1 + i % 2)]
            assert list(map(about, found)) == list(map(about, wanted)), i
            apart = [
                np.abs(pixels(one).astype(int) - pixels(other)).max() for one, other in zip(found, wanted, strict=True)
            ]
            assert max(apart) <= 1, i  # sums of a batch are rounded otherwise than those of one picture

    with concurrent.futures.ThreadPoolExecutor(64) as clients:
        everyone(clients, 64)
        before = server.memory()
        everyone(clients, 70)
    assert server.memory() - before < 64 << 20


def test_a_client_that_goes_takes_its_pictures_with_it(server: Server) -> None:
    before = server.counter("pictures_total")
    body = json.dumps({"prompt": APPLE, "model": "tiny-emoji", "steps": 200, "n": 10}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server.url) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.counter("jobs_drawing") == 1, "drawing")
    until(lambda: server.counter("jobs_drawing") == 0, "the end of the job")
    assert call(server.url, GENERATE, {"prompt": "a", "model": "tiny", "steps": 1})[0] == 200
    assert server.counter("pictures_total") == before + 1
    assert server.counter("http_held_bytes") == 0


def test_streams_that_nobody_hears_end_too(server: Server) -> None:
    before = server.counter("pictures_total")
    body = json.dumps({"prompt": APPLE, "model": "tiny-emoji", "steps": 200, "n": 10, "stream": True}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server.url) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: server.counter("jobs_drawing") == 1, "drawing")
    until(lambda: server.counter("jobs_drawing") == 0, "the end of the job")
    assert server.counter("pictures_total") == before


def test_large_bodies_leave_the_memory_as_it_was(server: Server) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):  # a client that is refused while it sends may see no answer
            assert call(server.url, GENERATE, b'{"prompt": "' + b"x" * (100 << 20) + b'"}')[0] == 413

    send()
    before = server.memory()
    for _ in range(5):
        send()
    assert server.memory() - before < 48 << 20


# ---- the command ----


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["--http", "0.0.0.0:0"], {}, ["--token"]),
        (["--http", "0", "--host", "0.0.0.0"], {}, ["--token"]),
        (["--http", "0.0.0.0:0"], {"LDM_TOKEN": "s3cr3t"}, ["8 or more"]),
        (["--http", "127.0.0.1:0", "--host", "0.0.0.0"], {}, ["leave out one"]),
        (["--host", "0.0.0.0"], {}, ["--http"]),
        (["--http", "here"], {}, ["[HOST:]PORT"]),
    ],
)
def test_what_would_let_anyone_in_is_refused(
    options: list[str], env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    result = ldm_here("serve", *options, env={"LDM_SERVER": str(tmp_path / "socket"), **env})
    assert "s3cr3t" not in assert_refused(result, 2, *words)


def test_an_address_that_is_taken_is_said(server: Server, tmp_path: Path) -> None:
    result = ldm_here("serve", "--http", str(server.port), env={"LDM_SERVER": str(tmp_path / "socket")})
    assert_refused(result, 73, f"127.0.0.1:{server.port}", "in use")


def test_without_the_extra_one_sentence_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ldmcli.serving.http.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = ldm_here("serve", "--http", "0", env={"LDM_SERVER": str(tmp_path / "socket")})
    assert_refused(result, 2, "ldmcli[serve]")
