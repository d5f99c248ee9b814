"""What is done beside the contenders, in processes of its own so that the bench itself stays small: random weights, the
floor under a model's times, the profile of a step, and what a device is."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ldmcli.bench.task import Job
from ldmcli.errors import LdmError


def main() -> None:
    """`weights FAMILY FOLDER`, `floor JOB`, `profile JOB` or `device NAME`; an LdmError ends it with its code, its
    message on stderr. What is found is the last line on stdout, in JSON."""
    kind = sys.argv[1]
    try:
        if kind == "weights":
            _write(sys.argv[2], Path(sys.argv[3]))
        elif kind == "device":
            print(json.dumps(_device(sys.argv[2])))
        else:
            find = _floor if kind == "floor" else _profile
            print(json.dumps(find(Job.from_json(sys.argv[2]))))
    except LdmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _write(family: str, folder: Path) -> None:
    from ldmcli.bench.random_weights import write_random_model

    write_random_model(family, folder)


def _device(name: str) -> dict[str, Any]:
    """The device of this name, as --device has it: its kind, what it is called, its memory in bytes."""
    import torch

    from ldmcli.speed.policy import choose_runtime

    device = choose_runtime(name).device
    if device.type == "cpu":
        return {"kind": "cpu", "torch": torch.__version__}
    found = torch.cuda.get_device_properties(device)
    return {"kind": "cuda", "name": found.name, "memory": found.total_memory, "torch": torch.__version__}


def _profile(job: Job) -> dict[str, Any]:
    from ldmcli.bench.step_profile import profile

    return profile(job)


def _floor(job: Job) -> dict[str, Any]:
    """The least time, in seconds, that a guided step and a batch of pictures could take at the best rate measured now;
    and of a step's by kinds of work, as step_profile.py names them."""
    import torch

    from ldmcli.bench.floor import count_flops, measure_rate
    from ldmcli.checkpoints.source import open_model
    from ldmcli.speed.policy import DTYPES

    task = job.task
    config = open_model(Path(task.model)).config
    flops = count_flops(config, task.width, task.height)
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    rate = measure_rate(config, task.width, task.height, dtype, device, task.threads)
    samples = (2 if task.guided else 1) * task.batch_size
    step = samples * flops.unet
    # The prompt is the same for all pictures: once is enough.
    prompts = (2 if task.guided else 1) * (flops.text + flops.context)
    image = task.steps * step + prompts + task.batch_size * flops.vae
    products = flops.unet - flops.unet_attention - flops.unet_convolution
    kinds = {"convolution": flops.unet_convolution, "matrix product": products, "attention": flops.unet_attention}
    return {
        "flops": dataclasses.asdict(flops),
        "dtype": job.dtype,
        "flops_per_second": rate.flops_per_second,
        "product": rate.product,
        "all": rate.all,
        "step": step / rate.flops_per_second,
        "image": image / rate.flops_per_second,
        "kinds": {kind: samples * count / rate.flops_per_second for kind, count in kinds.items()},
    }
