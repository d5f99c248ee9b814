"""The weights of networks under the names that they were built with, whatever speed has made of their layers."""

from torch import Tensor, nn

from ldmcli.speed.cpu.onednn import make_plain


def names_with_weights(network: nn.Module) -> list[str]:
    """The names of all layers that were built with a weight."""
    return [name for name, layer in network.named_modules() if layer._parameters.get("weight") is not None]


def plain_parameters(network: nn.Module, name: str) -> dict[str, Tensor]:
    """A layer's own parameters, plain, to be written in place: what computes with them, recordings of a network's steps
    too, goes on with what is written."""
    layer = network.get_submodule(name)
    make_plain(network.get_submodule(name.rpartition(".")[0]), layer)
    return {key: value.detach() for key, value in layer.named_parameters(recurse=False)}
