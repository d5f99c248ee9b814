"""`ldm bench`: how long pictures take here."""

import json
from typing import Any

import click

from ldmcli.cli.command import command
from ldmcli.cli.options import (
    expanded,
    json_option,
    model_options,
    model_spec,
    option,
    request_options,
    request_settings,
    runtime_options,
    runtime_spec,
    verbosity_options,
)
from ldmcli.cli.txt2img import txt2img
from ldmcli.errors import CannotCreateError, UsageError, printable
from ldmcli.spec import GenerationRequest

_CLOCKS = ("cold", "image", "step")
_STEPS = 20
_PROMPT = "a red apple on a blue background"
# Options that make bench has now, by how its argument is typed.
_MOVED = {
    "--against": "--against diffusers", "--random-weights": "--random-weights sd15",
    "--compile-cache": "--compile-cache DIR", "--markdown": "",
}  # fmt: skip


def _clocks(_context: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names or not set(names) <= set(_CLOCKS):
        raise click.BadParameter(f"choose from {', '.join(_CLOCKS)}, with commas between.")
    return tuple(name for name in _CLOCKS if name in names)


def _moved(_context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        name = parameter.opts[0]
        argument = f' BENCH="{_MOVED[name]}"' if _MOVED[name] else ", which prints Markdown"
        raise UsageError(f"{name} has left `ldm bench`; in a clone of the project run make bench{argument}.")


def _moved_options(command: click.Command) -> click.Command:
    """Refuse what the command had, naming where it is."""
    for name in _MOVED:
        flag = name == "--markdown"
        option(name, is_flag=flag, hidden=True, expose_value=False, is_eager=True, callback=_moved)(command)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name == "steps":
            parameter.default, parameter.show_default, parameter.help = _STEPS, True, "Sampling steps."
    return command


@_moved_options
@command(short_help="Measure how long pictures take.")
@model_options
@option("-p", "--prompt", metavar="TEXT", default=_PROMPT, help="What to draw.  [default: an apple]")
@request_options
@option("-s", "--seed", type=int, default=0, show_default=True, help="Seed of the picture.")
@option("--clock", "clocks", envvar="LDM_CLOCK", callback=_clocks, metavar="LIST", default="cold,image,step",
        show_default=True, help="What to measure.")  # fmt: skip
@option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rounds.")
@option("-b", "--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="Pictures drawn at once, by the clocks image and step.")  # fmt: skip
@runtime_options
@json_option("Print one JSON object with every sample.")
@option("--json-file", metavar="FILE", help="Write that object to FILE as well, whatever is printed.")
@verbosity_options
@click.pass_context
def bench(context: click.Context, **options: Any) -> None:
    """Measure how long pictures take: from a cold start and warm, by phases and steps, and how much memory.

    \b
    cold    a new process to the PNG on disk, the page cache warm; split into phases
    image   in a process that is warm, prompt to PNG
    step    one U-Net step, prompt and negative prompt together
    floor   what a step or image would take if all its convolutions and matrix products ran at
            the best rate measured in the same run

    One pass is measured, from noise: a second one, as --hires asks for, or a given picture is timed
    by `ldm txt2img --json` and `ldm img2img --json`. Comparisons with other programs, and with this
    one's own techniques turned off, are run by `make bench` in a clone of the project.

    \b
    Examples:
    ldm bench
    ldm bench --clock step --dtype fp32
    ldm bench -m sd15.safetensors --clock image,step -b 4
    """
    if options["batch_size"] > 1 and "cold" in options["clocks"]:
        raise UsageError("a cold start draws one picture; with --batch-size give --clock image,step.")
    if options["prompt"] == "-":
        raise UsageError("--prompt takes the text itself, not - for standard input.")
    from ldmcli.bench import measure, report
    from ldmcli.disk.writing import check_may_write, write_exact
    from ldmcli.session import Session

    json_file = expanded(options["json_file"]) if options["json_file"] is not None else None
    if json_file is not None:  # refused before anything is measured
        if not json_file.absolute().parent.is_dir():
            raise CannotCreateError(f"there is no folder for {printable(str(json_file))}; make it first.")
        check_may_write(json_file, b'"ldmcli": "', "result of ldm bench", "--json-file")

    with Session(model_spec(options), runtime_spec(options)) as session:
        request = session.fit(GenerationRequest(options["prompt"], seed=options["seed"], **request_settings(options)))
        last = request.seed + options["batch_size"] - 1
        GenerationRequest(request.prompt, seed=last)  # refused where it is out of range
        found = measure(session, request, _words(context), options["clocks"], options["runs"], options["batch_size"])
    if json_file is not None:
        write_exact(json_file, json.dumps(found).encode("ascii") + b"\n", overwrite=True)
    click.echo(json.dumps(found) if options["as_json"] else report(found))


def _words(context: click.Context) -> list[str]:
    """The words after `ldm txt2img` that ask for the same picture, computed in the same way."""
    shared = {parameter.name for parameter in txt2img.params} - {"as_json", "batch_size", "no_cache", "prompt"}
    words = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in shared or value is None or value is False:
            continue
        name = max(parameter.opts, key=len)
        if parameter.name == "loras":
            words += [f"{name}={lora.name}:{lora.weight}:{lora.text_weight}" for lora in value]
            continue
        if isinstance(parameter, click.Option) and parameter.multiple:
            words += [f"{name}={text}" for text in value]
            continue
        text = ":".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(name if value is True else f"{name}={text}")
    return [*words, "--", context.params["prompt"]]
