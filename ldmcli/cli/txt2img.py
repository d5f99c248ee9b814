"""`ldm txt2img`: prompts in, PNG files out."""

import dataclasses
import itertools
import logging
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ldmcli.cli.options import expanded, json_option, option, verbosity_options
from ldmcli.cli.output import Output, open_output
from ldmcli.cli.prompts import STDIN, read_prompts
from ldmcli.errors import UsageError, printable
from ldmcli.request import MAX_SEED, SAMPLERS, GenerationRequest, fit_to_model

if TYPE_CHECKING:
    from ldmcli.checkpoints.source import ModelSource
    from ldmcli.pipeline import Pipeline
    from ldmcli.runtime.policy import Runtime

_log = logging.getLogger(__name__)
_RANDOM_SEEDS = 2**32  # short enough to type again
_REQUEST_OPTIONS = ("negative_prompt", "steps", "guidance_scale", "width", "height", "sampler", "eta")
_RUNTIME_OPTIONS = ("device", "dtype", "attention")


class _Device(click.ParamType):
    name = "auto|cpu|cuda[:N]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, number = value.partition(":")
        if value in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and number.isascii() and number.isdigit()):
            return value
        raise click.BadParameter(f"{printable(repr(value))} is not auto, cpu, cuda or cuda:N.", ctx, param)


@click.command()
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@option("-m", "--model", metavar="PATH", help="Diffusers folder or .safetensors file.  [default: the embedded model]")
@option("-n", "--negative-prompt", metavar="TEXT", default="", help="What the picture should not show.")
@option("-W", "--width", type=int, help="Pixels.  [default: the model's own]")
@option("-H", "--height", type=int, help="Pixels.  [default: the model's own]")
@option("--steps", type=int, default=50, show_default=True, help="Sampling steps.")
@option("--sampler", type=click.Choice(SAMPLERS), default="ddim", show_default=True,
        help="DDIM; or PLMS, of higher order, which wants less guidance or more steps.")  # fmt: skip
@option("--eta", type=float, default=0.0, show_default=True, help="Fresh noise in DDIM: 0 none, 1 as in DDPM.")
@option(
    "-g", "--guidance-scale", "--cfg-scale", type=float, default=7.5, show_default=True,
    help="How closely to follow the prompt; 1 is unguided and twice as fast.",
)  # fmt: skip
@option("-s", "--seed", type=int, help="Seed of the first picture.  [default: random, reported]")
@option("-c", "--count", type=click.IntRange(1), default=1, show_default=True,
        help="Pictures per prompt, with seeds SEED, SEED+1, …")  # fmt: skip
@option("-b", "--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="Pictures computed at once.")  # fmt: skip
@option("-o", "--output", metavar="PATH", default=".",
        help="A folder, a .png file, or - for PNG data on stdout.  [default: this folder]")  # fmt: skip
@option("--from-image", metavar="PNG", help="Run the request in this picture again; options given win over it.")
@option("--on-long-prompt", type=click.Choice(["warn", "error"]), default="warn", show_default=True,
        help="When a prompt is longer than the model reads: cut it with a warning, or refuse.")  # fmt: skip
@option("--dtype", type=click.Choice(["auto", "fp16", "bf16", "fp32"]), default="auto", show_default=True,
        help="Numbers to compute with; auto: fp16 on a GPU, bf16 on a CPU that has it, else fp32.")  # fmt: skip
@option("--device", type=_Device(), metavar="[auto|cpu|cuda|cuda:N]", default="auto", show_default=True,
        help="Where to compute; auto: the GPU if there is one.")  # fmt: skip
@option("--attention", type=click.Choice(["auto", "sdpa", "xformers", "math"]), default="auto", show_default=True,
        help="How attention is computed: torch's kernels, xformers', or plainly.")  # fmt: skip
@option("--overwrite", is_flag=True, help="Replace files that are there already.")
@option("--no-metadata", is_flag=True, help="Write no prompt and settings into the PNG.")
@json_option("Report each picture as a JSON line.")
@verbosity_options
@click.pass_context
def txt2img(context: click.Context, prompts: tuple[str, ...], **options: Any) -> None:
    """Draw each PROMPT and print the path of each picture.

    A PROMPT of - means: one prompt a line from standard input, drawn as they come.

    \b
    Examples:
    ldm txt2img "a red apple on a blue background"
    ldm txt2img "an orange" "a pear" -c 4 -s 1 -o fruit
    ldm txt2img "a rose" -o - > rose.png
    ldm txt2img --from-image rose.png --steps 100

    Every option can be set by environment too: LDM_MODEL, LDM_STEPS, LDM_GUIDANCE_SCALE, …
    """
    # 1. The request: from the command line, over that of a picture.
    record = _read_record(options["from_image"])
    if record:
        _take_over(context, options, record)
        prompts = prompts or (record["request"]["prompt"],)
    if not prompts:
        raise click.UsageError("give a PROMPT, - for standard input, or --from-image.", context)
    requests = _requests(prompts, options)
    # 2. What the model is, from its headers; then every check that needs no weights.
    source = _open_source(options["model"])
    requests = _checked(requests, source, options["on_long_prompt"], eager=STDIN not in prompts)
    first = next(requests, None)
    if first is None:
        _log.info("0 prompts on standard input, nothing to draw")
        return
    output = open_output(
        options["output"],
        overwrite=options["overwrite"],
        as_json=options["as_json"],
        one_image=len(prompts) * options["count"] == 1 and STDIN not in prompts,
    )
    # 3. The pictures.
    if options["seed"] is None:
        _log.info("seed %d", first.seed)
    requests = _counted(itertools.chain([first], requests), options["count"])
    _draw_all(source, requests, output, options, record)


def _draw_all(
    source: "ModelSource",
    requests: Iterable[GenerationRequest],
    output: Output,
    options: dict[str, Any],
    record: dict[str, Any] | None,
) -> None:
    """Load the model, draw the requests batch by batch and write each picture."""
    from ldmcli.checkpoints.load import model_sha256
    from ldmcli.images.metadata import text_chunks
    from ldmcli.images.png import encode_png
    from ldmcli.pipeline import load_pipeline

    runtime = _choose_runtime(options, record)
    source = dataclasses.replace(source, half=runtime.half)
    hashed = model_sha256(source)
    started = time.perf_counter()
    pipeline = load_pipeline(source, runtime)
    _log.debug("%s loaded in %.2f s: %s", source.name, time.perf_counter() - started, runtime.to_dict())
    done = 0
    while batch := list(itertools.islice(requests := iter(requests), options["batch_size"])):
        started = time.perf_counter()
        pictures = _draw(pipeline, batch, f"{done + 1}")
        seconds = (time.perf_counter() - started) / len(batch)
        identity = {"name": source.name, "path": _shareable(options["model"]), "sha256": hashed.result()}
        _compare_models(record, identity, options)
        for request, pixels in zip(batch, pictures, strict=True):
            chunks = {} if options["no_metadata"] else text_chunks(request, identity, runtime.to_dict())
            report = {**request.to_dict(), "model": identity["name"], "seconds": round(seconds, 3)}
            output.write(encode_png(pixels, chunks), request.seed, report)
            _log.debug("seed %d drawn in %.2f s", request.seed, seconds)
        done += len(batch)


def _draw(pipeline: "Pipeline", batch: Sequence[GenerationRequest], label: str) -> list[Any]:
    from tqdm import tqdm

    label = label if len(batch) == 1 else f"{label}…{int(label) + len(batch) - 1}"
    quiet = not _log.isEnabledFor(logging.INFO)
    # None lets tqdm look whether stderr is a terminal.
    with tqdm(total=batch[0].steps, desc=label, unit="step", disable=quiet or None, file=sys.stderr) as bar:
        return pipeline.draw(batch, bar.update)


def _read_record(picture: str | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    from ldmcli.images.metadata import read_record

    return read_record(Path(picture))


def _take_over(context: click.Context, options: dict[str, Any], record: dict[str, Any]) -> None:
    """Put a picture's request, model and runtime in place of every option that the command line does not give."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    found = {name: record["request"][name] for name in (*_REQUEST_OPTIONS, "seed")}
    found |= {name: record["runtime"][name] for name in _RUNTIME_OPTIONS if name in record["runtime"]}
    found["model"] = record["model"]["path"] or None
    options.update({name: value for name, value in found.items() if not given(name)})
    options["model_given"] = given("model")


def _requests(prompts: Sequence[str], options: dict[str, Any]) -> Iterator[GenerationRequest]:
    """The first request of each prompt. Raises UsageError before any prompt is read where an option is out of range."""
    seed = random.SystemRandom().randrange(_RANDOM_SEEDS) if options["seed"] is None else options["seed"]
    settings = {name: options[name] for name in _REQUEST_OPTIONS}
    common = GenerationRequest(prompt="", seed=seed, **settings)
    if seed + options["count"] - 1 > MAX_SEED:
        raise UsageError(f"seed {seed} with --count {options['count']} goes past {MAX_SEED}, the largest seed.")
    return (dataclasses.replace(common, prompt=prompt) for prompt in read_prompts(prompts))


def _counted(requests: Iterable[GenerationRequest], count: int) -> Iterator[GenerationRequest]:
    """One request for each picture. Seeds count up within a prompt and start again at the next."""
    for request in requests:
        for i in range(count):
            yield dataclasses.replace(request, seed=request.seed + i)


def _open_source(model: str | None) -> "ModelSource":
    from ldmcli.checkpoints.source import embedded_model, open_model

    return open_model(embedded_model() if model is None else expanded(model))


def _checked(
    requests: Iterator[GenerationRequest], source: "ModelSource", on_long_prompt: str, *, eager: bool
) -> Iterator[GenerationRequest]:
    """The requests fitted to the model, prompts' lengths looked at. `eager` checks all before the first is drawn;
    requests from an endless standard input are checked as they come."""
    from ldmcli.runtime.memory import check_memory

    read: set[str] = set()  # negative prompts whose length was looked at: one, which all requests share

    def check(request: GenerationRequest) -> GenerationRequest:
        fitted = fit_to_model(request, source.config)
        assert fitted.width is not None
        assert fitted.height is not None
        check_memory(source.config, fitted.width, fitted.height)
        for text in (fitted.prompt, *({fitted.negative_prompt} - read)):
            _check_length(text, source, on_long_prompt)
        read.add(fitted.negative_prompt)
        return fitted

    checked = map(check, requests)
    return iter(list(checked)) if eager else checked


def _check_length(text: str, source: "ModelSource", on_long_prompt: str) -> None:
    cut = source.tokenizer(text).cut_text
    if not cut:
        return
    limit = source.config.text_encoder.max_length - 2
    if on_long_prompt == "error":
        raise UsageError(f"a prompt is longer than the {limit} tokens the model reads; too much: “{printable(cut)}”.")
    _log.warning("a prompt is longer than the %d tokens the model reads; cut off: “%s”", limit, printable(cut))


def _choose_runtime(options: dict[str, Any], record: dict[str, Any] | None) -> "Runtime":
    from ldmcli.runtime.policy import choose_runtime

    try:
        return choose_runtime(options["device"], options["dtype"], options["attention"])
    except UsageError as error:
        if record is None:
            raise
        _log.warning("the picture was made otherwise than this machine can (%s) It may differ.", error)
        return choose_runtime()


def _shareable(model: str | None) -> str:
    """The model's path as it may stand in a picture that is given away: without the name of the user's home."""
    if model is None:
        return ""
    path, home = Path(model), Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else model


def _compare_models(record: dict[str, Any] | None, identity: dict[str, str], options: dict[str, Any]) -> None:
    """Say so, once, when a picture is run again with weights that have changed since."""
    if record is None or options["model_given"]:
        return
    if record["model"]["sha256"] != identity["sha256"]:
        _log.warning("the model %s is not the one the picture was made with; it will differ", identity["name"])
        options["model_given"] = True
