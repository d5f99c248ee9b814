"""--from-image: the request in a picture, and what it was made from, once more."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ldmcli.cli.arguments import STDIN
from ldmcli.cli.options import REQUEST_OPTIONS, expanded
from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.control import CONTROL_FIELDS
from ldmcli.errors import BadDataError, MissingInputError, printable
from ldmcli.image_prompt import IP_ADAPTER_FIELDS, NO_MASK
from ldmcli.spec import (
    ALPHA,
    HIRES_FIELDS,
    IMAGE_FIELDS,
    INPUT_FILES,
    PICTURES,
    STEERING,
    STEERING_FILES,
    STEERING_NETWORKS,
    STEERING_PICTURES,
)

if TYPE_CHECKING:
    from ldmcli.fitting import FittedRequest

_log = logging.getLogger(__name__)
_RUNTIME_OPTIONS = ("device", "dtype", "attention")
_SHOWN_LEFT = 20
# What a picture was drawn without where its record has none of it, whatever environment and configuration say.
_WITHOUT = (*CONDITION_FIELDS, "image", "hires")
_WEIGHT_OPTIONS = ("vae", "refiner", "prediction_type", "upscaler", "image_encoder")


def read_again(picture: str) -> dict[str, Any]:
    """A picture's record, or what takes its place in another program's picture. Raises as `read_record` does."""
    from ldmcli.images.metadata import read_record

    try:
        return read_record(Path(picture))
    except BadDataError:
        from ldmcli.foreign.pictured import read_foreign

        found = read_foreign(Path(picture))
        if found is None:
            raise
    model = {"name": found.model, "path": "", "sha256": found.model_hash, "vae": found.vae}
    return {"request": found.fields, "model": model, "runtime": {}, "made_by": found.tool, "left": found.left}


def take_over(context: click.Context, options: dict[str, Any], record: dict[str, Any]) -> None:
    """Put a picture's request, model and runtime in place of every option that the command line does not give."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    request, prompts = record["request"], context.params.get("prompts", ())
    names = (*REQUEST_OPTIONS, *CONDITION_FIELDS, "embedding_row", *IMAGE_FIELDS, *HIRES_FIELDS, *STEERING, "seed")
    found = {name: request[name] for name in names if name in request}
    for networks, _, *settings in (CONTROL_FIELDS, IP_ADAPTER_FIELDS, ("image_embedding", "", "embedding_row")):
        if given(networks):  # what is said of other networks is not for these
            found = {name: value for name, value in found.items() if name not in settings}
    found |= {name: record["runtime"][name] for name in _RUNTIME_OPTIONS if name in record["runtime"]}
    if "made_by" in record:
        found |= _of_another_program(found, options, record, given)
    else:
        found |= {name: record["model"].get(name) for name in _WEIGHT_OPTIONS}
        found["model"] = record["model"]["path"] or None
    if "upscaled" in record and not found["upscaler"]:
        _log.info("the picture was made larger after it was drawn (%s); it is drawn as it was", record["upscaled"])
    changed = prompts or given("prompt_syntax")  # what the prompt names is then not the picture's
    loras = [lora for lora in request.get("loras", ()) if not (changed and lora.get("in_prompt"))]
    found |= {"loras": loras, "embeddings": ()}
    if given("sampler") and " " in options["sampler"]:
        found["schedule"] = None  # the sampler's name says it
    steering = [fields for fields in (CONTROL_FIELDS, IP_ADAPTER_FIELDS) if not given(fields[0])]
    unsaid = itertools.chain(_WITHOUT, *steering)
    without = {name: () if isinstance(options[name], tuple) else None for name in unsaid if name in options}
    options.update({name: value for name, value in (without | found).items() if not given(name)})
    options["embeddings"] += tuple(_embeddings_again(options, record, prompts))
    options["model_given"] = given("model")
    for name in INPUT_FILES:
        if not given(name) and name in request and options[name] is not None:
            options[name] = _picture_again(name, options[name], record.get("inputs", {}).get(name))
    for name in STEERING_FILES:
        if not given(name) and name in request:
            options[name] = tuple(_steered_again(name, request[name], record.get("inputs", {})))
    # Which network an upscaler's name means, the model's files tell: they are compared once it is open.
    if given("hires_upscaler"):
        record.get("inputs", {}).pop("hires_upscaler", None)
    if given("upscaler"):
        record["model"].pop("upscaler_sha256", None)


def skips_otherwise(context: click.Context, record: dict[str, Any], family: str) -> bool:
    """Whether clip_skip comes from a picture of another program, and is one more there than here: SDXL never reads the
    last layer, which others count."""
    if "made_by" not in record or not family.startswith("Stable Diffusion XL"):
        return False
    return context.get_parameter_source("clip_skip") is not ParameterSource.COMMANDLINE


def _of_another_program(
    found: dict[str, Any], options: dict[str, Any], record: dict[str, Any], given: Callable[[str], bool]
) -> dict[str, Any]:
    """The weights of another program's picture, found by their names; what was not taken of it is said. Raises
    MissingInputError where its model or a LoRA is not here, and no other is given."""
    from ldmcli.hub.listing import find_here

    def here(name: str) -> str | None:
        return next((one for one in (name, f"{name}.safetensors") if name and find_here(one)), None)

    model, left = record["model"], list(record["left"])
    weights = {"model": here(model["name"]) or options["model"], "vae": here(model["vae"]) or options["vae"]}
    for lora in () if given("loras") else found.get("loras", ()):
        if options["lora_dir"] is None and not here(lora["name"]):
            raise MissingInputError(
                f"the picture was made with the LoRA “{printable(lora['name'])}”, which is not here by that name; give "
                "--lora-dir DIR, or --lora FILE in its place."
            )
    if model["name"] and not given("model") and weights["model"] is None:
        known = f" (SHA-256 {printable(model['sha256'][:12])}…)" if model["sha256"] else ""
        raise MissingInputError(
            f"the picture was made with the model “{printable(model['name'])}”{known}, which is not here by that name; "
            "give --model, or put it into the folder LDM_MODELS."
        )
    if model["vae"] and not weights["vae"]:
        left.append(f"VAE {model['vae']}, which is not here")
    if "strength" in found and options.get("image") is None:
        left.append(f"strength {found.pop('strength'):g}, of an image that it does not hold")
    if left:
        shown = list(map(printable, left[:_SHOWN_LEFT]))
        more = [f"and {len(left) - _SHOWN_LEFT} more"] if len(left) > _SHOWN_LEFT else []
        _log.warning("not taken from the picture, which %s made: %s", record["made_by"], "; ".join(shown + more))
    return weights


def _picture_again(name: str, path: str, sha256: str | None) -> str:
    """Where the picture is that another was made from. Raises MissingInputError where it is not there any more."""
    if (name, path) == ("mask", ALPHA):
        return path
    found = str(expanded(path))
    if path == STDIN or not os.path.exists(found):
        where = "standard input" if path == STDIN else f"{printable(path)}, which is not there"
        said = name.replace("_", " ")
        option = name.replace("_", "-")
        raise MissingInputError(f"the picture's {said} came from {where}; give that with --{option}.")
    if _sha256(name, found) != sha256:
        _log.warning("the %s %s is not the one the picture was made with; it will differ", name, printable(found))
    return found


def _sha256(name: str, path: str) -> str:
    """That of a picture, which is looked at, or of another file."""
    if name not in PICTURES and name not in STEERING_PICTURES:
        from ldmcli.disk.hashes import FileHashes

        return FileHashes().sha256(Path(path))
    from ldmcli.images.pixels import facts_of

    return facts_of(path, depth=name == "depth").sha256


def _steered_again(name: str, paths: Sequence[str], hashes: dict[str, str]) -> Iterator[str]:
    """Where the networks are that steered a picture, or the pictures that they followed. Raises MissingInputError for a
    picture that is not there any more; the hub may have a network."""
    for i, path in enumerate(paths):
        found, wanted = str(expanded(path)), hashes.get(f"{name}:{i}")
        if path == NO_MASK:
            yield path
        elif name in STEERING_PICTURES:
            yield _picture_again(name, path, wanted)
        else:
            yield found if os.path.exists(found) else path


def compare_networks(record: dict[str, Any], fitted: "FittedRequest") -> None:
    """Say so where a network of the same name is another than steered the picture."""
    before, now = record.get("inputs", {}), dict(fitted.inputs)
    if before.get("image_encoder", now.get("image_encoder")) != now.get("image_encoder"):
        _log.warning("the image encoder is not the one the picture was made with; it will differ")
    for field in STEERING_NETWORKS:
        names = zip(record["request"].get(field, ()), getattr(fitted.recorded, field), strict=False)
        for i, (one, other) in enumerate(names):
            keys = [f"{field}:{i}", *([f"image_encoder:{i}"] if field == "ip_adapter" else [])]
            if str(expanded(one)) == str(expanded(other)) and any(
                before.get(k, now.get(k)) != now.get(k) for k in keys
            ):
                what = f"the network {printable(other)}"
                _log.warning("%s is not the one the picture was made with; it will differ", what)


def _embeddings_again(options: dict[str, Any], record: dict[str, Any], prompts: Sequence[str]) -> Iterator[str]:
    """What names a picture's embeddings here, but for the words that the options give embeddings for. Raises
    MissingInputError for one that is not here and whose word a prompt holds."""
    recorded = record["model"].get("embeddings", ())
    if not recorded:
        return
    from ldmcli.adapters.embedding_words import found_again, split_name
    from ldmcli.conditioning.words import folded
    from ldmcli.disk.hashes import user_hashes
    from ldmcli.hub.fetch import parse

    texts = folded("\n".join([*(prompts or (record["request"]["prompt"],)), options["negative_prompt"]]))
    names = [split_name(name) for name in options["embeddings"]]
    taken = {folded(Path(file).stem if word is None else word) for file, word in names}
    sha256 = user_hashes(enabled=not options["no_cache"]).sha256
    folder = None if options["embedding_dir"] is None else expanded(options["embedding_dir"])
    for one in recorded:
        word, path = one["word"], one["path"]
        if folded(word) in taken or (STDIN not in prompts and folded(word) not in texts):
            continue
        file = found_again(one, folder, sha256)
        if file is None and (parse(path) is None or expanded(path).exists()):
            raise MissingInputError(
                f"the picture was made with the embedding “{printable(word)}” ({printable(path)}, SHA-256 "
                f"{printable(one['sha256'][:12])}), which is not here; give --embedding FILE:WORD or --embedding-dir."
            )
        if file is not None and sha256(file) != one["sha256"]:
            _log.warning("the embedding %s is not the one the picture was made with; it will differ", printable(word))
        yield f"{path if file in (None, expanded(path)) else file}:{word}"
