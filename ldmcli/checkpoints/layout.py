"""Which files make up a model or an adapter, by their names: what to fetch of a repository, and whether it is whole."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ldmcli.errors import BadDataError, MissingInputError, printable

INDEX = "model_index.json"
GENERATION = "generation_config.json"  # how the model is best drawn with: transformers' name; diffusers ignores it
WORD_LIST = "known_words.txt"  # what the model draws, a name a line; ours too, as is the next
UPSCALER = "upscaler/model.safetensors"  # a network that makes this model's pictures larger
LEARNED = ("learned_embeds.safetensors", "learned_embeds.bin")  # what diffusers calls an embedding, the better first
PEFT_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")  # in folders of PEFT and diffusers
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside its file
# The latent diffusion paper's models call their parts otherwise: "vqvae" even where it is none, "bert".
OTHER_FOLDERS = {"vae": "vqvae", "text_encoder": "bert"}
_SCHEDULERS = ("scheduler", "low_res_scheduler", "image_noising_scheduler")
_NETWORKS = ("unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "bert", "image_normalizer")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MAX_SHARDS = 1000
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def stem_of(part: str) -> str:
    """How the weight files of one part of a model begin."""
    return "model" if part.startswith(("text_encoder", "image_encoder", "bert")) else "diffusion_pytorch_model"


def weight_names(stem: str, *, half: bool) -> tuple[str, ...]:
    """The names under which a network's weights, or the index of their shards, may stand, best first: where `half`, the
    fp16 variant before the plain one."""
    plain = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    fp16 = (
        f"{stem}.fp16.safetensors",
        f"{stem}.safetensors.index.fp16.json",
        f"{stem}.fp16.safetensors.index.json",
    )
    return fp16 + plain if half else plain + fp16


def needed_files(
    name: str, files: Collection[str], read: Callable[[str], Mapping[str, Any]], *, half: bool
) -> list[str]:
    """The files of the model `name` that a run reads, small ones first, out of all its `files` (paths from its root);
    also of a repository that is one VAE, or one embedding.

    `read` gives the JSON object in one of them. Raises MissingInputError naming a file that is not among `files`, and
    BadDataError where `files` are no model that can be run.
    """

    def require(file: str) -> str:
        if file not in files:
            raise MissingInputError(f"{name} lacks {printable(file)}.")
        return file

    def weights(folder: str) -> list[str]:
        """The weights in `folder` ("" or ending in a slash): one file, or an index and its shards."""
        names = [folder + file for file in weight_names(stem_of(folder), half=half)]
        found = next((file for file in names if file in files), None)
        if found is None:
            _check_pickles(f"the weights of {name}'s {folder.rstrip('/')}", files, folder)
            raise MissingInputError(f"{name} lacks {min(names, key=len)}.")
        shards = _shards(found, name, read(found)) if found.endswith(".json") else []
        return [found, *(require(folder + shard) for shard in shards)]

    def tokenizer(folder: str) -> list[str]:
        whole = [f"{folder}tokenizer.json"]
        if whole[0] not in files and f"{folder}vocab.txt" in files:
            whole = [f"{folder}vocab.txt"]
        split = [f"{folder}vocab.json", f"{folder}merges.txt"]
        extras = [folder + extra for extra in _TOKENIZER_EXTRAS if folder + extra in files]
        return [*(whole if whole[0] in files else map(require, split)), *extras]

    if INDEX not in files and any(file in files for file in weight_names(stem_of("vae"), half=half)):
        return ["config.json", *weights("")]
    if INDEX not in files and (learned := [file for file in LEARNED if file in files]):
        return learned[:1]
    if not any(file.endswith(".safetensors") for file in files):
        _check_pickles(f"the weights of {name}", files)
    if INDEX not in files:
        hint = safetensors_hint(name, files)
        cure = f"to use one of its files, name {hint}" if hint else "name another one"
        raise BadDataError(f"{name} has no {INDEX}, so it is no diffusers model; {cure}.")
    index = read(INDEX)
    named = {part for part, kind in index.items() if isinstance(kind, list) and any(kind)}
    if not ({"unet", "vae"} <= named or {"unet", "vqvae"} <= named):
        kind = printable(str(index.get("_class_name", ""))) or "model of another kind"
        raise BadDataError(f"{name} is a {kind}, not a latent diffusion model with a U-Net and a VAE.")
    parts = [part for part in _NETWORKS if part in named]
    return [
        INDEX,
        *(file for file in (GENERATION, WORD_LIST, UPSCALER) if file in files),
        *(require(f"{part}/scheduler_config.json") for part in _SCHEDULERS if part in named),
        *(file for part in _TOKENIZERS if part in named for file in tokenizer(f"{part}/")),
        *(require(f"{part}/config.json") for part in parts),
        *(file for part in parts for file in weights(f"{part}/")),
    ]


def safetensors_hint(name: str, files: Collection[str]) -> str:
    """The .safetensors files among `files` as they are typed, after the repository's `name`; "" where none are."""
    repository, _, revision = name.partition("@")
    found = sorted(file for file in files if file.endswith(".safetensors"))
    shown = [printable(f"{repository}/{file}" + (f"@{revision}" if revision else "")) for file in found[:5]]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(shown) + more


def _check_pickles(what: str, files: Collection[str], folder: str = "") -> None:
    """Raise BadDataError where there are pickles in `folder`, which stand for what is not there otherwise."""
    pickles = sorted(file for file in files if file.startswith(folder) and file.endswith(_PICKLES))
    if pickles:
        raise BadDataError(
            f"{what} are there only as a pickle ({printable(pickles[0])}), which could run code when opened; look for "
            "a repository or revision with safetensors."
        )


def _shards(index: str, name: str, content: Mapping[str, Any]) -> list[str]:
    """The files that a shard index names, all of them beside it. Raises BadDataError."""
    weight_map = content.get("weight_map")
    found = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    sound = all(file.endswith(".safetensors") and not set(file) & set("/\\\0") for file in found)
    if not found or not sound or len(found) > _MAX_SHARDS:
        raise BadDataError(f"{name}: {index} does not name the .safetensors files of its folder.")
    return sorted(found)
