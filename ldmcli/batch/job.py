"""What a batch run is asked for: the rows of an input, fitted to a model, and the identity that run.json keeps."""

import collections
import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.batch.items import BadRow, Item
from ldmcli.batch.lines import Digest, continues
from ldmcli.batch.reading import RowReader, open_rows
from ldmcli.batch.runfile import STDIN, RunIdentity, open_run
from ldmcli.batch.settings import parse_grid
from ldmcli.batch.survey import Survey, items, named, shard, survey
from ldmcli.conditioning.dynamic import DynamicPrompts
from ldmcli.conditioning.hints import UNREAD_PROMPT, empty_hint, syntax_hint
from ldmcli.conditioning.known_words import SHOWN_UNKNOWN
from ldmcli.conditioning.lora_tags import split_tags
from ldmcli.errors import printable
from ldmcli.images.formats import Encoding
from ldmcli.images.naming import NamePattern
from ldmcli.session import Session
from ldmcli.spec import HIRES_FIELDS, IMAGE_FIELDS, GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.speed.startup import quicken

_log = logging.getLogger(__name__)
_SHOWN_BAD_ROWS = 20
_SHOWN_CUTS = 5
_OF_EMBEDDINGS = ("negative_prompt", "embeddings")  # fields of a grid that may name some


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A batch run as it is asked for: an input (`path`, None for standard input) and how its rows are read and drawn.
    `common` holds what rows leave open; `seed` and `count` are for rows without their own. `shard` is (number from 1,
    of how many). `dynamic` draws prompts by lot. `name` names the pictures' files."""

    path: Path | None
    common: GenerationRequest
    model: ModelSpec = ModelSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    format: str | None = None
    prompt_column: str | None = None
    grid: Sequence[str] = ()
    seed: int = 0
    count: int = 1
    shard: tuple[int, int] = (1, 1)
    metadata: bool = True
    dynamic: DynamicPrompts | None = None
    encoding: Encoding = Encoding()
    name: NamePattern | None = None


class Job:
    """A batch run's input, opened, with the model that its rows are fitted to."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.grid = [parse_grid(text) for text in spec.grid]
        self.reader = self._open()
        self.session = Session(spec.model, spec.runtime)
        if self.session.undecided:
            quicken()
        loras = tuple(map(self.session.find_lora, spec.common.loras))
        self.spec = dataclasses.replace(spec, common=dataclasses.replace(spec.common, loras=loras))
        self.model = self.session.spec  # asked for its prediction type once, not by every worker
        self.session.close()
        self.runtime = spec.runtime
        self._digest: Digest | None = None  # of the input that was surveyed
        self._pictures: dict[str, str] = {}  # those that rows name, with their hashes, in the order of the rows
        self._remarks: collections.Counter[str] = collections.Counter()
        self._unknown: dict[str, None] = {}  # the first words that the model does not know
        self._not_understood = 0  # prompts with such words
        self._embeddings: dict[str, str] = {}  # hashes by word, of those that the command or a row so far uses
        varied = [{name: value} for name, values in self.grid for value in values if name in _OF_EMBEDDINGS]
        for fields in ({}, *varied):
            self._note_embeddings(dataclasses.replace(spec.common, **fields), named=True)

    def survey(self) -> Survey:
        """Go through all rows, logging the bad ones; then the input is opened anew."""
        found = survey(self.items(), _SHOWN_BAD_ROWS)
        for bad in found.first_bad:
            _log_bad(bad)
        if found.bad_rows > len(found.first_bad):
            _log.error("and %d more bad rows", found.bad_rows - len(found.first_bad))
        self._digest = self.reader.digest()
        self._remarks["cut"] = _SHOWN_CUTS  # they are known now
        if self.spec.path is not None:
            self.reader = self._open()
        return found

    def items(self, *, reporting: bool = False) -> Iterator[Item | BadRow]:
        """The pictures of this shard's rows, once; `reporting`: bad rows are logged as they pass."""
        spec, fit, check = self.spec, self._fit, self._check_prompt
        found = items(
            self.reader, spec.common, seed=spec.seed, count=spec.count, grid=self.grid, fit=fit, check_prompt=check,
            folder=spec.path.parent if spec.path else Path(), dynamic=spec.dynamic,
        )  # fmt: skip
        if spec.name:
            found = named(found, spec.name)
        hints = 0
        for one in shard(found, spec.shard):
            hints += self._say_hints(hints)
            if reporting and isinstance(one, BadRow):
                _log_bad(one)
            yield self._with_loras(one) if isinstance(one, Item) else one
        self._say_hints(hints)
        if self._digest is None and self._unknown:
            unknown, prompts = list(self._unknown), self._not_understood
            _log.warning("%s", self.session.word_list.hint(self.session.name, unknown, prompts))

    def _say_hints(self, said: int) -> int:
        """Log what the reader remarks on beyond the first `said`; not where they were logged as rows were surveyed."""
        new = self.reader.hints[said:] if self._digest is None else []
        for hint in new:
            _log.warning("%s", hint)
        return len(new)

    def open_run(self, folder: Path, found: Survey | None, *, extend: bool = False) -> None:
        """Begin the run in the folder's run.json, or see that it is this one. Raises BadDataError if it is another."""
        spec = self.spec
        known: dict[str, Any] = {"sha256": self._digest.sha256, "bytes": self._digest.size} if self._digest else {}
        if self._pictures and self._digest:
            known |= self._pictures_known(len(self._pictures))
        settings = {name: value for name, value in spec.common.to_dict().items() if name not in ("prompt", "seed")}
        if spec.common.loras:  # a file that was moved is the same file
            settings["loras"] = [lora.what for lora in spec.common.loras]
        usual = vars(GenerationRequest(""))
        for name in (*IMAGE_FIELDS, *HIRES_FIELDS):
            settings |= {name: value} if (value := getattr(spec.common, name)) != usual[name] else {}
        # Beside the request, all that may change a file.
        settings |= {"seed": spec.seed, "count": spec.count, "prompt_column": spec.prompt_column}
        settings |= {"dtype": spec.runtime.dtype, "attention": spec.runtime.attention, "no_metadata": not spec.metadata}
        settings |= spec.encoding.settings
        if spec.name:
            settings["name"] = spec.name.text
        if spec.dynamic:
            settings |= {"dynamic_prompts": True, "wildcards": spec.dynamic.hashes}
        identity = RunIdentity(
            input={"name": spec.path.name if spec.path else STDIN, **known},
            model=self.session.identity() | ({"embeddings": self._embeddings} if self._embeddings else {}),
            settings=settings | {"grid": {name: list(values) for name, values in self.grid}},
            rows=found.rows if found else None,
            shard=None if spec.shard == (1, 1) else "{}/{}".format(*spec.shard),
            versions={"ldmcli": __version__},
        )
        open_run(folder, identity, extend=extend, is_extended=self._is_extended)

    def _is_extended(self, before: Mapping[str, Any]) -> bool:
        if self.spec.path is None:
            return True  # there, rows are compared one by one as they come
        pictures = self._pictures_known(before["pictures"]) if type(before.get("pictures")) is int else {}
        same = all(before[name] == value for name, value in pictures.items())
        return same and continues(self.spec.path, Digest(str(before.get("sha256")), int(before.get("bytes", 0))))

    def _pictures_known(self, count: int) -> dict[str, Any]:
        """What run.json says of the first `count` pictures that rows name."""
        text = " ".join(itertools.islice(self._pictures.values(), count))
        return {"pictures": count, "pictures_sha256": hashlib.sha256(text.encode("ascii")).hexdigest()}

    def _open(self) -> RowReader:
        return open_rows(self.spec.path, format=self.spec.format, prompt_column=self.spec.prompt_column)

    def _fit(self, request: GenerationRequest) -> GenerationRequest:
        fitted = self.session.fit(request)
        self._pictures |= fitted.files
        self.spec.encoding.check_size(*fitted.final_size)
        if fitted.guidance_scale < 1:
            self._remark("unread", UNREAD_PROMPT)
        return fitted.recorded

    def _with_loras(self, item: Item) -> Item:
        """The item with the LoRAs that its prompt names: batches are of one set, and the manifest has their hashes."""
        request = item.request
        if request.prompt_syntax != "weighted" or not split_tags(request.prompt)[1]:
            return item
        return dataclasses.replace(item, request=self.session.fit(request).recorded)

    def _remark(self, kind: str, sentence: str, limit: int = 1) -> None:
        """Warn of something, a few times a run."""
        if self._remarks[kind] < limit:
            self._remarks[kind] += 1
            _log.warning("%s", sentence)

    def _check_prompt(self, request: GenerationRequest) -> None:
        if request.prompt_syntax == "weighted" and "<" in request.prompt + request.negative_prompt:
            self.session.fit(request)  # what it names is there
        if self.session.token_limit and not request.prompt.strip() and request.image_embedding is None:
            self._remark("empty", empty_hint(self.session.name))
        for text in (request.prompt, request.negative_prompt):
            if not self._remarks["syntax"] and (hint := syntax_hint(text, request.prompt_syntax)):
                self._remark("syntax", hint)
            if cut := self.session.cut_text(text, request):
                limit = f"the {self.session.token_limit} tokens the model reads"
                self._remark("cut", f"a prompt is longer than {limit}; cut off: “{printable(cut)}”", _SHOWN_CUTS)
        self._note_embeddings(request)
        if unknown := self.session.unknown_words(request):
            self._not_understood += 1
            self._unknown |= dict.fromkeys(unknown) if len(self._unknown) <= SHOWN_UNKNOWN else {}

    def _note_embeddings(self, request: GenerationRequest, *, named: bool = False) -> None:
        self._embeddings |= {one["word"]: one["sha256"] for one in self.session.embeddings(request, named=named)}


def _log_bad(bad: BadRow) -> None:
    _log.error("line %d: %s", bad.line, " ".join(bad.problems))
