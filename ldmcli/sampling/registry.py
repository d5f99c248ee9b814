"""The samplers there are, by the name a user types; `ldmcli.sampling.catalogue` says of each what it takes."""

from collections.abc import Callable, Iterator

from torch import Tensor

from ldmcli.sampling.ddim import ddim
from ldmcli.sampling.dpmpp import dpmpp_2m, dpmpp_2m_sde
from ldmcli.sampling.euler import euler, euler_ancestral, heun
from ldmcli.sampling.lcm import lcm
from ldmcli.sampling.plms import plms
from ldmcli.sampling.unipc import unipc

SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler-a": euler_ancestral,
    "heun": heun,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "unipc": unipc,
    "lcm": lcm,
}
