"""AUTOMATIC1111's text, which Forge, Civitai, Fooocus and stable-diffusion.cpp write too."""

import json
import re
from collections.abc import Iterator
from typing import Any

from ldmcli.foreign.taken import Taken

_FIELDS = {
    "Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance_scale", "Seed": "seed", "Size": "size",
    "Model hash": "model_hash", "Model": "model", "VAE": "vae", "Clip skip": "clip_skip", "Eta DDIM": "eta",
    "Eta": "eta", "CFG Rescale": "guidance_rescale", "Mask blur": "mask_blur", "Masked area padding": "mask_padding",
    "Hires upscale": "hires", "Hires resize": "hires", "Hires steps": "hires_steps",
    **dict.fromkeys((
        "Version", "RNG", "VAE hash", "Lora hashes", "TI hashes", "Hashes", "User", "Emphasis", "ENSD", "Created Date",
        "Civitai metadata", "Schedule type", "Denoising strength", "Hires upscaler", "Init image hash",
        "Mask mode", "Masked content", "Inpaint area", "Postprocess upscale by", "Postprocess upscale to",
        "Postprocess upscaler", "Discard penultimate sigma", "Conditional mask weight", "Batch size", "Batch pos",
        "Template", "Negative Template", "Wildcard prompt", "Fooocus V2 Expansion", "Metadata Scheme",
    ), ""),
}  # fmt: skip
_KEY = re.compile(r"\s*(\w[\w \-/]{0,60}):\s*")
_AFTER = ("Template:", "Negative Template:", "Wildcard prompt:", "Wildcard negative prompt:")
_FEWEST, _MOST = 3, 1000
# What "Automatic" is there; for other samplers, steps that are even.
_AUTOMATIC = {"dpmpp-2m": "karras", "dpmpp-2m-sde": "exponential"}
_EVEN = ("euler", "euler-a", "heun", *_AUTOMATIC)
_UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos", "None": "lanczos", "embedded": "embedded"}
_CONTENTS = {"fill": "fill", "latent noise": "noise", "latent nothing": "zero", "original": "original"}
_OTHERWISE = {"unipc": "variant bh1 and steps of its own", "ays": "last step, which is one of the ten there"}
_DECODER = json.JSONDecoder()


def read_infotext(text: str) -> Taken | None:
    """The request in such a text; None where its last line does not hold one."""
    lines = text.strip().split("\n")
    while len(lines) > 1 and lines[-1].startswith(_AFTER):
        lines.pop()
    said = dict(_pairs(lines[-1])) if len(lines[-1]) < 1 << 20 else {}
    if len(said) < _FEWEST or not {"Steps", "Seed", "Sampler"} & said.keys():
        return None
    prompts = "\n".join(lines[:-1])
    prompt, _, negative = f"\n{prompts}".partition("\nNegative prompt:")
    taken = Taken(_tool(said.get("Version", "")))
    taken.take("prompt", prompt.strip(), "prompt")
    taken.take("negative_prompt", negative.strip(), "negative prompt")
    plain = said.get("Emphasis") == "None"
    taken.fields |= {"prompt_syntax": "plain" if plain else "weighted", "on_long_prompt": "chunk"}
    taken.table(said, _FIELDS)
    _take_schedule(taken, said.get("Schedule type", ""))
    strength = "hires_strength" if taken.fields.get("hires") else "strength"
    taken.take(strength, said.get("Denoising strength"), "Denoising strength")
    _take_mask(taken, said)
    if taken.fields.get("hires"):
        upscaler = said.get("Hires upscaler", "Latent")
        taken.fields["hires_upscaler"] = _UPSCALERS.get(upscaler, "embedded")
        if upscaler not in _UPSCALERS:
            taken.leave(f"Hires upscaler {upscaler} (the embedded one stands in)")
    if said.get("RNG") != "CPU" and not taken.tool.startswith("stable-diffusion.cpp"):
        taken.leave("the noise, which is not a CPU's (RNG)")
    taken.whole().differs(_OTHERWISE)
    return taken


def _pairs(line: str) -> Iterator[tuple[str, Any]]:
    """Names and values of the last line; a value with commas is a JSON string there, or, with Civitai, a list."""
    place = 0
    for _ in range(_MOST):
        found = _KEY.match(line, place)
        if not found:
            return
        place = found.end()
        end = line.find(",", place)
        value: Any = line[place : len(line) if end < 0 else end].strip()
        if line[place : place + 1] in ('"', "[", "{"):
            try:
                value, end = _DECODER.raw_decode(line, place)
                end = line.find(",", end)
            except (ValueError, RecursionError):
                pass
        yield found[1].strip(), value
        if end < 0:
            return
        place = end + 1


def _take_schedule(taken: Taken, said: str) -> None:
    sampler = taken.fields.get("sampler")
    if said and said != "Automatic":
        taken.take("schedule", said, "Schedule type")
    elif sampler in _EVEN and "schedule" not in taken.fields:
        taken.fields["schedule"] = _AUTOMATIC.get(sampler, "normal") if said else "normal"


def _take_mask(taken: Taken, said: dict[str, Any]) -> None:
    if said.get("Mask mode") == "Inpaint not masked":
        taken.fields["invert_mask"] = True
    if said.get("Masked content") in _CONTENTS:
        taken.fields["masked_content"] = _CONTENTS[said["Masked content"]]
    if said.get("Inpaint area") == "Only masked":
        taken.fields["inpaint_area"] = "masked"


def _tool(version: Any) -> str:
    version = str(version)
    named = ("stable-diffusion.cpp", "Fooocus", "ldmcli", "ComfyUI")
    return next((name for name in named if name in version), "Forge" if version[:1] == "f" else "AUTOMATIC1111")
