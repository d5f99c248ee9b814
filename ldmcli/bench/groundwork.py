"""What is done beside the contenders, in processes of its own so that the bench itself stays small: random weights, and
the floor under a model's times."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ldmcli.bench.task import Job
from ldmcli.errors import LdmError


def main() -> None:
    """`weights FAMILY FOLDER` or `floor JOB`; an LdmError ends it with its code, its message on stderr."""
    try:
        if sys.argv[1] == "weights":
            _write(sys.argv[2], Path(sys.argv[3]))
        else:
            print(json.dumps(_floor(Job.from_json(sys.argv[2]))))
    except LdmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _write(family: str, folder: Path) -> None:
    from ldmcli.bench.random_weights import write_random_model

    write_random_model(family, folder)


def _floor(job: Job) -> dict[str, Any]:
    """The least time, in seconds, that a guided step and a picture could take at the best rate measured now."""
    import torch

    from ldmcli.bench.floor import count_flops, measure_rate
    from ldmcli.checkpoints.source import open_model
    from ldmcli.runtime.policy import DTYPES

    task = job.task
    config = open_model(Path(task.model)).config
    flops = count_flops(config, task.width, task.height)
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    rate = measure_rate(config, task.width, task.height, dtype, device, task.threads)
    samples = 2 if task.guided else 1
    step = samples * flops.unet
    image = task.steps * step + samples * (flops.text + flops.context) + flops.vae
    return {
        "flops": dataclasses.asdict(flops),
        "dtype": job.dtype,
        "flops_per_second": rate.flops_per_second,
        "product": rate.product,
        "all": rate.all,
        "step": step / rate.flops_per_second,
        "image": image / rate.flops_per_second,
    }
