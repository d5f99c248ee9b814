"""Adapters merged into networks that speed has changed: laid out, fused, recorded, offloaded, of other number types."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import DIALECTS, Networks, noise, small_networks, write
from cli_support import tiny_model
from test_lora import RUNTIME, fresh, lora_for, request
from torch import Tensor, nn

from ldmcli import GenerationRequest, ModelSpec, Session
from ldmcli.adapters.adapter import Use, open_adapter
from ldmcli.adapters.merging import Merger
from ldmcli.networks.layers import Upsample
from ldmcli.spec import LoRA
from ldmcli.speed.cpu.onednn import lay_out
from ldmcli.speed.cuda.fused import fuse
from ldmcli.speed.cuda.graph import state_of
from ldmcli.speed.weights import names_with_weights, plain_parameters


def everything(networks: Networks, path: Path, seed: int) -> Use:
    """An adapter of all layers of a U-Net, and of the biases of the first two layers of each resnet."""
    found: dict[str, Tensor] = {}
    for key, (part, name) in DIALECTS[0].keys(networks).items():
        shape = networks[part].get_parameter(f"{name}.weight").shape
        layer, end = key.split(".", 1)
        if end.startswith("lora_up"):
            found[key] = noise(shape[0], 2, *[1] * (len(shape) - 2), seed=seed)
        elif end.startswith("lora_down"):
            found[key] = noise(2, *shape[1:], seed=seed + 1)
        if name.endswith(("conv1", "time_emb_proj")):
            found[f"{layer}.diff_b"] = noise(shape[0], seed=seed + 2)
    return Use(open_adapter(write(path, found)), 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_network_is_what_fusing_the_merged_one_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = small_networks(dtype)
    fused: Networks = {**plain, "unet": fuse(copy.deepcopy(plain["unet"]))}
    assert sorted(names_with_weights(fused["unet"])) == sorted(names_with_weights(plain["unet"]))
    first, second = (everything({"unet": plain["unet"]}, tmp_path / f"{i}.safetensors", i) for i in (1, 2))
    ours, theirs = Merger(fused, "small"), Merger(plain, "small")
    before = state_of(fused["unet"])
    for uses in ([first], [second, first], [first], [], [second]):
        ours.merge(uses)
        theirs.merge(uses)
        wanted = fuse(copy.deepcopy(plain["unet"])).state_dict()
        found = fused["unet"].state_dict()
        assert wanted.keys() == found.keys()
        assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
        assert state_of(fused["unet"]) == before  # recordings of its steps go on with what is written


def test_a_compiled_network_computes_with_what_is_merged(tmp_path: Path) -> None:
    """And is not compiled anew for it. What compiles makes no difference: weights are inputs of what it makes."""
    networks = small_networks()
    layer = networks["unet"].get_submodule("mid_block.resnets.0")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    made = torch.compile(layer, dynamic=False, backend=backend)
    merger = Merger(networks, "small")
    uses = [everything({"unet": networks["unet"]}, tmp_path / f"{i}.safetensors", i) for i in (1, 2)]
    inputs = noise(1, 64, 4, 4), noise(1, 128)
    found = []
    with torch.inference_mode():
        for chosen in ([], uses[:1], uses[1:], []):
            merger.merge(chosen)
            found.append(made(*inputs))
            assert torch.equal(found[-1], layer(*inputs))
    assert torch.equal(found[0], found[3])
    assert len({tuple(one.flatten().tolist()) for one in found}) == 3
    assert len(graphs) == 1


def test_what_is_folded_is_folded_anew() -> None:
    layer = Upsample(8).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    whole = nn.ModuleList([layer])
    fast = lay_out(copy.deepcopy(whole), fold=True)
    x = noise(1, 8, 4, 4).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        before = fast[0](x)  # type: ignore[index]
        for network in (whole, fast):
            plain_parameters(network, "0.conv")["weight"].mul_(2)
        after = fast[0](x)  # type: ignore[index]
        assert torch.allclose(after, layer(x), atol=1e-5)
    assert not torch.allclose(after, before)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[GenerationRequest]:
    """Requests of no LoRA, of A, of B."""
    folder = tmp_path_factory.mktemp("sets")
    a, b = (LoRA(str(lora_for(tiny_model(), folder / f"{n}.safetensors", seed=n)), 0.8, 0.6) for n in (1, 2))
    return [request(), request(a), request(b)]


def pictures(session: Session, wanted: list[GenerationRequest]) -> list[np.ndarray]:
    return [picture.pixels() for picture in session.draw(wanted)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("first", [0, 1])
def test_parts_that_leave_the_device_keep_what_is_merged(first: int, sets: list[GenerationRequest]) -> None:
    wanted = [fresh(one) for one in sets]
    with Session(ModelSpec(str(tiny_model())), RUNTIME) as session:
        list(session.draw([sets[first]]))
        assert session._drawer is not None
        session._drawer.pipeline.offload()
        for _ in range(2):
            assert same(pictures(session, sets), wanted)


def test_float32_for_a_while_draws_with_the_requests_own(
    sets: list[GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture whose latents overflowed is drawn again after others, and changes nothing for those that follow."""
    runtime = dataclasses.replace(RUNTIME, dtype="bf16")
    wanted = [fresh(one, runtime=runtime) for one in sets]
    with Session(ModelSpec(str(tiny_model())), runtime) as session:
        found: list[Any] = list(session.draw(sets))
        drawer = session._drawer
        assert drawer is not None
        again = drawer._again(found[1], False)
        assert again.runtime["dtype"] == "fp32"
        assert np.abs(again.pixels().astype(int) - wanted[1]).max() < 32
        assert same(pictures(session, sets[::-1]), wanted[::-1])


def test_encodings_of_other_loras_are_forgotten(sets: list[GenerationRequest]) -> None:
    """Here a LoRA of the text encoder alone."""
    lora = dataclasses.replace(sets[1].loras[0], weight=0.0, text_weight=1.0)
    wanted = [request(), request(lora)]
    alone = [fresh(one) for one in wanted]
    assert not np.array_equal(*alone)
    with Session(ModelSpec(str(tiny_model())), RUNTIME) as session:
        assert same(pictures(session, [*wanted, *wanted]), [*alone, *alone])
