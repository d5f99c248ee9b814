"""What passes between the parts of a batch run: rows of the input, the pictures they ask for, and how each came out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ldmcli.images.formats import Encoding
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn. `problems` are sentences, each naming field, value and valid range."""

    row: int  # counted from 1, without headers, comments and blank lines
    line: int  # in the input, counted from 1
    id: str
    problems: tuple[str, ...]
    prompt: str = ""  # as far as it could be read


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture to draw. `number` counts the pictures of the whole input from 0, in its order, whatever of them are
    drawn here; so it names the picture for good, also after rows are appended to the input."""

    number: int
    row: int
    line: int
    id: str
    request: GenerationRequest  # fitted to the model: nothing is None that the model has its own of
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)  # columns that are no field of a request
    pictures: int = 1  # that its row has
    name: str = ""  # of its file, without an ending; by row and seed where there is none


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one picture came out: what a line of the manifest says."""

    item: Item
    status: str  # "done" or "failed"
    path: str = ""  # of the picture, from the run's folder on, with /
    sha256: str = ""  # of the file
    seconds: float = 0.0
    error: str = ""
    code: int = 0  # the exit code that names the class of the error
    attempts: int = 1
    worker: str = ""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker needs to draw: picklable, to go to another process or machine."""

    folder: Path
    model: ModelSpec = ModelSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    metadata: bool = True
    encoding: Encoding = Encoding()
