"""AUTOMATIC1111's calls: pictures, how far they are, models, samplers and what else its clients look at first."""

import dataclasses
import io
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ldmcli import __version__
from ldmcli.errors import LdmError
from ldmcli.images.metadata import PARAMETERS_KEYWORD, iterate_picture_text
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.serving.http.a1111_fields import SCHEDULES, UPSCALERS, check_settings, read_asked
from ldmcli.serving.http.calls import Call, Calls, Drawn
from ldmcli.serving.http.front import JSON, Front, as_json
from ldmcli.serving.http.limits import Refused, read_json
from ldmcli.serving.http.uploads import picture_bytes
from ldmcli.serving.http.values import Values
from ldmcli.session import CancelledError, Session

_PICTURES = ("init_images", "mask", "map")  # which an answer does not repeat
_FLAGS = {"send_images": True, "include_init_images": False}  # which say what an answer holds
_PAIR = re.compile(r'(\w[\w \-/]{0,50}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # of an infotext's last line
_MAX_LINE = 8000  # characters
_HASH_S = 0.5  # to wait for a model's hash, which large files take long for
# What clients look at, and is always the same here.
_ALWAYS: dict[str, Any] = {
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "cmd-flags": {},
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "prompt-styles": [],
    "embeddings": {"loaded": {}, "skipped": {}},
    "latent-upscale-modes": [{"name": "Latent"}],
    "upscalers": [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4} for name in UPSCALERS
    ],
    "samplers": [{"name": row.title, "aliases": [row.name], "options": {}} for row in SAMPLERS.values()],
    "schedulers": [
        {"name": (name or title).lower(), "label": title, "aliases": None, "default_rho": -1, "need_inner_model": False}
        for title, name in SCHEDULES.items()
    ],
}


@dataclasses.dataclass
class _Running:
    """A call, and whose it is: clients name no call when they interrupt one."""

    client: str
    call: Call
    interrupted: bool = False


class A1111:
    """The calls under /sdapi/v1. One model is in use by all clients, until one sets another."""

    def __init__(self, calls: Calls, front: Front) -> None:
        self._calls, self._front = calls, front
        self._model = calls.usual
        self._running: list[_Running] = []
        for name, handle, method in (
            ("txt2img", self.txt2img, "POST"),
            ("img2img", self.img2img, "POST"),
            ("png-info", self.png_info, "POST"),
            ("progress", self.progress, "GET"),
            ("interrupt", self.interrupt, "POST"),
            ("options", self.options, "GET"),
            ("options", self.set_options, "POST"),
            ("sd-models", self.models, "GET"),
            ("loras", self.loras, "GET"),
            ("refresh-checkpoints", self.nothing, "POST"),
            ("refresh-loras", self.nothing, "POST"),
        ):
            front.add(f"/sdapi/v1/{name}", handle, method, worded)
        for name in _ALWAYS:
            front.add(f"/sdapi/v1/{name}", self.always, "GET", worded)

    async def txt2img(self, request: Request) -> Response:
        return await self._drawn(request, on_image=False)

    async def img2img(self, request: Request) -> Response:
        return await self._drawn(request, on_image=True)

    async def _drawn(self, request: Request, *, on_image: bool) -> Response:
        async with self._front.body(request, JSON) as body:
            given = await self._calls.read(read_json, body)
            asked = await self._calls.read(read_asked, given, on_image=on_image)
            sends, repeats = (Values(given).flag(name, usual) for name, usual in _FLAGS.items())
            given |= {} if repeats else {name: None for name in _PICTURES if name in given}
            call = await self._calls.begin(asked, self._model)
            self._model = call.model if asked.keeps_model else self._model
            running = _Running(_client(request), call)
            self._running.append(running)
            try:
                pictures = await self._calls.all_pictures(call, request)
            except CancelledError:
                if not running.interrupted:
                    raise
                pictures = sorted(call.drawn, key=lambda drawn: drawn.place)
            finally:
                self._running.remove(running)
        info = await self._calls.read(_info, call, pictures)
        images = [drawn.base64 for drawn in pictures] if sends else []
        return as_json({"images": images, "parameters": given, "info": json.dumps(info)})

    async def progress(self, request: Request) -> Response:
        own = next((one.call for one in self._running if one.client == _client(request)), None)
        call = own or next((one.call for one in self._running), None)
        share, left = 0.0, 0.0
        if call:
            share = min(0.99, (len(call.drawn) + call.step / max(1, call.steps)) / call.count)
            left = (time.time() - call.started) * (1 - share) / share if share else 0.0
        state = {
            "skipped": False,
            "interrupted": False,
            "job": "drawing" if call else "",
            "job_count": len(self._running),
            "job_timestamp": _stamp(call.started) if call else "0",
            "job_no": len(call.drawn) if call else 0,
            "sampling_step": call.step if call else 0,
            "sampling_steps": call.steps if call else 0,
        }
        return as_json(
            {"progress": share, "eta_relative": left, "state": state, "current_image": None, "textinfo": None}
        )

    async def interrupt(self, request: Request) -> Response:
        """End the client's call that is drawn, or would be next; other clients' go on."""
        if own := next((one for one in self._running if one.client == _client(request)), None):
            own.interrupted = True
            own.call.cancel()
        return as_json({})

    async def options(self, request: Request) -> Response:
        found = await self._calls.read(self._described, self._model)
        return as_json(
            {
                "sd_model_checkpoint": found["title"],
                "sd_checkpoint_hash": found["sha256"],
                "sd_vae": "Automatic",
                "CLIP_stop_at_last_layers": 1,
                "eta_noise_seed_delta": 0,
                "randn_source": "CPU",
                "samples_format": "png",
            }
        )

    async def set_options(self, request: Request) -> Response:
        async with self._front.body(request, JSON) as body:
            given = await self._calls.read(read_json, body)
        values = Values(given)
        model = values.text("sd_model_checkpoint", most=500)
        if values.whole("CLIP_stop_at_last_layers", 1, 12) not in (None, 1):
            raise Refused("CLIP_stop_at_last_layers is for override_settings of a call.")
        check_settings({name: given[name] for name in values.unread() if name != "sd_checkpoint_hash"}, "options")
        if model:
            self._model = self._calls.named(model)
        return as_json(None)

    async def models(self, request: Request) -> Response:
        return as_json([await self._calls.read(self._described, name) for name in self._calls.models])

    async def loras(self, request: Request) -> Response:
        names = await self._calls.read(lambda: self._calls.session(self._model).lora_names())
        return as_json([{"name": name, "alias": name, "path": name, "metadata": {}} for name in names])

    async def png_info(self, request: Request) -> Response:
        async with self._front.body(request, JSON) as body:
            return as_json(await self._calls.read(lambda: _png_info(read_json(body))))

    async def always(self, request: Request) -> Response:
        return as_json(_ALWAYS[request.url.path.rpartition("/")[2]])

    async def nothing(self, request: Request) -> Response:
        return as_json(None)

    def _described(self, name: str) -> dict[str, Any]:
        """A model as /sd-models has it; without its hash where that takes long to find out, as there."""
        session = self._calls.session(name)
        sha256 = _hash(session)
        title = f"{name} [{sha256[:10]}]" if sha256 else name
        known = {"title": title, "model_name": name, "hash": sha256[:10] or None, "sha256": sha256 or None}
        return known | {"filename": name, "config": None}


def worded(refused: Refused) -> Response:
    """A refusal as AUTOMATIC1111 words it."""
    status = 422 if refused.status == 400 else refused.status
    said = {"error": "HTTPException", "detail": str(refused), "body": "", "errors": str(refused)}
    return as_json(said, status, refused.headers)


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


def _hash(session: Session) -> str:
    try:
        return session.begin_hashing().result(_HASH_S)
    except TimeoutError:
        return ""


def _stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))


def _info(call: Call, pictures: Sequence[Drawn]) -> dict[str, Any]:
    """What is told of the pictures; of those that were asked for where none was drawn."""
    from PIL import Image

    first = pictures[0].request if pictures else None
    asked = call.asked.requests[0]
    texts = []
    for drawn in pictures:
        with Image.open(io.BytesIO(drawn.data)) as picture:
            texts.append(picture.info.get(PARAMETERS_KEYWORD, ""))
    request = first or asked
    count = len(pictures)
    width, height = pictures[0].size if pictures else (asked.width, asked.height)
    return {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * count,
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * count,
        "seed": asked.seed,
        "all_seeds": [drawn.request.seed for drawn in pictures],
        "subseed": asked.seed,
        "all_subseeds": [drawn.request.seed for drawn in pictures],
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLERS[request.sampler].title if request.sampler else "",
        "cfg_scale": request.guidance_scale,
        "steps": request.steps,
        "batch_size": call.count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": call.model,
        "sd_model_hash": _hash(call.session)[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.hires_strength if asked.hires else request.strength if asked.image else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": _stamp(call.started),
        "clip_skip": asked.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": f"ldmcli {__version__}",
        "warnings": call.warnings,
    }


def _png_info(given: dict[str, Any]) -> dict[str, Any]:
    """The text that a picture carries."""
    data = picture_bytes(given.get("image"), "image")
    with tempfile.NamedTemporaryFile(prefix="ldm-") as file:
        file.write(data)
        file.flush()
        items: dict[str, str] = {}
        try:
            for keyword, text in iterate_picture_text(Path(file.name)):
                items.setdefault(keyword, text)
        except LdmError:
            if not items:
                raise Refused("image is no PNG, JPEG or WebP, or damaged.", field="image") from None
    text = items.get(PARAMETERS_KEYWORD, "")
    return {"info": text, "items": items, "parameters": _parameters(text)}


def _parameters(text: str) -> dict[str, str]:
    """The pairs of an infotext, its prompts among them."""
    prompts, _, last = text.rpartition("\n")
    pairs = dict(_PAIR.findall(last)) if len(last) <= _MAX_LINE else {}
    if not pairs:
        return {}
    prompt, _, negative = f"\n{prompts}".partition("\nNegative prompt:")
    said = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    return said | {name: value.strip('"') for name, value in pairs.items()}
