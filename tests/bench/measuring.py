"""One run: every contender in a process of its own, first whether all draw the same, then the clocks in turn."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.contenders import CLOCKS, OURS, REFERENCE, Contender, Job, job_for, obstacle
from bench.ours import cold_words
from bench.processes import ContenderError, Worker, environment, python, run
from bench.serving import PARITY_STEPS, parity
from bench.step_profile import ENVIRONMENT as PROFILED

from ldmcli.bench import machine, new_record, note_cold

_log = logging.getLogger("ldmcli.bench")
_TIMED_STEPS = 4  # of a run where only steps are timed; one more comes before them
_SHARE = 0.8  # of the free memory that contenders may take to be alive at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: `given` are fields of the job, of which the model gives those that are None."""

    model: Path
    against: tuple[Contender, ...] = ()
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    clocks: tuple[str, ...] = CLOCKS
    runs: int = 3
    profiled: bool = False
    compile_cache: Path | None = None


def measure(plan: Plan) -> dict[str, Any]:
    """Every sample, as plain JSON values (report.py). A contender whose package is missing is left out; one that fails
    is noted, and the others go on. Raises ContenderError where `ldm` itself cannot start.

    All processes are gone and all temporary files removed afterwards, whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-bench-", ignore_cleanup_errors=True) as name:
        run_ = _Run(plan, Path(name))
        try:
            run_.begin()
            run_.compare()
            if "cold" in plan.clocks:
                run_.time_cold()
            if {"image", "step"} & set(plan.clocks):
                run_.time_warm()
                run_.results["floor"] = run_.apart("floor")
            if plan.profiled:
                run_.results["profile"] = run_.apart("profile", PROFILED)
            return run_.results
        finally:
            run_.end()


class _Run:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._jobs: dict[str, tuple[Contender, Job]] = {}
        self._workers: dict[str, Worker] = {}
        self._decode = bool({"cold", "image"} & set(plan.clocks))
        self.results: dict[str, Any] = {}

    def begin(self) -> None:
        """Ask `ldm` what it computes with; the others get jobs that fit."""
        given = {name: value for name, value in self._plan.given.items() if value is not None}
        self._job = Job(OURS.name, str(self._plan.model), **given)
        facts = self._facts = self._worker(OURS, self._job).ask("greet")
        self._release(OURS.name, dead=True)
        found = {name: facts[name] for name in ("device", "threads")} | facts["fitted"]
        self._job = dataclasses.replace(self._job, **found)
        self._free = facts["free"] or _available_memory()
        against = [each for each in self._plan.against if set(each.clocks) & set(self._plan.clocks)]
        left_out = {each.name: why for each in against if (why := obstacle(each, self._job))}
        for name, why in left_out.items():
            _log.warning("%s is left out: it %s", name, why)
        for contender in (OURS, *(each for each in against if each.name not in left_out)):
            job = job_for(contender, self._job, facts)
            prepared = str(self._folder / f"{contender.name}-model")
            self._jobs[contender.name] = contender, dataclasses.replace(job, prepared=prepared)
        records = {name: new_record() | {"failure": None, "parity": {}, "greeting": {}} for name in self._jobs}
        self.results = {
            "model": self._plan.model.name,
            "task": {k: v for k, v in dataclasses.asdict(self._job).items() if k not in ("name", "model", "prepared")},
            "machine": machine() | ({"gpu": facts["gpu"]} if facts["gpu"] else {}),
            "contenders": records,
            "left_out": left_out,
            "floor": None,
            "profile": None,
            "together": True,
        }

    def compare(self) -> None:
        """Have every contender draw once, in few steps, beside the reference; which warms it up as well."""
        reference = self._folder / "reference.npz"
        _log.info("the reference: ldm in fp32")
        worker = self._worker(REFERENCE, job_for(REFERENCE, self._job, self._facts))
        worker.ask("compare", steps=PARITY_STEPS, file=str(reference), decode=self._decode)
        self._release(REFERENCE.name, dead=True)
        tokens, held = None, []
        for name, contender, job, record in self._alive(*CLOCKS):
            with self._noting_failure(name):
                if contender.module == "bench.peer_openvino":
                    _log.info("%s: converting the model", name)
                    Path(job.prepared).mkdir()
                    run(python(contender.module, "prepare", job.to_json()), self._environment(contender))
                _log.info("parity: %s", name)
                worker = self._worker(contender, job)
                record["greeting"] = worker.ask("greet")
                file = self._folder / f"{name}.npz"
                worker.ask("compare", steps=PARITY_STEPS, file=str(file), decode=self._decode)
                record["parity"] = parity(reference, file, job.dtype)
                tokens = tokens or record["greeting"]["tokens"]
                if record["greeting"]["tokens"] != tokens:
                    record["parity"] |= {"passed": False, "reason": "other token ids"}
                peaks = worker.ask("memory")
                held.append(peaks.get("gpu_reserved", peaks["host"]))
                self.results["together"] &= sum(held) <= _SHARE * self._free
                self._release(name, dead=contender.clocks == ("cold",))

    def time_cold(self) -> None:
        """New processes, from just before they start until they have ended; a first one warms the page cache."""
        for i in range(-1, self._plan.runs):
            for name, contender, job, record in self._alive("cold"):
                with self._noting_failure(name):
                    self._cold(contender, job, record if i >= 0 else None)
                if i >= 0:
                    _log.info("cold, round %d of %d: %s", i + 1, self._plan.runs, name)

    def time_warm(self) -> None:
        """Pictures and steps in processes that are warm, one of each contender in turn."""
        image = "image" in self._plan.clocks
        for i in range(self._plan.runs):
            for name, contender, job, record in self._alive("image", "step"):
                with self._noting_failure(name):
                    new = name not in self._workers
                    worker = self._worker(contender, job)
                    if new:  # on a GPU so many steps are recorded as a graph
                        worker.ask("draw", steps=PARITY_STEPS, prompt=job.prompt, decode=image)
                    steps = job.steps if image else 1 + min(max(job.steps - 1, 1), _TIMED_STEPS)
                    # Another prompt each time: one that was seen before need not be encoded.
                    answer = worker.ask("draw", steps=steps, prompt=f"{i + 1} {job.prompt}", decode=image)
                    if image:
                        record["samples"]["image"].append(answer["seconds"])
                    if "step" in self._plan.clocks:
                        record["samples"]["step"] += answer["steps"]
                    for where, size in worker.ask("memory").items():
                        record["peaks"][where].append(size)
                    self._release(name)
                    _log.info("warm, round %d of %d: %s %.2f s", i + 1, self._plan.runs, name, answer["seconds"])

    def apart(self, question: str, extra: dict[str, str] | None = None) -> dict[str, Any] | None:
        """What `ldm` answers in a process of its own, beside which no other computes; None where it fails."""
        _log.info("the %s", question)
        contender = dataclasses.replace(OURS, name=question, environment=extra or {})
        try:
            return self._worker(contender, self._jobs[OURS.name][1]).ask(question)
        except ContenderError as error:
            _log.warning("no %s: %s", question, error)
            return None
        finally:
            self._release(question, dead=True)

    def end(self) -> None:
        """Leave no process behind."""
        for name in list(self._workers):
            self._release(name, dead=True)

    def _alive(self, *clocks: str) -> Iterator[tuple[str, Contender, Job, dict[str, Any]]]:
        """Those that these clocks time, and that have not failed."""
        for name, (contender, job) in self._jobs.items():
            record = self.results["contenders"][name]
            if record["failure"] is None and set(clocks) & set(contender.clocks):
                yield name, contender, job, record

    def _cold(self, contender: Contender, job: Job, record: dict[str, Any] | None) -> None:
        job = dataclasses.replace(job, batch_size=1, steps=job.steps if record is not None else 1)
        picture = self._folder / "picture.png"
        picture.unlink(missing_ok=True)
        command = python(contender.module, "cold", job.to_json(), str(picture))
        with tempfile.TemporaryDirectory(dir=self._folder) as fresh:
            env = self._environment(contender, Path(fresh) if "cache" in contender.settings else None)
            ended = run(python("ldmcli", *cold_words(job, str(picture))) if contender.is_ours else command, env)
        if not picture.is_file():
            raise ContenderError("ended without a picture")
        if record is not None:
            note_cold(record, ended.seconds, ended.peak, json.loads(ended.out.splitlines()[-1]))

    def _environment(self, contender: Contender, fresh: Path | None = None) -> dict[str, str]:
        kept = None if fresh else self._plan.compile_cache
        return environment(fresh or self._folder, self._job.threads, kept) | dict(contender.environment)

    def _worker(self, contender: Contender, job: Job) -> Worker:
        if contender.name not in self._workers:
            command = python(contender.module, "serve", job.to_json())
            self._workers[contender.name] = Worker(command, self._environment(contender))
        return self._workers[contender.name]

    def _release(self, name: str, *, dead: bool = False) -> None:
        """The worker is not needed for now; it ends where memory does not hold all at once, or where it is dead."""
        if (dead or not self.results["together"]) and name in self._workers:
            self._workers.pop(name).kill()

    @contextlib.contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        """A contender that fails inside the block takes no further part."""
        try:
            yield
        except ContenderError as error:
            self.results["contenders"][name]["failure"] = str(error)
            self._release(name, dead=True)
            _log.warning("%s takes no further part: %s", name, error)


def _available_memory() -> int:
    """Bytes of memory that are free, page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
