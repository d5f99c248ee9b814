"""AUTOMATIC1111's fields as requests, and label, layout and map beyond them. What would change a picture and is not
drawn here is refused by name, unless it has the value at which it changes nothing, as clients send dozens; what is not
known at all is warned of."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ldmcli.config import ModelConfig
from ldmcli.errors import printable
from ldmcli.hires import MAX_SCALE
from ldmcli.images.metadata import SCHEDULE_TITLES
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.sampling.names import sampler_of, schedule_of
from ldmcli.serving.http.asked import Asked, conditions_of, requests_of
from ldmcli.serving.http.limits import MAX_PICTURES, MAX_STEPS, Refused
from ldmcli.serving.http.uploads import mask_of, picture_bytes
from ldmcli.serving.http.values import Values
from ldmcli.spec import MAX_BLUR, MAX_CLIP_SKIP, MAX_GUIDANCE, MAX_PADDING, MAX_SIZE, GenerationRequest

_log = logging.getLogger(__name__)
SCHEDULES: dict[str, str | None] = {"Automatic": None} | {title: name for name, title in SCHEDULE_TITLES.items()}
UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos", "None": "lanczos", "realesr-animevideov3": "embedded"}
# What "Automatic" is there, which is not always the model's own.
_AUTOMATIC = {
    "euler": "normal", "euler-a": "normal", "heun": "normal", "dpmpp-2m": "karras", "dpmpp-2m-sde": "exponential",
}  # fmt: skip
_RESIZES = {0: "stretch", 1: "crop", 2: "fill"}
_CONTENTS = {0: "fill", 1: "original", 2: "noise", 3: "zero"}
# Fields that change pictures there and are not drawn here, with the values at which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,),
    "script_name": ("", "None"),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "infotext": ("",),
    "initial_noise_multiplier": (1,),
    "mask_round": (True,),
    "latent_mask": ("",),
    "hr_additional_modules": ([], ["Use same choices"]),
    "firstpass_image": ("",),
    "token_merging_ratio": (0,),
    "token_merging_ratio_hr": (0,),
    "controlnet_units": ([],),
}
# … and those that are for the other call, which clients send to both.
_OF_IMAGES_ALONE: dict[str, tuple[Any, ...]] = {"init_images": ([], [""]), "mask": ("",)}
_OF_TEXT_ALONE: dict[str, tuple[Any, ...]] = {"enable_hr": (False,)}
# Those that change none, and those that change none without what they belong to.
_IDLE = (
    "subseed", "sampler_index", "script_args", "refiner_switch_at", "do_not_save_samples",
    "do_not_save_grid", "override_settings_restore_afterwards", "send_images", "include_init_images", "comments",
    "force_task_id", "seed_enable_extras",
)  # fmt: skip
_OF_HIRES = (
    "hr_scale", "hr_resize_x", "hr_resize_y", "hr_upscaler", "hr_second_pass_steps", "hr_checkpoint_name",
    "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg",
)  # fmt: skip
_OF_MASK = (
    "mask_blur", "mask_blur_x", "mask_blur_y", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding",
    "inpainting_mask_invert",
)  # fmt: skip
# What this program's own names of settings are called there.
_CALLED = {
    "guidance_scale": "cfg_scale", "sampler": "sampler_name", "schedule": "scheduler", "image": "init_images",
    "strength": "denoising_strength", "resize": "resize_mode", "masked_content": "inpainting_fill",
    "inpaint_area": "inpaint_full_res", "mask_padding": "inpaint_full_res_padding",
    "invert_mask": "inpainting_mask_invert", "image_guidance_scale": "image_cfg_scale", "hires": "enable_hr",
    "hires_strength": "denoising_strength", "hires_steps": "hr_second_pass_steps", "hires_upscaler": "hr_upscaler",
    "loras": "<lora:NAME:WEIGHT> in the prompt",
}  # fmt: skip
_MAX_UNKNOWN = 20  # fields of which each is warned of
_SAME = ("", "None", "Use same sampler", "Use same scheduler", "Use same checkpoint")
_NEUTRAL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "randn_source": ("CPU",),
    "eta_noise_seed_delta": (0,),
    "eta_ancestral": (1,),
    "eta_ddim": (0,),
    "emphasis": ("Original",),
    "enable_emphasis": (True,),
    "img2img_fix_steps": (False,),
    "filter_nsfw": (False,),
    "forge_additional_modules": ([],),
}
# How settings begin that change no picture.
_IDLE_SETTINGS = ("save_", "samples_", "grid_", "return_", "show_", "live_", "outdir_", "jpeg_", "webp_", "export_")


def read_asked(given: Mapping[str, Any], *, on_image: bool) -> Asked:
    """The pictures that a call of txt2img asks for, or, `on_image`, of img2img. What is left out of size, steps,
    guidance and sampler is the model's own. Raises Refused."""
    values = Values(given)
    settings: dict[str, Any] = {
        "prompt": values.text("prompt"),
        "negative_prompt": values.text("negative_prompt"),
        "steps": values.whole("steps", 1, MAX_STEPS),
        "guidance_scale": values.number("cfg_scale", 0, MAX_GUIDANCE),
        "width": values.whole("width", 1, MAX_SIZE),
        "height": values.whole("height", 1, MAX_SIZE),
        "prompt_syntax": "weighted",
        "on_long_prompt": "chunk",
        **_sampler(values),
        **conditions_of(values),
    }
    settings |= _eta(values, settings["sampler"])
    settings |= _image(values) if on_image else _hires(values, settings)
    model, clip_skip = _overrides(values)
    image_guidance = values.number("image_cfg_scale", 0, MAX_GUIDANCE)
    for name, neutral in (_NEUTRAL | (_OF_TEXT_ALONE if on_image else _OF_IMAGES_ALONE)).items():
        _check_neutral(name, values.raw(name), neutral)
    _check_scripts(values)
    count = (values.whole("batch_size", 1, MAX_PICTURES) or 1) * (values.whole("n_iter", 1, MAX_PICTURES) or 1)
    if count > MAX_PICTURES:
        raise Refused(f"batch_size × n_iter is {count}; at most {MAX_PICTURES} are drawn.", field="n_iter")
    for name in (*_IDLE, *(_OF_HIRES if on_image else (*_OF_MASK, "resize_mode"))):
        values.raw(name)
    requests = requests_of(settings | {"clip_skip": clip_skip}, values.seed(), count)
    keeps_model = model is not None and not values.flag("override_settings_restore_afterwards", True)
    warnings = ["save_images is true, and nothing is saved here"] if values.flag("save_images") else []
    unknown = values.unread()
    _check_own_names(unknown)
    warnings += [f"{printable(name, 60)} is not known here, and changes nothing" for name in unknown[:_MAX_UNKNOWN]]
    if more := unknown[_MAX_UNKNOWN:]:
        warnings.append(f"{len(more)} more fields are not known here, and change nothing")
    return Asked(
        requests, model, warnings=warnings, keeps_model=keeps_model, adapted=functools.partial(_adapted, image_guidance)
    )


def _adapted(image_guidance: float | None, request: GenerationRequest, config: ModelConfig) -> GenerationRequest:
    """The request as it is meant for a model. There clip skip counts from the last layer, which SDXL never reads, and
    `image_guidance` is for models that edit pictures alone. Clients send cfg_scale to models that know no guidance."""
    if request.clip_skip > 1 and config.family.startswith("Stable Diffusion XL"):
        request = dataclasses.replace(request, clip_skip=request.clip_skip - 1)
    if not config.guidable and request.guidance_scale not in (None, 1):
        _log.warning("cfg_scale changes nothing with a model that knows no drawing without its condition")
        request = dataclasses.replace(request, guidance_scale=None)
    if config.unet.reads != "image":
        return request
    if request.strength not in (None, 1):
        _log.warning("denoising_strength changes nothing with a model that edits pictures")
    return dataclasses.replace(request, strength=None, image_guidance_scale=image_guidance)


def check_settings(given: Mapping[str, Any], field: str) -> None:
    """Raise Refused for a setting that would change pictures, and is not there."""
    for name, value in given.items():
        if name in _NEUTRAL_SETTINGS:
            _check_neutral(f"{field}.{name}", value, _NEUTRAL_SETTINGS[name])
        elif not name.startswith(_IDLE_SETTINGS):
            raise Refused(f"{field}: there is no setting {printable(repr(name), 60)} here.", field=field)


def sampler_called(title: str, field: str = "sampler_name") -> tuple[str, str | None]:
    """The sampler of this title, and the schedule that it names too, as titles did before AUTOMATIC1111 1.9."""
    found = sampler_of(title)
    if found is None:
        known = ", ".join(row.title for row in SAMPLERS.values())
        raise Refused(f"Sampler not found: {printable(repr(title), 60)}; there are {known}.", 404, field)
    return found


def schedule_called(title: str, field: str = "scheduler") -> str | None:
    """The schedule of this title; None for the usual one."""
    found = schedule_of(title)
    if found is None and title.lower() not in ("", "automatic"):
        known = ", ".join(SCHEDULES)
        raise Refused(f"Scheduler not found: {printable(repr(title), 60)}; there are {known}.", 404, field)
    return found


def _sampler(values: Values) -> dict[str, Any]:
    title = values.text("sampler_name", most=100) or values.text("sampler_index", most=100)
    schedule = schedule_called(values.text("scheduler", most=100))
    name, own = sampler_called(title) if title else (None, None)
    return {"sampler": name, "schedule": schedule or own or _AUTOMATIC.get(name or "")}


def _eta(values: Values, sampler: str | None) -> dict[str, Any]:
    """Eta where the sampler takes it. Those that draw noise do it as with 1, and the others have none there either."""
    eta = values.number("eta", 0, 1)
    row = SAMPLERS.get(sampler or "")
    if row and row.takes_eta and eta is not None:
        return {"eta": eta}
    if eta is not None and eta != 1 and row and row.draws_noise:
        raise Refused(f"eta {eta:g} is not drawn with {row.title}; 1 is.", field="eta")
    return {}


def _hires(values: Values, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The second pass."""
    if not values.flag("enable_hr"):
        for name in (*_OF_HIRES, "denoising_strength"):
            values.raw(name)
        return {}
    sampler = values.text("hr_sampler_name", most=100)
    if sampler not in _SAME and sampler_called(sampler, "hr_sampler_name")[0] != settings["sampler"]:
        raise Refused("hr_sampler_name is another than sampler_name; both passes are drawn with one.")
    schedule = values.text("hr_scheduler", most=100)
    if schedule not in _SAME and schedule_called(schedule, "hr_scheduler") not in (None, settings["schedule"]):
        raise Refused("hr_scheduler is another than scheduler; both passes are drawn with one.", field="hr_scheduler")
    _check_neutral("hr_checkpoint_name", values.raw("hr_checkpoint_name"), _SAME)
    for name, own in (("hr_prompt", "prompt"), ("hr_negative_prompt", "negative_prompt")):
        _check_neutral(name, values.raw(name), ("", settings[own]))
    _check_neutral("hr_cfg", values.raw("hr_cfg"), (settings["guidance_scale"],))
    wide, high = values.whole("hr_resize_x", 0, MAX_SIZE) or 0, values.whole("hr_resize_y", 0, MAX_SIZE) or 0
    scale = values.number("hr_scale", 1, MAX_SCALE)
    if wide or high:
        width, height = settings["width"], settings["height"]
        if not (wide and high) and not (width and height):
            raise Refused("one of hr_resize_x and hr_resize_y alone takes width and height beside it.")
        wide, high = wide or high * width // height, high or wide * height // width
    strength = values.number("denoising_strength", 0, 1)
    return {
        "hires": f"{wide}x{high}" if wide else str(2.0 if scale is None else scale),
        "hires_strength": 0.75 if strength is None else strength,
        "hires_steps": values.whole("hr_second_pass_steps", 0, MAX_STEPS) or None,
        "hires_upscaler": values.choice("hr_upscaler", UPSCALERS, "Latent"),
    }


def _image(values: Values) -> dict[str, Any]:
    """What is drawn on."""
    pictures = values.raw("init_images", [])
    if not isinstance(pictures, list) or not pictures:
        raise Refused("Init image not found: init_images must be a list with a picture in base64.", 404, "init_images")
    if len(pictures) > 1:
        raise Refused(f"init_images has {len(pictures)} pictures; send each by itself.", field="init_images")
    found: dict[str, Any] = {
        "image": picture_bytes(pictures[0], "init_images"),
        "strength": values.number("denoising_strength", 0, 1),
        "resize": values.choice("resize_mode", _RESIZES, 0),
    }
    if not values.raw("mask"):
        for name in _OF_MASK:
            values.raw(name)
        return found
    masked, padding = values.flag("inpaint_full_res", True), values.whole("inpaint_full_res_padding", 0, MAX_PADDING)
    return found | {
        "mask": mask_of(picture_bytes(values.raw("mask"), "mask")),
        "mask_blur": _blur(values),
        "masked_content": values.choice("inpainting_fill", _CONTENTS, 0),
        "inpaint_area": "masked" if masked else "whole",
        "invert_mask": values.flag("inpainting_mask_invert"),
        **({"mask_padding": padding or 0} if masked else {}),  # which clients send in any case
    }


def _blur(values: Values) -> float:
    """The blur of a mask; one for both sides."""
    both = values.number("mask_blur", 0, MAX_BLUR)
    sides = [values.number(name, 0, MAX_BLUR) for name in ("mask_blur_x", "mask_blur_y")]
    wide, high = (4.0 if side is None else side for side in sides)
    if both is None and wide != high:
        raise Refused(f"mask_blur_x {wide:g} and mask_blur_y {high:g} differ; one blur is drawn.", field="mask_blur_x")
    return wide if both is None else both


def _overrides(values: Values) -> tuple[str | None, int]:
    """The model and the clip skip that override_settings name."""
    given = values.raw("override_settings", {})
    if not isinstance(given, dict):
        raise Refused("override_settings must be an object.", field="override_settings")
    own = Values(given)
    model = own.text("sd_model_checkpoint", most=500) or None
    clip_skips = (own.whole("CLIP_stop_at_last_layers", 1, MAX_CLIP_SKIP), values.whole("clip_skip", 1, MAX_CLIP_SKIP))
    check_settings({name: own.raw(name) for name in own.unread()}, "override_settings")
    return model, clip_skips[0] or clip_skips[1] or 1


def _check_own_names(unread: Sequence[str]) -> None:
    """Raise Refused for what this program knows as a setting of a picture, which these calls name otherwise or not at
    all."""
    settings = {field.name for field in dataclasses.fields(GenerationRequest)}
    for name in unread:
        if name in settings:
            instead = f"; {_CALLED[name]} is" if name in _CALLED else ""
            raise Refused(f"{name} is no field of AUTOMATIC1111's calls{instead}.", field=name)


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value is not None and value not in neutral:
        usual = "nothing" if neutral[0] in ("", None) else neutral[0]
        raise Refused(f"{name} {printable(repr(value), 60)} is not drawn here; only {usual} is.", field=name)


def _check_scripts(values: Values) -> None:
    """Raises Refused for a script that is switched on; clients send those that are off too."""
    scripts = values.raw("alwayson_scripts", {})
    if not isinstance(scripts, dict):
        raise Refused("alwayson_scripts must be an object.", field="alwayson_scripts")
    for name, script in scripts.items():
        given = script.get("args", []) if isinstance(script, dict) else script
        units = given if isinstance(given, list) else [given]
        off = [unit is False or (isinstance(unit, dict) and unit.get("enabled") is False) for unit in units]
        if units and not (off[0] if units[0] is False else all(off)):
            shown = printable(repr(name), 60)
            raise Refused(f"alwayson_scripts: there is no script {shown} here.", field="alwayson_scripts")
