"""`ldm bench`: how long pictures take, here and by other programs."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from ldmcli.cli.options import expanded, json_option, option, runtime_options, verbosity_options
from ldmcli.errors import CannotCreateError, LdmError, UsageError, printable
from ldmcli.speed.tuning import Tuning

_CLOCKS = ("cold", "image", "step")
_FAMILIES = ("sd15", "sd21", "sdxl")


class _Clocks(click.ParamType):
    name = "clocks"

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        unknown = [name for name in names if name not in _CLOCKS]
        if unknown or not names:
            raise click.BadParameter(f"choose from {', '.join(_CLOCKS)}, with commas between.", ctx, param)
        return tuple(name for name in _CLOCKS if name in names)


@click.command(short_help="Measure how long pictures take.")
@option("-m", "--model", metavar="MODEL", help="As for `ldm txt2img`.  [default: the embedded model]")
@option("--random-weights", type=click.Choice(_FAMILIES),
        help="In place of a model, weights drawn at random: speed needs no download. They take 2 to 7 GB of the "
        "temporary folder's disk (TMPDIR) until the end.")  # fmt: skip
@option("--against", metavar="LIST", default="",
        help="What to compare with, with commas between: diffusers, diffusers-channels-last, diffusers-bf16, "
        "diffusers-compile, openvino; or ldm itself with one setting changed: ldm-eager (no CUDA graph), "
        "ldm-torch-kernels, ldm-plain (neither), ldm-sdpa, ldm-xformers, ldm-compile, ldm-low-vram.")  # fmt: skip
@option("--clock", "clocks", envvar="LDM_CLOCK", type=_Clocks(), metavar="LIST", default="cold,image,step",
        show_default=True, help="What to measure.")  # fmt: skip
@option("--runs", type=click.IntRange(1, 1000), help="Rounds.  [default: 3; 5 for small models beside others]")
@option("-b", "--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="Pictures drawn at once, by the clocks image and step.")  # fmt: skip
@option("--profile", is_flag=True, help="Tell what one step spends its time on, by kinds of work.")
@option("--prompt", metavar="TEXT", help="What to draw.  [default: an apple]")
@option("-n", "--negative-prompt", metavar="TEXT", default="", help="What the picture should not show.")
@option("-s", "--seed", type=int, default=0, show_default=True, help="Seed of the picture.")
@option("--steps", type=int, default=20, show_default=True, help="Sampling steps, of DDIM.")
@option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@option("-g", "--guidance-scale", "--cfg-scale", type=float, help="1 is unguided.  [default: the model's own]")
@runtime_options
@json_option("Print one JSON object with every sample.")
@option("--json-file", metavar="FILE", help="Write that object to FILE as well, whatever is printed.")
@option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@option("--compile-cache", metavar="DIR",
        help="Keep what programs compile in DIR for the next time.  [default: an empty folder, removed at the "
        "end]")  # fmt: skip
@verbosity_options
def bench(**options: Any) -> None:
    """Measure a model: pictures from a cold start and warm, single steps, memory; beside other programs with --against.

    \b
    cold    a new process to the PNG on disk, the page cache warm; split into phases
    image   in a process that is warm, prompt to PNG
    step    one U-Net step, prompt and negative prompt together
    floor   what a step or image would take if all its convolutions and matrix products ran at
            the best rate measured in the same run

    All programs draw the same picture: same weights, tokens, noise, steps and number of threads,
    in turn, each in its own process. Each must first come near ldm's own picture in fp32; if one does
    not, or fails, the exit code is 1.

    \b
    Examples:
    ldm bench
    ldm bench --against diffusers,diffusers-bf16
    ldm bench --random-weights sd15 --against diffusers --clock step --dtype bf16
    ldm bench --random-weights sd15 --against diffusers,ldm-eager --clock image,step -b 16 --profile
    """
    if options["as_json"] and options["markdown"]:
        raise UsageError("--json and --markdown both say what to print; give one of them.")
    if options["model"] is not None and options["random_weights"]:
        raise UsageError("--model and --random-weights both say what to measure; give one of them.")
    if options["batch_size"] > 1 and "cold" in options["clocks"]:
        raise UsageError("a cold start draws one picture; with --batch-size give --clock image,step.")
    json_file = expanded(options["json_file"]) if options["json_file"] is not None else None
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise CannotCreateError(f"there is no folder for '{printable(str(json_file))}'; make it first.")
    from ldmcli.bench.report import to_dict, to_markdown, to_text
    from ldmcli.bench.run import run_bench

    results = run_bench(_plan(options))
    if json_file is not None:
        _write_json(json_file, to_dict(results))
    if options["as_json"]:
        click.echo(json.dumps(to_dict(results)))
    else:
        click.echo(to_markdown(results) if options["markdown"] else to_text(results))
    if results.flawed:
        sys.stdout.flush()
        raise LdmError("a contender failed or draws something else; its times do not count.")


def _plan(options: dict[str, Any]) -> Any:
    """What the options ask for. Raises UsageError."""
    from ldmcli.bench.contenders import chosen_peers
    from ldmcli.bench.plan import Plan

    peers = chosen_peers(options["against"])
    names = (
        "negative_prompt", "seed", "steps", "width", "height", "guidance_scale", "dtype", "device", "attention",
        "threads", "batch_size",
    )  # fmt: skip
    settings = {name: options[name] for name in names} | {"tile_vae": options["vae_tiling"]}
    settings |= dataclasses.asdict(Tuning.of(options))
    if options["prompt"] is not None:
        settings["prompt"] = options["prompt"]
    family = options["random_weights"]
    model = None if family else _located(options)
    compile_cache = options["compile_cache"]
    return Plan(
        model,
        family,
        settings,
        tuple(peers),
        options["clocks"],
        options["runs"],
        cached=not options["no_cache"],
        profiled=options["profile"],
        compile_cache=expanded(compile_cache).absolute() if compile_cache is not None else None,
    )


def _write_json(path: Path, found: dict[str, Any]) -> None:
    from ldmcli.disk.writing import named_errors

    with named_errors(path, "write the results"):
        path.write_text(json.dumps(found) + "\n")


def _located(options: dict[str, Any]) -> Path:
    from ldmcli.sources import located

    return located(options["model"], options).absolute()
