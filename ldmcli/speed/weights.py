"""The weights of networks under the names that they were built with, whatever speed has made of their layers."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from ldmcli.speed.cpu.onednn import make_plain
from ldmcli.speed.cuda.fused import hidden_layers, hidden_parameters, rejoin


def names_with_weights(network: nn.Module) -> list[str]:
    """The names of all layers that were built with a weight."""
    found = [name for name, layer in network.named_modules() if layer._parameters.get("weight") is not None]
    hidden, made = hidden_layers(network)
    return [*(name for name in found if name not in made), *hidden]


@contextlib.contextmanager
def writing(network: nn.Module, name: str) -> Iterator[dict[str, Tensor]]:
    """Inside the block a layer's own parameters, plain, to be written in place: recordings of a network's steps go on
    with what is written. At its end, what other layers compute with follows."""
    holder, last = network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    parameters = hidden_parameters(network, holder, last)
    if parameters is None:
        layer = network.get_submodule(name)
        make_plain(holder, layer)
        parameters = {key: value.detach() for key, value in layer.named_parameters(recurse=False)}
    try:
        yield parameters
    finally:
        rejoin(network, holder, last)
