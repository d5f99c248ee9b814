"""The samplers there are, by the name a user types."""

from collections.abc import Callable, Iterator

from torch import Tensor

from ldmcli.sampling.ddim import ddim
from ldmcli.sampling.plms import plms

SAMPLERS: dict[str, Callable[..., Iterator[Tensor]]] = {"ddim": ddim, "plms": plms}
