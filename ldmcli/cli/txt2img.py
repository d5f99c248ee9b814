"""`ldm txt2img`: prompts in, pictures out."""

import contextlib
import dataclasses
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import click

from ldmcli.cli.arguments import STDIN, picture_from_stdin, read_prompts
from ldmcli.cli.command import command
from ldmcli.cli.option_types import Whole
from ldmcli.cli.options import (
    dynamic_options,
    dynamic_prompts,
    expanded,
    hires_options,
    model_options,
    model_spec,
    option,
    output_options,
    request_options,
    request_settings,
    runtime_spec,
    together,
)
from ldmcli.cli.output import Output, choose_encoding, open_output
from ldmcli.cli.previews import Previews, preview_steps
from ldmcli.cli.resident import open_session
from ldmcli.cli.steering_options import DrawingCommand, steering_options
from ldmcli.cli.terminal import StepBar, loading, shows_pictures
from ldmcli.conditioning.hints import UNREAD_PROMPT, empty_hint, syntax_hint
from ldmcli.conditions import CONDITION_FIELDS
from ldmcli.errors import UsageError, printable
from ldmcli.images.formats import Encoding, format_of_file
from ldmcli.spec import MAX_SEED, GenerationRequest, RuntimeSpec
from ldmcli.speed.linking import link_ahead, settle_down
from ldmcli.stopwatch import process_age

if TYPE_CHECKING:
    from ldmcli.fitting import FittedRequest
    from ldmcli.serving.client import RemoteSession
    from ldmcli.session import Session
    from ldmcli.session.picture import Picture

_log = logging.getLogger(__name__)
_RANDOM_BYTES = 4  # of a seed that is short enough to type again
_WAITING = 2  # pictures that may wait for the writer


# Of every command that draws prompts given as arguments.
drawing_options = together(
    option("-p", "--prompt", type=Whole(), multiple=True, metavar="TEXT",
           help="A prompt, as an argument is one; may be given again."),
    model_options,
    request_options,
    hires_options,
    steering_options,
    dynamic_options,
    output_options,
)  # fmt: skip


@command(cls=DrawingCommand, short_help="Draw prompts given as arguments.")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@drawing_options
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
    draw(context, prompts, options)


def draw(context: click.Context, prompts: tuple[str, ...], options: dict[str, Any]) -> None:
    """Draw the prompts as the options of a command say; what that lacks of the IMAGE_FIELDS is as usual. Raises
    LdmError, and click's UsageError for what only a command line can get wrong."""
    # 1. The request: from the command line, over that of a picture.
    encoding, of_row = choose_encoding(options), options["count"]
    record, prompts = _with_record(context, prompts, options)
    unprompted = not prompts and options.get("image") is not None  # as some models draw on pictures
    prompts = ("",) if unprompted else prompts
    _check_sources(context, prompts, options)
    conditions = _conditions(options)
    requests = _requests(prompts, options, conditions)
    preview = preview_steps(options)
    # 2. What the model is, from its headers; then every check that needs no weights.
    session = _open(options, record, encoding, preview)
    if unprompted and session.token_limit:
        _check_sources(context, (), options)
    if record:
        from ldmcli.cli.again import compare_networks, skips_otherwise

        if skips_otherwise(context, record, session.family):
            requests = (dataclasses.replace(one, clip_skip=max(1, one.clip_skip - 1)) for one in requests)
    if not session.remote:
        link_ahead()
    fitted = _checked(requests, session, encoding, eager=STDIN not in prompts)
    first = next(fitted, None)
    if first is None:
        _log.info("0 prompts on standard input, nothing to draw")
        return
    if record:
        compare_networks(record, first)
    session.alone = STDIN not in prompts and len(prompts) * len(conditions) * options["count"] == 1
    output = open_output(
        options["output"],
        encoding,
        overwrite=options["overwrite"],
        as_json=options["as_json"],
        one_image=session.alone,
        name=options["name"],
        of_row=of_row,
    )
    output = dataclasses.replace(output, show=shows_pictures(options["show"]))
    file = expanded(options["preview_file"]) if options["preview_file"] else None
    previews = Previews(preview, file, on_terminal=output.show)
    if options["seed"] is None:
        _log.info("seed %d", first.seed)
    # 3. The pictures.
    if not session.remote:
        from ldmcli.speed.startup import quicken

        quicken()
    with contextlib.nullcontext() if session.loaded else contextlib.closing(loading(session.name)):
        session = _with_runtime(session, record)
        session.stopwatch.add("imports", process_age())
        session.load([first])
    settle_down()
    session.begin_hashing()
    with contextlib.closing(StepBar(previews)) as bar, _Written(session, output, encoding, options, record) as written:
        drawn = written.checked(_counted(first, fitted, options))
        for picture in session.draw(drawn, batch_size=options["batch_size"], on_step=bar):
            written.put(picture)


def _with_record(
    context: click.Context, prompts: tuple[str, ...], options: dict[str, Any]
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The record of --from-image, where that is given, whose request takes the options' place; and the prompts."""
    if options["from_image"] is None:
        return None, prompts
    from ldmcli.cli.again import read_again, take_over

    record = read_again(options["from_image"])
    take_over(context, options, record)
    if prompts:
        return record, prompts
    options["dynamic_prompts"] = False  # it is drawn already
    return record, (record["request"]["prompt"],)


def _check_sources(context: click.Context, prompts: tuple[str, ...], options: dict[str, Any]) -> None:
    """Raise UsageError where nothing says what to draw, or two things are to come from standard input."""
    if not prompts:
        raise click.UsageError("give a PROMPT, - for standard input, or --from-image.", context)
    if STDIN in prompts and options.get("image") == STDIN:
        raise click.UsageError("standard input is either the prompts or the picture.", context)
    for name in ("mask", "depth"):
        if options.get(name) == STDIN:
            raise click.UsageError(f"standard input may be the --image alone; name a file as --{name}.", context)


class _Written:
    """Encodes, writes and reports pictures in a thread of its own, in order; in this one where times are reported,
    which are then of one batch alone. What goes wrong is raised before the next batch or at the end of the block."""

    def __init__(
        self,
        session: "Session | RemoteSession",
        output: Output,
        encoding: Encoding,
        options: dict[str, Any],
        record: dict[str, Any] | None,
    ) -> None:
        self._session, self._output, self._encoding, self._record = session, output, encoding, record
        self._metadata = not options["no_metadata"]
        self._compared = record is None or options["model_given"]
        self._threads = None if options["as_json"] else ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()
        self._failure: Exception | None = None
        if self._threads is not None:
            self._threads.submit(session.prepare_encoding)

    def put(self, picture: "Picture") -> None:
        if self._threads is None:
            self._try(picture)
            return
        self._waiting.append(self._threads.submit(self._try, picture))
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def checked(self, requests: "Iterable[FittedRequest]") -> "Iterator[FittedRequest]":
        """The requests, up to the first picture that could not be written, whose error is raised."""
        for request in requests:
            yield request
            self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown()  # what is drawn is written, whatever ended the drawing
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _try(self, picture: "Picture") -> None:
        """Write a picture; one that fails takes none with it that was drawn beside it."""
        try:
            self._write(picture)
        except Exception as error:
            self._failure = self._failure or error

    def _write(self, picture: "Picture") -> None:
        picture.pixels()  # waits for the device, which is no time of the encoder's
        identity = self._session.identity()
        self._compare(identity, picture.request)
        started = time.perf_counter()
        data = self._session.encode(picture, self._encoding, metadata=self._metadata)
        self._session.stopwatch.add("png", time.perf_counter() - started)
        report = {**picture.request.to_dict(), "model": identity["name"], "seconds": round(picture.seconds, 3)}
        times = self._session.stopwatch.report()
        self._output.write(data, picture.request.seed, report | times)
        _log.debug("seed %d drawn in %.2f s: %s", picture.request.seed, picture.seconds, times["phases"])

    def _compare(self, identity: dict[str, Any], request: "FittedRequest") -> None:
        """Say so, once, when a picture is run again with weights that have changed since."""
        if self._compared or self._record is None:
            return
        self._compared = True
        before, inputs, key = self._record["model"], self._record.get("inputs", {}), "hires_upscaler"
        for what, was, now in (
            (f"model {identity['name']}", before["sha256"], identity["sha256"]),
            (f"upscaler {before.get('upscaler')}", before.get("upscaler_sha256"), identity.get("upscaler_sha256")),
            (f"upscaler {request.hires_upscaler}", inputs.get(key), dict(request.inputs).get(key)),
        ):
            if was and not (now or "").startswith(was):  # other programs keep the beginning of a hash
                _log.warning("the %s is not the one the picture was made with; it will differ", printable(what))


def _conditions(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What is drawn of each prompt: a class each, where there are several, or a row of embeddings."""
    names = (*CONDITION_FIELDS, "embedding_row")
    given = {name: options[name] for name in names if options.get(name) not in (None, ())}
    labels = given.get("label")
    if isinstance(labels, tuple):
        return [given | {"label": one} for one in labels]
    embeddings = given.get("image_embedding")
    if embeddings and "embedding_row" not in given and not format_of_file(expanded(embeddings)):
        from ldmcli.checkpoints.image_embedding_file import count_rows

        rows = count_rows(embeddings, allow_pickle=options["allow_pickle"])
        return [given | {"embedding_row": row} for row in range(rows)]
    return [given]


def _requests(
    prompts: Sequence[str], options: dict[str, Any], conditions: Sequence[dict[str, Any]]
) -> Iterator[GenerationRequest]:
    """The first request of each prompt and condition; of each picture, where prompts are drawn by lot. Raises
    UsageError before any prompt is read where an option is out of range."""
    seed = int.from_bytes(os.urandom(_RANDOM_BYTES)) if options["seed"] is None else options["seed"]
    for name in ("image", "map"):
        if options.get(name) == STDIN:
            options[name] = picture_from_stdin()
            conditions = [one | {name: options[name]} if name in one else one for one in conditions]
    common = GenerationRequest(prompt="", seed=seed, **request_settings(options))
    if seed + options["count"] - 1 > MAX_SEED:
        raise UsageError(f"seed {seed} with --count {options['count']} goes past {MAX_SEED}, the largest seed.")
    of_each = [dataclasses.replace(common, **one) for one in conditions]
    requests = (dataclasses.replace(one, prompt=prompt) for prompt in read_prompts(prompts) for one in of_each)
    draws = dynamic_prompts(options)
    if draws is None:
        return requests
    count, options["count"] = options["count"], 1  # each picture has a prompt of its own
    return (draws.drawn(dataclasses.replace(one, seed=one.seed + i)) for one in requests for i in range(count))


def _open(
    options: dict[str, Any], record: dict[str, Any] | None, encoding: Encoding, preview: int
) -> "Session | RemoteSession":
    runtime = runtime_spec(options)
    how: dict[str, Any] = {"encoding": encoding, "metadata": not options["no_metadata"], "exact": options["as_json"]}
    how["preview"] = preview
    session = open_session(options, model_spec(options), runtime, **how)
    if not session.undecided:
        return session
    from ldmcli.speed.startup import quicken

    quicken()
    return _with_runtime(session, record)


def _with_runtime(session: "Session | RemoteSession", record: dict[str, Any] | None) -> "Session | RemoteSession":
    """The session once its runtime is chosen: another, as suits this machine, where a picture was made otherwise than
    it can."""
    try:
        session.runtime  # noqa: B018  to choose it
    except UsageError as error:
        if record is None:
            raise
        from ldmcli.session import Session

        why = str(error).removesuffix(".")
        _log.warning("the picture was made otherwise than this machine can (%s); it may differ", why)
        spec = RuntimeSpec(threads=session.runtime_spec.threads, cache=session.runtime_spec.cache)
        return Session(session.spec, spec)
    return session


def _checked(
    requests: Iterator[GenerationRequest], session: "Session | RemoteSession", encoding: Encoding, *, eager: bool
) -> "Iterator[FittedRequest]":
    """The requests fitted to the model, prompts' lengths looked at. `eager` checks all before the first is drawn;
    requests from an endless standard input are checked as they come."""
    read: set[str] = set()  # negative prompts whose length was looked at: one, which all requests share
    hinted: set[str] = set()

    def say_once(kind: str, hint: str) -> None:
        if hint and kind not in hinted:
            hinted.add(kind)
            _log.warning("%s", hint)

    def check(request: GenerationRequest) -> "FittedRequest":
        fitted = session.fit(request)
        encoding.check_size(*fitted.final_size)
        if session.token_limit and not fitted.prompt.strip() and fitted.recorded.image_embedding is None:
            say_once("empty", empty_hint(session.name))
        say_once("syntax", syntax_hint(fitted.prompt, fitted.prompt_syntax))
        if "words" not in hinted:
            say_once("words", session.word_hint(fitted))
        for text in (fitted.prompt, *({fitted.negative_prompt} - read)):
            if cut := session.cut_text(text, fitted):
                limit = session.token_limit
                _log.warning(
                    "a prompt is longer than the %d tokens the model reads; cut off: “%s”", limit, printable(cut)
                )
        if not read and fitted.guidance_scale < 1:
            _log.warning(UNREAD_PROMPT)
        read.add(fitted.negative_prompt)
        return fitted

    if not eager:
        return map(check, requests)
    checked = list(map(check, requests))
    _warn_of_unused(session, checked)
    return iter(checked)


def _warn_of_unused(session: "Session | RemoteSession", requests: "Sequence[FittedRequest]") -> None:
    """Say which embeddings that were asked for change no picture."""
    if not requests[0].embeddings:
        return
    used = {one["word"] for request in requests for one in session.embeddings(request)}
    for one in session.embeddings(requests[0], named=True):
        if one["word"] not in used:
            word, path = printable(one["word"]), printable(one["path"])
            _log.warning("no prompt has the word “%s”, so the embedding %s changes nothing", word, path)


def _counted(
    first: "FittedRequest", others: "Iterable[FittedRequest]", options: dict[str, Any]
) -> "Iterator[FittedRequest]":
    """One request for each picture. Seeds count up within a prompt and start again at the next."""
    for request in itertools.chain([first], others):
        for i in range(options["count"]):
            yield request.with_seed(request.seed + i)
