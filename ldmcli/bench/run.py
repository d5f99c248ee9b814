"""One run of the bench: contenders in their processes, parity first, then the clocks in turn."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli.bench import parity
from ldmcli.bench.contenders import NO_CACHE, OURS, REFERENCE, Contender, check_peers, job_for
from ldmcli.bench.crew import Crew, available_memory, fits_together
from ldmcli.bench.measure import Record
from ldmcli.bench.plan import Plan, Results, caches, default_runs, environment, machine, make_task
from ldmcli.bench.processes import ContenderError, Ended, Processes
from ldmcli.bench.task import Job, Task

_log = logging.getLogger(__name__)
_TIMED_STEPS = 4  # of a run where only steps are timed; one more comes before them
# NVIDIA's profiling library is to stay where it is between two profiles: CUDA graphs do not survive its leaving.
_PROFILED = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def run_bench(plan: Plan) -> Results:
    """Measure. Contenders that fail are noted in their records, this program's own beginning excepted.

    Raises LdmError where the model cannot be read, the disk cannot hold what is to be written, or `ldm` itself cannot
    start. All processes are gone and all temporary files removed afterwards, whatever happens.
    """
    with _workspace() as folder:
        model = plan.model or _random_model(plan, folder)
        check_peers(plan.peers, model, plan.settings.get("batch_size", 1))
        task = make_task(plan, model)
        with Processes(folder, environment(task.threads, folder, plan.compile_cache)) as processes:
            bench = _Bench(plan, task, processes, folder)
            bench.begin()
            bench.check_parity()
            if "cold" in plan.clocks:
                bench.time_cold()
            if {"image", "step"} & set(plan.clocks):
                bench.time_warm()
                bench.measure_floor()
            if plan.profiled:
                bench.profile()
            return bench.results


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _random_model(plan: Plan, folder: Path) -> Path:
    """Weights of the plan's family in `folder`, written by another process."""
    assert plan.family is not None
    model = folder / plan.family
    free = shutil.disk_usage(folder).free
    _log.info("writing random weights of %s to %s, which has %.1f GB free", plan.family, folder.parent, free / 1e9)
    with Processes(folder, dict(os.environ)) as processes:
        try:
            processes.run("random weights", "ldmcli.bench.groundwork", "weights", plan.family, str(model))
        except ContenderError as error:
            raise error.cause() from None
    return model


class _Bench:
    """The parts of a run, in the order in which they are called."""

    def __init__(self, plan: Plan, task: Task, processes: Processes, folder: Path) -> None:
        self._plan = plan
        self._task = task
        self._processes = processes
        self._folder = folder
        self._crew = Crew(processes)
        self._jobs: dict[str, tuple[Contender, Job]] = {}
        self._runs = 0
        name = f"{plan.family}, random weights" if plan.family else Path(task.model).name
        self.results = Results(name, task, {}, machine=machine())

    def begin(self) -> None:
        """Start `ldm`, see what it computes with, and set the peers' jobs by that."""
        ours = Job(self._task, OURS.name)
        greeting = self._crew.worker(OURS, ours)[0].ask("greet")
        ours = Job(self._task, OURS.name, greeting["device"], greeting["dtype"])
        self._add(OURS, ours).greeting = greeting
        for peer in self._plan.peers:
            self._add(peer, job_for(peer, self._task, greeting, str(self._folder / f"{peer.name}-model")))
        single = greeting["weights"] / _BYTES[greeting["dtype"]]
        weights = [int(single * _BYTES[job.dtype]) for _, job in self._jobs.values()]
        free = greeting["gpu_free"] or available_memory()
        self.results.together = self._crew.together = fits_together(weights, free)
        if not self._crew.together:
            _log.info("memory does not hold all contenders at once; each is started anew in every round")
        self._crew.release(OURS.name)
        self._runs = self._plan.runs or default_runs(greeting["weights"], len(self._plan.peers))

    def _add(self, contender: Contender, job: Job) -> Record:
        self._jobs[job.name] = contender, job
        self.results.records[job.name] = Record(job.name)
        return self.results.records[job.name]

    def check_parity(self) -> None:
        """Every contender draws once, in few steps, beside the reference; which warms it up as well."""
        own = self._jobs[OURS.name][1]
        # On a CPU in float32 `ldm` computes as the reference does.
        alike = own.dtype == "fp32" and own.device == "cpu" and own.task.attention in ("auto", "sdpa")
        ours_is_reference = alike and not own.task.compiled
        reference = self._reference(OURS if ours_is_reference else REFERENCE, own)
        for name, (contender, job) in self._jobs.items():
            with self._noting_failure(name):
                if contender.prepares:
                    self._prepare(contender, job)
                record = self.results.records[name]
                is_reference = contender is OURS and ours_is_reference
                if not is_reference:
                    _log.info("parity: %s", name)
                file = reference if is_reference else self._drawn_once(contender, job)
                record.parity = parity.compare(reference, file, job.dtype)
                tokens = self.results.records[OURS.name].greeting["tokens"]
                if record.greeting["tokens"] != tokens:
                    record.parity |= {"passed": False, "reason": "other token ids"}

    def _reference(self, reference: Contender, own: Job) -> Path:
        """What `ldm` draws in float32."""
        _log.info("parity: the reference, ldm in fp32")
        if reference is OURS:
            return self._drawn_once(OURS, own)
        task = dataclasses.replace(self._task, **dict(reference.settings))
        file = self._drawn_once(reference, dataclasses.replace(own, name=reference.name, task=task))
        self._crew.release(reference.name, dead=True)
        return file

    def _drawn_once(self, contender: Contender, job: Job) -> Path:
        """The .npz of a contender's latents and picture; it greets first, if it has not."""
        worker, _ = self._crew.worker(contender, job)
        record = self.results.records.get(job.name)
        if record and not record.greeting:
            record.greeting = worker.ask("greet")
        file = self._folder / f"{job.name}.npz"
        worker.ask("compare", steps=parity.STEPS, file=str(file), decode=self._decodes)
        self._crew.release(job.name)
        return file

    @property
    def _decodes(self) -> bool:
        """Whether pictures are decoded at all: the decoder's time and memory are for naught where steps are asked."""
        return bool({"cold", "image"} & set(self._plan.clocks))

    def _prepare(self, contender: Contender, job: Job) -> None:
        _log.info("%s: converting the model", contender.name)
        ours = self.results.records[OURS.name].greeting
        needed, free = ours["weights"] / _BYTES[ours["dtype"]] * 4, shutil.disk_usage(self._folder).free
        if needed > free:
            room = (
                f"{needed / 1e9:.1f} GB of disk for the converted model, and {self._folder.parent} has {free / 1e9:.1f}"
            )
            raise ContenderError(contender.name, f"needs {room}; name another folder in TMPDIR")
        Path(job.prepared).mkdir()
        self._processes.run(contender.name, contender.module, "prepare", job.to_json())

    def time_cold(self) -> None:
        """New processes, from just before they start until they have ended; a first one, apart, warms the page cache
        and fills the prompt cache."""
        starts = self._cold_starts()
        for name, start in starts.items():
            with self._noting_failure(name):
                start(1)
        for i in range(self._runs):
            for name, start in starts.items():
                record = self.results.records[name]
                if record.failure is None:
                    with self._noting_failure(name):
                        _note_cold(record, start(self._task.steps))
                        _log.info(
                            "cold, round %d of %d: %s %.2f s", i + 1, self._runs, name, record.samples["cold"][-1]
                        )

    def _cold_starts(self) -> dict[str, Callable[[int], Ended]]:
        """What starts each contender for a picture of so many steps."""
        starts: dict[str, Callable[[int], Ended]] = {}
        for name, (contender, job) in self._jobs.items():
            if self.results.records[name].failure is not None:
                continue
            if not contender.is_ours:
                starts[name] = functools.partial(self._cold_peer, contender, job)
            elif contender is not OURS or self._plan.cached:
                starts[name] = functools.partial(self._cold_ours, job)
            if contender is OURS:
                self.results.records = _inserted(self.results.records, Record(NO_CACHE))
                starts[NO_CACHE] = functools.partial(self._cold_anew, job)
        return starts

    def _cold_ours(self, job: Job, steps: int) -> Ended:
        return self._cold(job.name, "ldmcli.cli", *_command(job.task, steps, self._picture()))

    def _cold_anew(self, job: Job, steps: int) -> Ended:
        """As if it were the first time: neither are prompts known, nor is anything compiled."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            command = _command(job.task, steps, self._picture(), "--no-cache")
            return self._cold(NO_CACHE, "ldmcli.cli", *command, extra=caches(Path(folder)))

    def _cold_peer(self, contender: Contender, job: Job, steps: int) -> Ended:
        return self._cold(job.name, contender.module, "cold", job.with_steps(steps).to_json(), self._picture())

    def _cold(self, name: str, module: str, *arguments: str, extra: Mapping[str, str] | None = None) -> Ended:
        picture = Path(self._picture())
        picture.unlink(missing_ok=True)
        ended = self._processes.run(name, module, *arguments, extra=extra)
        if not picture.is_file():
            raise ContenderError(name, "ended without a picture")
        return ended

    def _picture(self) -> str:
        return str(self._folder / "picture.png")

    def time_warm(self) -> None:
        """Pictures and steps in processes that are warm, one of each contender in turn."""
        for i in range(self._runs):
            for name, (contender, job) in self._jobs.items():
                if self.results.records[name].failure is None:
                    with self._noting_failure(name):
                        self._warm(i, contender, job)

    def _warm(self, i: int, contender: Contender, job: Job) -> None:
        worker, new = self._crew.worker(contender, job)
        record = self.results.records[job.name]
        image = "image" in self._plan.clocks
        if new:
            worker.ask("greet")
            # On a GPU so many that `ldm` records a step as a graph: see runtime/graph.py.
            warm_up = parity.STEPS if job.device.startswith("cuda") else 2
            worker.ask("draw", steps=warm_up, prompt=self._task.prompt, decode=image)
        steps = self._task.steps if image else 1 + min(max(self._task.steps - 1, 1), _TIMED_STEPS)
        # Another prompt each time: one that was seen before need not be encoded.
        answer = worker.ask("draw", steps=steps, prompt=f"{i + 1} {self._task.prompt}", decode=image)
        if image:
            record.add("image", answer["seconds"])
        if "step" in self._plan.clocks:
            record.add("step", *answer["steps"])
        for where, size in worker.ask("memory").items():
            record.note_peak(where, size)
        self._crew.release(job.name)
        _log.info("warm, round %d of %d: %s %.2f s", i + 1, self._runs, job.name, answer["seconds"])

    def measure_floor(self) -> None:
        """The floor, in `ldm`'s number type. Nothing else runs meanwhile."""
        _log.info("the floor: the best rate of convolutions and matrix products")
        job = self._jobs[OURS.name][1]
        try:
            ended = self._processes.run("floor", "ldmcli.bench.groundwork", "floor", job.to_json())
        except ContenderError as error:
            _log.warning("no floor: %s", error)
            return
        self.results.floor = json.loads(ended.out)

    def profile(self) -> None:
        """What a step of `ldm` spends its time on, in a process of its own."""
        _log.info("the profile of a step")
        job = self._jobs[OURS.name][1]
        try:
            ended = self._processes.run("profile", "ldmcli.bench.groundwork", "profile", job.to_json(), extra=_PROFILED)
        except ContenderError as error:
            _log.warning("no profile: %s", error)
            return
        self.results.profile = json.loads(ended.out.splitlines()[-1])

    @contextlib.contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        """A contender that fails inside the block is told of, and takes no further part."""
        try:
            yield
        except ContenderError as error:
            self.results.records[name].failure = error.reason
            self._crew.release(name, dead=True)
            _log.warning("%s takes no further part: %s", name, error.reason)


def _command(task: Task, steps: int, picture: str, *more: str) -> Sequence[str]:
    """`ldm txt2img` as typed for the task."""
    words = {
        "--model": task.model, "--negative-prompt": task.negative_prompt, "--seed": task.seed, "--steps": steps,
        "--width": task.width, "--height": task.height, "--guidance-scale": task.guidance_scale,
        "--sampler": task.sampler, "--dtype": task.dtype, "--device": task.device, "--attention": task.attention,
        "--threads": task.threads, "--kernels": task.kernels, "--output": picture,
    }  # fmt: skip
    flags = {
        "--vae-tiling": task.tile_vae, "--no-cuda-graph": not task.graph, "--compile": task.compiled,
        "--low-vram": task.low_vram,
    }  # fmt: skip
    raised = [name for name, wanted in flags.items() if wanted]
    typed = [f"{name}={value}" for name, value in words.items()]
    return ["txt2img", *typed, "--json", *more, *raised, "--", task.prompt]


def _note_cold(record: Record, ended: Ended) -> None:
    """Put a cold run's times into its record."""
    record.add("cold", ended.seconds)
    record.note_peak("cold", ended.peak)
    told: dict[str, Any] = json.loads(ended.out.splitlines()[-1])
    first = told.get("marks", told).get("first_step")
    if "first_step_at" in told:
        first = told["first_step_at"] - ended.started
    if first is not None:
        record.add("first_step", first)
        record.note_peak("first_step", told.get("peaks", {}).get("first_step") or None)
    if "phases" in told:
        phases: dict[str, float] = told["phases"]
        record.phases.append(phases | {"rest": ended.seconds - sum(phases.values())})


def _inserted(records: dict[str, Record], record: Record) -> dict[str, Record]:
    """The records with another one in second place."""
    first, *others = records.items()
    return dict([first, (record.name, record), *others])
