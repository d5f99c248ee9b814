"""Programs that write flat JSON, or a text for each setting, as tables: their names, and the fields of a request."""

from collections.abc import Mapping
from typing import Any

from ldmcli.foreign.taken import Taken

_IDLE_FOOOCUS = "full_prompt full_negative_prompt metadata_scheme version created_by performance refiner_switch user"
FOOOCUS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps", "sampler": "sampler",
    "scheduler": "schedule", "guidance_scale": "guidance_scale", "cfg": "guidance_scale", "resolution": "size",
    "width": "width", "height": "height", "base_model": "model", "base_model_hash": "model_hash",
    "clip_skip": "clip_skip", "loras": "", **dict.fromkeys(_IDLE_FOOOCUS.split(), ""),
}  # fmt: skip
_IDLE_SWARM = "swarm_version aspectratio images batchsize loras loraweights sidelength automaticvae date"
SWARM = {
    "prompt": "prompt", "negativeprompt": "negative_prompt", "seed": "seed", "steps": "steps", "width": "width",
    "height": "height", "cfgscale": "guidance_scale", "sampler": "sampler", "comfyuisampler": "sampler",
    "autowebuisampler": "sampler", "scheduler": "schedule", "comfyuischeduler": "schedule", "model": "model",
    "vae": "vae", "clipstopatlayer": "", **dict.fromkeys(_IDLE_SWARM.split(), ""),
}  # fmt: skip
EASY = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "num_inference_steps": "steps",
    "steps": "steps", "guidance_scale": "guidance_scale", "width": "width", "height": "height",
    "sampler_name": "sampler", "sampler": "sampler", "use_stable_diffusion_model": "model",
    "stable_diffusion_model": "model", "use_vae_model": "vae", "vae_model": "vae", "clip_skip": "",
    "output_format": "", "created_at": "", "num_outputs": "",
}  # fmt: skip
DRAW_THINGS = {
    "c": "prompt", "uc": "negative_prompt", "seed": "seed", "steps": "steps", "scale": "guidance_scale", "size": "size",
    "sampler": "sampler", "model": "model", "strength": "", "profile": "", "v2": "", "seed_mode": "",
}  # fmt: skip
KOHYA = {
    "prompt": "prompt", "negative-prompt": "negative_prompt", "seed": "seed", "steps": "steps", "sampler": "sampler",
    "scale": "guidance_scale", "original-width": "original_width", "original-height": "original_height",
    "crop-top": "crop_top", "crop-left": "crop_left",
}  # fmt: skip


def read_fooocus(said: Mapping[str, Any]) -> Taken:
    """Fooocus's JSON."""
    taken = Taken("Fooocus")
    taken.table(said, FOOOCUS)
    taken.loras(said.get("loras"))
    return taken.whole()


def read_swarm(said: Mapping[str, Any]) -> Taken:
    """SwarmUI's JSON, which keeps LoRAs and their weights in two lists."""
    taken = Taken("SwarmUI")
    taken.table(said, SWARM)
    names, weights = _several(said.get("loras")), _several(said.get("loraweights"))
    for i, name in enumerate(names):
        taken.lora(name, weights[i] if i < len(weights) else 1.0)
    return taken.whole()


def read_table(tool: str, said: Mapping[str, Any], fields: Mapping[str, str]) -> Taken:
    """Another program's settings by one of the tables here."""
    taken = Taken(tool)
    taken.table(said, fields)
    return taken.whole()


def _several(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [one.strip() for one in value.split(",") if one.strip()]
    return value if isinstance(value, list) else []
