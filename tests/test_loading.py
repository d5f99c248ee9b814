"""Every layout a model comes in gives the same weights, and nothing that does not fit is let through."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from oracle.comparing import pictures_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldmcli.checkpoints.load import load_text_encoders, load_unet, load_vae
from ldmcli.checkpoints.source import open_model
from ldmcli.checkpoints.vae_source import open_vae
from ldmcli.config import ScheduleConfig
from ldmcli.errors import BadDataError
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.sampling.schedule import Schedule
from ldmcli.spec import GenerationRequest

State = dict[str, Tensor]
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of `model_folder` to damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def text_model(pipeline: Pipeline) -> Any:
    """The module of its one text encoder."""
    (encoder,) = pipeline.model.prompts.encoders
    return encoder.model


def parts(pipeline: Pipeline) -> dict[str, nn.Module]:
    return {"unet": pipeline.model.unet, "vae": pipeline.vae, "text_encoder": text_model(pipeline)}


def dense(weight: Tensor) -> Tensor:
    """A weight as it was read, also of a layer that has laid it out for oneDNN."""
    return weight.to_dense() if weight.layout is torch._mkldnn else weight


def assert_same_weights(one: Pipeline, other: Pipeline) -> None:
    """Bit for bit, in every part."""
    others = parts(other)
    for name, part in parts(one).items():
        state, wanted = part.state_dict(), others[name].state_dict()
        assert state.keys() == wanted.keys()
        for key in state:
            assert state[key].dtype == wanted[key].dtype
            assert torch.equal(dense(state[key]), dense(wanted[key])), key


def rewrite(path: Path, change: Callable[[State], State]) -> None:
    state = load_file(path)
    save_file({key: tensor.contiguous() for key, tensor in change(state).items()}, path)


# ---- layouts ----


def test_folder_has_the_weights_that_diffusers_saved(pipeline: Pipeline, random_model: Any) -> None:
    for name, part in parts(pipeline).items():
        wanted = getattr(random_model, name).state_dict()
        if name == "vae":  # which only decodes
            wanted = {k: tensor for k, tensor in wanted.items() if not k.startswith(("encoder.", "quant_conv."))}
        assert part.state_dict().keys() == wanted.keys()
        for key, tensor in part.state_dict().items():
            assert torch.equal(dense(tensor), wanted[key]), key


def test_a_vaes_encoder_is_not_read(model_folder: Path, model_file: Path, tmp_path: Path) -> None:
    """Nobody asks it for anything: neither for its numbers nor for memory."""
    whole = load_file(model_folder / WEIGHTS["vae"])
    of_encoder = [key for key in whole if key.startswith(("encoder.", "quant_conv."))]
    assert len(of_encoder) > 20
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    rewrite(folder / WEIGHTS["vae"], lambda state: state | {key: state[key] * torch.nan for key in of_encoder})
    assert_same_weights(load(folder), load(model_folder))
    for path in (model_folder, model_file):
        assert not any(key.startswith(("encoder.", "quant_conv.")) for key in load(path).vae.state_dict())


def test_our_single_file_is_an_original_checkpoint(model_file: Path, random_model: Any) -> None:
    """diffusers' converter makes the folder's tensors of it: what the next tests load is the layout it claims to be."""
    from diffusers.loaders import single_file_utils as conversion

    state = load_file(model_file)
    for convert, part in (
        (conversion.convert_ldm_unet_checkpoint, random_model.unet),
        (conversion.convert_ldm_vae_checkpoint, random_model.vae),
    ):
        found, wanted = convert(dict(state), part.config), part.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found = conversion.convert_ldm_clip_checkpoint(dict(state))
    wanted = random_model.text_encoder.state_dict()
    assert {key.removeprefix("text_model."): tensor.sum() for key, tensor in found.items()} == {
        key.removeprefix("text_model."): tensor.sum() for key, tensor in wanted.items()
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_single_file_equals_folder(model_folder: Path, model_file: Path, dtype: str) -> None:
    one, other = load(model_file, dtype), load(model_folder, dtype)
    assert_same_weights(one, other)
    request = GenerationRequest("a pear", seed=3, steps=3, width=96, height=72, negative_prompt="fog", sampler="ddim")
    assert (pictures_of(one, [request]) == pictures_of(other, [request])).all()


def test_single_file_dimensions(model_folder: Path, model_file: Path) -> None:
    """Read from shapes alone, they are those that config.json gives; only the picture's usual size is the family's."""
    one, other = open_model(model_file).config, open_model(model_folder).config
    assert one.unet.sample_size == 64
    assert one.text_encoders == other.text_encoders
    assert one.vae == other.vae
    assert one.schedule == dataclasses.replace(other.schedule, variants=())  # a file has no scheduler
    differing = {name for name, value in vars(one.unet).items() if value != getattr(other.unet, name)}
    assert differing == {"sample_size"}


def test_single_file_with_all_that_old_files_carry(model_file: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    extras = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "alphas_cumprod": Schedule(ScheduleConfig()).alphas_cumprod.half(),
        "betas": torch.zeros(1000),
        "sqrt_alphas_cumprod": torch.zeros(1000),
        "posterior_variance": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(1),
    }
    path = tmp_path / "full.safetensors"
    save_file(load_file(model_file) | extras, path)
    assert_same_weights(load(path), pipeline)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_either_kind_of_clip_keys(
    folder: Path, model_file: Path, pipeline: Pipeline, tmp_path: Path, prefix: str
) -> None:
    def change(state: State) -> State:
        return {prefix + key.removeprefix("text_model."): tensor for key, tensor in state.items()}

    rewrite(folder / WEIGHTS["text_encoder"], change)
    assert_same_weights(load(folder), pipeline)
    state = load_file(model_file)
    texts = {key: state.pop(key) for key in list(state) if key.startswith("cond_stage_model.")}
    renamed = {key.replace(".text_model.", f".{prefix}"): tensor for key, tensor in texts.items()}
    save_file(state | renamed, tmp_path / "model.safetensors")
    assert_same_weights(load(tmp_path / "model.safetensors"), pipeline)


def test_folder_with_old_vae_attention(folder: Path, pipeline: Pipeline) -> None:
    """Names from before diffusers 0.18, and matrices that are 1×1 convolutions."""

    def change(state: State) -> State:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        pattern = re.compile(r"(\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
        renamed = {pattern.sub(lambda m: f"{m[1]}{names[m[2]]}.", key): tensor for key, tensor in state.items()}
        assert len(renamed.keys() - state.keys()) == 16
        return {
            key: tensor[:, :, None, None] if ".mid_block.attentions." in key and tensor.ndim == 2 else tensor
            for key, tensor in renamed.items()
        }

    rewrite(folder / WEIGHTS["vae"], change)
    assert_same_weights(load(folder), pipeline)


def test_fp16_variant_is_for_16_bits(folder: Path, pipeline: Pipeline) -> None:
    for name in WEIGHTS.values():
        path = folder / name
        halves = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"))
    assert_same_weights(load(folder), pipeline)
    halved = load(folder, "bf16")
    weight = dense(pipeline.model.unet.conv_in.weight)
    assert torch.equal(halved.model.unet.conv_in.weight, weight.half().bfloat16())
    # One variant for all parts, so that one hash names what was read; on a CPU the text encoder computes in 32 bits.
    weight_32 = text_model(pipeline).final_layer_norm.weight
    assert torch.equal(text_model(halved).final_layer_norm.weight, weight_32.half().float())
    for name in WEIGHTS.values():
        (folder / name).unlink()
    widened = load(folder)
    assert widened.model.unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(widened.model.unet.conv_in.weight, weight.half().float())
    assert torch.equal(text_model(widened).final_layer_norm.weight, weight_32.half().float())


@pytest.mark.parametrize("part", WEIGHTS)
def test_sharded_folder(folder: Path, pipeline: Pipeline, part: str) -> None:
    path = folder / WEIGHTS[part]
    state = load_file(path)
    path.unlink()
    weight_map = {}
    for i in range(3):
        name = f"{path.stem}-{i + 1:05}-of-00003.safetensors"
        shard = {key: state[key] for key in sorted(state)[i::3]}
        save_file(shard, path.with_name(name))
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    path.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(load(folder), pipeline)


# ---- strictness ----


def refusal(path: Path, part: str) -> str:
    """What loading that part says."""
    source = open_model(path)
    loader = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text_encoders}[part]
    with pytest.raises(BadDataError) as caught:
        loader(source, torch.device("cpu"), torch.float32)
    return str(caught.value)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_tensors(folder: Path, part: str) -> None:
    keys = sorted(load_file(folder / WEIGHTS[part]))
    rewrite(folder / WEIGHTS[part], lambda state: {key: state[key] for key in keys[7:]})
    message = refusal(folder, part)
    assert f"model/{part} is not the {part} it should be: it lacks tensors (" in message
    listed = re.search(r"\((.*) and (\d+) more\)", message)
    assert listed is not None
    names = {name.removeprefix("text_model.") for name in listed[1].split(", ")}
    assert len(names) == 5
    assert names <= set(keys[:7])
    assert listed[2] == "2"


def test_more_of_a_network_than_is_built(folder: Path) -> None:
    """Another network, which drawn as this one would draw something else."""
    key = max(load_file(folder / WEIGHTS["unet"]), key=len)
    rewrite(folder / WEIGHTS["unet"], lambda state: state | {f"{key}.{i}\n": torch.zeros(2) for i in range(6)})
    listed = ", ".join(rf"{key}.{i}\n" for i in range(5))
    assert f"it has tensors of no use here ({listed} and 1 more)." in refusal(folder, "unet")


def test_stray_tensors_are_named_and_ignored(
    folder: Path, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    for path in WEIGHTS.values():
        rewrite(folder / path, lambda state: state | {f"extra.{i}\n": torch.zeros(2).int() for i in range(6)})
    assert_same_weights(load(folder), pipeline)
    listed = ", ".join(rf"extra.{i}\n" for i in range(5))
    assert sorted(caplog.messages) == [
        f"{folder}/{part} has tensors that are ignored ({listed} and 1 more)" for part in sorted(WEIGHTS)
    ]


def test_stray_tensors_of_a_single_file(
    model_file: Path, pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(load_file(model_file) | {"trainer.step": torch.tensor(5)}, path)
    assert_same_weights(load(path), pipeline)
    assert caplog.messages == [f"{path} has tensors of no known part, which are ignored (trainer.step)"]


@pytest.mark.parametrize(("part", "dtype"), list(zip(WEIGHTS, [torch.int8, torch.bool, torch.int64], strict=True)))
def test_whole_numbers_are_no_weights(folder: Path, part: str, dtype: torch.dtype) -> None:
    key = next(key for key, tensor in load_file(folder / WEIGHTS[part]).items() if tensor.ndim == 2)
    rewrite(folder / WEIGHTS[part], lambda state: state | {key: state[key].to(dtype)})
    message = refusal(folder, part)
    assert re.search(rf"it has tensors that hold no floating numbers \({re.escape(key)}: \w+\)", message)


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", "weight.absmax", "weight_scale_inv"])
def test_scaled_weights_are_refused_by_name(folder: Path, model_file: Path, tmp_path: Path, scale: str) -> None:
    rewrite(folder / WEIGHTS["unet"], lambda state: state | {f"conv_in.{scale}": torch.ones(1)})
    assert f"whose scales this version does not apply (conv_in.{scale})" in refusal(folder, "unet")
    key = f"model.diffusion_model.out.2.{scale}"
    save_file(load_file(model_file) | {key: torch.ones(1)}, tmp_path / "a.safetensors")
    assert f"whose scales this version does not apply ({key})" in refusal(tmp_path / "a.safetensors", "unet")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64], ids=str)
def test_any_floating_type_is_read(model_file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The usual noise schedule, rounded to that type, is still the usual one."""
    levels = {"alphas_cumprod": Schedule(ScheduleConfig()).alphas_cumprod}
    state = {key: tensor.to(dtype) for key, tensor in (load_file(model_file) | levels).items()}
    save_file(state, tmp_path / "a.safetensors")
    widened = {key: tensor.float() for key, tensor in state.items() if key not in levels}
    save_file(widened, tmp_path / "b.safetensors")
    assert_same_weights(load(tmp_path / "a.safetensors"), load(tmp_path / "b.safetensors"))
    assert open_model(tmp_path / "a.safetensors").config == open_model(model_file).config


def test_a_vae_without_an_encoder_draws(folder: Path, model_file: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    def decoder(state: State, prefix: str = "") -> State:
        beginnings = (f"{prefix}encoder.", f"{prefix}quant_conv.")
        return {key: tensor for key, tensor in state.items() if not key.startswith(beginnings)}

    rewrite(folder / WEIGHTS["vae"], decoder)
    single = tmp_path / "single.safetensors"
    save_file(decoder(load_file(model_file), "first_stage_model."), single)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(folder / WEIGHTS["vae"]), bare)
    for path in (folder, single):
        assert_same_weights(load(path), pipeline)
    config = open_model(model_file).config
    assert open_model(single).config == config
    for path in (single, bare):
        assert open_vae(path, config).config == config.vae
    with pytest.raises(BadDataError, match=r"lacks tensors .*encoder\.conv_in"):
        load_vae(open_model(single), torch.device("cpu"), torch.float32)


def test_misshapen_tensors(folder: Path) -> None:
    def change(state: State) -> State:
        changed = sorted(key for key, tensor in state.items() if tensor.ndim == 1)[:6]
        return state | {key: torch.cat([state[key], torch.zeros(1)]) for key in changed}

    rewrite(folder / WEIGHTS["text_encoder"], change)
    message = refusal(folder, "text_encoder")
    assert re.search(r"tensors of the wrong shape \((\S+: \[(\d+)\] for \[\d+\], ){4}.* and 1 more\)", message)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    def change(state: State) -> State:
        del state["conv_in.bias"]
        return state | {"conv_in.weight": torch.zeros(32, 4, 1, 1), "other": torch.zeros(1)}

    rewrite(folder / WEIGHTS["unet"], change)
    message = refusal(folder, "unet")
    for fault in (
        "it lacks tensors (conv_in.bias)",
        "it has tensors of the wrong shape (conv_in.weight: [32, 4, 1, 1] for [32, 4, 3, 3])",
        "it has tensors of no use here (other)",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "model.diffusion_model.output_blocks.4.1.norm.weight"),
        ("vae", "first_stage_model.decoder.up.1.block.2.conv1.bias"),
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    ],
)
def test_single_file_is_held_to_the_same(model_file: Path, tmp_path: Path, part: str, key: str) -> None:
    path = tmp_path / "model.safetensors"
    state = load_file(model_file)
    missing = {name: tensor for name, tensor in state.items() if name != key}
    save_file(missing, path)
    assert f"{path} is not the {part} it should be: it lacks tensors ({key})." in refusal(path, part)
    save_file(missing | {f"{key}s": state[key]}, path)
    assert f"lacks tensors ({key}); it has tensors of no use here ({key}s)." in refusal(path, part)
    save_file(state | {key: state[key][None]}, path)
    assert f"tensors of the wrong shape ({key}: [1, " in refusal(path, part)


# ---- how modules are built ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dtype_and_memory_format(model_folder: Path, dtype: str) -> None:
    loaded = load(model_folder, dtype)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name, part in parts(loaded).items():
        assert not part.training
        assert {tensor.dtype for tensor in part.parameters()} == {torch.float32 if name == "text_encoder" else wanted}
        for tensor in [*part.parameters(), *part.buffers()]:
            assert tensor.device.type == "cpu", "nothing is left on meta"
            assert not tensor.requires_grad
            assert tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def test_no_weight_is_initialised_only_to_be_overwritten(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: list[str] = []
    calls: list[str] = []

    def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(tensor: Tensor, *args: Any, **settings: Any) -> Any:
            calls.append(name)
            if tensor.device.type != "meta":
                real.append(name)
            return original(tensor, *args, **settings)

        return init

    for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_", "xavier_uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, spy(name, getattr(nn.init, name)))
    load(model_folder)
    assert "kaiming_uniform_" in calls  # the spies were in place
    assert real == []
