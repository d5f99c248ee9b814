"""What a batch run is asked for: the rows of an input, fitted to a model, and the identity that run.json keeps."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.batch.grid import parse_grid
from ldmcli.batch.items import BadRow, Item
from ldmcli.batch.lines import Digest, continues
from ldmcli.batch.plan import shard
from ldmcli.batch.reading import RowReader, open_rows
from ldmcli.batch.rows import IdIndex, Survey, items, survey
from ldmcli.batch.runfile import STDIN, RunIdentity, open_run
from ldmcli.config import UNDECIDED
from ldmcli.errors import printable
from ldmcli.sources import Sources, open_sources
from ldmcli.spec import GenerationRequest
from ldmcli.speed.startup import quicken
from ldmcli.speed.tuning import Tuning

_log = logging.getLogger(__name__)
_SHOWN_BAD_ROWS = 20
_SHOWN_CUTS = 5
_KEPT_OPTIONS = ("prompt_column", "dtype", "attention", "no_metadata")  # beside the request, all that may change a PNG


class Job:
    """An input (`path`, None for standard input), and the command line's options by name, `settings` being the fields
    of a request among them."""

    def __init__(self, path: Path | None, options: Mapping[str, Any]) -> None:
        self.path = path
        self.options = dict(options)
        self.grid = [parse_grid(text) for text in options["grid"]]
        self.common = GenerationRequest("", **options["settings"])
        self.reader = self._open()
        self.sources = self._open_sources()
        self.digest: Digest | None = None
        self._cuts = 0

    def survey(self) -> Survey:
        """Go through all rows of this shard, telling of the bad ones; then the input is opened anew."""
        index, count = self.options["shard"]
        found = survey(shard(self.items(), index - 1, count), _SHOWN_BAD_ROWS)
        for bad in found.first_bad:
            _tell(bad)
        if found.bad_rows > len(found.first_bad):
            _log.error("and %d more bad rows", found.bad_rows - len(found.first_bad))
        self.digest = self.reader.digest()
        self._cuts = _SHOWN_CUTS  # they are known now
        if self.path is not None:
            self.reader = self._open()
        return found

    def items(self, *, told: bool = False) -> Iterator[Item | BadRow]:
        """The rows' pictures, once; `told`: with word of bad rows as they pass."""
        found = items(
            self.reader,
            self.common,
            seed=self.options["seed"],
            count=self.options["count"],
            grid=self.grid,
            fit=self.sources.fit,
            check_prompt=self._check_prompt,
            ids=IdIndex(),
        )
        for one in found:
            if told and isinstance(one, BadRow):
                _tell(one)
            yield one
        if self.digest is None:  # else they were told of when the rows were surveyed
            for hint in self.reader.hints:
                _log.warning("%s", hint)

    def open_run(self, folder: Path, found: Survey | None) -> None:
        """Begin the run in the folder's run.json, or see that it is this one. Raises BadDataError if it is another."""
        from ldmcli.checkpoints.identity import model_sha256

        options = self.options
        known = {"sha256": self.digest.sha256, "bytes": self.digest.size} if self.digest else {}
        half = options["dtype"] != "fp32"
        sha256 = model_sha256(dataclasses.replace(self.sources.model, half=half)).result()
        identity = RunIdentity(
            input={"name": self.path.name if self.path else STDIN, **known},
            model=self.sources.identity(options, sha256),
            settings={
                **{name: value for name, value in self.common.to_dict().items() if name not in ("prompt", "seed")},
                **{name: options[name] for name in ("seed", "count", *_KEPT_OPTIONS)},
                "grid": {name: list(values) for name, values in self.grid},
            },
            rows=found.rows if found else None,
            shard=None if options["shard"] == (1, 1) else "{}/{}".format(*options["shard"]),
            versions={"ldmcli": __version__},
        )
        open_run(folder, identity, extend=options["extend"], is_extended=self._is_extended)

    def _is_extended(self, before: Mapping[str, Any]) -> bool:
        if self.path is None:
            return True  # there, rows are compared one by one as they come
        return continues(self.path, Digest(str(before.get("sha256")), int(before.get("bytes", 0))))

    def _open(self) -> RowReader:
        return open_rows(self.path, format=self.options["format"], prompt_column=self.options["prompt_column"])

    def _open_sources(self) -> Sources:
        """Look at the model. Where only its U-Net can tell the prediction type, that is asked once, not by workers."""
        sources = open_sources(self.options)
        if sources.model.config.schedule.prediction_type == UNDECIDED:
            quicken()
            from ldmcli.speed.policy import choose_runtime

            options = self.options
            tuning = Tuning.of(options)
            runtime = choose_runtime(options["device"], options["dtype"], options["attention"], tuning)
            sources = dataclasses.replace(sources.settled(runtime), unet=None)
            self.options["prediction_type"] = sources.model.config.schedule.prediction_type
        return sources

    def _check_prompt(self, request: GenerationRequest) -> None:
        for text in (request.prompt, request.negative_prompt):
            cut = self.sources.check_length(text, request)
            if cut and self._cuts < _SHOWN_CUTS:
                self._cuts += 1
                limit = self.sources.token_limit
                _log.warning(
                    "a prompt is longer than the %d tokens the model reads; cut off: “%s”", limit, printable(cut)
                )


def _tell(bad: BadRow) -> None:
    _log.error("line %d: %s", bad.line, " ".join(bad.problems))
