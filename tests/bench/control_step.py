"""What a control network adds to a step, on Stable Diffusion 1.5's shapes with random weights, on this machine.

    python tests/bench/control_step.py --side 512 --rounds 3

Steps without and with the network take turns, so that what else the machine does falls on both; medians are printed, as
one JSON line. The network's operations are 35 % of the U-Net's; at most 38 % more time is to be lost.
"""

import argparse
import dataclasses
import json
import statistics
import time

import torch

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


def random_module(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights of a trained model's size in place of those on meta."""
    module = module.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
    for weight in module.parameters():
        weight.normal_(0, 0.02)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    runtime = choose_runtime(RuntimeSpec(device="cpu", dtype=args.dtype))
    config = UNetConfig()
    control_config = ControlConfig(config, (*config.skip_channels, config.block_channels[-1]))
    with torch.inference_mode(False):
        unet = runtime.prepare(random_module(on_meta(lambda: UNet(config)), runtime.dtype))
        control = runtime.prepare(random_module(on_meta(lambda: ControlNet(control_config)), runtime.dtype))
    assert isinstance(unet, UNet)
    assert isinstance(control, ControlNet)
    with torch.inference_mode():
        steps = Schedule(ScheduleConfig()).steps(20, "ddim")
        condition = Conditioning(torch.randn(1, 77, config.context_dim, dtype=runtime.dtype))
        latents = torch.randn(1, 4, args.side // 8, args.side // 8)
        plain = unet.prepare(condition, steps)
        began = time.perf_counter()
        features = control.read(torch.rand(1, 3, args.side, args.side))
        hint = time.perf_counter() - began
        residuals = control.prepare(condition, steps, features)

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
    print(json.dumps(report | {"config": dataclasses.asdict(config)["block_channels"], "side": args.side}))


if __name__ == "__main__":
    main()
