"""ComfyUI's graph, walked from the picture that was saved up to what it was made of. Nodes are only read."""

import re
from collections.abc import Iterator
from typing import Any

from ldmcli.foreign.taken import Taken, json_object
from ldmcli.spec import MAX_STEPS

_MOST_NODES, _MOST_ENDS = 10_000, 50
# Inputs that lead on to nodes with settings of the sampler that has them.
_PARTS = ("noise", "guider", "sampler", "sigmas")
_SCALARS = {
    "seed": "seed", "noise_seed": "seed", "cfg": "guidance_scale", "sampler_name": "sampler", "scheduler": "schedule",
}  # fmt: skip
_SIGMAS = {
    "KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "AlignYourStepsScheduler": "ays",
    "BetaSamplingScheduler": "beta", "SDTurboScheduler": "sgm_uniform", "PolyexponentialScheduler": "exponential",
}  # fmt: skip
_LORAS = ("LoraLoader", "LoraLoaderModelOnly")
_TEXTS = ("text", "string", "value", "prompt", "text_g", "text_l", "STRING", "populated_text")
_VALUES = ("value", "int", "float", "number", "seed", "noise_seed", "Number")
_UPWARD = ("conditioning", "conditioning_1", "conditioning_to")
_KNOWN = {
    "VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "VAELoader", "CLIPSetLastLayer", "LoadImage",
    "VAEEncode", "CLIPLoader", "DualCLIPLoader", "Note", "Reroute", "KSamplerSelect", "BasicScheduler",
    "BasicGuider", "CFGGuider", "RandomNoise", "EmptyLatentImage", "RescaleCFG", "LatentUpscale", "LatentUpscaleBy",
    *_SIGMAS, *_LORAS,
}  # fmt: skip
_OTHERWISE = {"unipc": "variant bh1", "beta": "steps, which are whole training steps there"}
_EMBEDDING = re.compile(r"\bembedding:([^\s,()\[\]:<>]+)")


class _Graph:
    """The nodes of an API graph by id; whatever is not as it should be is as if it were not there."""

    def __init__(self, nodes: dict[str, Any]) -> None:
        sound = {key: one for key, one in nodes.items() if isinstance(one, dict)}
        self.inputs = {key: one["inputs"] for key, one in sound.items() if isinstance(one.get("inputs"), dict)}
        self.kinds = {key: str(sound[key].get("class_type", "")) for key in self.inputs}
        self.read: set[str] = set()

    def link(self, value: Any) -> str | None:
        """The id of the node that an input's value leads to."""
        key = str(value[0]) if isinstance(value, list) and len(value) == 2 else None
        return key if key in self.inputs else None

    def scalar(self, value: Any, names: tuple[str, ...] = _VALUES) -> Any:
        """An input's value, over links to nodes that only hold one; None where that is none."""
        waiting, seen = [value], set[str]()
        while waiting:
            node = self.link(value := waiting.pop())
            if node is None and value is not None and not isinstance(value, list | dict):
                return value
            if node is not None and node not in seen:
                seen.add(node)
                self.read.add(node)
                waiting += [self.inputs[node][name] for name in reversed(names) if name in self.inputs[node]]
        return None

    def upstream(self, start: str | None, names: tuple[str, ...] = ()) -> Iterator[str]:
        """Nodes from `start` on, nearest first, along all inputs or those named; each once."""
        waiting, seen = [start] if start else [], set[str]()
        while waiting:
            node = waiting.pop(0)
            if node in seen:
                continue
            seen.add(node)
            yield node
            inputs = self.inputs[node]
            waiting += filter(None, (self.link(inputs[name]) for name in names or inputs if name in inputs))

    def settings(self, sampler: str) -> dict[str, Any]:
        """The inputs of a sampler, and of the nodes that hold settings for it."""
        found: dict[str, Any] = {}
        for node in self.upstream(sampler, _PARTS):
            self.read.add(node)
            found = self.inputs[node] | found
            if self.kinds[node] in _SIGMAS:
                found.setdefault("scheduler", _SIGMAS[self.kinds[node]])
        return found


def read_comfy(text: str) -> Taken | None:
    """The request of the last sampler of a graph, or of the first and a second pass; None where there is no sampler.
    Raises BadDataError where it is no JSON object."""
    nodes = json_object(text)
    if len(nodes) > _MOST_NODES:
        return None
    graph = _Graph(nodes)
    used = {graph.link(value) for inputs in graph.inputs.values() for value in inputs.values()}
    ends = sorted((key for key in graph.inputs if key not in used), key=lambda key: "Save" not in graph.kinds[key])
    above: list[str] = []
    path: list[str] = []
    for end in ends[:_MOST_ENDS]:
        above = list(graph.upstream(end))
        if path := [node for node in above if _samples(graph, node)]:
            break
    else:
        return None
    taken = Taken("ComfyUI")
    first, last = path[-1], path[0]
    said = graph.settings(first)
    for name, field in _SCALARS.items():
        if name in said:
            taken.take(field, graph.scalar(said[name]), name)
    _take_steps(graph, taken, said)
    _take_size(graph, taken, said)
    _take_prompts(graph, taken, said)
    _take_models(graph, taken, said)
    if first != last:
        _take_second(graph, taken, first, last, count=len(path))
    graph.read.update(path)
    for node in above:
        if node not in graph.read and graph.kinds[node] not in _KNOWN:
            taken.leave(f"node {graph.kinds[node]}")
    taken.whole().differs(_OTHERWISE)
    return taken


def _samples(graph: _Graph, node: str) -> bool:
    inputs = graph.inputs[node]
    return "latent_image" in inputs and ("positive" in inputs or "guider" in inputs)


def _take_steps(graph: _Graph, taken: Taken, said: dict[str, Any]) -> None:
    """Steps are those of the whole schedule here, of which a denoise below 1 takes the last; there, those taken."""
    steps, denoise = (graph.scalar(said.get(name)) for name in ("steps", "denoise"))
    if isinstance(denoise, int | float) and 0 < denoise < 1 and type(steps) is int and steps <= MAX_STEPS:
        taken.take("strength", denoise, "denoise")
        steps = int(steps / denoise)
    taken.take("steps", steps, "steps")
    if graph.scalar(said.get("start_at_step")) not in (None, 0):
        taken.leave("start_at_step", graph.scalar(said["start_at_step"]))


def _take_size(graph: _Graph, taken: Taken, said: dict[str, Any]) -> None:
    for node in graph.upstream(graph.link(said.get("latent_image"))):
        inputs = graph.inputs[node]
        if _samples(graph, node) or "width" not in inputs or "height" not in inputs:
            if graph.kinds[node] == "LoadImage":
                taken.leave("the image", graph.scalar(inputs.get("image")))
            continue
        graph.read.add(node)
        taken.take("width", graph.scalar(inputs["width"]), "width")
        taken.take("height", graph.scalar(inputs["height"]), "height")
        return


def _take_prompts(graph: _Graph, taken: Taken, said: dict[str, Any]) -> None:
    """The nearest text above each of the two, and how many of the encoder's layers are read for it."""
    prompts = {"prompt": "", "negative_prompt": ""}
    for field, name in (("prompt", "positive"), ("negative_prompt", "negative")):
        start = graph.link(said.get(name) or (said.get("conditioning") if field == "prompt" else None))
        path = list(graph.upstream(start, (*_UPWARD, name)))
        zeros = [node for node in path if graph.kinds[node] == "ConditioningZeroOut"]
        texts = [(node, text) for node in path if isinstance(text := _text(graph, node), str)]
        if zeros or not texts:
            taken.leave(f"the {name} prompt{', zeros' * bool(zeros)}" if start else "")
            graph.read.update(path)
            continue
        encoder, prompts[field] = texts[0][0], _EMBEDDING.sub(r"\1", texts[0][1])
        graph.read.add(encoder)
        for node in graph.upstream(encoder, ("clip",)):
            layer = graph.scalar(graph.inputs[node].get("stop_at_clip_layer"))
            if type(layer) is int and layer < -1:
                taken.take("clip_skip", -layer, "stop_at_clip_layer")
    weighted = any("(" in text for text in prompts.values())
    for field, text in prompts.items():
        taken.take(field, re.sub(r"(?<!\\)([\[\]])", r"\\\1", text) if weighted else text, field)
    taken.fields |= {"prompt_syntax": "weighted" if weighted else "plain", "on_long_prompt": "chunk"}


def _text(graph: _Graph, node: str) -> Any:
    inputs = graph.inputs[node]
    return next((graph.scalar(inputs[key], _TEXTS) for key in _TEXTS if key in inputs), None)


def _take_models(graph: _Graph, taken: Taken, said: dict[str, Any]) -> None:
    loras = []
    for node in graph.upstream(graph.link(said.get("model")), ("model",)):
        inputs, kind = graph.inputs[node], graph.kinds[node]
        weight = graph.scalar(inputs.get("strength_model", 1.0))
        if "lora_name" in inputs:
            loras.append((graph.scalar(inputs["lora_name"]), weight, graph.scalar(inputs.get("strength_clip", 0.0))))
        elif name := inputs.get("ckpt_name") or inputs.get("unet_name"):
            taken.take("model", graph.scalar(name), "ckpt_name")
            graph.read.add(node)
        elif kind == "RescaleCFG":
            taken.take("guidance_rescale", graph.scalar(inputs.get("multiplier")), "RescaleCFG")
        elif kind not in _KNOWN:
            taken.leave(f"node {kind}")
        graph.read.add(node)
    for lora in reversed(loras):
        taken.lora(*lora)


def _take_second(graph: _Graph, taken: Taken, first: str, last: str, *, count: int) -> None:
    """A second sampler that goes on with what the first drew, enlarged: `hires`."""
    said = graph.settings(last)
    between = [node for node in graph.upstream(graph.link(said.get("latent_image"))) if not _samples(graph, node)]
    sizes = [graph.inputs[node] for node in between if "Upscale" in graph.kinds[node]]
    scale = next((graph.scalar(one["scale_by"]) for one in sizes if "scale_by" in one), None)
    sides = next(([graph.scalar(one[side]) for side in ("width", "height")] for one in sizes if "width" in one), None)
    graph.read.update(between)
    if count != 2 or not (scale or sides):
        taken.leave(f"{count} samplers, of which the first is taken")
        return
    taken.take("hires", str(scale) if scale else "{}x{}".format(*sides or ()), "upscale")
    taken.take("hires_strength", graph.scalar(said.get("denoise", 1.0)), "denoise")
    taken.take("hires_steps", graph.scalar(said.get("steps")), "steps")
