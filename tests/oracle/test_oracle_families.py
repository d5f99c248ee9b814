"""Stable Diffusion 2, SDXL, its refiner, and distilled models give diffusers' numbers, from every layout they come in.

Parts agree to 1e-5 relative in float32, whole runs to 1e-4 after every step.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load
from oracle.comparing import decoded, draw, fitted, pictures_of, pixels_apart, relative
from oracle.family_models import FamilyModels, draw_theirs, their_negative, their_prompts
from oracle.original_layout import original_state, write
from oracle.random_families import RECIPES, build_parts

from ldmcli.checkpoints.families import LCM_DEFAULTS
from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import open_model
from ldmcli.conditioning.pairs import added_vector, pairs
from ldmcli.config import VAEConfig
from ldmcli.errors import BadDataError
from ldmcli.networks.inputs import Conditioning
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.session.loading import probed_prediction_type
from ldmcli.spec import GenerationRequest

PARTS, RUNS = 1e-5, 1e-4
PROMPTS = ["a red apple on a blue background", "", "naïve 猫 🎉 " * 60]
NEGATIVES = ["blurry, a dog", "a rose", "fog " * 90]
LAYOUTS = [(name, layout) for name in ("sd2", "sdxl", "refiner") for layout in ("folder", "file")]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def request(prompt: str = PROMPTS[0], **settings: Any) -> GenerationRequest:
    """Ten guided steps of DDIM for a picture of 96×96, or what is given."""
    usual = {"seed": 3, "steps": 10, "sampler": "ddim", "guidance_scale": 5.0, "width": 96, "height": 96}
    return GenerationRequest(prompt, **{**usual, **settings})


def added_to_time(reference: Any) -> dict[str, torch.Tensor] | None:
    """A pooled prompt and sizes, where the U-Net takes them."""
    if reference.unet.config.addition_embed_type is None:
        return None
    numbers = [[768.0, 1024.0, 16.0, 0.0, 512.0, 640.0], [640.0, 512.0, 0.0, 8.0, 1024.0, 768.0]]
    count = 5 if reference.config.get("requires_aesthetics_score") else 6
    width = reference.text_encoder_2.config.projection_dim
    return {"text_embeds": normal(2, width, seed=2), "time_ids": torch.tensor(numbers)[:, :count]}


def their_noise(reference: Any, latents: torch.Tensor, timestep: int, context: torch.Tensor, **more: Any) -> Any:
    settings = {"added_cond_kwargs": added_to_time(reference)} | more
    with torch.inference_mode():
        return reference.unet(latents, timestep, context, **settings).sample


def guidance_waves(reference: Any, scale: float) -> torch.Tensor | None:
    width = reference.unet.config.time_cond_proj_dim
    return reference.get_guidance_scale_embedding(torch.tensor([scale - 1] * 2), width) if width else None


def inputs(reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    size, width = reference.unet.config.sample_size, reference.unet.config.cross_attention_dim
    return normal(2, 4, size, size), normal(2, 77, width, seed=4)


def assert_same(ours: Pipeline, theirs: Any, requests: list[GenerationRequest], refiner: Any = None) -> None:
    """Same latents after every step and same pixels, but for rounding."""
    latents, pixels = draw(ours, requests)
    their_latents, their_pixels = draw_theirs(theirs, requests, refiner)
    assert len(latents) == len(their_latents) == requests[0].steps
    errors = [relative(a, b) for a, b in zip(latents, their_latents, strict=True)]
    assert max(errors) < RUNS, f"worst after step {errors.index(max(errors)) + 1}: {errors}"
    assert pixels_apart(pixels, their_pixels) <= 1
    assert their_pixels.std() > 10  # a picture, not a flat colour


# ---- the oracle itself ----


@pytest.mark.parametrize("name", ["sd2", "sdxl", "refiner"])
def test_our_single_files_are_original_checkpoints(family_models: FamilyModels, name: str) -> None:
    """diffusers' converters make the folder's tensors of them: what is loaded below is the layout it claims to be."""
    from diffusers.loaders import single_file_utils as conversion

    parts = family_models.parts(name)
    state = original_state(parts)
    found = {
        "unet": conversion.convert_ldm_unet_checkpoint(dict(state), parts["unet"].config),
        "vae": conversion.convert_ldm_vae_checkpoint(dict(state), parts["vae"].config),
    }
    openclip = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
    prefix = openclip.get(name, "conditioner.embedders.0.model.")
    last = "text_encoder" if name == "sd2" else "text_encoder_2"
    found[last] = conversion.convert_open_clip_checkpoint(parts[last], dict(state), prefix=prefix)
    if name == "sdxl":
        clip = "conditioner.embedders.0.transformer."
        found["text_encoder"] = conversion.convert_ldm_clip_checkpoint(dict(state), remove_prefix=clip)
    assert set(found) == set(parts)
    for part, module in parts.items():
        converted = {key.removeprefix("text_model."): tensor for key, tensor in found[part].items()}
        for key, wanted in module.state_dict().items():
            assert torch.equal(converted[key.removeprefix("text_model.")], wanted), key


@pytest.mark.parametrize("name", ["sd2", "sdxl", "refiner", "lcm"])
def test_every_input_matters(family_models: FamilyModels, name: str) -> None:
    reference = family_models.diffusers(name)
    latents, context = inputs(reference)
    waves = {"timestep_cond": guidance_waves(reference, 8.0)}
    noise = their_noise(reference, latents, 500, context, **waves)
    others = {
        "context": their_noise(reference, latents, 500, context.flip(0), **waves),
        "time": their_noise(reference, latents, 520, context, **waves),
    }
    added = added_to_time(reference)
    for key in added or ():
        changed = {**(added or {}), key: (added or {})[key].flip(0)}
        others[key] = their_noise(reference, latents, 500, context, added_cond_kwargs=changed)
    if name == "lcm":
        other_scale = {"timestep_cond": guidance_waves(reference, 5.0)}
        others["guidance"] = their_noise(reference, latents, 500, context, **other_scale)
    assert 0.7 < noise.std() < 1.5
    assert {key: True for key in others} == {key: bool((other - noise).std() > 0.05) for key, other in others.items()}


# ---- parts ----


def whole_vae(model: Path) -> torch.nn.Module:
    """A model's VAE with its encoder, which a pipeline does without."""
    return load_vae(open_model(model), torch.device("cpu"), torch.float32)


def assert_decodes_alike(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """The weights for decoding, and no others."""
    wanted = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("encoder.", "quant_conv."))}
    found = ours.state_dict()
    assert found.keys() == wanted.keys() != theirs.state_dict().keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("name", "layout"), [*LAYOUTS, ("lcm", "folder"), ("lcm", "file"), ("sdxl", "crowded"), ("sd2", "crowded")]
)
def test_unet_and_vae_have_the_weights(family_models: FamilyModels, name: str, layout: str) -> None:
    ours, parts = family_models.ours(name, layout), family_models.parts(name)
    for part, module in (("unet", ours.model.unet), ("vae", whole_vae(family_models.path(name, layout)))):
        found, wanted = module.state_dict(), parts[part].state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), part
    assert_decodes_alike(ours.vae, parts["vae"])


@pytest.mark.parametrize("layout", ["sharded", "fp16"])
def test_other_folders_have_the_weights(family_models: FamilyModels, layout: str) -> None:
    ours, parts = family_models.ours("sdxl", layout), family_models.parts("sdxl")
    modules = {"unet": ours.model.unet, "vae": whole_vae(family_models.path("sdxl", layout))}
    names = ("text_encoder", "text_encoder_2")
    modules |= {name: text.model for name, text in zip(names, ours.model.prompts.encoders, strict=True)}
    for part, module in modules.items():
        found, theirs = module.state_dict(), parts[part].state_dict()
        wanted = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()}
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor.half().float() if layout == "fp16" else tensor), key


def pooled_in(conditioning: Conditioning, like: torch.Tensor) -> torch.Tensor:
    """The pooled prompt in what is added to the time embedding: before the sizes."""
    assert conditioning.vector is not None
    return conditioning.vector[0, : like.shape[-1]]


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_prompts(family_models: FamilyModels, name: str, layout: str, clip_skip: int) -> None:
    reference, ours = family_models.diffusers(name), family_models.ours(name, layout)
    requests = [
        request(prompt, negative_prompt=negative, clip_skip=clip_skip)
        for prompt, negative in zip(PROMPTS, NEGATIVES, strict=True)
    ]
    context, pooled = their_prompts(reference, PROMPTS, clip_skip)
    negative, negative_pooled = their_prompts(reference, NEGATIVES, clip_skip)
    found = pairs(ours.model.config, ours.model.prompts, fitted(ours, requests))
    for i, (ours_negative, ours_positive) in enumerate(found):
        assert relative(ours_positive.context[0], context[i]) < PARTS
        assert relative(ours_negative.context[0], negative[i]) < PARTS
        if pooled is not None and negative_pooled is not None:
            assert relative(pooled_in(ours_positive, pooled), pooled[i]) < PARTS
            assert relative(pooled_in(ours_negative, negative_pooled), negative_pooled[i]) < PARTS


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_prompts_without_a_negative(family_models: FamilyModels, name: str, layout: str) -> None:
    """SDXL's empty negative prompt is zeros; the others' is the encoded empty text."""
    reference, ours = family_models.diffusers(name), family_models.ours(name, layout)
    negative, pooled = their_negative(reference)
    ((found, _),) = pairs(ours.model.config, ours.model.prompts, fitted(ours, [request()]))
    if name == "sdxl":
        assert not found.context.any()
        assert not negative.any()
        assert pooled is not None
        assert not pooled_in(found, pooled).any()
    else:
        assert relative(found.context, negative) < PARTS
        if pooled is not None:
            assert relative(pooled_in(found, pooled), pooled[0]) < PARTS


@pytest.mark.parametrize("timestep", [1, 999])
@pytest.mark.parametrize(("name", "layout"), [*LAYOUTS, ("lcm", "folder"), ("lcm", "file")])
def test_unet(family_models: FamilyModels, name: str, layout: str, timestep: int) -> None:
    reference, unet = family_models.diffusers(name), family_models.ours(name, layout).model.unet
    latents, context = inputs(reference)
    added = added_to_time(reference)
    theirs = their_noise(reference, latents, timestep, context, timestep_cond=guidance_waves(reference, 8.5))
    with torch.inference_mode():
        time = unet.embed_time(torch.tensor([float(timestep)]), 8.5)
        if added:
            time = time + unet.add_embedding(added_vector(added["text_embeds"], added["time_ids"], unet.config))
        assert relative(unet(latents, time, unet.project_context(context)), theirs) < PARTS


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_vae_decodes(family_models: FamilyModels, name: str, layout: str) -> None:
    """Scaled by each family's own factor."""
    vae, latents = family_models.diffusers(name).vae, normal(1, 4, 9, 8)
    with torch.inference_mode():
        theirs = vae.decode(latents / vae.config.scaling_factor).sample
    assert relative(decoded(family_models.ours(name, layout), latents), theirs) < PARTS


# ---- whole runs ----

OFF, ON = {"guidance_scale": 1.0}, {"guidance_scale": 7.5, "negative_prompt": "a dog"}
RUN_CASES = [
    ("sd2", "folder", "ddim", OFF),
    ("sd2", "folder", "ddim", ON),
    ("sd2", "file", "ddim", ON),
    ("sd2-v", "folder", "ddim", ON),
    ("sd2-v", "file", "ddim", ON),
    ("sd2-zero-snr", "folder", "ddim", ON),
    ("sdxl", "folder", "ddim", ON),
    ("sdxl", "folder", "euler", OFF),
    ("sdxl", "folder", "euler", ON),
    ("sdxl", "file", "euler", ON),
    ("sdxl-zero-snr", "folder", "euler", ON),
]


@pytest.mark.parametrize(("name", "layout", "sampler", "settings"), RUN_CASES)
def test_trajectory(
    family_models: FamilyModels, name: str, layout: str, sampler: str, settings: dict[str, Any]
) -> None:
    ours, theirs = family_models.ours(name, layout), family_models.diffusers(name)
    side = 64 if name.startswith("sdxl") else 96  # 2×2 at the coarsest level
    assert_same(ours, theirs, [request(sampler=sampler, width=side, height=side, **settings)])


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_trajectory_without_a_negative_prompt(family_models: FamilyModels, name: str) -> None:
    prompts = ("a rose", "a whale, 猫 🎉 " * 30)
    requests = [request(prompt, seed=seed, steps=5) for seed, prompt in enumerate(prompts)]
    assert_same(family_models.ours(name), family_models.diffusers(name), requests)


@pytest.mark.parametrize("name", ["sd2-v", "sdxl"])
def test_other_settings_together(family_models: FamilyModels, name: str) -> None:
    common: dict[str, Any] = {"width": 72, "height": 120, "steps": 3, "eta": 1.0, "guidance_rescale": 0.7}
    texts = zip(PROMPTS[1:], NEGATIVES[1:], strict=True)
    requests = [request(prompt, negative_prompt=negative, seed=9, **common) for prompt, negative in texts]
    assert_same(family_models.ours(name), family_models.diffusers(name), requests)


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_what_sdxl_is_told_of_the_picture(family_models: FamilyModels, layout: str) -> None:
    sizes = {"original_width": 1024, "original_height": 512, "crop_left": 40, "crop_top": 7}
    told = request(sampler="euler", steps=5, negative_prompt="a dog", width=72, height=64, **sizes)
    assert_same(family_models.ours("sdxl", layout), family_models.diffusers("sdxl"), [told])


@pytest.mark.parametrize(
    ("sampler", "layout", "steps"), [("euler", "folder", 10), ("euler", "file", 5), ("ddim", "folder", 5)]
)
def test_refiner_takes_over(family_models: FamilyModels, sampler: str, layout: str, steps: int) -> None:
    """As diffusers' denoising_end and denoising_start do: the same noise schedule, walked on by another model."""
    ours = family_models.ours("sdxl", layout, refiner="refiner")
    told: dict[str, Any] = {"negative_prompt": "a dog", "original_width": 640, "crop_top": 9}
    asked = request(sampler=sampler, steps=steps, refiner_start=0.8, **told)
    assert_same(ours, family_models.diffusers("sdxl"), [asked], family_models.diffusers("refiner"))


def test_refiner_without_a_negative_prompt(family_models: FamilyModels) -> None:
    ours = family_models.ours("sdxl", refiner="refiner")
    requests = [request(p, seed=i, sampler="euler", steps=5, refiner_start=0.6) for i, p in enumerate(PROMPTS[1:])]
    assert_same(ours, family_models.diffusers("sdxl"), requests, family_models.diffusers("refiner"))


@pytest.mark.parametrize("steps", [1, 4])
def test_turbo(family_models: FamilyModels, steps: int) -> None:
    """Its folder names the sampler and the spacing; guidance is off."""
    ours = family_models.ours("turbo")
    assert ours.config.defaults.sampler == "euler-a"
    assert_same(ours, family_models.diffusers("turbo"), [request(sampler="euler-a", steps=steps, guidance_scale=1.0)])


@pytest.mark.parametrize("guidance_scale", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency_model(family_models: FamilyModels, steps: int, guidance_scale: float) -> None:
    """It reads the guidance scale; nothing is pushed, so one pass a step."""
    ours = family_models.ours("lcm")
    assert ours.config.defaults.sampler == "lcm"
    requests = [
        request(prompt, seed=i, sampler="lcm", steps=steps, guidance_scale=guidance_scale)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert_same(ours, family_models.diffusers("lcm"), requests)


def test_pictures_do_not_depend_on_their_neighbours(family_models: FamilyModels) -> None:
    """Not even where some have a negative prompt and others, with zeros in its place, have none."""
    ours = family_models.ours("sdxl")
    requests = [request("a pear", seed=i, steps=2, negative_prompt=n) for i, n in enumerate(("", "fog", ""))]
    together = pictures_of(ours, requests)
    alone = [pictures_of(ours, [asked]) for asked in requests]
    assert pixels_apart(together, np.concatenate(alone)) <= 1


def test_version_2_file_without_the_projection(family_models: FamilyModels, tmp_path: Path) -> None:
    """As converters write it from a folder: what nothing reads is not there."""
    state = original_state(family_models.parts("sd2"))
    unread = [f"cond_stage_model.model.{key}" for key in ("text_projection", "logit_scale")]
    kept = {key: tensor for key, tensor in state.items() if key not in unread}
    assert len(kept) == len(state) - 2
    ours = load(write(kept, tmp_path / "model.safetensors"))
    context, _ = their_prompts(family_models.diffusers("sd2"), PROMPTS)
    found = pairs(ours.model.config, ours.model.prompts, fitted(ours, [request(prompt) for prompt in PROMPTS]))
    assert relative(torch.cat([positive.context for _, positive in found]), context) < PARTS


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_layouts_draw_the_same(family_models: FamilyModels, name: str) -> None:
    asked = request("a pear", negative_prompt="fog", sampler="euler", steps=4)
    latents, pixels = draw(family_models.ours(name, "file"), [asked])
    for layout in ("folder", "crowded"):
        other_latents, other_pixels = draw(family_models.ours(name, layout), [asked])
        assert max(relative(a, b) for a, b in zip(latents, other_latents, strict=True)) < PARTS
        assert pixels_apart(pixels, other_pixels) <= 1


# ---- telling them apart ----


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sd2", "Stable Diffusion 2.x"),
        ("sd2-v", "Stable Diffusion 2.x"),
        ("sdxl", "Stable Diffusion XL"),
        ("refiner", "Stable Diffusion XL refiner"),
    ],
)
def test_families_are_told_apart(family_models: FamilyModels, name: str, family: str) -> None:
    for layout in ("folder", "file"):
        assert open_model(family_models.path(name, layout)).config.family == family


@pytest.mark.parametrize("name", ["sd2", "sdxl", "refiner"])
def test_a_file_may_lack_its_vae(family_models: FamilyModels, name: str, tmp_path: Path) -> None:
    """What is drawn with another, or hands its latents on, needs none: the rest is read as from the whole file."""
    state = original_state(family_models.parts(name))
    path = write({k: t for k, t in state.items() if not k.startswith("first_stage_model.")}, tmp_path / "lacking")
    with pytest.raises(BadDataError, match=r"without its VAE, not a whole model; name a VAE for it with --vae\.$"):
        open_model(path)
    whole, lacking = open_model(family_models.path(name, "file")).config, open_model(path, own_vae=False).config
    assert dataclasses.replace(lacking, vae=whole.vae) == whole
    assert lacking.vae == VAEConfig(scaling_factor=whole.vae.scaling_factor, force_upcast=whole.vae.force_upcast)


def test_prediction_type_is_found_out(family_models: FamilyModels, tmp_path: Path) -> None:
    """A file of 2.x may be of either kind, and its network tells: v is about minus the image at the noisiest step."""
    import copy

    unet = copy.deepcopy(
        family_models.ours("sd2", "file").model.unet.float()
    )  # which unpacks weights that were laid out
    latents = torch.full((1, 4, 8, 8), 0.5)
    for bias, wanted in ((2.0, "epsilon"), (-4.0, "v_prediction")):
        unet.conv_out.bias.fill_(bias)
        with torch.inference_mode():
            context = unet.project_context(torch.full((1, 2, unet.config.context_dim), 0.5))
            output = unet(latents, unet.embed_time(torch.tensor([999.0])), context)
        assert (float((output - latents).mean()) < -1) == (wanted == "v_prediction")
        assert probed_prediction_type(unet) == wanted


@pytest.mark.parametrize("name", ["sdxl"])
def test_marks_of_a_single_file(family_models: FamilyModels, name: str, tmp_path: Path) -> None:
    """`v_pred` and `ztsnr` are all that tells such a file; with them it draws as diffusers told so."""
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write(original_state(family_models.parts(name)) | marks, tmp_path / "model.safetensors")
    schedule = open_model(path).config.schedule
    assert (schedule.prediction_type, schedule.zero_terminal_snr) == ("v_prediction", True)
    plain = open_model(family_models.path(name, "file")).config.schedule
    assert (plain.prediction_type, plain.zero_terminal_snr) == ("epsilon", False)


def test_other_input_channels_are_refused(tmp_path: Path) -> None:
    state = original_state(build_parts("sd2", small=True, in_channels=6))
    with pytest.raises(BadDataError, match="no model this version knows"):
        open_model(write(state, tmp_path / "model.safetensors"))


def test_every_recipe_is_drawn_with() -> None:
    drawn = {name for name, *_ in RUN_CASES} | {"refiner", "turbo", "lcm"}
    assert drawn == set(RECIPES)


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_latent_consistency_models_are_drawn_with_as_their_authors_say(
    family_models: FamilyModels, layout: str
) -> None:
    assert family_models.ours("lcm", layout).config.defaults == LCM_DEFAULTS
