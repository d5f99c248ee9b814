"""What parts beside the U-Net cost on Stable Diffusion 1.5's shapes with random weights, on this machine's CPU.

    python -m bench.parts control --side 512 --rounds 3    # with PYTHONPATH=tests:.
    python -m bench.parts encode --side 512 --rounds 5 --dtype bf16 --threads 2

`control`: what a control network adds to a step. Its operations are 35 % of the U-Net's; at most 38 % more time is to
be lost. `encode`: a picture to latents by the VAE alone, beside diffusers', in a process each. What is compared takes
turns, so that what else the machine does falls on both; medians are printed, as one JSON line.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import serving
from bench.contenders import Job
from bench.processes import Worker, environment, python

from ldmcli.checkpoints.load import on_meta
from ldmcli.config import ScheduleConfig, UNetConfig
from ldmcli.networks.control_net import ControlNet
from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.unet import Residuals, UNet
from ldmcli.sampling.guidance import controlled
from ldmcli.sampling.schedule import Schedule
from ldmcli.spec import RuntimeSpec
from ldmcli.speed.policy import choose_runtime
from ldmcli.steering_config import ControlConfig


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serving.main(_ENCODERS[json.loads(sys.argv[2])["name"]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["control", "encode"])
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print(json.dumps(control(args) if args.part == "control" else encode(args)))


# ---- a control network ----


def random_module(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights of a trained model's size in place of those on meta."""
    module = module.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
    for weight in module.parameters():
        weight.normal_(0, 0.02)
    return module


def control(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step without and with a control network."""
    torch.set_num_threads(args.threads)
    runtime = choose_runtime(RuntimeSpec(device="cpu", dtype=args.dtype))
    config = UNetConfig()
    control_config = ControlConfig(config, (*config.skip_channels, config.block_channels[-1]))
    with torch.inference_mode(False):
        unet = runtime.prepare(random_module(on_meta(lambda: UNet(config)), runtime.dtype))
        network = runtime.prepare(random_module(on_meta(lambda: ControlNet(control_config)), runtime.dtype))
    assert isinstance(unet, UNet)
    assert isinstance(network, ControlNet)
    with torch.inference_mode():
        steps = Schedule(ScheduleConfig()).steps(20, "ddim")
        condition = Conditioning(torch.randn(1, 77, config.context_dim, dtype=runtime.dtype))
        latents = torch.randn(1, 4, args.side // 8, args.side // 8)
        plain = unet.prepare(condition, steps)
        began = time.perf_counter()
        features = network.read(torch.rand(1, 3, args.side, args.side))
        hint = time.perf_counter() - began
        residuals = network.prepare(condition, steps, features)

        def added(inputs: torch.Tensor, step: object) -> Residuals:
            *skips, middle = residuals(inputs, step)  # type: ignore[arg-type]
            return Residuals(skips, middle)

        models = {"plain": plain, "controlled": controlled(plain, added)}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(args.rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                model(latents, steps[turn % len(steps)])
                if turn:  # the first lays weights out
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["controlled"], strict=True))
    report = {**medians, "ratio": ratio, "hint_encoder_once": hint, "runtime": runtime.to_dict()}
    return report | {"config": dataclasses.asdict(config)["block_channels"], "side": args.side}


# ---- pictures to latents ----


class _Encoder(serving.Serving):
    def encode(self, file: str) -> dict[str, Any]:
        """`seconds` for the job's picture; its likeliest latents are kept in `file`."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.job.height, self.job.width, 3), np.uint8)
        began = time.perf_counter()
        latents = self.latents(pixels)
        seconds = time.perf_counter() - began
        np.save(file, latents, allow_pickle=False)
        return {"seconds": seconds}

    def latents(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Ours(_Encoder):
    """As `ldm vae encode` encodes, and `ldm img2img`."""

    def __init__(self, job: Job) -> None:
        from ldmcli.checkpoints.vae_source import open_autoencoder
        from ldmcli.session.autoencoding import Autoencoding

        super().__init__(job)
        runtime = RuntimeSpec(device="cpu", dtype=job.dtype, threads=job.threads)
        self._vae = Autoencoding(open_autoencoder(Path(job.model)), runtime, decoder=False)

    def latents(self, pixels: np.ndarray) -> np.ndarray:
        return self._vae.encode(pixels).latents


class Diffusers(_Encoder):
    """diffusers' AutoencoderKL, as its documentation has it."""

    def __init__(self, job: Job) -> None:
        from diffusers import AutoencoderKL

        super().__init__(job)
        torch.set_num_threads(job.threads)
        self._vae = AutoencoderKL.from_pretrained(job.model, torch_dtype=_DTYPES[job.dtype], local_files_only=True)

    @torch.inference_mode()
    def latents(self, pixels: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        found: torch.Tensor = self._vae.encode(image.to(self._vae.dtype)).latent_dist.mean
        return found[0].float().numpy()


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ENCODERS = {"ldm": Ours, "diffusers": Diffusers}


def encode(args: argparse.Namespace) -> dict[str, Any]:
    """Of each: the first encoding, the median of those after it, the peak of its process in bytes; and how far apart
    their latents are."""
    from bench.random_weights import FAMILIES  # here, for it imports diffusers
    from oracle.random_families import build_parts
    from oracle.random_model import randomise

    dtype = str(choose_runtime(RuntimeSpec(device="cpu", dtype=args.dtype)).to_dict()["dtype"])
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        with torch.device("meta"):
            vae = build_parts(FAMILIES["sd15"], small=False)["vae"]
        randomise(vae.to_empty(device="cpu"), torch.Generator().manual_seed(0))
        vae.save_pretrained(folder / "vae")
        job = Job("", str(folder / "vae"), width=args.side, height=args.side, dtype=dtype, threads=args.threads)
        workers = {}
        for one in _ENCODERS:
            words = python("bench.parts", "serve", dataclasses.replace(job, name=one, device="cpu").to_json())
            workers[one] = Worker(words, environment(folder, args.threads))
            stack.callback(workers[one].kill)
        seconds: dict[str, list[float]] = {one: [] for one in workers}
        for _ in range(args.rounds + 1):
            for one, worker in workers.items():
                seconds[one].append(worker.ask("encode", file=str(folder / f"{one}.npy"))["seconds"])
        for one, worker in workers.items():
            peak = worker.ask("memory")["host"]
            found[one] = {"first": seconds[one][0], "median": statistics.median(seconds[one][1:]), "peak": peak}
        ours, theirs = (np.load(folder / f"{one}.npy") for one in workers)
        apart = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return {**found, "apart": apart, "dtype": dtype, "threads": args.threads, "side": args.side}


if __name__ == "__main__":
    main()
