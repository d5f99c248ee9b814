"""`ldm info`: what pictures and weight files hold, from their headers."""

import json
from pathlib import Path
from typing import Any

import click

from ldmcli.cli.arguments import each_file
from ldmcli.cli.command import command, values
from ldmcli.cli.options import expanded, json_option, option, verbosity_options
from ldmcli.errors import BadDataError, printable


@command(short_help="Tell what pictures and model files are.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, shell_complete=values)
@option("--allow-pickle", is_flag=True, help="Look into .ckpt, .pt and .bin files too, for plain tensors alone.")
@json_option("Print one JSON object a file.")
@verbosity_options
@click.pass_context
def info(context: click.Context, files: tuple[str, ...], allow_pickle: bool, as_json: bool) -> None:
    """Tell what each FILE is: the request a picture holds; a model's family, parts and dimensions; a LoRA's kind, rank,
    family and trigger words; what a ControlNet, T2I-Adapter or IP-Adapter is for; an embedding's word, vectors and
    family; or an upscaler's architecture, size and scale.

    Only headers are read, but for upscalers, so this is quick for files of any size. Where a file cannot be read, the
    others are shown all the same, and the exit code is that of the first that could not.
    """

    def show_facts(file: str) -> None:
        facts = _facts(file, allow_pickle=allow_pickle)
        if as_json:
            click.echo(json.dumps({"path": file, **facts} if len(files) > 1 else facts))
            return
        if len(files) > 1:
            click.echo(f"{printable(file, 4096)}:")
        for line in _lines(facts, "  " if len(files) > 1 else ""):
            click.echo(line)

    each_file(context, files, show_facts)


def _facts(file: str, *, allow_pickle: bool) -> dict[str, Any]:
    """What a file, or a folder, is. Raises LdmError."""
    from ldmcli.adapters.adapter import is_adapter_folder
    from ldmcli.checkpoints.control_source import control_facts, is_control_folder
    from ldmcli.checkpoints.file_kinds import AUTOENCODERS, IP_ADAPTER, STEERING
    from ldmcli.checkpoints.inspection import inspect
    from ldmcli.checkpoints.ip_adapter_source import ip_adapter_facts
    from ldmcli.checkpoints.vae_source import autoencoder_facts, is_autoencoder_folder
    from ldmcli.hub.listing import find_here

    path = find_here(file) or expanded(file)
    if is_adapter_folder(path):
        return {"kind": "weights", "is": "LoRA"} | _adapter_facts(path, allow_pickle=allow_pickle)
    if is_control_folder(path):
        return {"kind": "weights"} | control_facts(path)
    if is_autoencoder_folder(path):
        facts = {"kind": "weights", "is": "autoencoder, diffusers folder"}
        return facts | autoencoder_facts(path, allow_pickle=allow_pickle)
    facts = inspect(path, allow_pickle=allow_pickle)
    if facts.get("is") in ("LoRA", "unknown"):  # of some kinds no key's ending tells
        facts |= _tried_adapter_facts(path, facts["is"], allow_pickle=allow_pickle)
    if facts.get("is") in STEERING:
        facts |= control_facts(path, allow_pickle=allow_pickle)
    elif facts.get("is") in AUTOENCODERS:
        facts |= _autoencoder_facts(path, allow_pickle=allow_pickle)
    elif facts.get("is") == IP_ADAPTER:
        facts |= ip_adapter_facts(path, allow_pickle=allow_pickle)
    elif facts["kind"] != "model":
        facts |= _embedding_facts(path, facts.get("is", ""), allow_pickle=allow_pickle)
    if facts.get("is") == "unknown":
        facts |= _upscaler_facts(path, allow_pickle=allow_pickle)
    return facts


def _tried_adapter_facts(path: Path, kind: str, *, allow_pickle: bool) -> dict[str, Any]:
    """What can be said of a file that may be an adapter; of a LoRA what is wrong with it, if something is."""
    try:
        return {"is": "LoRA"} | _adapter_facts(path, allow_pickle=allow_pickle)
    except BadDataError as error:
        return {"problem": str(error)} if kind == "LoRA" else {}


def _adapter_facts(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    from ldmcli.adapters.adapter import open_adapter
    from ldmcli.adapters.facts import facts

    return facts(open_adapter(path, allow_pickle=allow_pickle))


def _embedding_facts(path: Path, kind: str, *, allow_pickle: bool) -> dict[str, Any]:
    """What is to be said of an embedding, which files of no other kind may be too; nothing of others."""
    from ldmcli.checkpoints.file_kinds import EMBEDDING

    if kind not in (EMBEDDING, "unknown", ""):
        return {}
    from ldmcli.adapters.embeddings import facts, open_embedding

    try:
        return {"is": EMBEDDING} | facts(open_embedding(path, allow_pickle=allow_pickle))
    except BadDataError:
        if kind == EMBEDDING:
            raise
        return {}


def _autoencoder_facts(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    """What is to be said of an autoencoder; of one that cannot be read, why."""
    from ldmcli.checkpoints.vae_source import autoencoder_facts

    try:
        return autoencoder_facts(path, allow_pickle=allow_pickle)
    except BadDataError as error:
        return {"problem": str(error)}


def _upscaler_facts(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    from ldmcli.checkpoints.files import open_weights
    from ldmcli.upscaling.upscaler import upscaler_facts

    return upscaler_facts(open_weights(path, allow_pickle=allow_pickle))


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Nested facts as aligned `name: value` lines, safe to print."""
    lines = []
    for name, value in facts.items():
        if value is None or value in ([], ""):
            continue  # not said
        label = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict):
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, str) and "\n" in value:
            lines += [label, *(f"{indent}  {printable(line, 4096)}" for line in value.splitlines())]
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            lines.append(f"{label} {printable('; '.join(value), 4096)}")
        else:
            shown = f"{value:,}" if isinstance(value, int) and value >= 10_000 and name == "parameters" else str(value)
            lines.append(f"{label} {printable(shown, 4096)}")
    return lines
