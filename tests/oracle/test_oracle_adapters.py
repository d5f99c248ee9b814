"""Adapters against those who write them: LyCORIS' own layers, PEFT's own files, and diffusers' pipelines."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import Networks, flat, layers, noise, small_networks, state, unequal, write
from conftest import open_session
from oracle.comparing import pixels_apart, relative
from oracle.family_models import draw_theirs
from oracle.random_families import random_family
from oracle.random_model import random_pipeline
from torch import Tensor, nn

from ldmcli.adapters.adapter import open_adapter
from ldmcli.adapters.embeddings import open_embedding
from ldmcli.adapters.merging import Merger, Use
from ldmcli.checkpoints.load import load_text_encoders, load_unet
from ldmcli.checkpoints.source import open_model
from ldmcli.config import TextEncoderConfig
from ldmcli.errors import BadDataError
from ldmcli.spec import GenerationRequest, LoRA

pytest.importorskip("peft", reason="make test installs it")
lycoris = pytest.importorskip("lycoris.modules", reason="make test installs it")

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # [256, 32]
CONV = "up_blocks.0.resnets.0.conv1"  # [64, 128, 3, 3]
NORM = "down_blocks.0.resnets.0.norm1"


@pytest.fixture(scope="module")
def networks(one_thread: None) -> Networks:
    """Small networks, which every test gives back as they were."""
    return small_networks()


def randomised(module: nn.Module) -> nn.Module:
    """A LyCORIS layer as if trained; the base's weights, which it refers to, stay."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
            if name.endswith("dora_scale"):
                weight.mul_(1.3)
    return module.eval()


# ---- LyCORIS ----

LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA": ("LoConModule", LINEAR, {"lora_dim": 4, "alpha": 3.0}),
    "rsLoRA": ("LoConModule", LINEAR, {"lora_dim": 4, "alpha": 3.0, "rs_lora": True}),
    "LoCon": ("LoConModule", CONV, {"lora_dim": 4, "alpha": 3.0}),
    "LoCon in Tucker's form": ("LoConModule", CONV, {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    "LoHa": ("LohaModule", LINEAR, {"lora_dim": 4, "alpha": 3.0}),
    "LoHa of a convolution": ("LohaModule", CONV, {"lora_dim": 4, "alpha": 3.0}),
    "LoHa in Tucker's form": ("LohaModule", CONV, {"lora_dim": 4, "alpha": 3.0, "use_tucker": True}),
    "LoKr": ("LokrModule", LINEAR, {"lora_dim": 2, "alpha": 3.0, "factor": 8}),
    "LoKr of two low ranks": ("LokrModule", LINEAR, {"lora_dim": 1, "alpha": 3.0, "factor": 8, "decompose_both": True}),
    "LoKr of whole matrices": ("LokrModule", LINEAR, {"lora_dim": 100000, "alpha": 3.0, "factor": 8}),
    "LoKr of a convolution": ("LokrModule", CONV, {"lora_dim": 2, "alpha": 3.0, "factor": 8}),
    "LoKr in Tucker's form": ("LokrModule", CONV, {"lora_dim": 2, "alpha": 3.0, "factor": 8, "use_tucker": True}),
    "GLoRA": ("GLoRAModule", LINEAR, {"lora_dim": 4, "alpha": 3}),
    "GLoRA of a convolution": ("GLoRAModule", CONV, {"lora_dim": 4, "alpha": 3.0}),
    "IA3": ("IA3Module", LINEAR, {}),
    "IA3 of inputs": ("IA3Module", CONV, {"train_on_input": True}),
    "OFT": ("DiagOFTModule", LINEAR, {"lora_dim": 8}),
    "OFT, constrained": ("DiagOFTModule", CONV, {"lora_dim": 8, "constraint": 0.01}),
    "OFT, rescaled": ("DiagOFTModule", CONV, {"lora_dim": 8, "rescaled": True}),
    "BOFT": ("ButterflyOFTModule", LINEAR, {"lora_dim": 8}),
    "BOFT, rescaled": ("ButterflyOFTModule", CONV, {"lora_dim": 8, "rescaled": True}),
    "DoRA of rows": ("LoConModule", CONV, {"lora_dim": 4, "alpha": 3.0, "weight_decompose": True}),
    "DoRA of columns": (
        "LoConModule",
        CONV,
        {"lora_dim": 4, "alpha": 3.0, "weight_decompose": True, "wd_on_out": False},
    ),
    "DoRA of LoHa": ("LohaModule", LINEAR, {"lora_dim": 4, "weight_decompose": True, "wd_on_out": False}),
    "DoRA of LoKr": ("LokrModule", LINEAR, {"lora_dim": 2, "factor": 8, "weight_decompose": True}),
    "a norm": ("NormModule", NORM, {}),
}
# Strengths other than 1 mean the same there.
LINEAR_IN_STRENGTH = ("LoRA", "LoCon in Tucker's form", "LoHa", "LoKr", "GLoRA", "IA3", "OFT", "a norm")


@pytest.mark.parametrize(
    ("case", "strength"), [*((case, 1.0) for case in LYCORIS), *((case, 0.5) for case in LINEAR_IN_STRENGTH)]
)
def test_a_layer_computes_as_lycoris_does(case: str, strength: float, networks: Networks, tmp_path: Path) -> None:
    kind, layer, settings = LYCORIS[case]
    module = networks["unet"].get_submodule(layer)
    theirs = randomised(getattr(lycoris, kind)("layer", module, strength, **settings))
    inputs = {LINEAR: (2, 5, 32), CONV: (2, 128, 6, 6), NORM: (2, 32, 6, 6)}[layer]
    x = noise(*inputs, seed=5, scale=1.0)
    theirs.org_forward = module.forward
    with torch.no_grad():
        wanted, plain = theirs(x), module(x)
    assert relative(plain, wanted) > 1e-2
    saved = {key: tensor.detach().clone() for key, tensor in theirs.state_dict().items()}
    file = write(tmp_path / "a.safetensors", {f"lora_unet_{flat(layer)}.{key}": t for key, t in saved.items()})
    merger = Merger(networks, "small")
    merger.merge([Use(open_adapter(file), strength)])
    found = module(x)
    merger.restore()
    assert relative(found, wanted) < 1e-5
    assert torch.equal(module(x), plain)


# ---- PEFT's own files ----

PEFT: dict[str, Callable[[Any], Any]] = {
    "LoRA": lambda peft: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"]),
    "patterns": lambda peft: peft.LoraConfig(
        r=4, target_modules=["to_q", "to_k"], rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn1.to_q": 3}
    ),
    "rsLoRA": lambda peft: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"]),
    "DoRA": lambda peft: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv1", "proj_in"]),
    "biases": lambda peft: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["ff.net.2"]),
    "LoHa": lambda peft: peft.LoHaConfig(r=4, alpha=6, target_modules=["to_q", "conv1"]),
    "LoKr": lambda peft: peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"]),
    "LoKr of whole matrices": lambda peft: peft.LoKrConfig(r=64, alpha=6, target_modules=["to_q"]),
}


@pytest.mark.parametrize("case", PEFT)
def test_what_peft_saves_is_merged_as_it_merges(case: str, tmp_path: Path, one_thread: None) -> None:
    import peft

    ours, base = small_networks(), small_networks()["unet"]
    model = peft.get_peft_model(base, PEFT[case](peft))
    randomised(model.base_model)
    with torch.no_grad():  # what the adapter does not train is as it was
        for name, weight in ours["unet"].named_parameters():
            theirs = dict(model.base_model.model.named_parameters())
            theirs.get(name, theirs.get(_wrapped(name), weight)).copy_(weight)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    before = state(ours)
    Merger(ours, "small").merge([Use(open_adapter(tmp_path / "adapter"))])
    changed = 0
    for name, weight in merged.state_dict().items():
        assert relative(ours["unet"].get_parameter(name), weight) < 1e-5, name
        changed += not torch.equal(before[f"unet.{name}"], weight)
    assert changed >= 2


def _wrapped(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


# ---- diffusers ----


def kohya_state(pipeline: Any, rank: int = 4, *, conv: bool = False) -> dict[str, Tensor]:
    """A LoRA of a pipeline's attention and text layers as sd-scripts writes it, with `conv` of convolutions too."""
    names = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    if getattr(pipeline, "text_encoder_2", None) is None:
        names["text_encoder"] = "lora_te"
    found: dict[str, Tensor] = {}
    for part, prefix in names.items():
        for number, (name, module) in enumerate(layers(getattr(pipeline, part, None) or nn.Module()).items()):
            attending = ".attentions." in name or ".layers." in name
            if not attending and not (conv and ("resnets" in name or "samplers" in name)):
                continue
            shape = module.weight.shape
            bare = name.removeprefix("text_model.")
            text = "" if part == "unet" else "text_model_"
            key = f"{prefix}_{text}{flat(bare)}"
            found[f"{key}.lora_up.weight"] = noise(shape[0], rank, *[1] * (len(shape) - 2), seed=number)
            found[f"{key}.lora_down.weight"] = noise(rank, *shape[1:], seed=1000 + number)
            found[f"{key}.alpha"] = torch.tensor(2.0)
    return found


def our_networks(path: Path) -> tuple[Networks, str]:
    """A model's networks as they are loaded, and its family."""
    source = open_model(path)
    cpu = torch.device("cpu")
    texts = zip(source.config.text_encoders, load_text_encoders(source, cpu, torch.float32), strict=True)
    networks: Networks = {"unet": load_unet(source, cpu, torch.float32)}
    return networks | {text.part: encoder.model for text, encoder in texts}, source.config.family


MODELS: dict[str, Callable[[], Any]] = {
    "sd1": random_pipeline,
    "sd2": lambda: random_family("sd2"),
    "sdxl": lambda: random_family("sdxl"),
}


@pytest.mark.parametrize(("name", "conv"), [("sd1", False), ("sd1", True), ("sd2", False), ("sdxl", False)])
def test_a_kohya_file_becomes_the_weights_that_diffusers_fuses(
    name: str, conv: bool, tmp_path: Path, one_thread: None
) -> None:
    pipeline = MODELS[name]()
    pipeline.save_pretrained(tmp_path / "model")
    file = write(tmp_path / "lora.safetensors", kohya_state(pipeline, conv=conv))
    parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, part, None) is not None]
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(parts, lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours, family = our_networks(tmp_path / "model")
    before = state(ours)
    Merger(ours, family).merge([Use(open_adapter(file), 0.7, 0.7)])
    after = state(ours)
    for part in parts:
        changed = 0
        for key, weight in getattr(pipeline, part).state_dict().items():
            path = f"{part}.{key.removeprefix('text_model.')}"
            assert relative(after[path], weight) < 1e-5, path
            changed += not torch.equal(before[path], after[path])
        assert changed > 10, part


@pytest.mark.parametrize("name", ["sd2", "sdxl", "refiner"])
def test_a_single_file_takes_the_same_as_its_folder(name: str, family_models: Any, tmp_path: Path) -> None:
    """OpenCLIP's files hold queries, keys and values as one."""
    file = write(tmp_path / "lora.safetensors", kohya_state(family_models.diffusers(name)))
    found = []
    for layout in ("folder", "file"):
        networks, family = our_networks(family_models.path(name, layout))
        before = state(networks)
        merger = Merger(networks, family)
        merger.merge([Use(open_adapter(file))])
        found.append(state(networks))
        merger.restore()
        assert not unequal(before, state(networks))
        assert len(unequal(before, found[-1])) > 40
    folder, single = found
    assert not unequal(folder, {key: single[key] for key in folder})


def test_what_diffusers_saves_has_its_scale_in_the_metadata(tmp_path: Path, one_thread: None) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = random_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], alpha_pattern={"attn2.to_q": 3})
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in pipeline.unet.named_parameters():
            if ".lora_" in key:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora",
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet)),
        **_collate_lora_metadata({"unet": pipeline.unet}),
    )
    pipeline.fuse_lora(["unet"])
    pipeline.unload_lora_weights()
    ours, family = our_networks(tmp_path / "model")
    before = state(ours)
    Merger(ours, family).merge([Use(open_adapter(tmp_path / "lora"))])
    for key, weight in pipeline.unet.state_dict().items():
        assert relative(ours["unet"].get_parameter(key), weight) < 1e-5, key
    assert len(unequal(before, state(ours))) > 30


WEIGHTS = (-1.0, 0.0, 0.5, 1.0, 2.0)


@pytest.mark.parametrize("name", MODELS)
def test_pictures_are_diffusers(name: str, tmp_path: Path, one_thread: None) -> None:
    """Of one LoRA at all weights, and of two in either order, drawn by one session."""
    pipeline = MODELS[name]()
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    state = kohya_state(pipeline)
    halved = {key: tensor / 2 if "lora_up" in key else tensor for key, tensor in state.items()}
    queries = {key: tensor for key, tensor in state.items() if "attn1_to_q" in key}
    files = [write(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((halved, queries))]
    chosen = [[(0, weight)] for weight in WEIGHTS] + [[(0, 0.5), (1, -0.7)], [(1, -0.7), (0, 0.5)]]
    usual: dict[str, Any] = {"seed": 3, "steps": 2, "sampler": "ddim", "guidance_scale": 5.0, "width": 64, "height": 64}
    wanted = [
        GenerationRequest("a red apple", loras=tuple(LoRA(str(files[i]), w, w) for i, w in uses), **usual)
        for uses in chosen
    ]
    with open_session(tmp_path / "model") as session:
        ours = [picture.pixels() for picture in session.draw(wanted)]
    parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, part, None) is not None]
    base = {part: copy.deepcopy(getattr(pipeline, part).state_dict()) for part in parts}
    for uses, request, found in zip(chosen, wanted, ours, strict=True):
        for i, weight in uses:  # one after the other: a second one beside the first has diffusers lose the text encoder
            pipeline.load_lora_weights(str(files[i]))
            pipeline.fuse_lora(parts if i == 0 else ["unet"], lora_scale=weight)
            pipeline.unload_lora_weights()
        theirs = draw_theirs(pipeline, [request])[1][0]
        assert pixels_apart(found, theirs) <= 1, uses
        for part in parts:
            getattr(pipeline, part).load_state_dict(base[part])
    assert len({found.tobytes() for found in ours}) >= len(WEIGHTS) + 1
    assert pixels_apart(ours[-1], ours[-2]) <= 1


def test_a_lora_goes_to_the_base_or_to_the_refiner(family_models: Any, tmp_path: Path, caplog: Any) -> None:
    """Whichever it was trained for, without a word on the other; one for neither is refused."""
    base, refiner = (kohya_state(family_models.diffusers(name)) for name in ("sdxl", "refiner"))
    files = [write(tmp_path / f"{n}.safetensors", state) for n, state in enumerate((base, refiner))]
    usual: dict[str, Any] = {"seed": 3, "steps": 4, "width": 32, "height": 32, "refiner_start": 0.5}
    with open_session(family_models.path("sdxl"), refiner=str(family_models.path("refiner"))) as session:
        for chosen in ((), (0,), (1,), (0, 1)):
            request = GenerationRequest("a fox", loras=tuple(LoRA(str(files[i])) for i in chosen), **usual)
            (picture,) = session.draw([request])
            picture.pixels()
            assert session._drawer is not None
            merged = [model.merger for model in session._drawer.pipeline.models]
            assert [bool(merger and merger.uses) for merger in merged] == [0 in chosen, 1 in chosen]
    assert not [record for record in caplog.records if record.name.startswith("ldmcli.adapters")]
    with open_session(family_models.path("sdxl")) as session, pytest.raises(BadDataError, match="the model is Stable"):
        session.fit(GenerationRequest("a fox", loras=(LoRA(str(files[1])),)))


# ---- embeddings ----


def test_diffusers_puts_the_same_vectors_into_its_table(tmp_path: Path, one_thread: None) -> None:
    pipeline = random_pipeline()
    vectors = noise(3, 64)
    encoder = TextEncoderConfig(hidden_size=64)
    for word, content in {"<one>": {"<cat>": vectors}, "<two>": {"emb_params": vectors[:1]}}.items():
        file = write(tmp_path / f"{len(content)}.safetensors", content)
        pipeline.load_textual_inversion(str(file), token=word)
        embedding = open_embedding(file)
        embedding.check([encoder], "small")
        found = embedding.of_part(encoder.part)
        ids = pipeline.tokenizer.convert_tokens_to_ids([word, f"{word}_1", f"{word}_2"][: len(found)])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], found)
