"""What other programs call samplers and schedules: AUTOMATIC1111, ComfyUI, InvokeAI, NovelAI, k-diffusion, diffusers.

Case, blanks, hyphens, underscores and brackets make no difference; `++` is pp; `k_` and `sample_` may stand before a
sampler's name, `Scheduler` and the schedule after it, which InvokeAI writes `_k` where it is Karras's.
"""

import functools
import re
from collections.abc import Mapping

from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spacings import SPACINGS

_SAMPLERS = {
    "euler-a": "eulerancestral",
    "plms": "pndm",
    "dpmpp-2m": "dpmsolver dpmsolverpp",
    "dpmpp-2m-sde": "sdedpmsolverpp dpmpp2msdegpu",
    "unipc": "unipcbh1 unipcbh2",
}
# Samplers of other programs that are not here, by what draws most like them.
_ELSEWHERE = {
    "dpmpp-2m": "lms deis ipndm ipndmv dpmpp3m dpmfast dpmadaptive dpmsolversinglestep resmultistep gradientestimation",
    "dpmpp-2m-sde": "dpmppsde dpmppsdegpu dpmpp3msde dpmpp3msdegpu dpmsolversde seeds2 seeds3 ersde sasolver",
    "euler-a": "dpm2a dpm2ancestral dpmpp2sa dpmpp2sancestral",
    "heun": "dpm2 heunpp2 restart",
    "lcm": "tcd",
}
_SCHEDULES = {
    "leading": "ddim ddimuniform",
    "normal": "uniform",
    "exponential": "polyexponential",  # with its usual exponent, 1
    "sgm_uniform": "sgm",
    "ays": "alignyoursteps",
}


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


_BY_NAME = {_bare(name): row.name for row in SAMPLERS.values() for name in (row.name, row.title)}
_BY_NAME |= {other: name for name, others in _SAMPLERS.items() for other in others.split()}
_SPACINGS = {_bare(name): name for name in SPACINGS}
_SPACINGS |= {other: name for name, others in _SCHEDULES.items() for other in others.split()}
_ENDINGS = sorted(((end, name) for end, name in _SPACINGS.items() if "ddim" not in end), key=lambda row: -len(row[0]))


@functools.lru_cache(1024)
def sampler_of(name: str) -> tuple[str, str | None] | None:
    """The sampler that any program calls so, and the schedule that the name says, if any; None for none that is here.
    What goes together is not checked: `check_spacing` does."""
    return _found(name, _BY_NAME)


def nearest_sampler(name: str) -> str:
    """The sampler here that draws most like one of other programs that is not here; "" where none is known so."""
    found = _found(name, {other: near for near, others in _ELSEWHERE.items() for other in others.split()})
    return found[0] if found else ""


def _found(name: str, samplers: Mapping[str, str]) -> tuple[str, str | None] | None:
    bare = re.sub("(?:discrete|multistep)?(?:scheduler)?$", "", _bare(name[:100]).removeprefix("sample"))
    for end, schedule in (("", None), *_ENDINGS, ("k", "karras")):
        if bare.endswith(end):
            stem = bare.removesuffix(end)
            if found := samplers.get(stem) or samplers.get(stem.removeprefix("k")):
                return found, schedule
    return None


def schedule_of(name: str) -> str | None:
    """The schedule that any program calls so."""
    return _SPACINGS.get(_bare(name[:100]))
