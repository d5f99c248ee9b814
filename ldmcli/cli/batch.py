"""`ldm batch`: a prompt file in, a folder of pictures and an account of them out."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ldmcli.cli.command import command, values
from ldmcli.cli.option_types import Duration, RowFormat, Shard
from ldmcli.cli.options import (
    dynamic_options,
    dynamic_prompts,
    file_options,
    hires_options,
    image_options,
    json_option,
    model_options,
    model_spec,
    name_option,
    option,
    request_options,
    request_settings,
    runtime_options,
    runtime_spec,
    server_options,
    show_option,
    verbosity_options,
)
from ldmcli.cli.resident import open_session
from ldmcli.cli.run_status import RunBar, print_failures, print_status, print_totals, watch_run
from ldmcli.cli.steering_options import DrawingCommand, steering_options
from ldmcli.cli.terminal import show_file, shows_pictures, write_result
from ldmcli.errors import BadDataError, LdmError, TryAgainError, UsageError, printable
from ldmcli.images.formats import Encoding
from ldmcli.images.naming import NamePattern
from ldmcli.spec import PICTURES, GenerationRequest
from ldmcli.speed.cpu.threads import available_cores, is_small
from ldmcli.speed.startup import may_have_gpu

if TYPE_CHECKING:
    from ldmcli.batch.items import Outcome, Setup
    from ldmcli.batch.job import Job, JobSpec
    from ldmcli.batch.run import Engine, Run
    from ldmcli.batch.survey import Survey
    from ldmcli.serving.client import RemoteSession
    from ldmcli.session import Session

_log = logging.getLogger(__name__)
_STDIN = "-"
_SOME_FAILED = 3
_LOOKS = ("status", "watch", "failed", "as_json")  # what --status and --watch heed
_SMALL_BATCH = 8  # of a small model on a CPU: the fastest of 1 to 16, with a thread each
_WORTH_A_PROCESS = 32  # pictures for which another process is worth its start


@command(cls=DrawingCommand, short_help="Draw every row of a prompt file into a folder.")
@click.argument("file", metavar="[FILE]", required=False, shell_complete=values)
@option("-o", "--output", metavar="DIR", help="The run's folder: pictures, manifest, run.json.  [required]")
@option("--format", type=RowFormat(["txt", "jsonl", "csv", "tsv", "kohya", "a1111"]),
        help="What FILE is; kohya (a {red|blue} cat --n dog --s 20) and a1111 (--prompt \"a cat\" --steps 20) "
        "have options in each line.  [default: by its name's ending; needed for -]")  # fmt: skip
@option("--prompt-column", metavar="NAME", help="The CSV or TSV column, or JSON field, to take prompts from.")
@option(
    "--grid", metavar="FIELD=V,V,…", multiple=True, help="Draw each row with each of these values; may be repeated."
)
@option("-s", "--seed", type=int, default=0, show_default=True,
        help="Rows without a seed, or with -1, get one made of this and their id.")  # fmt: skip
@option(
    "-c",
    "--count",
    aliases=["--num-images", "--batch-count"],
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pictures for each row.",
)
@option("-b", "--batch-size", type=click.IntRange(1, 1024),
        help="Pictures computed at once; rows of equal settings share a batch.  [default: 8 of a small model's on a "
        "CPU, else 1]")  # fmt: skip
@option("--dry-run", is_flag=True, help="Check every row, print the totals, draw nothing.")
@option("--strict", is_flag=True, help="Draw nothing if any row is bad.")
@option("--extend", is_flag=True, help="Go on although rows were added at the end of FILE.")
@option("--retry-failed", is_flag=True, help="Draw only what failed before.")
@option("--status", metavar="DIR", help="Tell how far the run in DIR is, and do nothing else.")
@option("--watch", metavar="DIR", help="Follow the run in DIR, which another process draws, until that ends.")
@option("--failed", is_flag=True, help="With --status: list what failed, with its prompt and why.")
@option("--max-images", type=click.IntRange(1), metavar="N", help="End after N pictures.")
@option("--time-limit", type=Duration(), metavar="TIME", help="End after 90s, 55m, 1.5h …; the same command goes on.")
@option("--shard", type=Shard(), metavar="I/N", default="1/1", help="Only every N-th row, from the I-th on.")
@option("--devices", metavar="LIST",
        help="A process on each: all, 0,1, cpu*2.  [default: --device, in this process; a small model's many pictures "
        "on a CPU in one a core]")  # fmt: skip
@option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="Draw on this machine, or on a Ray cluster.")  # fmt: skip
@option("--ray-address", metavar="ADDRESS", help="The cluster to use.  [default: one of this machine's own]")
@option("--sheet", metavar="PNG", help="Write a contact sheet of the run's pictures at the end.")
@file_options("--image-format")
@name_option
@show_option
@option("--no-metadata", is_flag=True, help="Write no prompt and settings into the pictures.")
@model_options
@request_options
@hires_options
@steering_options
@dynamic_options
@image_options
@runtime_options
@server_options
@json_option("Report each picture as a JSON line as soon as it is there.")
@verbosity_options
@click.pass_context
def batch(context: click.Context, file: str | None, **options: Any) -> None:
    """Draw every row of a prompt FILE into the folder DIR; - reads standard input.

    FILE is plain text (a prompt a line, # comments), JSON lines, CSV or TSV, maybe gzip. Rows may set prompt,
    negative_prompt, seed, steps, guidance_scale, width, height, sampler, image, mask, strength, … and count and id;
    what they don't say, the options say. All rows are checked before the model is loaded.

    Running the same command again goes on where it stopped, however it stopped: what is done is not drawn again.

    \b
    Examples:
    ldm batch prompts.txt -o out
    ldm batch prompts.csv -o out --grid steps=20,50 --grid guidance_scale=5,7.5 --dry-run
    ldm batch prompts.jsonl -o out --devices all -b 16 --sheet out/sheet.png
    ldm batch --watch out

    Exit codes: 0 all done, 3 some rows failed, 65 --strict or another run's folder, 75 not finished or locked: the same
    command goes on; the others as everywhere.
    """
    from ldmcli.batch.job import Job
    from ldmcli.batch.local import parse_devices

    if _looked_at(context, options):
        return
    file = _checked(context, file, options)
    devices = parse_devices(options["devices"]) if options["devices"] else None
    if options["ray_address"] and options["engine"] != "ray":
        raise UsageError("--ray-address is for --engine ray.")
    job = Job(_job_spec(None if file == _STDIN else Path(file), options))
    # 1. Every row, before anything is loaded; standard input is checked as it comes.
    found = job.survey() if file != _STDIN or options["dry_run"] else None
    if found and found.bad_rows and options["strict"]:
        raise BadDataError(f"{_named(file)} has {found.bad_rows} bad rows; mend them, or leave out --strict.")
    if options["dry_run"]:
        assert found is not None
        print_totals(found, as_json=options["as_json"])
        context.exit(_SOME_FAILED if found.bad_rows else 0)
    options["show"] = shows_pictures(options["show"])
    # 2. The run's folder, held against others; then the pictures.
    small = _small_on_cpu(job)
    if options["batch_size"] is None:
        # A batch waits until it is full; whoever types rows waits for none.
        options["batch_size"] = _SMALL_BATCH if small and found else 1
    if devices is None and small and found:
        devices = ("cpu",) * max(1, min(available_cores(), found.images // _WORTH_A_PROCESS))
    context.exit(_run(job, found, _engine(job, devices, options), options))


def _looked_at(context: click.Context, options: dict[str, Any]) -> bool:
    """Whether it is only asked how far a run is, and that was told."""
    as_json, folder = options["as_json"], options["status"]
    if options["failed"] and not folder:
        raise click.UsageError("--failed goes with --status DIR.", context)
    if folder and options["watch"]:
        raise click.UsageError("--status and --watch exclude each other; leave out one.", context)
    if folder or options["watch"]:
        _check_only_looks(context)
    if options["watch"]:
        counts = watch_run(Path(options["watch"]), as_json=as_json)
        context.exit(_SOME_FAILED if counts.failed else 0)
    if not folder:
        return False
    (print_failures if options["failed"] else print_status)(Path(folder), as_json=as_json)
    return True


def _check_only_looks(context: click.Context) -> None:
    """Raise UsageError where something is typed that would be of no effect, for nothing is drawn."""
    for name in context.params:
        if name not in _LOOKS and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            (parameter,) = (one for one in context.command.params if one.name == name)
            shown = "a prompt FILE" if name == "file" else parameter.opts[0]
            raise click.UsageError(f"--status and --watch draw nothing; leave out {shown}.", context)


def _checked(context: click.Context, file: str | None, options: dict[str, Any]) -> str:
    """The prompt file's name. Raises UsageError where what is typed says too little, or what no batch does."""
    if file is None:
        raise click.UsageError("give a prompt FILE, - for standard input, or --status DIR.", context)
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("give --output DIR, or --dry-run to check the rows alone.", context)
    if _STDIN in [options.get(name) for name in PICTURES]:
        raise click.UsageError("a picture of a batch is a file; standard input is for rows.", context)
    if options["seed"] == -1:
        _log.warning("--seed -1 is a seed like others here, for the same command draws the same")
    return file


def _small_on_cpu(job: "Job") -> bool:
    device = job.spec.runtime.device
    on_cpu = device == "cpu" or (device == "auto" and not may_have_gpu())
    return on_cpu and job.spec.runtime.threads is None and is_small(job.session.config.unet)


def _job_spec(path: Path | None, options: dict[str, Any]) -> "JobSpec":
    from ldmcli.batch.job import JobSpec

    own = ("format", "prompt_column", "grid", "seed", "count", "shard")
    by_lot = options["dynamic_prompts"] or options["format"] == "kohya"  # whose scripts always do
    return JobSpec(
        path,
        GenerationRequest("", **request_settings(options)),
        model_spec(options),
        runtime_spec(options),
        metadata=not options["no_metadata"],
        dynamic=dynamic_prompts(options | {"dynamic_prompts": by_lot}),
        name=NamePattern(options["name"]) if options["name"] is not None else None,
        encoding=Encoding(options["image_format"] or "png", options["quality"], options["lossless"]),
        **{name: options[name] for name in own},
    )


def _run(job: "Job", found: "Survey | None", engine: "Engine", options: dict[str, Any]) -> int:
    """Draw what is still to be drawn, and return the exit code."""
    from ldmcli.batch.pictures import clean_temporaries
    from ldmcli.batch.run import Run
    from ldmcli.batch.runfile import record_rows
    from ldmcli.disk.lock import folder_lock
    from ldmcli.disk.writing import prepare_folder

    folder = Path(options["output"])
    prepare_folder(folder)
    if options["sheet"]:  # not after hours of drawing
        from ldmcli.gallery.sheet import check_sheet

        check_sheet(Path(options["sheet"]), folder)
    with folder_lock(folder):
        job.open_run(folder, found, extend=options["extend"])
        clean_temporaries(folder)
        limits = {"max_images": options["max_images"], "seconds": options["time_limit"]}
        rows = found.rows if found else None
        run = Run(folder, rows=rows, retry_failed=options["retry_failed"], **limits)
        if found:
            _log.info("rows: %d, pictures: %d, done before: %d", found.rows, found.images, run.counts().images)
        with _stopping() as stop:
            _draw(run, job, found, engine, stop, options)
        if run.rows is not None and not found:
            record_rows(folder, run.rows)
        if options["sheet"]:
            _write_sheet(folder, Path(options["sheet"]), [name for name, _ in job.grid])
        return _account(run, stop, options)


def _draw(
    run: "Run", job: "Job", found: "Survey | None", engine: "Engine", stop: "_Signals", options: dict[str, Any]
) -> None:
    """Report every picture as it comes."""
    folder = Path(options["output"])
    outcomes = run.draw(job.items(reporting=found is None), engine, batch_size=options["batch_size"], stop=stop.stop)
    with contextlib.closing(outcomes), contextlib.closing(RunBar(run.counts(), found, options)) as progress:
        for outcome in outcomes:
            _report(outcome, folder, as_json=options["as_json"])
            if options["show"] and outcome.status == "done":
                show_file(folder / outcome.path)
            progress.note(outcome)


def _engine(job: "Job", devices: tuple[str, ...] | None, options: dict[str, Any]) -> "Engine":
    """What draws the batches: this process, several on this machine, or a Ray cluster."""
    from ldmcli.batch.items import Setup

    setup = Setup(Path(options["output"]).resolve(), job.model, job.runtime, job.spec.metadata, job.spec.encoding)
    if options["engine"] == "ray":
        from ldmcli.batch.ray_engine import run_ray

        workers = len(devices) if devices and devices != ("all",) else None
        return partial(run_ray, setup, address=options["ray_address"], workers=workers)
    from ldmcli.batch.local import run_local

    opened = partial(_session, options)
    return partial(run_local, setup, devices=devices or (options["device"],), open_session=opened)


def _session(options: dict[str, Any], setup: "Setup") -> "Session | RemoteSession":
    """What draws in this process: a session of its own, or the server's."""
    return open_session(options, setup.model, setup.runtime, encoding=setup.encoding, metadata=setup.metadata)


def _account(run: "Run", stop: "_Signals", options: dict[str, Any]) -> int:
    """Say what came of the rows, and how to go on; the exit code."""
    from ldmcli.batch.ledger import audit

    counts = run.counts()
    sentence, holds = audit(counts)
    _log.info("%s", sentence)
    if stop.number is not None:
        _log.warning("stopped by %s; the same command goes on", signal.Signals(stop.number).name)
        return 128 + stop.number
    limited = options["retry_failed"] or options["max_images"] or options["time_limit"] is not None
    if counts.pending and limited:
        raise TryAgainError(f"{counts.pending} rows are still to be drawn; the same command goes on.")
    if not holds and not (limited and counts.rows is None):
        raise LdmError(f"the account does not add up: {sentence}")
    return _SOME_FAILED if counts.failed else 0


def _report(outcome: "Outcome", folder: Path, *, as_json: bool) -> None:
    """One line on standard output for a picture that is there; with --json also for one that failed."""
    if as_json:
        item = outcome.item
        said = dataclasses.asdict(outcome) | {"id": item.id, "row": item.row, "seed": item.request.seed}
        del said["item"]
        path = str(folder / outcome.path) if outcome.path else ""
        line = json.dumps(said | {"path": path, "request": item.request.to_dict()}).encode("ascii")
    elif outcome.status == "done":
        line = os.fsencode(folder / outcome.path)
    else:
        _log.error("row %d: %s", outcome.item.row, outcome.error)
        return
    write_result(line + b"\n")


class _Signals:
    """Asks for the end of a run at the first SIGINT or SIGTERM, and interrupts it at the second."""

    def __init__(self) -> None:
        from ldmcli.batch.dispatch import Stop

        self.stop = Stop()
        self.number: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self.stop.request()
        # Not by way of logging, whose lock the interrupted code may hold.
        os.write(2, b"\nldm: finishing the pictures in hand; once more stops now\n")


@contextlib.contextmanager
def _stopping() -> Iterator[_Signals]:
    signals = _Signals()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, signals) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_sheet(folder: Path, path: Path, varied: Sequence[str]) -> None:
    """The run's first pictures, in the order of its rows; under each the fields that a grid varied, and its prompt."""
    import heapq

    from ldmcli.batch.manifest import read_manifests
    from ldmcli.gallery.sheet import MAX_PICTURES, SheetPicture, write_sheet
    from ldmcli.gallery.varied import caption

    done = (record for record in read_manifests(folder) if record["status"] == "done")
    first = heapq.nsmallest(MAX_PICTURES + 1, done, key=lambda record: record["number"])
    distinct = {record["number"]: record for record in first}.values()
    pictures = (SheetPicture(folder / r["path"], caption(r["request"], varied)) for r in distinct)
    if write_sheet(path, pictures, folder):
        _log.info("contact sheet: %s", printable(str(path), 4096))


def _named(file: str) -> str:
    return "standard input" if file == _STDIN else printable(file)
