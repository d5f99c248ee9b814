"""Networks that steer, from disk to a device; some files hold only what differs from their model's U-Net."""

import torch
from torch import Tensor

from ldmcli.checkpoints.control_source import DIFFERENCE, LORA, ControlSource
from ldmcli.checkpoints.files import WeightFile
from ldmcli.checkpoints.header import FLOATING
from ldmcli.checkpoints.key_map import disk_names
from ldmcli.checkpoints.load import fill, on_meta, read_all, same_shape
from ldmcli.checkpoints.source import PartSource, list_keys
from ldmcli.config import UNetConfig
from ldmcli.disk.opening import bad_file
from ldmcli.errors import BadDataError
from ldmcli.networks.control_net import ControlNet
from ldmcli.networks.t2i_adapter import T2IAdapter
from ldmcli.networks.unet import Encoder
from ldmcli.steering_config import AdapterConfig


def load_control(
    source: ControlSource, unet: PartSource[UNetConfig], device: torch.device, dtype: torch.dtype
) -> ControlNet | T2IAdapter:
    """A network that steers. Where the file only says how it differs from the model's U-Net, that is read too."""
    config = source.config
    if isinstance(config, AdapterConfig):
        return fill(on_meta(lambda: T2IAdapter(config)), source.part, device, dtype)
    network = on_meta(lambda: ControlNet(config))
    if not source.base:
        return fill(network, source.part, device, dtype, (f"{source.part.prefix}{DIFFERENCE}",))
    host = torch.device("cpu")
    up = ("output_blocks.", "out.") if unet.original else ("up_blocks.", "conv_norm_out.", "conv_out.")
    unread = tuple(unet.prefix + name for name in up)
    base = fill(on_meta(lambda: Encoder(unet.config)), unet, host, torch.float32, unread).state_dict()
    state = _on_base(network, source, base)
    network.load_state_dict({key: tensor.to(device, dtype) for key, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval()


def _on_base(network: ControlNet, source: ControlSource, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network whose file builds on its model's U-Net: differences are added to that; factors are
    multiplied and added, and what the file lacks is the U-Net's own. In float32. Raises BadDataError."""
    part = source.part
    wanted = {key: tuple(meta.shape) for key, meta in network.state_dict().items()}
    names = {key: found[0] for key, found in disk_names(wanted, part.config, part.prefix, original=True).items()}
    on_disk = part.keys()
    by_file: dict[int, tuple[WeightFile, list[str]]] = {}
    for key, file in on_disk.items():
        if file.tensors[key].dtype in FLOATING:
            by_file.setdefault(id(file), (file, []))[1].append(key)
    held = dict(read_all(list(by_file.values()), torch.device("cpu"), torch.float32))
    marks = (f"{part.prefix}{DIFFERENCE}", f"{part.prefix}{LORA}")
    read, state = set(marks), dict[str, Tensor]()
    for key, name in names.items():
        stem = name.removesuffix(".weight")
        own, factors = held.get(name), (f"{stem}.up", f"{stem}.down")
        under = base.get(key)
        if own is not None and under is not None and source.base == DIFFERENCE:
            own = own.reshape(under.shape) + under if own.numel() == under.numel() else own
        elif own is None and under is not None and factors[0] in held and factors[1] in held and stem != name:
            up, down = (held[factor].flatten(1) for factor in factors)
            if up.shape[1] != down.shape[0] or len(up) * down.shape[1] != under.numel():
                raise _misfit(source, f"its factors of {stem} do not fit the model's {list(under.shape)}")
            own, read = under + (up @ down).reshape(under.shape), read | {*factors}
        elif own is None and source.base == "lora":
            own = under
        if own is None:
            raise _misfit(source, list_keys("it lacks tensors", [name]))
        if not same_shape(tuple(own.shape), wanted[key]):
            raise _misfit(source, f"its {name} is {list(own.shape)} and not {list(wanted[key])}")
        read.add(name)
        state[key] = own.reshape(wanted[key])
    if left := [key for key in on_disk if key not in read]:
        raise _misfit(source, list_keys("it has tensors of no use here", left))
    return state


def _misfit(source: ControlSource, why: str) -> BadDataError:
    return bad_file(source.path, f"is not made for this model: {why}", "use one that was made for it")
