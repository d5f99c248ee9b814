"""Adapters opened, described and merged: nothing is dropped in silence, and the base comes back bit for bit."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import DIALECTS, Networks, noise, small_networks, state, unequal, write
from torch import Tensor

from ldmcli.adapters.adapter import Adapter, open_adapter
from ldmcli.adapters.facts import base_family, facts
from ldmcli.adapters.merging import Merger, Use
from ldmcli.errors import BadDataError

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
Q_PROJ = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CONV_IN = "lora_unet_conv_in"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def networks(one_thread: None) -> Networks:
    """Small networks, which every test gives back as they were."""
    return small_networks()


def pair(name: str, out: int = 32, into: int = 32, rank: int = 4, seed: int = 1) -> State:
    """A LoRA of one linear layer."""
    return {
        f"{name}.lora_up.weight": noise(out, rank, seed=seed),
        f"{name}.lora_down.weight": noise(rank, into, seed=7),
    }


def everything(networks: Networks, seed: int = 1, dialect: int = 0) -> State:
    """A LoRA of all layers."""
    found = {}
    for key, (part, name) in DIALECTS[dialect].keys(networks).items():
        shape = networks[part].get_parameter(f"{name}.weight").shape
        if key.endswith(DIALECTS[dialect].up):
            found[key] = noise(shape[0], 2, *[1] * (len(shape) - 2), seed=seed)
        elif key.endswith(DIALECTS[dialect].down):
            found[key] = noise(2, *shape[1:], seed=seed + 1)
        else:
            found[key] = torch.tensor(1.0)
    return found


def opened(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Adapter:
    return open_adapter(write(path / "adapter.safetensors", tensors, metadata))


# ---- merging ----


@pytest.mark.parametrize("dialect", range(len(DIALECTS)), ids=lambda i: DIALECTS[i].name.replace(" ", "-"))
def test_the_same_lora_in_every_dialect_is_the_same(dialect: int, networks: Networks, tmp_path: Path) -> None:
    before = state(networks)
    merger = Merger(networks, "small")
    merger.merge([Use(opened(tmp_path, everything(networks, dialect=dialect)))])
    after = state(networks)
    merger.restore()
    assert not unequal(before, state(networks))
    keys = DIALECTS[dialect].keys(networks).values()
    assert unequal(before, after) == {f"{part}.{name}.weight" for part, name in keys}
    scale = 1.0 if DIALECTS[dialect].alpha is None else 0.5
    for part, name in keys:
        weight = before[f"{part}.{name}.weight"]
        up = noise(weight.shape[0], 2, seed=1)
        down = noise(2, *weight.shape[1:], seed=2)
        wanted = weight + scale * (up @ down.flatten(1)).reshape(weight.shape)
        assert torch.allclose(after[f"{part}.{name}.weight"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_set_replaces_the_first_and_none_is_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    networks = small_networks(dtype)
    first = Use(open_adapter(write(tmp_path / "1.safetensors", everything(networks))), 0.7)
    second = Use(open_adapter(write(tmp_path / "2.safetensors", pair(TO_Q, seed=3) | pair(Q_PROJ, seed=4))), -1.0)
    base = state(networks)
    merger = Merger(networks, "small")
    merger.merge([second])
    alone = state(networks)
    merger.merge([first])
    merger.merge([first, second])
    merger.merge([second])
    assert not unequal(alone, state(networks))
    merger.merge([])
    assert not unequal(base, state(networks))
    assert len(unequal(base, alone)) == 2


def test_weight_0_is_the_base_bit_for_bit(networks: Networks, tmp_path: Path) -> None:
    base = state(networks)
    adapter = opened(tmp_path, everything(networks))
    merger = Merger(networks, "small")
    merger.merge([Use(adapter, 0.0, 0.0)])
    assert not unequal(base, state(networks))
    merger.merge([Use(adapter, 1.0, 0.0)])
    assert {key.partition(".")[0] for key in unequal(base, state(networks))} == {"unet"}
    merger.merge([Use(adapter, 0.0, 1.0)])
    assert {key.partition(".")[0] for key in unequal(base, state(networks))} == {"text_encoder"}
    merger.restore()
    assert not unequal(base, state(networks))


def test_loras_add_up_in_any_order(networks: Networks, tmp_path: Path) -> None:
    first = Use(open_adapter(write(tmp_path / "1.safetensors", pair(TO_Q))), 0.5)
    second = Use(open_adapter(write(tmp_path / "2.safetensors", pair(TO_Q, seed=3))), 2.0)
    base = state(networks)
    merger = Merger(networks, "small")
    found = []
    for uses in ([first, second], [second, first], [first], [second]):
        merger.merge(uses)
        found.append(state(networks)["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"])
    merger.restore()
    weight = base["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[0] - weight, (found[2] - weight) + (found[3] - weight), rtol=1e-4, atol=1e-5)


def test_only_what_changes_is_copied(networks: Networks, tmp_path: Path) -> None:
    merger = Merger(networks, "small")
    merger.merge([Use(opened(tmp_path, pair(TO_Q) | pair(Q_PROJ)))])
    copies = [copy for kept in merger._base.values() for copy in kept.values()]
    assert sum(copy.nbytes for copy in copies) == 2 * 32 * 32 * 4
    merger.merge([])
    assert not merger._base


def test_an_inpainting_model_takes_what_4_channels_were_trained(tmp_path: Path) -> None:
    """What the adapter does not know of stays as it is."""
    networks = small_networks(in_channels=9)
    before = state(networks)["unet.conv_in.weight"]
    factors = {f"{CONV_IN}.lora_up.weight": noise(32, 2, 1, 1), f"{CONV_IN}.lora_down.weight": noise(2, 4, 3, 3)}
    Merger(networks, "small").merge([Use(opened(tmp_path, factors))])
    after = state(networks)["unet.conv_in.weight"]
    wanted = (
        factors[f"{CONV_IN}.lora_up.weight"].flatten(1) @ factors[f"{CONV_IN}.lora_down.weight"].flatten(1)
    ).reshape(32, 4, 3, 3)
    assert torch.allclose(after[:, :4] - before[:, :4], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[:, 4:], before[:, 4:])


def test_numbers_that_the_weights_cannot_hold_leave_the_base(tmp_path: Path) -> None:
    networks = small_networks(torch.float16)
    base = state(networks)
    adapter = opened(tmp_path, pair(Q_PROJ) | pair(TO_Q))
    with pytest.raises(BadDataError, match=r"more than float16 can hold; use a smaller weight"):
        Merger(networks, "small").merge([Use(adapter, 1.0), Use(adapter, 1e6)])
    assert not unequal(base, state(networks))


# ---- what fits, and what does not ----


def test_some_that_do_not_fit_are_one_warning(
    networks: Networks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = [f"lora_unet_down_blocks_7_attentions_{i}_proj_in" for i in range(4)]
    tensors = pair(TO_Q) | {key: tensor for name in strange for key, tensor in pair(name).items()}
    adapter = opened(tmp_path, tensors | {"oddity": noise(3), "spare.alpha": torch.tensor(1.0)})
    merger = Merger(networks, "small")
    with caplog.at_level(logging.WARNING, "ldmcli"):
        merger.merge([Use(adapter)])
        merger.merge([Use(adapter, 2.0)])
    merger.restore()
    (record,) = caplog.records
    told = record.getMessage()
    assert "6 of its 7 modules and other keys have no place in this model and are left out" in told
    assert ", ".join(strange[:3]) + " and 3 more" in told


@pytest.mark.parametrize(
    ("key", "family"),
    [
        (f"{TO_K.replace('0', '9')}", "Stable Diffusion XL"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("lora_te2_text_model_encoder_layers_40_mlp_fc1", "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux"),
        ("something", "a model of another kind"),
    ],
)
def test_none_that_fits_names_the_family(key: str, family: str, networks: Networks, tmp_path: Path) -> None:
    adapter = opened(tmp_path, pair(key, into=2048))
    with pytest.raises(BadDataError, match=f"is for {family}: none of the 1 modules it changes is in this tiny model"):
        Merger(networks, "tiny").merge([Use(adapter)])


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "Stable Diffusion XL")],
)
def test_a_lora_of_another_width_names_both_families(
    width: int, family: str, networks: Networks, tmp_path: Path
) -> None:
    base = state(networks)
    adapter = opened(tmp_path, pair(TO_Q) | pair(TO_K, into=width))
    assert base_family(adapter) == family
    with pytest.raises(BadDataError, match=f"is for {family} and does not fit this tiny model"):
        Merger(networks, "tiny").merge([Use(adapter)])
    assert not unequal(base, state(networks))


def test_an_unknown_kind_of_a_known_module_is_refused_by_name(networks: Networks, tmp_path: Path) -> None:
    for key in (
        "q_layer.weight",
        "vera_lambda_b",
        "bias_values",
        "reshape_weight",
        "set_weight",
        "weight",
        "oft_R.weight",
        "ia3_l",
    ):
        adapter = opened(tmp_path, pair(Q_PROJ) | {f"{TO_Q}.{key}": noise(4)})
        with pytest.raises(BadDataError, match=f"in a way that this version does not know .*{key}”"):
            Merger(networks, "small").merge([Use(adapter)])


def test_two_names_of_one_module_are_refused(networks: Networks, tmp_path: Path) -> None:
    twice = pair(TO_Q) | pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    with pytest.raises(BadDataError, match=r"changes unet\.down_blocks\S+to_q twice"):
        Merger(networks, "small").merge([Use(opened(tmp_path, twice))])


# ---- hostile files ----


def without(tensors: State, end: str) -> State:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


LORA = pair(TO_Q)
HADA = {
    f"{TO_Q}.hada_w{half}_{side}": noise(*shape) for half in "12" for side, shape in (("a", (32, 4)), ("b", (4, 32)))
}
BROKEN: dict[str, tuple[State, str]] = {
    "no partner": (without(LORA, "lora_up.weight"), "holds down for “.*”, which make up no adapter"),
    "no partner of LoHa": (without(HADA, "hada_w2_b"), "holds hada_w1_a, hada_w1_b, hada_w2_a for"),
    "no second half of LoKr": ({f"{TO_Q}.lokr_w1": noise(4, 4)}, "holds lokr_w1 for"),
    "two kinds at once": (LORA | {f"{TO_Q}.diff": noise(32, 32)}, "holds diff, down, up for"),
    "rank 0": (LORA | {f"{TO_Q}.lora_down.weight": noise(0, 32), f"{TO_Q}.lora_up.weight": noise(32, 0)}, "no numbers"),
    "no size": (LORA | {f"{TO_Q}.lora_down.weight": noise(4, 0)}, "with no numbers"),
    "ranks that differ": (LORA | {f"{TO_Q}.lora_down.weight": noise(5, 32)}, "down .5, 32."),
    "another width": (LORA | {f"{TO_Q}.lora_down.weight": noise(4, 33)}, "down .4, 33."),
    "transposed": (
        LORA | {f"{TO_Q}.lora_down.weight": noise(32, 4), f"{TO_Q}.lora_up.weight": noise(4, 32)},
        "does not fit",
    ),
    "many dimensions": (LORA | {f"{TO_Q}.lora_down.weight": noise(4, *[1] * 20, 32)[..., :3]}, "does not fit"),
    "one number": (LORA | {f"{TO_Q}.lora_down.weight": torch.tensor(1.0)}, "as one number, not as a matrix"),
    "whole numbers": (LORA | {f"{TO_Q}.lora_down.weight": torch.ones(4, 32, dtype=torch.int8)}, "not as floating"),
    "many alphas": (LORA | {f"{TO_Q}.alpha": noise(4)}, "alpha” as .4., not as one number"),
    "alpha NaN": (LORA | {f"{TO_Q}.alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
    "NaN": (LORA | {f"{TO_Q}.lora_down.weight": torch.full((4, 32), float("nan"))}, "NaN or infinity"),
    "infinity": (LORA | {f"{TO_Q}.alpha": torch.tensor(float("inf"))}, "NaN or infinity"),
    "magnitudes of another width": (LORA | {f"{TO_Q}.dora_scale": noise(1, 31)}, "31 magnitudes for 32 columns"),
    "rotations of another size": ({f"{TO_Q}.oft_blocks": noise(5, 7, 7)}, "does not fit"),
    "rotations that are not square": ({f"{TO_Q}.oft_blocks": noise(4, 8, 7)}, "does not fit"),
    "sets without end": ({f"{TO_Q}.oft_blocks": noise(90, 4, 8, 8)}, "does not fit"),
    "IA3 of neither": ({f"{TO_Q}.weight": noise(5), f"{TO_Q}.on_input": torch.tensor(0)}, "5 numbers for 32 rows"),
    "a scale of what has none": ({f"{TO_Q}.diff": noise(32, 32), f"{TO_Q}.scale": torch.tensor(2.0)}, "no adapter of"),
    "IA3 of the other axis": (
        {
            f"{TO_Q.replace('attn1_to_q', 'ff_net_0_proj')}.weight": noise(32),
            f"{TO_Q.replace('attn1_to_q', 'ff_net_0_proj')}.on_input": torch.tensor(0),
        },
        "32 numbers for 256 rows",
    ),
    "a bias where there is none": ({f"{TO_Q}.diff_b": noise(32)}, "has no bias"),
    "a small file for a large memory": (
        {f"{TO_Q}.lora_down.weight": noise(1, 500_000), f"{TO_Q}.lora_up.weight": noise(500_000, 1)},
        "a change of 250000000000 numbers",
    ),
    "a Kronecker product for a large memory": (
        {f"{TO_Q}.lokr_w1": noise(1000, 1000), f"{TO_Q}.lokr_w2": noise(1000, 1000)},
        "a change of 1000000000000 numbers",
    ),
    "a core for a large memory": (
        LORA | {f"{TO_Q}.lora_mid.weight": noise(4, 4, 500, 500)},
        "a change of 256000000 numbers",
    ),
    "a Kronecker product of another size": (
        {f"{TO_Q}.lokr_w1": noise(3, 3), f"{TO_Q}.lokr_w2": noise(9, 9)},
        "not fit",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_one_sentence(name: str, networks: Networks, tmp_path: Path) -> None:
    tensors, words = BROKEN[name]
    base = state(networks)
    with pytest.raises(BadDataError, match=words) as caught:
        Merger(networks, "small").merge([Use(opened(tmp_path, tensors))])
    assert caught.value.exit_code == 65
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not unequal(base, state(networks))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": noise(4, 4)}, "U-Net only .* not a LoRA"),
        ({"emb_params": noise(1, 768)}, "is a textual-inversion embedding, not a LoRA"),
        ({"image_proj.x": noise(1), "ip_adapter.y": noise(1)}, "is an IP-Adapter, not a LoRA"),
        ({"something": noise(1)}, "has no LoRA or other adapter in it"),
        ({"unet:0:up": noise(2, 2), "unet:0:down": noise(2, 2)}, "is a LoRA of cloneofsimo's lora, whose layers"),
    ],
)
def test_what_is_no_adapter_is_named(tensors: State, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=words):
        opened(tmp_path, tensors)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=r"is a folder without adapter_model\.safetensors"):
        open_adapter(tmp_path)


# ---- configurations beside the factors ----


def peft_folder(path: Path, tensors: State, **config: Any) -> Path:
    path.mkdir()
    write(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return path


def peft_pair(name: str) -> State:
    return {
        f"base_model.model.{name}.lora_A.weight": noise(4, 32, seed=2),
        f"base_model.model.{name}.lora_B.weight": noise(32, 4, seed=3),
    }


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"attn1.to_k": 2}}, (2.0, 0.5)),
        ({"alpha_pattern": {"to_q": 1.0, "^other.to_k": 3}}, (0.25, 2.0)),
    ],
)
def test_a_peft_folder_scales_as_its_configuration_says(
    config: dict[str, Any], scales: tuple[float, float], networks: Networks, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "a", peft_pair(f"{ATTENTION}.to_q") | peft_pair(f"{ATTENTION}.to_k"), **config)
    before = state(networks)
    merger = Merger(networks, "small")
    merger.merge([Use(open_adapter(folder))])
    after = state(networks)
    merger.restore()
    for name, scale in zip(("to_q", "to_k"), scales, strict=True):
        key = f"unet.{ATTENTION}.{name}.weight"
        wanted = before[key] + scale * noise(32, 4, seed=3) @ noise(4, 32, seed=2)
        assert torch.allclose(after[key], wanted, rtol=1e-5, atol=1e-6)


def test_folders_of_parts_are_told_apart(networks: Networks, tmp_path: Path) -> None:
    """A text encoder's PEFT folder names its layers as another text encoder's would."""
    whole = {**networks, "text_encoder_2": small_networks(seed=5)["text_encoder"]}
    before = state(whole)
    (tmp_path / "a").mkdir()
    peft_folder(tmp_path / "a" / "unet", peft_pair(f"{ATTENTION}.to_q"))
    peft_folder(tmp_path / "a" / "text_encoder_2", peft_pair("text_model.encoder.layers.1.self_attn.q_proj"))
    merger = Merger(whole, "small")
    merger.merge([Use(open_adapter(tmp_path / "a"))])
    after = state(whole)
    merger.restore()
    text = "text_encoder_2.encoder.layers.1.self_attn.q_proj.weight"
    assert unequal(before, after) == {f"unet.{ATTENTION}.to_q.weight", text}
    for path in (tmp_path / "a" / "text_encoder_2", tmp_path / "a" / "text_encoder_2" / "adapter_model.safetensors"):
        merger.merge([Use(open_adapter(path))])
        assert unequal(before, state(whole)) == {text}
        merger.restore()


def test_diffusers_writes_the_same_into_the_metadata(networks: Networks, tmp_path: Path) -> None:
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}, "text_encoder.lora_alpha": 1}
    tensors = {
        f"unet.{ATTENTION}.{name}.lora_{side}.weight": noise(*shape, seed=2 + (side == "B"))
        for name in ("to_q", "to_k")
        for side, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    adapter = opened(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert [change.scale for change in adapter.changes.values()] == [0.5, 2.0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "many"}, "lora_alpha is 'many', not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern is 'x', not a number above 0"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .1., not a table"),
        ({"use_rslora": 1}, "use_rslora is 1, not true or false"),
    ],
)
def test_a_damaged_configuration(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", peft_pair(f"{ATTENTION}.to_q"), **config)
    with pytest.raises(BadDataError, match=words):
        open_adapter(folder)


# ---- what can be said of one ----


def test_facts(tmp_path: Path) -> None:
    metadata = {
        "ss_tag_frequency": json.dumps({"10_cat": {"a cat": 12, "grass": 3}, "5_more": {"a cat": 2, "sofa": 4}}),
        "ss_output_name": "cats",
    }
    tensors = pair(TO_Q) | pair(TO_K, into=768, rank=8) | pair(Q_PROJ, rank=8) | {f"{TO_Q}.dora_scale": noise(1, 32)}
    adapter = opened(tmp_path, tensors | {"bundle_emb.meow.string_to_param.*": noise(2, 768)}, metadata)
    assert facts(adapter) == {
        "kinds": {"LoRA": 2, "LoRA with DoRA": 1},
        "rank": 8,
        "family": "Stable Diffusion 1.x",
        "trigger_words": ["a cat", "sofa", "grass"],
        "embeddings": ["meow"],
        "metadata": metadata,
    }


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "cat , dog,"}, ["cat", "dog"]),
        ({"ss_tag_frequency": "{broken"}, []),
        ({"ss_tag_frequency": json.dumps({"a": [1], "b": {"c": "x"}})}, []),
        ({}, []),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: list[str], tmp_path: Path) -> None:
    assert facts(opened(tmp_path, pair(TO_Q), metadata))["trigger_words"] == words


@pytest.mark.parametrize(
    ("made", "kind", "rank"),
    [
        (
            lambda: {f"{CONV_IN}.lora_up.weight": noise(32, 2, 1, 1), f"{CONV_IN}.lora_down.weight": noise(2, 4, 3, 3)},
            "LoCon",
            2,
        ),
        (lambda: HADA, "LoHa", 4),
        (lambda: {f"{TO_Q}.lokr_w1": noise(4, 4), f"{TO_Q}.lokr_w2": noise(8, 8)}, "LoKr", None),
        (lambda: {f"{TO_Q}.oft_blocks": noise(3, 4, 8, 8)}, "BOFT", None),
        (lambda: {f"{TO_Q}.oft_blocks": noise(4, 8, 8)}, "OFT", None),
        (lambda: {f"{TO_Q}.oft_diag": noise(4, 8, 8)}, "OFT", None),
        (lambda: {f"{TO_Q}.weight": noise(32), f"{TO_Q}.on_input": torch.tensor(0)}, "IA3", None),
    ],
)
def test_kinds_are_named(made: Callable[[], State], kind: str, rank: int | None, tmp_path: Path) -> None:
    found = facts(opened(tmp_path, made()))
    assert (found["kinds"], found["rank"]) == ({kind: 1}, rank)


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sd_v1"}, "Stable Diffusion 1.x"),
        ({"ss_base_model_version": "wan2.1"}, "wan2.1"),
        ({}, None),
    ],
)
def test_metadata_tells_the_family_where_shapes_do_not(
    metadata: dict[str, str], family: str | None, tmp_path: Path
) -> None:
    assert base_family(opened(tmp_path, pair(TO_Q), metadata)) == family


def test_a_file_is_described_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter.safetensors", pair(TO_Q))
    program = (
        "import sys, pathlib; from ldmcli.adapters.adapter import open_adapter\n"
        "from ldmcli.adapters.facts import facts\n"
        "print(facts(open_adapter(pathlib.Path(sys.argv[1])))['rank'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "False"], done.stderr
