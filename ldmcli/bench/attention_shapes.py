"""Times the kernels of attention on the shapes that U-Nets and VAEs call, and writes the table of the best.

`python -m ldmcli.bench.attention_shapes --table ldmcli/runtime/attention_table.py`, on an idle CUDA device: some three
minutes. `--device cpu --quick` runs the same code on a CPU, for tests; its numbers say nothing of a GPU.

Shapes are those that the networks themselves call, run on the meta device. Kernels take turns, each for a batch of
calls, in a CUDA graph where there is one, as by default in a run; the median counts. Results are compared with
`math_attention` in float32. A kernel that cannot be recorded into a graph counts as refusing.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmcli.bench.attention_rows import Problem, Result, merged, rows_of, table_source
from ldmcli.bench.random_weights import family_config
from ldmcli.checkpoints.load import on_meta
from ldmcli.networks.attention import ATTENTIONS, Attend, math_attention, set_attention, takes
from ldmcli.networks.unet import UNet
from ldmcli.networks.vae import AutoencoderKL
from ldmcli.speed.attention_choice import REFUSALS, TABLE
from ldmcli.speed.attention_table import MEASURED_WITH
from ldmcli.speed.policy import DTYPES

SECONDS = 160.0  # after which no other shape is begun
ROUNDS = 11
BATCH_SECONDS = 1e-3  # that a batch of calls takes, about
MOST_CALLS = 50
MOST_SCORES = 1 << 27  # that math_attention may hold where it is timed

WORKS = {"sd15": (512, 768), "sdxl": (1024,), "sd21": (768, 512)}  # sides of pictures; the last may find no time
QUICK_WORKS = {"sd15": (64,)}
KEYS = (77, 154)  # of a prompt, in one chunk and in two
SAMPLES = (2, 32)  # of a guided step for one picture, and for sixteen

Called = Counter[tuple[int, int, int, int]]  # calls by heads, queries, keys and head_dim, for one sample


# Shapes


def unet_calls(unet: UNet, latents: int, keys: int) -> Called:
    """How often a step calls attention with each shape, for a sample of latents² latents and a prompt of so many keys.
    `unet` is on the meta device; its attention is lost."""
    called: Called = Counter()
    set_attention(unet, _noting(called))
    config = unet.config
    with torch.no_grad():
        context = unet.project_context(torch.empty(1, keys, config.context_dim, device="meta"))
        x = torch.empty(1, config.in_channels, latents, latents, device="meta")
        unet(x, torch.empty(1, 4 * config.block_channels[0], device="meta"), context)
    return called


def vae_calls(vae: AutoencoderKL, latents: int) -> Called:
    """As `unet_calls`, for the decoding of one picture."""
    called: Called = Counter()
    set_attention(vae, _noting(called))
    with torch.no_grad():
        vae.decode(torch.empty(1, vae.config.latent_channels, latents, latents, device="meta"))
    return called


def _noting(called: Called) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        called[query.shape[1], query.shape[2], key.shape[2], query.shape[3]] += 1
        return torch.empty_like(query)

    return attend


def planned(dtype: torch.dtype, *, quick: bool = False) -> dict[str, Counter[Problem]]:
    """Every problem to measure, with its calls, by the work it is part of: a step of so many samples, or a decoding."""
    plan: dict[str, Counter[Problem]] = {}
    for family, sizes in (QUICK_WORKS if quick else WORKS).items():
        config = family_config(family)
        unet, vae = on_meta(partial(UNet, config.unet)), on_meta(partial(AutoencoderKL, config.vae))
        wide = config.vae.force_upcast and dtype == torch.float16  # as in Runtime.vae_dtype
        for size in sizes:
            latents, name = size // config.vae.factor, f"{family} {size}×{size}"
            for keys in KEYS[:1] if quick else KEYS:
                called = unet_calls(unet, latents, keys)
                for samples in SAMPLES[:1] if quick else SAMPLES:
                    plan[f"{name}, {keys} keys, a step of {samples}"] = _problems(called, samples, dtype)
            plan[f"{name}, VAE"] = _problems(vae_calls(vae, latents), 1, torch.float32 if wide else dtype)
    return plan


def _problems(called: Called, samples: int, dtype: torch.dtype) -> Counter[Problem]:
    name = str(dtype).removeprefix("torch.")
    return Counter({Problem(samples, *shape, name): calls for shape, calls in called.items()})


# Measuring


def measure(problem: Problem, device: torch.device) -> Result:
    """Errors and times of all kernels that take a problem."""
    query, key, value = problem.tensors(device)
    result = Result(problem, _picked(query, key, value))
    right = _right(query, key, value)
    timers: dict[str, Callable[[], float]] = {}
    for name in _candidates(problem, device):
        run = partial(_attended, ATTENTIONS[name], query, key, value)
        try:
            out = run().unflatten(-1, (problem.heads, -1)).transpose(1, 2)[-1:].float()
            result.errors[name] = ((out - right).norm() / right.norm()).item()
            del out
            timers[name] = _timer(run, device)
        except REFUSALS as error:
            result.errors.pop(name, None)
            result.refused[name] = str(error).strip().partition("\n")[0][:100]
    times: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(ROUNDS):
        for name in list(timers)[:: -1 if i % 2 else 1]:
            times[name].append(timers[name]())
    result.seconds = {name: statistics.median(of_kernel) for name, of_kernel in times.items()}
    return result


def _attended(attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As in the modules: a kernel whose result lies otherwise in memory pays for a copy."""
    return attend(query, key, value).transpose(1, 2).flatten(2)


def _candidates(problem: Problem, device: torch.device) -> Iterator[str]:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    scores = problem.batch * problem.heads * problem.queries * problem.keys
    for name in ATTENTIONS:
        if (name == "chunked" and capability) or (name == "math" and scores > MOST_SCORES):
            continue
        if takes(name, problem.head_dim, problem.keys, getattr(torch, problem.dtype), capability):
            yield name


def _right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last sample's result in float32, head by head."""
    last = [tensor[-1:].float() for tensor in (query, key, value)]
    heads = (math_attention(*(tensor[:, i : i + 1] for tensor in last)) for i in range(query.shape[1]))
    return torch.cat(list(heads), dim=1)


def _picked(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The kernel that torch itself takes, in its words."""
    from torch.nn.attention import SDPBackend

    return SDPBackend(torch._fused_sdp_choice(query, key, value)).name.removesuffix("_ATTENTION").lower()


def _timer(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """A function that measures the seconds of a call, on average over a batch of calls. Raises RuntimeError where the
    calls cannot be recorded."""
    if device.type == "cpu":
        calls = _calls(_cpu_seconds(run, 1))
        return lambda: _cpu_seconds(run, calls)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # warm, as recording wants it
        for _ in range(3):
            run()
        calls = _calls(_gpu_seconds(run, 5))
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return lambda: _gpu_seconds(graph.replay, 1) / calls


def _calls(seconds: float) -> int:
    return min(max(round(BATCH_SECONDS / max(seconds, 1e-9)), 1), MOST_CALLS)


def _cpu_seconds(run: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def _gpu_seconds(run: Callable[[], object], calls: int) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls  # of milliseconds


# The program


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write what the options name."""
    options = _options(arguments)
    device, dtype = _device(options.device), DTYPES[options.dtype]
    torch.set_float32_matmul_precision("highest")
    setup = _setup(device)
    print(f"{setup['device']}, {setup['libraries']}; µs (relative error)")
    plan = planned(dtype, quick=options.quick)
    problems = list(dict.fromkeys(problem for work in plan.values() for problem in work))
    if device.type == "cuda":
        gc.freeze()  # or each recording would go through all objects
    started = time.perf_counter()
    results: dict[Problem, Result] = {}
    with torch.inference_mode():
        for problem in problems:
            if time.perf_counter() - started > SECONDS:
                print(f"out of time: {len(problems) - len(results)} shapes are left out")
                break
            with contextlib.suppress(torch.OutOfMemoryError):  # a small card: torch picks there
                results[problem] = measure(problem, device)
                print(results[problem], flush=True)
    works = _works(plan, results)
    for name, (own, best) in works.items():
        print(f"{name}: attention {1e3 * own:.3f} ms by torch's picks, {1e3 * best:.3f} ms by the best")
    if options.json:
        _write(options.json, json.dumps(_report(setup, results.values(), works), indent=1))
    if options.table:
        _write(options.table, _new_table(list(results.values()), setup))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ldmcli.bench.attention_shapes", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="fp16 on a GPU, fp32 on a CPU unless given")
    parser.add_argument("--quick", action="store_true", help="a few small shapes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table that attention_choice reads")
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    if not cpu and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; to see the program work, use --device cpu --quick")
    if cpu and options.table:
        parser.error("--table is for CUDA devices: on a CPU no table is read")
    options.dtype = options.dtype or ("fp32" if cpu else "fp16")
    return options


def _device(name: str) -> torch.device:
    """The device by name; a CUDA device becomes the current one."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _setup(device: torch.device) -> dict[str, str]:
    """The card and the libraries."""
    libraries = f"torch {torch.__version__}"
    if device.type == "cpu":
        return {"device": "CPU", "capability": "", "libraries": libraries}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "libraries": f"{libraries}, cuDNN {torch.backends.cudnn.version()}",
    }


def _works(plan: dict[str, Counter[Problem]], results: dict[Problem, Result]) -> dict[str, tuple[float, float]]:
    """Seconds that attention takes in each work by torch's own picks, and by the best kernels; of works that were
    measured wholly."""
    found = {}
    for name, calls in plan.items():
        if all(problem in results and "sdpa" in results[problem].seconds for problem in calls):
            own = sum(n * results[problem].seconds["sdpa"] for problem, n in calls.items())
            best = sum(n * results[problem].seconds[results[problem].best] for problem, n in calls.items())
            found[name] = own, best
    return found


def _report(setup: dict[str, str], results: Iterable[Result], works: dict[str, tuple[float, float]]) -> dict[str, Any]:
    rows = [dataclasses.asdict(result) | {"best": result.best} for result in results]
    return setup | {"rows": rows, "works": {name: {"sdpa": own, "best": best} for name, (own, best) in works.items()}}


def _new_table(results: list[Result], setup: dict[str, str]) -> str:
    """The program's own table with what was measured now."""
    capability = setup["capability"]
    said = f"{setup['device']}, {setup['libraries']}"
    measured_with = MEASURED_WITH | {f"{capability} {result.problem.dtype}": said for result in results}
    return table_source(merged(TABLE, rows_of(results, capability), results, capability), measured_with)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.exit(f"{path} cannot be written ({error.strerror}); choose another file.")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
