"""The text transformer gives the numbers of transformers' CLIP and of open_clip's tower, with the same weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from oracle.original_layout import State, openclip_state
from oracle.random_model import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from ldmcli.checkpoints.files import open_weights
from ldmcli.checkpoints.load import fill, on_meta
from ldmcli.checkpoints.source import PartSource
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError
from ldmcli.networks.clip import TextTransformer

BOS, EOS = 49406, 49407
THEIRS, OPEN_CLIPS = 1e-6, 5e-6  # open_clip's attention rounds otherwise
_SMALL = TextEncoderConfig(hidden_size=128, intermediate_size=512, layers=4, heads=2)
# Shaped as the families' text encoders, with heads as wide as theirs, and as the embedded model's.
CONFIGS = {
    "sd1": _SMALL,
    "sd2": dataclasses.replace(_SMALL, activation="gelu", eos_token_id=2),
    "sdxl": dataclasses.replace(_SMALL, activation="gelu", projection_dim=96, final_norm=False, skipped_layers=1),
    "sdxl as published": dataclasses.replace(
        _SMALL, activation="gelu", projection_dim=128, final_norm=False, skipped_layers=1, eos_token_id=2
    ),
    "embedded": dataclasses.replace(
        _SMALL, vocab_size=758, layers=3, heads=4, max_length=24, bos_token_id=756, eos_token_id=757
    ),
    "others": dataclasses.replace(_SMALL, activation="gelu_new", norm_eps=1e-3, layers=3, intermediate_size=200),
    "others still": dataclasses.replace(_SMALL, activation="gelu_pytorch_tanh", layers=3, projection_dim=7),
}


def random_transformer(config: TextEncoderConfig) -> TextTransformer:
    model = TextTransformer(config)
    randomise(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def rows(config: TextEncoderConfig, *, padding: int | None = None) -> Tensor:
    """Prompts of no, some and all the tokens there is room for, and one with an end mark of its own."""
    bos, eos = (BOS, EOS) if config.vocab_size > EOS else (config.bos_token_id, config.eos_token_id)
    generator, room = torch.Generator().manual_seed(1), config.max_length - 2
    found = []
    for count in (0, 7, room):
        words = torch.randint(1, bos, (count,), generator=generator).tolist()
        found.append([bos, *words, eos, *[eos if padding is None else padding] * (room - count)])
    found.append([bos, *found[2][1:5], eos, *found[2][1 : room - 4], eos])
    return torch.tensor(found)


def their_clip(model: TextTransformer) -> Any:
    """transformers' model of the same dimensions, with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = model.config
    settings = CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_length,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
        bos_token_id=0,
        eos_token_id=config.eos_token_id,
        projection_dim=config.projection_dim or 512,
    )
    theirs = (CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel)(settings)
    bare = {key.removeprefix("text_model."): key for key in theirs.state_dict()}
    theirs.load_state_dict({bare[key]: tensor for key, tensor in model.state_dict().items()})
    return theirs.requires_grad_(False).eval()


@torch.inference_mode()
def assert_same(model: TextTransformer, ids: Tensor, hidden: Any, norm: nn.Module, pooled: Any, limit: float) -> None:
    """For every layer that can be asked for, normed or not."""
    ours = copy.copy(model)
    skipped = model.config.skipped_layers
    for clip_skip in (1, 2, 3):
        for final_norm in (True, False):
            ours.config = dataclasses.replace(model.config, final_norm=final_norm)
            states, projected = ours(ids, clip_skip=clip_skip)
            wanted = hidden[-clip_skip - skipped]
            assert relative(states, norm(wanted) if final_norm else wanted) < limit
            assert torch.equal(ours(ids, clip_skip=clip_skip, pooled=False)[0], states)
            assert (projected is None) == (model.config.projection_dim is None)
            if projected is not None:
                assert relative(projected, pooled) < limit


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers(name: str, padding: int | None, one_thread: None) -> None:
    model = random_transformer(CONFIGS[name])
    theirs, ids = their_clip(model), rows(model.config, padding=padding)
    with torch.inference_mode():
        out = theirs(input_ids=ids, output_hidden_states=True)
    norm = (theirs.text_model if model.config.projection_dim else theirs).final_layer_norm
    pooled = out.text_embeds if model.config.projection_dim else None
    assert_same(model, ids, out.hidden_states, norm, pooled, THEIRS)


@pytest.mark.parametrize(("eos", "place"), [(EOS, 4), (2, 2)])
def test_where_a_prompt_ends(eos: int, place: int, one_thread: None) -> None:
    """With tokens of its own beyond CLIP's, a model's highest token ends nothing, unless its end mark is given as 2."""
    config = dataclasses.replace(CONFIGS["sdxl"], vocab_size=49410, eos_token_id=eos)
    model = random_transformer(config)
    ids = torch.tensor([[BOS, 320, 49409, 2368, EOS, *[EOS] * 72]])
    assert model.end_marks(ids).tolist() == [place]
    with torch.inference_mode():
        assert relative(model(ids)[1], their_clip(model)(input_ids=ids).text_embeds) < THEIRS


# ---- OpenCLIP's layout ----


def loaded(path: Path, config: TextEncoderConfig, state: State) -> TextTransformer:
    """What is read of a file in OpenCLIP's layout."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    part = PartSource("text_encoder", path, dataclasses.replace(config, layout="openclip"), (open_weights(path),))
    return fill(on_meta(lambda: TextTransformer(config)), part, torch.device("cpu"), torch.float32)


def tower_state(model: TextTransformer) -> State:
    return {key: tensor for key, tensor in openclip_state(model.state_dict()).items() if key != "logit_scale"}


@pytest.mark.parametrize("projection_dim", [None, 96, 128])
def test_open_clip(projection_dim: int | None, tmp_path: Path, one_thread: None) -> None:
    from open_clip.transformer import TextTransformer as Tower

    config = dataclasses.replace(CONFIGS["sdxl"], projection_dim=projection_dim)
    torch.manual_seed(0)
    theirs: Any = Tower(
        context_length=config.max_length,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=config.projection_dim,
    )
    randomise(theirs, torch.Generator().manual_seed(0))
    model = loaded(tmp_path / "tower.safetensors", config, theirs.requires_grad_(False).eval().state_dict())
    ids = rows(config, padding=0)
    with torch.inference_mode():
        hidden = [theirs.token_embedding(ids) + theirs.positional_embedding]
        for block in theirs.transformer.resblocks:
            hidden.append(block(hidden[-1], attn_mask=theirs.attn_mask))
        pooled = theirs(ids) if projection_dim else None
    assert_same(model, ids, hidden, theirs.ln_final, pooled, OPEN_CLIPS)


def test_open_clips_keys_hold_every_weight_once(tmp_path: Path) -> None:
    """Bit for bit what the layout's tensors were made of, and no byte more is held."""
    wanted = random_transformer(CONFIGS["sdxl"]).state_dict()
    model = loaded(tmp_path / "tower.safetensors", CONFIGS["sdxl"], tower_state(random_transformer(CONFIGS["sdxl"])))
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found.values()}
    assert sum(held.values()) == sum(tensor.nbytes for tensor in wanted.values())


def test_open_clips_keys_are_held_to_the_same(tmp_path: Path) -> None:
    """What does not fit is told in the file's own words, and once."""
    state = tower_state(random_transformer(CONFIGS["sdxl"]))
    first, second = (f"transformer.resblocks.{number}.attn.in_proj_weight" for number in (0, 1))
    del state[first]
    state |= {second: state[second][:-1], "text_projection": state["text_projection"].T, "more": torch.zeros(1)}
    with pytest.raises(BadDataError) as caught:
        loaded(tmp_path / "tower.safetensors", CONFIGS["sdxl"], state)
    assert str(caught.value).endswith(
        f"tower.safetensors is not the text_encoder it should be: it lacks tensors ({first}); it has "
        f"tensors of the wrong shape ({second}: [383, 128] for [384, 128], text_projection: [96, 128] for [128, 96]); "
        "it has tensors of no use here (more)."
    )


def test_a_projection_of_four_dimensions(tmp_path: Path) -> None:
    """1×1 convolutions are read as the matrices they are; the one that lies the other way round is no exception."""
    model = random_transformer(CONFIGS["sdxl"])
    state = tower_state(model)
    state["text_projection"] = state["text_projection"][:, :, None, None]
    found = loaded(tmp_path / "tower.safetensors", CONFIGS["sdxl"], state)
    assert torch.equal(found.text_projection.weight, model.text_projection.weight)
