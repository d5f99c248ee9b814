"""NovelAI's pictures: `Description`, `Comment` and `Source`, in the file's text or hidden in its pixels."""

import re
from collections.abc import Mapping
from typing import Any

from ldmcli.foreign.taken import Taken, json_object

_FIELDS = {
    "uc": "negative_prompt", "steps": "steps", "sampler": "sampler", "seed": "seed", "scale": "guidance_scale",
    "width": "width", "height": "height", "cfg_rescale": "guidance_rescale", "noise_schedule": "",
    **dict.fromkeys((
        "prompt", "n_samples", "request_type", "signed_hash", "version", "v4_prompt", "v4_negative_prompt",
        "lora_unet_weights", "image", "mask", "lora_clip_weights", "noise", "hide_debug_overlay", "legacy_v3_extend",
        "add_original_image", "params_version", "strength", "legacy", "controlnet_strength", "uncond_scale",
        "extra_noise_seed", "max_sequence_length", "explike_fine_detail", "prefer_brownian", "legacy_uc",
        "sampler_version",
    ), ""),
}  # fmt: skip
_CLOSED = {"}": ":1.05)", "]": ":0.952)"}
_SIGNS = re.compile(r"[{}\[\]()\\]")


def read_novelai(said: Mapping[str, str]) -> Taken:
    """The request in these texts. Raises BadDataError where the comment is no JSON object."""
    comment = json_object(said.get("Comment", ""))
    taken = Taken("NovelAI")
    taken.table(comment, _FIELDS)
    taken.take("schedule", comment.get("noise_schedule"), "noise_schedule")
    if comment.get("request_type") not in (None, "PromptGenerateRequest"):
        taken.leave("request_type", comment["request_type"])
    prompts: dict[str, Any] = {
        "prompt": comment.get("prompt") or said.get("Description", ""),
        "negative_prompt": taken.fields.get("negative_prompt", ""),
    }
    for name, prompt in prompts.items():
        taken.take(name, _weighted(prompt) if isinstance(prompt, str) else "", name)
    taken.fields |= {"prompt_syntax": "weighted", "on_long_prompt": "chunk"}
    taken.leave("the model", said.get("Source", ""))
    return taken.whole()


def _weighted(prompt: str) -> str:
    """Braces and brackets as weights; what does not match stays as text."""
    opening: list[tuple[int, str]] = []  # where, and what closes it
    parts: list[str] = []
    place = 0
    for found in _SIGNS.finditer(prompt):
        parts.append(prompt[place : found.start()])
        place, sign = found.end(), found[0]
        if opening and sign == opening[-1][1]:
            parts[opening.pop()[0]] = "("
            parts.append(_CLOSED[sign])
            continue
        if sign in "{[":
            opening.append((len(parts), "}" if sign == "{" else "]"))
        parts.append(sign if sign in "{}" else f"\\{sign}")
    return "".join([*parts, prompt[place:]])
