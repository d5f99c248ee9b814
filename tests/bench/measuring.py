"""One run: every contender in a process of its own, first whether all draw the same, then the clocks in turn."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import parity
from bench.contenders import OURS, REFERENCE, Contender, job_for, obstacle
from bench.job import Job
from bench.ours import cold_words
from bench.processes import ContenderError, Worker, environment, python, run
from bench.step_profile import ENVIRONMENT as PROFILED

from ldmcli.bench import machine, new_record, note_cold

NO_CACHE = "ldm --no-cache"  # its cold start keeps nothing on disk and finds nothing compiled
_log = logging.getLogger("ldmcli.bench")
_TIMED_STEPS = 4  # of a run where only steps are timed; one more comes before them
_SHARE = 0.8  # of the free memory that contenders may take to be alive at once


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure: `given` are fields of the job, of which the model gives those that are None."""

    model: Path
    against: tuple[Contender, ...] = ()
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    clocks: tuple[str, ...] = ("cold", "image", "step")
    runs: int = 3
    profiled: bool = False
    compile_cache: Path | None = None


def measure(plan: Plan) -> dict[str, Any]:
    """Every sample, as plain JSON values (report.py). A contender whose package is missing is left out; one that fails
    is noted, and the others go on. Raises ContenderError where `ldm` itself cannot start.

    All processes are gone and all temporary files removed afterwards, whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-bench-", ignore_cleanup_errors=True) as name, _Run(plan, name) as run_:
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


class _Run:
    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan, self._folder = plan, Path(folder)
        self._jobs: dict[str, tuple[Contender, Job]] = {}
        self._workers: dict[str, Worker] = {}
        self._decode = bool({"cold", "image"} & set(plan.clocks))
        self.results: dict[str, Any] = {}

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.kill()

    def begin(self) -> None:
        """Ask `ldm` what it computes with; the others get jobs that fit."""
        given = {name: value for name, value in self._plan.given.items() if value is not None}
        self._job = Job(OURS.name, str(self._plan.model), **given)
        own = self._worker(OURS, self._job)
        facts = own.ask("greet")
        own.kill()
        del self._workers[OURS.name]
        found = {name: facts[name] for name in ("device", "threads")} | facts["fitted"]
        self._job = dataclasses.replace(self._job, **found)
        self._facts, self._free = facts, facts["free"] or _available_memory()
        left_out = {each.name: why for each in self._plan.against if (why := obstacle(each, self._job))}
        for name, why in left_out.items():
            _log.warning("%s is left out: it %s", name, why)
        self.results = {
            "model": self._plan.model.name,
            "task": {k: v for k, v in dataclasses.asdict(self._job).items() if k not in ("name", "model", "prepared")},
            "machine": machine() | ({"gpu": facts["gpu"]} if facts["gpu"] else {}),
            "contenders": {},
            "left_out": left_out,
            "floor": None,
            "profile": None,
            "together": True,
        }
        for contender in (OURS, *(each for each in self._plan.against if each.name not in left_out)):
            job = dataclasses.replace(
                job_for(contender, self._job, facts), prepared=str(self._folder / f"{contender.name}-model")
            )
            self._jobs[contender.name] = contender, job
            self.results["contenders"][contender.name] = new_record() | {"failure": None, "parity": {}, "greeting": {}}

    def compare(self) -> None:
        """Have every contender draw once, in few steps, beside the reference; which warms it up as well."""
        reference = self._folder / "reference.npz"
        _log.info("the reference: ldm in fp32")
        worker = self._worker(REFERENCE, job_for(REFERENCE, self._job, self._facts))
        worker.ask("compare", steps=parity.STEPS, file=str(reference), decode=self._decode)
        self._release(REFERENCE.name, dead=True)
        tokens, held = None, []
        for name, contender, job, record in self._alive():
            with self._noting_failure(name):
                if contender.module == "bench.peer_openvino":
                    _log.info("%s: converting the model", name)
                    Path(job.prepared).mkdir()
                    run(python(contender.module, "prepare", job.to_json()), self._environment(contender))
                _log.info("parity: %s", name)
                worker = self._worker(contender, job)
                record["greeting"] = worker.ask("greet")
                file = self._folder / f"{name}.npz"
                worker.ask("compare", steps=parity.STEPS, file=str(file), decode=self._decode)
                record["parity"] = parity.compare(reference, file, job.dtype)
                tokens = tokens or record["greeting"]["tokens"]
                if record["greeting"]["tokens"] != tokens:
                    record["parity"] |= {"passed": False, "reason": "other token ids"}
                peaks = worker.ask("memory")
                held.append(peaks.get("gpu_reserved", peaks["host"]))
                if sum(held) > _SHARE * self._free:
                    self.results["together"] = False
                self._release(name)

    def time_cold(self) -> None:
        """New processes, from just before they start until they have ended; a first one warms the page cache."""
        self.results["contenders"] = _second(self.results["contenders"], NO_CACHE, new_record() | {"failure": None})
        for i in range(-1, self._plan.runs):
            for name, contender, job, record in self._alive(NO_CACHE):
                with self._noting_failure(name):
                    self._cold(name, contender, job, record if i >= 0 else None)
                if i >= 0:
                    _log.info("cold, round %d of %d: %s", i + 1, self._plan.runs, name)

    def time_warm(self) -> None:
        """Pictures and steps in processes that are warm, one of each contender in turn."""
        image = "image" in self._plan.clocks
        for i in range(self._plan.runs):
            for name, contender, job, record in self._alive():
                with self._noting_failure(name):
                    new = name not in self._workers
                    worker = self._worker(contender, job)
                    if new:  # on a GPU so many steps are recorded as a graph
                        worker.ask("draw", steps=parity.STEPS, prompt=job.prompt, decode=image)
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

    def _alive(self, *more: str) -> Iterator[tuple[str, Contender, Job, dict[str, Any]]]:
        """Those that have not failed; `more` are other records of `ldm` itself."""
        for name, record in list(self.results["contenders"].items()):
            if record["failure"] is None and (name in self._jobs or name in more):
                yield name, *self._jobs.get(name, self._jobs[OURS.name]), record

    def _cold(self, name: str, contender: Contender, job: Job, record: dict[str, Any] | None) -> None:
        job = job if record is not None else job.with_steps(1)
        picture = self._folder / "picture.png"
        picture.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as fresh:
            env = self._environment(contender, Path(fresh) if name == NO_CACHE else None)
            if contender.is_ours:
                more = ["--no-cache"] if name == NO_CACHE else []
                ended = run(python("ldmcli", *cold_words(job, str(picture), *more)), env)
            else:
                ended = run(python(contender.module, "cold", job.to_json(), str(picture)), env)
        if not picture.is_file():
            raise ContenderError("ended without a picture")
        if record is not None:
            note_cold(record, ended.seconds, ended.peak or 0, json.loads(ended.out.splitlines()[-1]))

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


def _second(records: dict[str, Any], name: str, record: dict[str, Any]) -> dict[str, Any]:
    """The records with another one in second place."""
    first, *others = records.items()
    return dict([first, (name, record), *others])


def _available_memory() -> int:
    """Bytes of memory that are free, page cache included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
