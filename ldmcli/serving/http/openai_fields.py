"""OpenAI's fields as requests, and a few beyond them: seed, steps, guidance_scale, label and others by this program's
names. What is not known is refused, as there."""

from collections.abc import Mapping
from typing import Any

from ldmcli.errors import UsageError, printable
from ldmcli.images.formats import Encoding
from ldmcli.serving.http.a1111_fields import sampler_called, schedule_called
from ldmcli.serving.http.asked import Asked, conditions_of, requests_of
from ldmcli.serving.http.limits import MAX_STEPS, Refused
from ldmcli.serving.http.uploads import checked_picture, has_transparency, mask_of_transparency
from ldmcli.serving.http.values import Values
from ldmcli.spec import ALPHA, MAX_BLUR, MAX_CLIP_SKIP, MAX_GUIDANCE, PROMPT_SYNTAXES

_MAX_N = 10
_FORMATS = {"png": "png", "jpeg": "jpeg", "webp": "webp"}
_QUALITIES = ("low", "medium", "high", "xhigh", "max", "hd", "standard", "auto")
_USUAL = ("auto", "standard", "medium")
_NO_MATTER = ("user", "safety_identifier", "moderation")  # of whom
_MAX_VIEWS = 3


def read_generation(given: Mapping[str, Any]) -> tuple[Asked, bool]:
    """The pictures that a call of images/generations asks for, and whether as a stream. Raises Refused."""
    values = Values(given)
    settings = _settings(values)
    return _asked(values, settings), values.flag("stream")


def read_edit(given: Mapping[str, Any], files: Mapping[str, list[bytes]]) -> tuple[Asked, bool]:
    """As `read_generation`, of images/edits: the picture is drawn on where the mask, or without one the picture itself,
    is transparent, and all over where nothing is. Raises Refused, LdmError."""
    values, maps = Values(given), files.get("map", [])
    if len(maps) > 1 or (maps and "map" in values):
        raise Refused("map is given twice; send one.", field="map")
    settings = _settings(values, conditioned=bool(maps))
    images = [data for name in ("image", "image[]") for data in files.get(name, [])]
    masks = files.get("mask", [])
    for name in files:
        if name not in ("image", "image[]", "mask", "map"):
            raise _unknown(name)
    if len(images) != 1 or len(masks) > 1:
        raise Refused(f"image must be one file, and there are {len(images)}; mask one or none.", field="image")
    settings["image"] = checked_picture(images[0], "image")
    if maps:
        settings["map"] = checked_picture(maps[0], "map")
    if masks:
        settings["mask"] = mask_of_transparency(checked_picture(masks[0], "mask"), "mask")
    elif has_transparency(images[0]):
        settings["mask"] = ALPHA
    strength = values.number("strength", 0, 1)
    settings["strength"] = 1.0 if strength is None and "mask" in settings else strength
    settings["image_guidance_scale"] = values.number("image_guidance_scale", 0, MAX_GUIDANCE)
    settings["mask_blur"] = values.number("mask_blur", 0, MAX_BLUR) or 0.0
    return _asked(values, settings), values.flag("stream")


def _settings(values: Values, *, conditioned: bool = False) -> dict[str, Any]:
    """The fields of a request that both calls have; where it is `conditioned` otherwise, a prompt may be missing."""
    conditions = conditions_of(values)
    if "prompt" not in values and not conditions and not conditioned:
        raise Refused("prompt is missing.", field="prompt", code="missing_required_parameter")
    width, height = _size(values)
    sampler, own = None, None
    if title := values.text("sampler", most=100):
        sampler, own = sampler_called(title, "sampler")
    return {
        "prompt": values.text("prompt"),
        "negative_prompt": values.text("negative_prompt"),
        "width": width,
        "height": height,
        "steps": values.whole("steps", 1, MAX_STEPS),
        "guidance_scale": values.number("guidance_scale", 0, MAX_GUIDANCE),
        "sampler": sampler,
        "schedule": schedule_called(values.text("schedule", most=100), "schedule") or own,
        "eta": values.number("eta", 0, 1) or 0.0,
        "clip_skip": values.whole("clip_skip", 1, MAX_CLIP_SKIP) or 1,
        "prompt_syntax": values.choice("prompt_syntax", {name: name for name in PROMPT_SYNTAXES}, "plain"),
        "on_long_prompt": "chunk",
        **conditions,
    }


def _asked(values: Values, settings: Mapping[str, Any]) -> Asked:
    if values.choice("response_format", {"b64_json": False, "url": True}, "b64_json"):
        raise Refused(
            "response_format url is not offered, for no picture is kept; b64_json is.", field="response_format"
        )
    if values.choice("background", {"auto": False, "opaque": False, "transparent": True}, "auto"):
        raise Refused("background transparent is not drawn; opaque is.", field="background")
    encoding = _encoding(values)
    quality = values.choice("quality", {name: name for name in _QUALITIES}, "auto")
    warnings = [] if quality in _USUAL else [f"quality {quality} changes nothing; steps does"]
    for name in ("style", "input_fidelity"):
        if name in values:
            warnings.append(f"{name} {printable(values.text(name, most=20))} changes nothing")
    for name in _NO_MATTER:
        values.raw(name)
    views = values.whole("partial_images", 0, _MAX_VIEWS) or 0
    views = views if values.flag("stream") else 0
    model = values.text("model", most=500) or None
    seed, count = values.seed(), values.whole("n", 1, _MAX_N) or 1
    if unread := values.unread():
        raise _unknown(unread[0])
    requests = requests_of(settings, seed, count)
    return Asked(requests, model, encoding, warnings, views=views)


def _encoding(values: Values) -> Encoding:
    name = values.choice("output_format", _FORMATS, "png")
    quality = values.whole("output_compression", 0, 100)
    if quality == 100 and name == "png":  # which loses nothing
        quality = None
    try:
        return Encoding(name, None if quality is None else max(1, quality))
    except UsageError:
        raise Refused("output_compression is for jpeg and webp.", field="output_compression") from None


def _size(values: Values) -> tuple[int | None, int | None]:
    """Width and height; the model's own, or the picture's, for auto."""
    text = values.text("size", "auto", most=20)
    wide, cross, high = text.partition("x")
    if text == "auto":
        return None, None
    if not cross or not all(side.isascii() and side.isdigit() and 1 <= int(side) <= 1 << 16 for side in (wide, high)):
        raise Refused(f"size {printable(repr(text))} is neither WIDTHxHEIGHT, such as 512x512, nor auto.", field="size")
    return int(wide), int(high)


def _unknown(name: str) -> Refused:
    shown = printable(name, 60)
    return Refused(f"Unknown parameter: '{shown}'.", field=shown, code="unknown_parameter")
