"""What a picture says about its making: A1111's `parameters` text and our `ldmcli` record, both ways.

`parameters` follows AUTOMATIC1111's format, so that its readers work. `ldmcli` is JSON with the whole
request, the model and the versions: enough to run it again.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.control import controls_of
from ldmcli.errors import BadDataError, LdmError, printable
from ldmcli.hires import LATENT, is_scale, upscaler_title
from ldmcli.image_prompt import image_prompts_of
from ldmcli.images.exif import PARAMETERS_KEYWORD, RECORD_KEYWORD, iterate_exif_text
from ldmcli.images.formats import format_of_file
from ldmcli.images.png_text import iterate_text
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spec import GenerationRequest

_MAX_SHOWN_KEYWORDS = 8
# A1111's schedules with the same steps; of "SGM Uniform" they may be off by less than one of 1000 training steps.
SCHEDULE_TITLES = {
    "karras": "Karras", "leading": "DDIM", "trailing": "SGM Uniform", "linspace": "Uniform", "normal": "Normal",
    "exponential": "Exponential", "sgm_uniform": "SGM Uniform", "simple": "Simple", "beta": "Beta",
    "ays": "Align Your Steps",
}  # fmt: skip
_CONTENT_TITLES = {"fill": "fill", "noise": "latent noise", "zero": "latent nothing"}
_MODE_TITLES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
    "guess": "ControlNet is more important",
}
_RESIZE_TITLES = {"stretch": "Just Resize", "crop": "Crop and Resize", "fill": "Resize and Fill"}
_OWN_SCHEDULE = ("ddim", "plms", "unipc", "lcm")  # samplers that draw with the same steps there, whatever is set
# How A1111 reads the last line of its text, and how many pairs it must have to be that.
_PAIR, _FEWEST_PAIRS = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'), 3
_EMPHASIS = re.compile(r"[()\[\]\\]|\bBREAK\b")  # what A1111 takes for more than text


def infotext(
    request: GenerationRequest,
    model_name: str,
    model_hash: str,
    *,
    family: str = "",
    schedule: str | None = None,
    embeddings: Sequence[Mapping[str, Any]] = (),
    inputs: Mapping[str, str] | None = None,
) -> str:
    """The `parameters` text: prompt, negative prompt if there is one, a last line of `Name: value` pairs.

    `model_hash` is the SHA-256 of the weights in hex, of which ten digits are shown; `family` the model's, as its
    configuration names it; `schedule` the one it was drawn with where the request leaves that to the model;
    `embeddings` have a word and a sha256 each; `inputs` are hashes of what steers. Left out: what none of them says,
    Eta when 0, name and hash when empty.
    """
    # A1111's own schedule is another for some samplers, such as DPM++ 2M.
    schedule = request.schedule or (schedule if request.sampler not in _OWN_SCHEDULE else None)
    # There counted from the last layer, which SDXL never reads.
    clip_skip = request.clip_skip + family.startswith("Stable Diffusion XL")
    strength = request.hires_strength if request.strength is None else request.strength
    typed = f"{request.prompt}\n{request.negative_prompt}"
    values = {
        "Steps": str(request.steps) if request.steps else "",
        "Sampler": SAMPLERS[request.sampler].title if request.sampler else "",
        "Schedule type": SCHEDULE_TITLES.get(schedule or "", ""),
        "CFG scale": _number(request.guidance_scale) if request.guidance_scale is not None else "",
        "Image CFG scale": "" if request.image_guidance_scale is None else _number(request.image_guidance_scale),
        "Seed": str(request.seed),
        "Label": "" if request.label is None else _quoted(str(request.label)),
        "Size": f"{request.width}x{request.height}" if request.width and request.height else "",
        "Model hash": model_hash[:10],
        "Model": _quoted(model_name),
        "Denoising strength": "" if strength is None else _number(strength),
        "Eta DDIM": _number(request.eta) if request.eta else "",
        "CFG Rescale": _number(request.guidance_rescale) if request.guidance_rescale else "",
        "Clip skip": str(clip_skip) if request.clip_skip > 1 else "",
        "Emphasis": "None" if request.prompt_syntax == "plain" and _EMPHASIS.search(typed) else "",
        "RNG": "CPU",
        **(_mask_values(request) if request.mask is not None else {}),
        **(_hires_values(request) if request.hires is not None else {}),
        **_steering_values(request, inputs or {}),
        "Lora hashes": _quoted(", ".join(f"{_bare(lora.name)}: {lora.sha256[:12]}" for lora in request.loras)),
        "TI hashes": _quoted(", ".join(f"{_bare(one['word'])}: {one['sha256'][:12]}" for one in embeddings)),
        "Version": f"ldmcli {__version__}",
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items() if value))
    return "\n".join(lines)


def _mask_values(request: GenerationRequest) -> dict[str, str]:
    """What A1111 says of a mask; it takes what is not there for its own defaults."""
    masked = request.inpaint_area == "masked"
    return {
        "Mask blur": _number(request.mask_blur),
        "Mask mode": "Inpaint not masked" if request.invert_mask else "",
        "Masked content": _CONTENT_TITLES.get(request.masked_content, ""),
        "Inpaint area": "Only masked" if masked else "",
        "Masked area padding": str(request.mask_padding) if masked else "",
    }


def _hires_values(request: GenerationRequest) -> dict[str, str]:
    """What A1111 says of a second pass; `Size` is the first's."""
    assert request.hires
    return {
        "Hires upscale" if is_scale(request.hires) else "Hires resize": request.hires,
        "Hires steps": str(request.hires_steps or ""),
        "Hires upscaler": _quoted(upscaler_title(request.hires_upscaler or LATENT)),
    }


def _steering_values(request: GenerationRequest, inputs: Mapping[str, str]) -> dict[str, str]:
    """What A1111's extension for ControlNet says of networks and pictures that steer, each of which it calls a unit."""
    units = []
    for i, control in enumerate(controls_of(vars(request)) if request.control_net else ()):
        low, high = control.canny or (0, 0)
        units.append(
            {
                "Module": "canny" if control.canny else "none",
                "Model": _network_title(control.net, inputs.get(f"control_net:{i}", "")),
                "Weight": repr(control.strength),
                "Resize Mode": _RESIZE_TITLES[request.resize],
                **({"Threshold A": str(low), "Threshold B": str(high)} if control.canny else {}),
                "Guidance Start": repr(control.start),
                "Guidance End": repr(control.end),
                "Pixel Perfect": "True",
                "Control Mode": _MODE_TITLES[control.mode],
                **({"Union Control Type": control.type} if control.type else {}),
            }
        )
    for i, prompt in enumerate(image_prompts_of(vars(request)) if request.ip_adapter else ()):
        model = _network_title(prompt.adapter, inputs.get(f"ip_adapter:{i}", ""))
        units.append({"Module": "ip-adapter-auto", "Model": model, "Weight": repr(prompt.strength)})
    texts = (", ".join(f"{key}: {value}" for key, value in unit.items()) for unit in units)
    return {f"ControlNet {i}": _quoted(text) for i, text in enumerate(texts)}


def _network_title(path: str, sha256: str) -> str:
    name = Path(path).stem if path.endswith((".safetensors", ".pth")) else Path(path).name
    return _bare(name) + (f" [{sha256[:8]}]" if sha256 else "")


def text_chunks(
    request: GenerationRequest,
    model: Mapping[str, Any],
    runtime: Mapping[str, str],
    *,
    family: str = "",
    schedule: str | None = None,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The text for a picture's file: `model` has name, path, sha256, embeddings; `runtime` dtype, device and such;
    `family` and `schedule` are as for `infotext`; `inputs` are the SHA-256 of the files that the request names.

    The record is pure ASCII, so that every reader of such text gives it back unchanged.
    """
    record = {
        "version": __version__,
        "request": request.to_dict(),
        "model": dict(model),
        "runtime": dict(runtime),
    } | ({"inputs": dict(inputs)} if inputs else {})
    return {
        PARAMETERS_KEYWORD: infotext(
            request,
            model["name"],
            model["sha256"],
            family=family,
            schedule=schedule,
            embeddings=model.get("embeddings", ()),
            inputs=inputs,
        ),
        RECORD_KEYWORD: json.dumps(record),
    }


def with_upscaling(
    text: Mapping[str, str],
    upscaler: str,
    *,
    by: float | None,
    size: tuple[int, int],
    settings: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The text of a picture that was enlarged: what it said before, and by what, with which `settings`, and how much
    (None: to `size`), as A1111 writes that after its parameters; in our record under `upscaled`."""
    amount = f"Postprocess upscale by: {_number(by)}" if by else f"Postprocess upscale to: {size[0]}x{size[1]}"
    said = f"{amount}, Postprocess upscaler: {_quoted(upscaler)}"
    said += "".join(f", Postprocess {name}: {_quoted(value)}" for name, value in (settings or {}).items())
    before = text.get(PARAMETERS_KEYWORD, "")
    last = before.rpartition("\n")[2]
    joint = "" if not before else ", " if len(_PAIR.findall(last)) >= _FEWEST_PAIRS else "\n"
    added = {PARAMETERS_KEYWORD: f"{before}{joint}{said}"}
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(text.get(RECORD_KEYWORD, ""))
        if isinstance(record, dict):
            earlier = f"{record['upscaled']}; " if isinstance(record.get("upscaled"), str) else ""
            added[RECORD_KEYWORD] = json.dumps(record | {"upscaled": earlier + said})
    return {**text, **added}


def read_record(path: Path) -> dict[str, Any]:
    """The `ldmcli` record of a picture: `version`, `request` (all fields of a valid request), `model`, `runtime`.

    In a PNG or JPEG it stands before the pixels, so a picture cut off later still gives it. Raises MissingInputError
    when there is no such file, BadDataError when it is neither PNG, JPEG nor WebP or its record is missing, broken or
    out of range, StorageError when reading fails.
    """
    shown = printable(str(path))
    keywords = []
    for keyword, text in iterate_picture_text(path):
        if keyword == RECORD_KEYWORD:
            return _checked_record(text, shown)
        keywords.append(keyword)
    raise BadDataError(f"{shown} holds no ldmcli record; {_described(keywords)}.")


def read_parameters(path: Path) -> str | None:
    """The A1111 `parameters` text of a picture from any program, or None without one; raises as `read_record`."""
    return next((text for keyword, text in iterate_picture_text(path) if keyword == PARAMETERS_KEYWORD), None)


def iterate_picture_text(path: Path) -> Iterator[tuple[str, str]]:
    """Each (keyword, text) of a picture: of all text chunks of a PNG; of a JPEG or WebP, ours and A1111's in its EXIF
    data. Bounded in memory and time, and raises, as `iterate_text` does."""
    return iterate_exif_text(path) if format_of_file(path) in ("jpeg", "webp") else iterate_text(path)


def _number(value: float) -> str:
    """`value` in full, without a trailing `.0`."""
    return str(int(value)) if value == int(value) else repr(value)


def _bare(word: str) -> str:
    """A word without what separates it from its hash and that from the next, as A1111 writes it."""
    return word.replace(":", "").replace(",", "")


def _quoted(value: str) -> str:
    """`value` as A1111 writes it: a JSON string where plain text would be read back as something else."""
    value = value.encode("utf-8", "backslashreplace").decode("utf-8")
    plain = value.isprintable() and not set(value) & set(',:"') and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)


def _checked_record(text: str, shown: str) -> dict[str, Any]:
    """The record in `text`, its request's fields all filled in. Raises BadDataError naming file and field."""
    try:
        record = json.loads(text)
    except RecursionError:
        raise BadDataError(f"{shown} has an ldmcli record that is nested too deeply.") from None
    except ValueError as error:
        raise BadDataError(f"{shown} has an ldmcli record that is not JSON: {error}.") from error
    problem = _shape_problem(record)
    if problem:
        raise BadDataError(f"{shown} has an ldmcli record {problem}.")
    try:
        request = GenerationRequest.from_dict(record["request"])
    except (LdmError, OverflowError) as error:
        raise BadDataError(f"{shown} has an ldmcli record that cannot be run: {error}") from error
    return {
        "version": record["version"],
        "request": request.to_dict(),
        "model": record["model"],
        "runtime": record["runtime"],
        **({"upscaled": record["upscaled"]} if isinstance(record.get("upscaled"), str) else {}),
        **({"inputs": record["inputs"]} if "inputs" in record else {}),
    }


def _shape_problem(record: Any) -> str:
    """What keeps `record` from being version, request, model and runtime of the right types, or nothing."""
    if not isinstance(record, dict):
        return "that is not a JSON object"
    if not isinstance(record.get("version"), str):
        return "without a version"
    for name in ("request", "model", "runtime"):
        if not isinstance(record.get(name), dict):
            return f"whose {name} is missing or not an object"
    for name in ("model", "runtime"):
        for key, value in record[name].items():
            if not isinstance(value, str) and (name, key) != ("model", "embeddings"):
                return f"whose {name} field {printable(repr(key))} is not text"
    embeddings = record["model"].get("embeddings", [])
    if not isinstance(embeddings, list) or not all(map(_is_embedding, embeddings)):
        return "whose embeddings are not a list of words, paths and hashes"
    inputs = record.get("inputs", {})
    if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        return "whose inputs are not hashes of files"
    missing = [key for key in ("name", "path", "sha256") if key not in record["model"]]
    return f"whose model has no {missing[0]}" if missing else ""


def _is_embedding(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("word", "path", "sha256"))


def _described(keywords: list[str]) -> str:
    """What a picture without our record does hold, in words."""
    if not keywords:
        return "it carries no text at all"
    if keywords == [PARAMETERS_KEYWORD]:
        return "it has only AUTOMATIC1111 parameters"
    if set(keywords) <= {"prompt", "workflow"}:
        return "it has only a ComfyUI graph"
    more = " …" if len(keywords) > _MAX_SHOWN_KEYWORDS else ""
    return f"its text is: {', '.join(printable(keyword) for keyword in keywords[:_MAX_SHOWN_KEYWORDS])}{more}"
