"""A diffusers folder's scheduler: the sampler that its class is, and how every sampler reads its configuration.

A class of diffusers reads the fields that it knows, and takes its own default for what the file leaves out: one file
means something else to each sampler. What a sampler cannot do as asked is refused when it is to draw, not before.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.buildable import betas_of
from ldmcli.checkpoints.families import LCM_DEFAULTS
from ldmcli.checkpoints.folder_config import MAX_CONFIG_BYTES, Fields
from ldmcli.config import BETA_SCHEDULES, Defaults, ScheduleConfig, Walk
from ldmcli.disk.opening import read_json
from ldmcli.errors import BadDataError, printable
from ldmcli.frozen import frozen
from ldmcli.sampling.catalogue import SAMPLERS

_log = logging.getLogger(__name__)

_SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
# The nearest of kin of those that are not here.
_STAND_IN = {
    "DDPMScheduler": "ddim",
    "DDPMParallelScheduler": "ddim",
    "IPNDMScheduler": "plms",
    "LMSDiscreteScheduler": "euler",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "euler-a",
    "DEISMultistepScheduler": "dpmpp-2m",
    "DPMSolverSinglestepScheduler": "dpmpp-2m",
    "DPMSolverSDEScheduler": "dpmpp-2m-sde",
    "SASolverScheduler": "dpmpp-2m-sde",
    "TCDScheduler": "lcm",
}

# The fields that each class reads, with its defaults; the prediction type and zero terminal SNR are the model's.
# fmt: off
_LEVELS = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "steps_offset": 0,
}
_LINSPACE = _LEVELS | {"timestep_spacing": "linspace"}
_LEADING = _LEVELS | {"timestep_spacing": "leading"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CLIPPED = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_RESPACED = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "sigma_min": None,
    "sigma_max": None,
}
_SOLVER = _LINSPACE | _THRESHOLD | _RESPACED | {
    "solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero", "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
_DPM = _SOLVER | {
    "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf, "variance_type": None,
}
_READS: dict[str, Mapping[str, Any]] = {
    "ddim": _LEADING | _CLIPPED | _THRESHOLD | {"clip_sample": True, "set_alpha_to_one": True},
    "plms": _LEADING | {"set_alpha_to_one": False},
    "euler": _LINSPACE | _RESPACED | {
        "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero",
    },
    "euler-a": _LINSPACE,
    "heun": _LINSPACE | _RESPACED | _CLIPPED | _SD_BETAS,
    "dpmpp-2m": _DPM,
    "dpmpp-2m-sde": _DPM,
    "unipc": _SOLVER | {
        "solver_type": "bh2", "predict_x0": True, "disable_corrector": (), "solver_p": None, "shift_terminal": None,
    },
    "lcm": _LEADING | _CLIPPED | _THRESHOLD | _SD_BETAS | {
        "beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0,
    },
}
# fmt: on
# Of these no other value can be run.
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), (False,)),
    **dict.fromkeys(("variance_type", "solver_p", "shift_terminal"), (None,)),
    "predict_x0": (True,),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # diffusers reads the last as the first
}
_SIGMAS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
_TURBO = (
    "by its scheduler the model looks distilled to few steps: unless told otherwise, it is drawn in 4 steps without "
    "guidance."
)
_CLIPS = (
    "as the model's scheduler_config.json has clip_sample true or leaves it out, this sampler clips the latents, which "
    "spoils pictures; set it to false there."
)


@frozen
class FolderSchedule:
    """What a folder's scheduler says: the noise schedule, how the model is drawn with, with a sentence where that is a
    guess, and what a user should know."""

    schedule: ScheduleConfig
    defaults: Defaults
    guess: str = ""
    notes: tuple[str, ...] = ()


def folder_schedule(
    path: Path, kind: object, usual: Defaults, *, reads_guidance: bool = False, mended: bool = False
) -> FolderSchedule:
    """The scheduler of `scheduler/scheduler_config.json`; where there is no such file, Stable Diffusion's constants.

    `kind` is its class by model_index.json, which wins over the file's own word, and `usual` how the family is drawn
    with. `mended` corrects `steps_offset` and `clip_sample`, as diffusers' pipelines of Stable Diffusion 1 and 2 do.
    """
    if not path.exists():
        return FolderSchedule(ScheduleConfig(), usual)
    said = read_json(path, MAX_CONFIG_BYTES)
    kind = kind if isinstance(kind, str) else str(said.get("_class_name"))
    fields = Fields(path, said)
    if kind.startswith(("EDM", "FlowMatch")):
        fields.refuse("_class_name", kind, "a scheduler of the noise schedules that run here")
    sampler = _SAMPLER_OF.get(kind) or _STAND_IN.get(kind, usual.sampler)
    if sampler == "dpmpp-2m" and str(said.get("algorithm_type")).startswith("sde-"):
        sampler = "dpmpp-2m-sde"
    own = _mended(fields.shown, said, own=True) if mended else said
    others = _mended(fields.shown, said, own=False) if mended else said
    schedule = _as_read_by(sampler, path, own)
    if kind == "PNDMScheduler":
        if own.get("skip_prk_steps") is not True:
            schedule = dataclasses.replace(schedule, refused=_cannot(fields, "skip_prk_steps", sampler, False))
        elif schedule.spacing == "linspace":  # whose strides diffusers takes for others
            schedule = dataclasses.replace(schedule, refused=_cannot(fields, "timestep_spacing", sampler))
    variants = tuple((name, _as_read_by(name, path, others)) for name in SAMPLERS if name != sampler)
    schedule = dataclasses.replace(schedule, variants=variants)
    notes: tuple[str, ...] = ()
    if kind not in _SAMPLER_OF and "_class_name" in said:
        notes = (f"the model is made for {printable(kind, 100)}, which is not here; {sampler} is used in its place.",)
    # Latent consistency models name LCMScheduler; unless the network reads the guidance scale itself, guidance is off,
    # as it was distilled in.
    if sampler == "lcm":
        own_scale = LCM_DEFAULTS.guidance_scale if reads_guidance else 1.0
        return FolderSchedule(schedule, dataclasses.replace(LCM_DEFAULTS, guidance_scale=own_scale), "", notes)
    # Adversarially distilled ones (SD-Turbo, SDXL-Turbo: Sauer et al. 2023) name Euler's or its ancestral kin with
    # "trailing" spacing and predict noise; no other known model does.
    trailing = said.get("timestep_spacing") == "trailing" and not said.get("rescale_betas_zero_snr")
    if sampler in ("euler", "euler-a") and kind in _SAMPLER_OF and trailing and schedule.prediction_type == "epsilon":
        return FolderSchedule(schedule, Defaults(sampler, steps=4, guidance_scale=1.0), _TURBO, notes)
    return FolderSchedule(schedule, dataclasses.replace(usual, sampler=sampler), "", notes)


def _mended(shown: str, said: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
    """The configuration as diffusers' pipelines of Stable Diffusion 1 and 2 correct it: of what the file leaves out,
    the default of its `own` class alone, since others take theirs."""
    mended = dict(said)
    if (own or "steps_offset" in said) and said.get("steps_offset", 0) != 1:
        _log.debug("%s: steps_offset is taken for 1", shown)
        mended["steps_offset"] = 1
    if said.get("clip_sample", own) is True:
        _log.debug("%s: clip_sample is taken for false", shown)
        mended["clip_sample"] = False
    return mended


def _as_read_by(sampler: str, path: Path, said: Mapping[str, Any]) -> ScheduleConfig:
    """The schedule that this sampler's class of diffusers makes of the configuration; `refused` says what the sampler
    cannot do of it. Raises BadDataError where no sampler could."""
    known = _READS[sampler]
    read = {name: said.get(name, default) for name, default in known.items()}
    read |= {name: False for name, value in read.items() if value is None and isinstance(known[name], bool)}
    fields = Fields(path, read | {name: said[name] for name in ("prediction_type",) if name in said})
    training_steps = fields.whole("num_train_timesteps", 1000)
    schedule = ScheduleConfig(
        training_steps=training_steps,
        beta_start=fields.number("beta_start", 0.0),
        beta_end=fields.number("beta_end", 0.0),
        beta_schedule=fields.choice("beta_schedule", "", BETA_SCHEDULES),
        betas=fields.numbers("trained_betas", training_steps),
        spacing=fields.choice("timestep_spacing", "", ("leading", "linspace", "trailing")),
        steps_offset=fields.whole("steps_offset", 0, low=0),
        prediction_type=fields.choice("prediction_type", "epsilon", ("epsilon", "v_prediction", "sample")),
        zero_terminal_snr=Fields(path, said).flag("rescale_betas_zero_snr"),
    )
    try:
        return _walked(fields, sampler, schedule)
    except BadDataError as error:
        return dataclasses.replace(schedule, refused=str(error))


def _walked(fields: Fields, sampler: str, schedule: ScheduleConfig) -> ScheduleConfig:
    """The schedule with all that changes how `sampler` walks it. Raises BadDataError naming what it cannot do."""
    predicts_velocity = schedule.prediction_type == "v_prediction"
    sigmas = [kind for name, kind in _SIGMAS.items() if fields.flag(name)]
    if fields.choice("interpolation_type", "linear", ("linear", "log_linear")) == "log_linear":
        sigmas.append("log")
    if len(sigmas) > 1:
        raise BadDataError(f"{fields.shown} asks for noise levels spaced in two ways ({', '.join(sigmas)}).")
    ends_clean = fields.choice("final_sigmas_type", "zero", ("zero", "sigma_min")) == "zero"
    lower_order_final = fields.flag("lower_order_final", True)
    order = fields.whole("solver_order", 2)
    cannot = {name: fields.get(name, values[0]) not in values for name, values in _ONLY.items()} | {
        "timestep_type": predicts_velocity and fields.get("timestep_type", "discrete") != "discrete",
        "lambda_min_clipped": _clips_levels(fields, schedule),
        "lower_order_final": sampler == "unipc" and ends_clean and not lower_order_final,  # diffusers divides by 0
        "solver_order": order > (3 if sampler == "dpmpp-2m" else 2),
    }
    if name := next((name for name, found in cannot.items() if found), ""):
        raise BadDataError(_cannot(fields, name, sampler))
    sigma_min, sigma_max = (
        None if fields.get(name) is None else fields.within(name, 0.0, 1e-9, 1e9) for name in ("sigma_min", "sigma_max")
    )
    clips = fields.flag("clip_sample")
    most_distilled = schedule.training_steps if sampler == "lcm" else 50  # which no other sampler looks at
    return dataclasses.replace(
        schedule,
        set_alpha_to_one=fields.flag("set_alpha_to_one"),
        sigmas=sigmas[0] if sigmas else "",
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        ends_clean=ends_clean,
        lower_order_final=lower_order_final,
        euler_at_final=fields.flag("euler_at_final"),
        distilled_steps=fields.whole("original_inference_steps", 50, high=most_distilled),
        walk=Walk(
            order=order,
            solver=_solver(fields, sampler),
            clip=fields.within("clip_sample_range", 1.0, 0.0, 1e9) if clips else None,
            threshold=_threshold(fields),
            uncorrected=_uncorrected(fields),
            mixes_velocities=predicts_velocity,
            timestep_scaling=fields.number("timestep_scaling", 10.0),
        ),
        note=_CLIPS if clips else "",
    )


def _solver(fields: Fields, sampler: str) -> str:
    """The solver's type, "" for the usual: another sampler's word is taken for this one's usual."""
    solver = fields.choice("solver_type", "midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2"))
    return solver if solver == ("bh1" if sampler == "unipc" else "heun") else ""


def _threshold(fields: Fields) -> tuple[float, float] | None:
    if not fields.flag("thresholding"):
        return None
    quantile = fields.within("dynamic_thresholding_ratio", 0.995, 0.0, 1.0)
    return quantile, fields.within("sample_max_value", 1.0, 1.0, 1e9)


def _uncorrected(fields: Fields) -> tuple[int, ...]:
    steps = fields.get("disable_corrector", ())
    if not isinstance(steps, list | tuple) or not all(isinstance(step, int) for step in steps):
        fields.refuse("disable_corrector", steps, "a list of steps")
    return tuple(steps)


def _clips_levels(fields: Fields, schedule: ScheduleConfig) -> bool:
    """Whether `lambda_min_clipped` would leave out the noisiest levels."""
    least = fields.get("lambda_min_clipped", -math.inf)
    if least == -math.inf:
        return False
    if isinstance(least, bool) or not isinstance(least, int | float):
        fields.refuse("lambda_min_clipped", least, "a number")
    decay = sum(math.log1p(-beta) for beta in betas_of(schedule) if beta < 1)
    level = 2.0**-24 if schedule.zero_terminal_snr else math.exp(decay)
    return math.log(level / (1 - level)) / 2 < least


def _cannot(fields: Fields, name: str, sampler: str, default: Any = None) -> str:
    shown = printable(repr(fields.get(name, default)))
    return f"{fields.shown}: {name} is {shown}, which sampler {sampler} cannot do here; choose another with --sampler."
