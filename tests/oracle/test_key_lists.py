"""Published models at their full size: every tensor has its place, though no weight is ever there.

diffusers builds the modules on the meta device, and what is written of them has a header and a hole for its data: such
files take no room, and all that looks at names and shapes reads them as the real ones.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fork_server import LEAN, quick
from oracle.comparing import relative
from oracle.original_layout import State, original_state
from oracle.random_families import RECIPES, build_parts
from oracle.random_model import SCHEDULER, clip_tokenizer
from torch import Tensor, nn

from ldmcli.checkpoints.files import WeightFile
from ldmcli.checkpoints.load import load_conditioner, load_text_encoders, load_unet, load_vae, on_meta
from ldmcli.checkpoints.source import ModelSource, open_model
from ldmcli.conditioning.pairs import added_vector
from ldmcli.config import TextEncoderConfig, UNetConfig
from ldmcli.networks.unet import UNet

GB = 10**9
NAMES = ("sd2-v", "sdxl", "refiner")
FAMILIES = {
    "sd2-v": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "refiner": "Stable Diffusion XL refiner",
}
UNETS = {
    "sd2-v": UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, sample_size=96),
    "sdxl": UNetConfig(
        sample_size=128,
        block_channels=(320, 640, 1280),
        attention=(0, 2, 10),
        middle_attention=10,
        heads=(5, 10, 20),
        context_dim=2048,
        linear_projection=True,
        pooled_dim=1280,
        added_numbers=6,
    ),
    "refiner": UNetConfig(
        sample_size=128,
        block_channels=(384, 768, 1536, 1536),
        attention=(0, 4, 4, 0),
        middle_attention=4,
        heads=(6, 12, 24, 24),
        context_dim=1280,
        linear_projection=True,
        pooled_dim=1280,
        added_numbers=5,
    ),
}
_VIT_H = TextEncoderConfig(hidden_size=1024, intermediate_size=4096, layers=23, heads=16, activation="gelu")
_CLIP_L = TextEncoderConfig(skipped_layers=1, final_norm=False)
_BIG_G = TextEncoderConfig(
    part="text_encoder_2",
    hidden_size=1280,
    intermediate_size=5120,
    layers=32,
    heads=20,
    activation="gelu",
    skipped_layers=1,
    final_norm=False,
    projection_dim=1280,
)
TEXTS = {"sd2-v": (_VIT_H,), "sdxl": (_CLIP_L, _BIG_G), "refiner": (_BIG_G,)}
# What the published files have, in millions of numbers: the U-Net, the VAE, and the text encoders.
MILLIONS = {"sd2-v": (865.91, 83.65, 340.39), "sdxl": (2567.46, 83.65, 817.72), "refiner": (2259.53, 83.65, 694.66)}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(name: str) -> dict[str, Any]:
    """diffusers' and transformers' modules in full size, on the meta device."""
    with torch.device("meta"):
        return build_parts(name, small=False)


@pytest.fixture(scope="module")
def folder(name: str, parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of it, without data."""
    path = tmp_path_factory.mktemp("full") / name
    for part, module in parts.items():
        is_text = part.startswith("text_encoder")
        (path / part).mkdir(parents=True)
        if is_text:
            module.config.save_pretrained(path / part)
            clip_tokenizer(pad_token="!").save_pretrained(path / part.replace("text_encoder", "tokenizer"))
        else:
            module.save_config(path / part)
        stem = "model" if is_text else "diffusion_pytorch_model"
        write_hollow(path / part / f"{stem}.safetensors", module.state_dict())
    recipe = RECIPES[name]
    classes = {part: [type(module).__module__.split(".")[0], type(module).__name__] for part, module in parts.items()}
    index = {"_class_name": recipe.pipeline, **classes, "scheduler": ["diffusers", recipe.scheduler[0]]}
    flags = {key: value for key, value in recipe.extras.items() if isinstance(value, bool)}
    (path / "model_index.json").write_text(json.dumps(index | flags))
    (path / "scheduler").mkdir()
    schedule = {"_class_name": recipe.scheduler[0], **SCHEDULER, **recipe.scheduler[1]}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return path


@pytest.fixture(scope="module")
def file(name: str, parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file in the original layout, without data."""
    return write_hollow(tmp_path_factory.mktemp("full") / f"{name}.safetensors", original_state(parts))


def write_hollow(path: Path, state: State) -> Path:
    """A safetensors file of these shapes in 16 bits, whose data are a hole. Skips where the disk would fill it."""
    header, end = {}, 0
    for key, tensor in state.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        out.truncate(8 + len(raw) + end)
    if path.stat().st_blocks * 512 > 64 << 20:
        path.unlink()
        pytest.skip("no sparse files here")
    return path


def shapes(state: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state}


def loaded(source: ModelSource) -> dict[str, nn.Module]:
    """The parts of a model without data, loaded as any other but for the reading itself."""

    def read_shapes(file: WeightFile, keys: Iterable[str], *_: Any) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            yield key, torch.empty(file.tensors[key].shape, device="meta")

    cpu = torch.device("cpu")
    with mock.patch("ldmcli.checkpoints.load.read_tensors", read_shapes):
        texts = load_text_encoders(source, cpu, torch.float32)
        modules: dict[str, Any] = {
            text.part: e.model for text, e in zip(source.config.text_encoders, texts, strict=True)
        }
        if source.config.conditioner:
            modules[source.config.conditioner.part] = load_conditioner(source, cpu, torch.float32)
        return modules | {
            part: load(source, cpu, torch.float32) for part, load in (("unet", load_unet), ("vae", load_vae))
        }


# ---- keys and shapes ----


def test_the_parts_have_their_published_size(name: str, parts: dict[str, Any]) -> None:
    counts = {part: sum(weight.numel() for weight in module.parameters()) / 1e6 for part, module in parts.items()}
    texts = sum(count for part, count in counts.items() if part.startswith("text_encoder"))
    assert (counts["unet"], counts["vae"], texts) == pytest.approx(MILLIONS[name], abs=0.01)


def test_the_unet_is_diffusers_unet(name: str, parts: dict[str, Any]) -> None:
    unet = on_meta(lambda: UNet(UNETS[name]))
    assert shapes(unet.state_dict().items()) == shapes(parts["unet"].state_dict().items())


def test_folder(name: str, parts: dict[str, Any], folder: Path) -> None:
    source = open_model(folder)
    assert source.config.family == FAMILIES[name]
    assert source.config.unet == UNETS[name]
    assert [described(text) for text in source.config.text_encoders] == [described(text) for text in TEXTS[name]]
    assert source.config.schedule.prediction_type == ("v_prediction" if name == "sd2-v" else "epsilon")
    assert source.config.zero_empty_negative == (name == "sdxl")
    assert source.config.default_size == {"sd2-v": 768}.get(name, 1024)
    modules = loaded(source)
    assert set(modules) == set(parts)
    for part, module in modules.items():
        wanted = shapes(parts[part].state_dict().items())
        assert shapes(module.state_dict().items()) == {key.removeprefix("text_model."): wanted[key] for key in wanted}


def test_single_file(name: str, parts: dict[str, Any], folder: Path, file: Path) -> None:
    """Shapes alone tell what a folder's config.json does; nothing lacks, nothing is left over."""
    source, told = open_model(file).config, open_model(folder).config
    assert source.family == told.family
    assert [field for field, value in vars(source.unet).items() if value != getattr(told.unet, field)] == (
        ["sample_size"] if name == "sd2-v" else []  # which goes with the prediction type, and that shapes do not tell
    )
    assert source.vae == told.vae
    assert source.default_size == (512 if name == "sd2-v" else 1024)
    for ours, theirs in zip(source.text_encoders, told.text_encoders, strict=True):
        for field in ("part", "hidden_size", "heads", "intermediate_size", "final_norm"):
            assert getattr(ours, field) == getattr(theirs, field)
        assert ours.layers - ours.skipped_layers == theirs.layers - theirs.skipped_layers
    modules = loaded(open_model(file))
    for part in ("unet", "vae"):
        assert shapes(modules[part].state_dict().items()) == shapes(parts[part].state_dict().items())


@pytest.mark.parametrize("name", ["sd2-v"], indirect=True)
def test_version_2_file_without_its_unread_layer(parts: dict[str, Any], tmp_path: Path) -> None:
    """As converters write it from a folder, which has 23 of the 24 layers: the last is the one to read."""
    state = {key: tensor for key, tensor in original_state(parts).items() if ".resblocks.23." not in key}
    (text,) = open_model(write_hollow(tmp_path / "model.safetensors", state)).config.text_encoders
    assert (text.layers, text.skipped_layers, text.final_norm) == (23, 0, True)


def described(text: TextEncoderConfig) -> dict[str, Any]:
    """What of it shapes the network: not which mark ends a prompt."""
    return {field: value for field, value in vars(text).items() if field not in ("bos_token_id", "eos_token_id")}


# ---- ldm info ----


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_info(name: str, layout: str, request: pytest.FixtureRequest) -> None:
    """Names the family, prediction type and parts of gigabytes in a moment, without torch."""
    path: Path = request.getfixturevalue(layout)
    done = quick("info", "--json", path)
    assert done.seconds < 10, "seconds of CPU time, of which it takes 0.1"
    assert done.peak < LEAN
    (facts,) = done.records
    assert facts["family"] == FAMILIES[name]
    undecided = name == "sd2-v" and layout == "file"
    assert (facts["prediction_type"] in ("epsilon", "v_prediction")) == (not undecided)
    assert set(facts["parts"]) == {"unet", "vae", *(text.part for text in TEXTS[name])}
    unet, vae, _ = (count * 1e6 for count in MILLIONS[name])
    assert facts["parts"]["unet"]["parameters"] == pytest.approx(unet, abs=1e4)
    assert facts["parts"]["vae"]["parameters"] == pytest.approx(vae, abs=1e4)


# ---- numbers ----


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    # Some processors run half a thousand million bf16 operations a second: hence so few latents.
    ("dtype", "side", "tolerance"),
    [(torch.bfloat16, 16, 0.05), (torch.float32, 32, 1e-5)],
    ids=["bf16", "fp32"],
)
def test_full_size_sdxl_unet_equals_diffusers(dtype: torch.dtype, side: int, tolerance: float) -> None:
    """One forward of both programs, one after the other, with the very same weights."""
    require_free_memory(14 * GB)
    ours = on_meta(lambda: UNet(UNETS["sdxl"]))
    generator = torch.Generator().manual_seed(0)
    state = {key: random_weight(key, weight, dtype, generator) for key, weight in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    shapes_of_inputs = ((1, 4, side, side), (1, 77, 2048), (1, 1280))
    latents, context, pooled = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes_of_inputs)
    numbers = torch.tensor([[1024.0, 768.0, 0.0, 16.0, 512.0, 512.0]])
    with torch.inference_mode():
        time = ours.embed_time(torch.tensor([500.0])) + ours.add_embedding(added_vector(pooled, numbers, ours.config))
        found = ours(latents, time, ours.project_context(context))
        with torch.device("meta"):
            theirs = build_parts("sdxl", small=False)["unet"].eval()
        theirs.load_state_dict(state, assign=True)
        added = {"text_embeds": pooled, "time_ids": numbers.to(dtype)}
        wanted = theirs(latents, 500, context, added_cond_kwargs=added).sample
    assert found.isfinite().all()
    assert found.shape == latents.shape
    error = relative(found, wanted)
    print(f"{dtype}: {error:.2e} apart, spread {wanted.float().std():.2f}")
    assert wanted.float().std() > 0.2
    assert error < tolerance


def require_free_memory(wanted: int) -> None:
    """Skip the test where the machine has less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    if available < wanted:
        pytest.skip(f"needs {wanted / GB:.0f} GB of free memory, has {available / GB:.0f}")


def random_weight(key: str, meta: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A weight that keeps a signal's size, made in the precision it is kept in."""
    noise = torch.empty(meta.shape, dtype=dtype).normal_(generator=generator)
    if meta.ndim > 1:
        return noise.div_(meta[0].numel() ** 0.5)
    return noise.mul_(0.1).add_(float(key.endswith("weight")))
