"""InvokeAI's pictures: `invokeai_metadata` since version 3, `sd-metadata` and `Dream` before."""

import re
from typing import Any

from ldmcli.foreign.taken import Taken, json_object

_FIELDS = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "width": "width", "height": "height",
    "seed": "seed", "cfg_scale": "guidance_scale", "cfg_rescale_multiplier": "guidance_rescale", "steps": "steps",
    "scheduler": "sampler", "strength": "strength", "refiner_start": "",
    **dict.fromkeys((
        "generation_mode", "rand_device", "app_version", "created_by", "model", "loras", "vae", "clip_skip",
    ), ""),
}  # fmt: skip
_OLD = {
    "seed": "seed", "steps": "steps", "cfg_scale": "guidance_scale", "width": "width", "height": "height",
    "sampler": "sampler", "strength": "strength",
    **dict.fromkeys((
        "prompt", "type", "postprocessing", "variations", "threshold", "perlin", "symmetry",
    ), ""),
}  # fmt: skip
_DREAM = {
    "s": "steps",
    "S": "seed",
    "W": "width",
    "H": "height",
    "C": "guidance_scale",
    "A": "sampler",
    "f": "strength",
}
_NEGATIVE = re.compile(r"\[([^\[\]]{0,20000})\]")
_WEIGHTS = re.compile(r"[)\w][+-]{1,8}(?=[\s,]|$)|\)\d\.\d")


def read_invoke(text: str) -> Taken:
    """`invokeai_metadata`."""
    said = json_object(text)
    taken = Taken("InvokeAI")
    taken.table(said, _FIELDS)
    model, vae = said.get("model"), said.get("vae")
    if isinstance(model, dict):
        taken.take("model", model.get("name") or model.get("model_name"), "model")
    if isinstance(vae, dict):
        taken.take("vae", vae.get("name") or vae.get("model_name"), "vae")
    if type(said.get("clip_skip")) is int:
        taken.take("clip_skip", said["clip_skip"] + 1, "clip_skip")  # there counted from 0
    taken.loras(said.get("loras"))
    return _with_notes(taken, said.get("rand_device", "cpu"))


def read_old(text: str) -> Taken:
    """`sd-metadata`."""
    said = json_object(text)
    image = said.get("image")
    if not isinstance(image, dict):
        image = {}
    taken = Taken("InvokeAI")
    taken.take("model", said.get("model_weights"), "model_weights")
    taken.take("model_hash", said.get("model_hash"), "model_hash")
    taken.table(image, _OLD)
    prompts: Any = image.get("prompt")
    first = prompts[0] if isinstance(prompts, list) and prompts else prompts
    _take_prompt(taken, first.get("prompt") if isinstance(first, dict) else first)
    return _with_notes(taken, "cuda")


def read_dream(text: str) -> Taken | None:
    """`Dream`: the options of a command line."""
    found = re.match(r'"(.*)"(.*)$', text, re.DOTALL)
    options = re.findall(r"\s-(\w)\s?(\S+)", found[2]) if found else []
    if not found or not options:
        return None
    taken = Taken("InvokeAI")
    _take_prompt(taken, found[1])
    for option, value in options:
        taken.take(_DREAM[option], value, f"-{option}") if option in _DREAM else taken.leave(f"-{option}", value)
    return _with_notes(taken, "cuda")


def _take_prompt(taken: Taken, prompt: Any) -> None:
    """The prompt, what stands in brackets being negative."""
    if isinstance(prompt, str):
        taken.take("negative_prompt", ", ".join(_NEGATIVE.findall(prompt)), "negative prompt")
        taken.take("prompt", _NEGATIVE.sub("", prompt).strip(), "prompt")


def _with_notes(taken: Taken, device: Any) -> Taken:
    taken.fields["on_long_prompt"] = "chunk"
    if _WEIGHTS.search(taken.fields["prompt"]):
        taken.leave("weights in the prompt, which stay as text")
    if device != "cpu":
        taken.leave("the noise, which is a GPU's")
    return taken.whole()
