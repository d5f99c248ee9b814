"""`ldm txt2img`: prompts in, PNG files out."""

import dataclasses
import functools
import itertools
import logging
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ldmcli.cli.options import (
    REQUEST_OPTIONS,
    json_option,
    model_options,
    option,
    request_options,
    request_settings,
    runtime_options,
    verbosity_options,
)
from ldmcli.cli.output import Output, open_output
from ldmcli.cli.prompts import STDIN, read_prompts
from ldmcli.config import UNDECIDED
from ldmcli.errors import UsageError, printable
from ldmcli.spec import MAX_SEED, GenerationRequest
from ldmcli.speed.startup import link_ahead, quicken
from ldmcli.speed.tuning import Tuning
from ldmcli.stopwatch import Stopwatch, process_age

if TYPE_CHECKING:
    from ldmcli.pipeline import Begun, Pipeline
    from ldmcli.sources import Sources
    from ldmcli.speed.cpu.heap import FilledHeap
    from ldmcli.speed.policy import Runtime

    _Begun = tuple[Sequence[GenerationRequest], Begun]

_Drawn = TypeVar("_Drawn")
_Write = Callable[[Iterable[tuple[GenerationRequest, tuple[Any, float]]]], None]  # pictures, each with its seconds
_log = logging.getLogger(__name__)
_RANDOM_SEEDS = 2**32  # short enough to type again
_RUNTIME_OPTIONS = ("device", "dtype", "attention")
_WEIGHT_OPTIONS = ("vae", "refiner", "prediction_type")


@click.command(short_help="Draw prompts given as arguments.")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@model_options
@request_options
@option("-s", "--seed", type=int, help="Seed of the first picture.  [default: random, reported]")
@option("-c", "--count", type=click.IntRange(1), default=1, show_default=True,
        help="Pictures per prompt, with seeds SEED, SEED+1, …")  # fmt: skip
@option("-b", "--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
        help="Pictures computed at once.")  # fmt: skip
@option("-o", "--output", metavar="PATH", default=".",
        help="A folder, a .png file, or - for PNG data on stdout.  [default: this folder]")  # fmt: skip
@option("--from-image", metavar="PNG", help="Run the request in this picture again; options given win over it.")
@runtime_options
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
    sources = _open(options, record)
    filled = sources.fill_heap(options["device"], options["dtype"])
    link_ahead()
    requests = _checked(requests, sources, eager=STDIN not in prompts)
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
    _draw_all(sources, requests, output, options, record, filled, eager=STDIN not in prompts)


def _draw_all(
    sources: "Sources",
    requests: Iterable[GenerationRequest],
    output: Output,
    options: dict[str, Any],
    record: dict[str, Any] | None,
    filled: "FilledHeap | None",
    *,
    eager: bool,
) -> None:
    """Load the model, draw the requests batch by batch and write each picture. `eager`: all requests are known."""
    from ldmcli.checkpoints.identity import model_sha256

    runtime = _choose_runtime(options, record)
    import ldmcli.pipeline  # noqa: F401  here, so that the time it takes counts as that of imports
    from ldmcli.checkpoints.stored_text import remembered

    settle = _wait_for(runtime) if options["as_json"] else None
    stopwatch = Stopwatch(settle)
    stopwatch.add("imports", process_age())
    memory = remembered(enabled=not options["no_cache"])
    batches = _batches(requests, options["batch_size"])
    first = next(batches)
    if filled:
        ready = filled.free()
        _log.debug("%d MB of memory were got meanwhile", ready >> 20)
    pipeline = _load(sources, runtime, options, first=first, memory=memory, stopwatch=stopwatch)
    hashed = model_sha256(dataclasses.replace(sources.model, half=runtime.half), memory.hashes)

    def write(drawn: Iterable[tuple[GenerationRequest, tuple[Any, float]]]) -> None:
        identity = sources.identity(options, hashed.result())
        _compare_models(record, identity, options)
        for request, picture in drawn:
            _write(output, pipeline, request, picture, identity, metadata=not options["no_metadata"])

    batches = itertools.chain([first], batches)
    # Times that are told are of one batch alone, and a picture is not kept back until there is another prompt.
    if eager and settle is None and pipeline.works_ahead:
        _draw_ahead(pipeline, batches, write)
        memory.prompts.flush()  # not before: it would wait for all that the device was asked for
        return
    done = 0
    for batch in batches:
        drawn: dict[int, tuple[Any, float]] = {}
        for alike in pipeline.alike(batch):
            started = time.perf_counter()
            pictures = _draw(pipeline.draw, alike, done + len(drawn) + 1)
            seconds = (time.perf_counter() - started) / len(alike)
            drawn |= {id(request): (pixels, seconds) for request, pixels in zip(alike, pictures, strict=True)}
        write((request, drawn[id(request)]) for request in batch)
        memory.prompts.flush()
        done += len(batch)


def _draw_ahead(pipeline: "Pipeline", batches: Iterable[Sequence[GenerationRequest]], write: _Write) -> None:
    """Draw batches on a device that computes by itself: it is asked for the next one before this one is written."""
    finished = time.perf_counter()

    def finish(batch: Sequence[GenerationRequest], begun: "Sequence[_Begun]") -> None:
        nonlocal finished
        drawn: dict[int, tuple[Any, float]] = {}
        for alike, one in begun:
            pictures = pipeline.finish(one)
            seconds, finished = (time.perf_counter() - finished) / len(alike), time.perf_counter()
            drawn |= {id(request): (pixels, seconds) for request, pixels in zip(alike, pictures, strict=True)}
        write((request, drawn[id(request)]) for request in batch)

    done = 0
    waiting: list[Callable[[], None]] = []
    for batch in batches:
        begun: list[_Begun] = []
        failure: Exception | None = None
        try:
            for alike in pipeline.alike(batch):
                number = done + sum(len(some) for some, _ in begun) + 1
                begun.append((alike, _draw(pipeline.begin, alike, number)))
        except Exception as error:  # which takes nothing with it that was begun before
            failure = error
        for one in waiting:
            one()
        if failure:
            raise failure
        waiting = [functools.partial(finish, batch, begun)]
        done += len(batch)
    for one in waiting:
        one()


def _wait_for(runtime: "Runtime") -> Callable[[], object] | None:
    """What waits for a device that computes by itself."""
    if runtime.device.type != "cuda":
        return None
    import torch

    return functools.partial(torch.cuda.synchronize, runtime.device)


def _batches(requests: Iterable[GenerationRequest], size: int) -> Iterator[list[GenerationRequest]]:
    """The requests, `size` at a time, as they come."""
    requests = iter(requests)
    while batch := list(itertools.islice(requests, size)):
        yield batch


def _load(sources: "Sources", runtime: "Runtime", options: dict[str, Any], **beside: Any) -> "Pipeline":
    from ldmcli.speed.cpu.heap import keep_freed_memory
    from ldmcli.speed.policy import use_threads

    keep_freed_memory()
    started = time.perf_counter()
    use_threads(options["threads"], sources.model.config.unet, pictures=options["batch_size"])
    pipeline = sources.load(runtime, **beside)
    name = sources.model.name
    _log.debug("%s loaded in %.2f s: %s", name, time.perf_counter() - started, runtime.to_dict())
    return pipeline


def _write(
    output: Output,
    pipeline: "Pipeline",
    request: GenerationRequest,
    drawn: tuple[Any, float],
    identity: dict[str, str],
    *,
    metadata: bool,
) -> None:
    """Encode and write one picture, drawn in so many seconds."""
    from ldmcli.images.metadata import text_chunks
    from ldmcli.images.png import encode_png

    pixels, seconds = drawn
    with pipeline.stopwatch.phase("png"):
        chunks = text_chunks(request, identity, pipeline.runtime.to_dict()) if metadata else {}
        data = encode_png(pixels, chunks)
    report = {**request.to_dict(), "model": identity["name"], "seconds": round(seconds, 3)}
    times = pipeline.stopwatch.report()
    output.write(data, request.seed, report | times)
    _log.debug("seed %d drawn in %.2f s: %s", request.seed, seconds, times["phases"])


def _draw(draw: Callable[..., _Drawn], batch: Sequence[GenerationRequest], number: int) -> _Drawn:
    """What `draw` gives for a batch, whose first picture has that number, with a bar that tells of its steps."""
    from tqdm import tqdm

    label = str(number) if len(batch) == 1 else f"{number}…{number + len(batch) - 1}"
    quiet = not _log.isEnabledFor(logging.INFO)
    # None lets tqdm look whether stderr is a terminal.
    with tqdm(total=batch[0].steps, desc=label, unit="step", disable=quiet or None, file=sys.stderr) as bar:
        return draw(batch, bar.update)


def _read_record(picture: str | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    from ldmcli.images.metadata import read_record

    return read_record(Path(picture))


def _take_over(context: click.Context, options: dict[str, Any], record: dict[str, Any]) -> None:
    """Put a picture's request, model and runtime in place of every option that the command line does not give."""

    def given(name: str) -> bool:
        return context.get_parameter_source(name) is ParameterSource.COMMANDLINE

    found = {name: record["request"][name] for name in (*REQUEST_OPTIONS, "seed")}
    found |= {name: record["runtime"][name] for name in _RUNTIME_OPTIONS if name in record["runtime"]}
    found |= {name: record["model"].get(name) for name in _WEIGHT_OPTIONS}
    found["model"] = record["model"]["path"] or None
    options.update({name: value for name, value in found.items() if not given(name)})
    options["model_given"] = given("model")


def _requests(prompts: Sequence[str], options: dict[str, Any]) -> Iterator[GenerationRequest]:
    """The first request of each prompt. Raises UsageError before any prompt is read where an option is out of range."""
    seed = random.SystemRandom().randrange(_RANDOM_SEEDS) if options["seed"] is None else options["seed"]
    common = GenerationRequest(prompt="", seed=seed, **request_settings(options))
    if seed + options["count"] - 1 > MAX_SEED:
        raise UsageError(f"seed {seed} with --count {options['count']} goes past {MAX_SEED}, the largest seed.")
    return (dataclasses.replace(common, prompt=prompt) for prompt in read_prompts(prompts))


def _counted(requests: Iterable[GenerationRequest], count: int) -> Iterator[GenerationRequest]:
    """One request for each picture. Seeds count up within a prompt and start again at the next."""
    for request in requests:
        for i in range(count):
            yield dataclasses.replace(request, seed=request.seed + i)


def _open(options: dict[str, Any], record: dict[str, Any] | None) -> "Sources":
    """What to draw with. A U-Net that alone can tell its prediction type is asked here: its size depends on that."""
    from ldmcli.sources import open_sources

    sources = open_sources(options)
    if sources.model.config.schedule.prediction_type == UNDECIDED:
        sources = sources.settled(_choose_runtime(options, record))
    return sources


def _checked(requests: Iterator[GenerationRequest], sources: "Sources", *, eager: bool) -> Iterator[GenerationRequest]:
    """The requests fitted to the model, prompts' lengths looked at. `eager` checks all before the first is drawn;
    requests from an endless standard input are checked as they come."""
    read: set[str] = set()  # negative prompts whose length was looked at: one, which all requests share

    def check(request: GenerationRequest) -> GenerationRequest:
        fitted = sources.fit(request)
        for text in (fitted.prompt, *({fitted.negative_prompt} - read)):
            if cut := sources.check_length(text, fitted):
                limit = sources.token_limit
                _log.warning(
                    "a prompt is longer than the %d tokens the model reads; cut off: “%s”", limit, printable(cut)
                )
        if not read and fitted.guidance_scale is not None and fitted.guidance_scale < 1:
            _log.warning("guidance below 1 draws what the negative prompt says; 1 is unguided")
        read.add(fitted.negative_prompt)
        return fitted

    checked = map(check, requests)
    return iter(list(checked)) if eager else checked


def _choose_runtime(options: dict[str, Any], record: dict[str, Any] | None) -> "Runtime":
    quicken()
    from ldmcli.speed.policy import choose_runtime

    tuning = Tuning.of(options)
    try:
        return choose_runtime(options["device"], options["dtype"], options["attention"], tuning)
    except UsageError as error:
        if record is None:
            raise
        _log.warning("the picture was made otherwise than this machine can (%s) It may differ.", error)
        return choose_runtime()


def _compare_models(record: dict[str, Any] | None, identity: dict[str, str], options: dict[str, Any]) -> None:
    """Say so, once, when a picture is run again with weights that have changed since."""
    if record is None or options["model_given"]:
        return
    if record["model"]["sha256"] != identity["sha256"]:
        _log.warning("the model %s is not the one the picture was made with; it will differ", identity["name"])
        options["model_given"] = True
