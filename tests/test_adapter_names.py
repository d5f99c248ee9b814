"""Every dialect's names find their modules; what does not fit is said."""

import functools

import pytest
from adapter_support import DIALECTS, Dialect, flat, layers, originals
from oracle.test_key_lists import TEXTS, UNETS
from torch import nn

from ldmcli.adapters.deltas import DELTAS
from ldmcli.adapters.kinds import KINDS, split
from ldmcli.adapters.spellings import Place, module_table
from ldmcli.checkpoints.load import on_meta
from ldmcli.config import TextEncoderConfig, UNetConfig
from ldmcli.networks.clip import TextTransformer
from ldmcli.networks.layers import ResnetBlock
from ldmcli.networks.transformer import SpatialTransformer
from ldmcli.networks.unet import UNet

FAMILIES = {
    "sd1": (UNetConfig(), (TextEncoderConfig(),)),
    "sd2": (UNETS["sd2-v"], TEXTS["sd2-v"]),
    "sdxl": (UNETS["sdxl"], TEXTS["sdxl"]),
    "refiner": (UNETS["refiner"], TEXTS["refiner"]),
}
# What sd-scripts trains: layers of transformers, then those of convolutions, then of each text encoder.
COUNTS = {"sd1": (192, 86, 72), "sd2": (192, 86, 138), "sdxl": (722, 66, 72, 192)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def networks(family: str) -> dict[str, nn.Module]:
    """The family's networks in full size, without numbers."""
    unet, texts = FAMILIES[family]
    encoders = {text.part: on_meta(functools.partial(TextTransformer, text)) for text in texts}
    return {"unet": on_meta(lambda: UNet(unet)), **encoders}


@pytest.fixture(scope="module")
def table(networks: dict[str, nn.Module]) -> dict[str, Place]:
    return module_table(networks)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: flat(dialect.name.replace(" ", "-")))
def test_every_key_of_every_dialect_is_found(
    dialect: Dialect, networks: dict[str, nn.Module], table: dict[str, Place]
) -> None:
    keys = dialect.keys(networks)
    assert len(keys) > 100
    for key, (part, name) in keys.items():
        found = split(key)
        assert found is not None, key
        assert table.get(found[0]) == Place(part, name), key
        assert found[1] == ("down" if key.endswith(dialect.down) else "up" if key.endswith(dialect.up) else "alpha")


def test_no_two_modules_share_a_name(networks: dict[str, nn.Module], table: dict[str, Place]) -> None:
    unet = networks["unet"]
    names = originals(unet)
    spelled = [{flat(name), flat(original)} for name, original in names.items()]
    assert len(set.union(*spelled)) == sum(map(len, spelled))
    assert all(table[f"lora_unet_{flat(original)}"] == Place("unet", name) for name, original in names.items())


@pytest.mark.parametrize("family", COUNTS, indirect=True)
def test_as_many_modules_as_sd_scripts_trains(
    family: str, networks: dict[str, nn.Module], table: dict[str, Place]
) -> None:
    unet = networks["unet"]
    blocks = [name for name, module in unet.named_modules() if isinstance(module, SpatialTransformer)]
    resnets = [name for name, module in unet.named_modules() if isinstance(module, ResnetBlock)]
    attending = [name for name in layers(unet) if name.startswith(tuple(f"{block}." for block in blocks))]
    convolving = [
        name
        for name in layers(unet)
        if name.startswith(tuple(f"{resnet}." for resnet in resnets)) or "samplers" in name
    ]
    texts = [
        [name for name in layers(network) if ".layers." in name] for part, network in networks.items() if part != "unet"
    ]
    assert (len(attending), len(convolving), *map(len, texts)) == COUNTS[family]
    assert all(f"lora_unet_{flat(name)}" in table for name in (*attending, *convolving))


def test_norms_are_found_too(networks: dict[str, nn.Module], table: dict[str, Place]) -> None:
    for name in layers(networks["unet"], (nn.GroupNorm, nn.LayerNorm)):
        assert table[f"lora_unet_{flat(name)}"] == Place("unet", name)


def test_every_kind_computes_something() -> None:
    assert {kind.name for kind in KINDS} == set(DELTAS)


@pytest.mark.parametrize("key", ["unet.conv_in.bias", "alpha", ".alpha", "", "lora_te_text_projection"])
def test_what_ends_like_no_factor_is_none(key: str) -> None:
    assert split(key) is None
