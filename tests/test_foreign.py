"""Pictures of other programs: what they say is taken as far as it can be, and what cannot be is said."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_support as made
import numpy as np
import pytest
from cli_support import assert_refused, ldm, ldm_here, pixels, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmcli.foreign.comfy import read_comfy
from ldmcli.foreign.infotext import read_infotext
from ldmcli.foreign.pictured import read_foreign
from ldmcli.foreign.taken import Taken
from ldmcli.session import Session
from ldmcli.spec import GenerationRequest

CHUNK = {"on_long_prompt": "chunk"}
WEIGHTED = {"prompt_syntax": "weighted"} | CHUNK
A1111_FIELDS = {
    "prompt": made.PROMPT, "negative_prompt": made.NEGATIVE, "steps": 7, "sampler": "dpmpp-2m", "schedule": "karras",
    "guidance_scale": 5.5, "seed": 12345, "width": 16, "height": 24, "clip_skip": 2, **WEIGHTED,
}  # fmt: skip
A1111_USUAL = made.A1111.replace("Clip skip: 2", "Clip skip: 1")  # the small model has one layer
COMFY_FIELDS = {
    "prompt": "a fox", "negative_prompt": "blurry, bad", "seed": 99, "steps": 20, "guidance_scale": 8.0,
    "sampler": "dpmpp-2m", "schedule": "karras", "width": 512, "height": 640, "clip_skip": 2,
    "loras": [{"name": "ink", "weight": 0.8, "text_weight": 0.5}], "prompt_syntax": "plain", **CHUNK,
}  # fmt: skip
FOX = {"prompt": "a fox", "negative_prompt": "blurry"}
Maker = Callable[[Path], Path]
CORPUS: dict[str, tuple[Maker, str, dict[str, Any], dict[str, str], list[str]]] = {
    "a1111.png": (
        lambda path: made.png(path, {"parameters": made.A1111}), "AUTOMATIC1111", A1111_FIELDS,
        {"model": "v1-5-pruned", "model_hash": "6ce0161689", "vae": "vae-ft-mse"},
        ["Token merging ratio 0.3", "the noise, which is not a CPU's (RNG)"],
    ),
    "a1111.jpg": (
        lambda path: made.with_comment(path, made.A1111), "AUTOMATIC1111", A1111_FIELDS,
        {"model": "v1-5-pruned", "model_hash": "6ce0161689", "vae": "vae-ft-mse"},
        ["Token merging ratio 0.3", "the noise, which is not a CPU's (RNG)"],
    ),
    "forge.webp": (
        lambda path: made.with_comment(path, made.HIRES), "Forge",
        {"prompt": "a castle", "negative_prompt": "", "steps": 10, "sampler": "euler-a", "schedule": "normal",
         "seed": 1, "guidance_scale": 7.0, "width": 16, "height": 16,
         "hires": "2", "hires_steps": 4, "hires_strength": 0.5,
         "hires_upscaler": "embedded", **WEIGHTED}, {},
        ["Hires upscaler 4x-UltraSharp (the embedded one stands in)"],
    ),
    "civitai.jpg": (
        lambda path: made.with_comment(path, made.CIVITAI), "AUTOMATIC1111",
        {"prompt": "a lighthouse", "negative_prompt": "bad", "steps": 20, "sampler": "euler-a", "schedule": "normal",
         "guidance_scale": 7.0, "seed": 9, "width": 512, "height": 768, "clip_skip": 2, **WEIGHTED}, {},
        ["Civitai resources …"],
    ),
    "sd.cpp.png": (
        lambda path: made.png(path, {"parameters": made.SD_CPP}), "stable-diffusion.cpp",
        {"prompt": "a cat", "negative_prompt": "", "steps": 20, "guidance_scale": 7.0, "seed": 42, "width": 512,
         "height": 512, "sampler": "euler-a", "schedule": "karras", "eta": 0.0, **WEIGHTED}, {"model": "sd-v1-4"},
        ["Guidance 3.500000"],
    ),
    "fooocus.png": (
        lambda path: made.png(path, {"parameters": json.dumps(made.FOOOCUS), "fooocus_scheme": "fooocus"}), "Fooocus",
        FOX | {"guidance_scale": 4.0, "width": 1152, "height": 896, "sampler": "dpmpp-2m-sde", "schedule": "karras",
               "seed": 77, "steps": 30, "clip_skip": 2, "loras": [
                   {"name": "sd_xl_offset_example-lora_1.0", "weight": 0.1, "text_weight": 0.1}]},
        {"model": "juggernautXL_v8", "model_hash": "aeb7e9e689"},
        ["adm_guidance (1.5, 0.8, 0.3)", "sharpness 2.0", "styles ['Fooocus V2']"],
    ),
    "swarm.png": (
        lambda path: made.png(path, {"parameters": json.dumps(made.SWARM)}), "SwarmUI",
        FOX | {"seed": 5, "steps": 20, "guidance_scale": 6.5, "width": 1024, "height": 768, "sampler": "euler-a",
               "schedule": "sgm_uniform", "loras": [{"name": "ink", "weight": 0.7, "text_weight": 0.7}]},
        {"model": "sd_xl_base_1.0"}, [],
    ),
    "swarm.jpg": (
        lambda path: made.with_tags(path, {made.MODEL: json.dumps(made.SWARM)}), "SwarmUI",
        FOX | {"seed": 5, "steps": 20, "guidance_scale": 6.5, "width": 1024, "height": 768, "sampler": "euler-a",
               "schedule": "sgm_uniform", "loras": [{"name": "ink", "weight": 0.7, "text_weight": 0.7}]},
        {"model": "sd_xl_base_1.0"}, [],
    ),
    "invoke.png": (
        lambda path: made.png(path, {"invokeai_metadata": json.dumps(made.INVOKE)}), "InvokeAI",
        FOX | CHUNK | {"width": 512, "height": 640, "seed": 3, "guidance_scale": 7.5, "guidance_rescale": 0.1,
                       "steps": 30, "sampler": "dpmpp-2m", "schedule": "karras", "clip_skip": 1,
                       "loras": [{"name": "ink", "weight": 0.6, "text_weight": 0.6}]},
        {"model": "stable-diffusion-v1-5"}, ["controlnets …"],
    ),
    "invoke2.png": (
        lambda path: made.png(path, {"sd-metadata": json.dumps(made.INVOKE_2)}), "InvokeAI",
        FOX | CHUNK | {"width": 640, "height": 512, "seed": 33, "guidance_scale": 7.5, "steps": 50},
        {"model": "stable-diffusion-1.5", "model_hash": "cc6cb27103"},
        ["sampler k_lms", "the noise, which is a GPU's"],
    ),
    "dream.png": (
        lambda path: made.png(path, {"Dream": made.DREAM}), "InvokeAI",
        FOX | CHUNK | {"width": 512, "height": 640, "seed": 1234, "guidance_scale": 7.5, "steps": 50,
                       "sampler": "euler-a"}, {}, ["the noise, which is a GPU's"],
    ),
    "novelai.png": (
        lambda path: made.png(path, {
            "Software": "NovelAI", "Description": made.NOVELAI["prompt"], "Source": "Stable Diffusion XL 7BCCAA2C",
            "Comment": json.dumps(made.NOVELAI)}), "NovelAI",
        {"prompt": "((a fox:1.05):1.05), (snow:0.952) \\(x\\)", "negative_prompt": "blurry", "steps": 28, "width": 832,
         "height": 1216, "guidance_scale": 5.0, "guidance_rescale": 0.0, "seed": 11, "sampler": "euler-a",
         "schedule": "karras", **WEIGHTED}, {}, ["sm true", "the model Stable Diffusion XL 7BCCAA2C"],
    ),
    "stealth.png": (
        lambda path: made.stealth_png(path, {"Software": "NovelAI", "Comment": json.dumps(made.NOVELAI)}), "NovelAI",
        {"prompt": "((a fox:1.05):1.05), (snow:0.952) \\(x\\)", "negative_prompt": "blurry", "steps": 28, "width": 832,
         "height": 1216, "guidance_scale": 5.0, "guidance_rescale": 0.0, "seed": 11, "sampler": "euler-a",
         "schedule": "karras", **WEIGHTED}, {}, ["sm true", "the model"],
    ),
    "easy.png": (
        lambda path: made.png(path, made.EASY), "Easy Diffusion",
        FOX | {"seed": 8, "sampler": "euler-a", "width": 512, "height": 640, "steps": 25, "guidance_scale": 7.5},
        {"model": "sd-v1-5"}, [],
    ),
    "easy.webp": (
        lambda path: made.with_comment(path, json.dumps(made.EASY)), "Easy Diffusion",
        FOX | {"seed": 8, "sampler": "euler-a", "width": 512, "height": 640, "steps": 25, "guidance_scale": 7.5},
        {"model": "sd-v1-5"}, [],
    ),
    "draw-things.png": (
        lambda path: made.png(path, {"XML:com.adobe.xmp": (
            "<x:xmpmeta><rdf:Description><exif:UserComment><rdf:Alt><rdf:li xml:lang='x-default'>"
            + json.dumps(made.DRAW_THINGS).replace('"', "&quot;")
            + "</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></x:xmpmeta>")}), "Draw Things",
        FOX | {"seed": 4, "steps": 20, "guidance_scale": 7.0, "width": 512, "height": 640, "sampler": "dpmpp-2m",
               "schedule": "karras"}, {"model": "sd_v1.5_f16"}, [],
    ),
    "kohya.png": (
        lambda path: made.png(path, made.KOHYA), "kohya's scripts",
        FOX | {"seed": 21, "steps": 20, "guidance_scale": 7.5, "sampler": "euler-a"}, {}, [],
    ),
    "comfy.png": (
        lambda path: made.comfy_png(path, made.COMFY), "ComfyUI", COMFY_FIELDS, {"model": "v1-5"}, ["node FreeU"],
    ),
    "comfy.webp": (
        lambda path: made.with_tags(path, {
            made.MODEL: "prompt:" + json.dumps(made.COMFY), made.MAKE: 'workflow:{"nodes": []}'}),
        "ComfyUI", COMFY_FIELDS, {"model": "v1-5"}, ["node FreeU"],
    ),
    "comfy-controlled.png": (
        lambda path: made.comfy_png(path, made.COMFY_CONTROLLED), "ComfyUI", COMFY_FIELDS, {"model": "v1-5"},
        ["node FreeU", "node ControlNetApplyAdvanced"],
    ),
    "comfy-zeros.png": (
        lambda path: made.comfy_png(path, made.COMFY_ZEROS), "ComfyUI", COMFY_FIELDS | {"negative_prompt": ""},
        {"model": "v1-5"}, ["the negative prompt, zeros", "node FreeU"],
    ),
    "comfy-second.png": (
        lambda path: made.comfy_png(path, made.COMFY_SECOND), "ComfyUI",
        COMFY_FIELDS | {"hires": "1.5", "hires_strength": 0.55, "hires_steps": 12}, {"model": "v1-5"}, ["node FreeU"],
    ),
    "comfy-custom.png": (
        lambda path: made.comfy_png(path, made.COMFY_CUSTOM), "ComfyUI",
        {"prompt": "a (red) fox \\[x\\]", "negative_prompt": "", "seed": 2**63, "steps": 10, "strength": 0.5,
         "guidance_scale": 4.5, "sampler": "euler", "schedule": "simple", **WEIGHTED}, {"model": "xl"},
        ["the image photo.png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_each_programs_pictures_are_read(tmp_path: Path, name: str) -> None:
    make, tool, fields, weights, left = CORPUS[name]
    taken = read_foreign(make(tmp_path / name))
    assert taken is not None
    assert taken.tool == tool
    assert taken.fields == fields
    assert taken.weights == weights
    assert taken.left == left
    GenerationRequest(**{key: value for key, value in fields.items() if key not in ("hires_strength", "strength")})


# ---- the commands ----


def test_a_foreign_picture_is_drawn_again_and_what_was_left_is_said_in_one_line(tmp_path: Path) -> None:
    source = made.png(tmp_path / "a.png", {"parameters": A1111_USUAL})
    fine = ("-m", tiny_model(), "--dtype", "fp32", "--device", "cpu", "-q")
    out = ldm("txt2img", "--from-image", source, *fine[:-1], "-o", tmp_path / "b.png", "--json")
    assert out.code == 0, out.err
    (line,) = [line for line in out.err.splitlines() if "warning" in line]
    assert "AUTOMATIC1111" in line
    assert "Token merging ratio 0.3; the noise" in line
    assert "VAE vae-ft-mse, which is not here" in line
    usual = A1111_FIELDS | {"clip_skip": 1}
    assert {key: out.records[0][key] for key in usual} == usual
    typed = ldm_here(
        "txt2img", made.PROMPT, "-n", made.NEGATIVE, "--steps", "7", "--sampler", "DPM++ 2M Karras", "-g", "5.5",
        "-s", "12345", "-W", "16", "-H", "24", "--prompt-syntax", "weighted", "--on-long-prompt",
        "chunk", *fine, "-o", tmp_path / "c.png",
    )  # fmt: skip
    assert typed.code == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "c.png"))


def test_options_win_over_a_foreign_picture_and_its_prompt_too(tmp_path: Path) -> None:
    source = made.png(tmp_path / "a.png", {"parameters": A1111_USUAL})
    out = ldm_here(
        "txt2img", "a dog", "--from-image", source, "-m", tiny_model(), "--sampler", "euler_a", "--steps", "1", "-W",
        "8", "-H", "8", "-o", tmp_path / "b.png", "--json",
    )  # fmt: skip
    assert out.code == 0, out.err
    assert {"prompt": "a dog", "sampler": "euler-a", "schedule": "karras", "width": 8, "seed": 12345}.items() <= (
        out.records[0].items()
    )
    named = ldm_here(
        "txt2img", "--from-image", source, "-m", tiny_model(), "--sampler", "Euler Simple", "--steps", "1", "-q", "-o",
        tmp_path / "c.png", "--json",
    )  # fmt: skip
    assert (named.records[0]["sampler"], named.records[0]["schedule"]) == ("euler", "simple")


def test_the_model_is_found_by_its_name_or_asked_for(tmp_path: Path) -> None:
    source = made.png(tmp_path / "a.png", {"parameters": A1111_USUAL})
    arguments = ("txt2img", "--from-image", source, "-q", "-o", tmp_path / "b.png", "--json")
    assert_refused(ldm_here(*arguments), 66, "v1-5-pruned", "6ce0161689", "--model")
    models = tmp_path / "models"
    models.mkdir()
    (models / "v1-5-pruned").symlink_to(tiny_model())
    found = ldm_here(*arguments, env={"LDM_MODELS": str(models)})
    assert found.code == 0, found.err
    assert found.records[0]["model"] == "v1-5-pruned"


def test_a_lora_is_found_by_its_name_or_asked_for(tmp_path: Path) -> None:
    source = made.comfy_png(tmp_path / "a.png", made.COMFY)
    fine = ("txt2img", "--from-image", source, "-m", tiny_model(), "-q", "-o", tmp_path / "b.png")
    assert_refused(ldm_here(*fine), 66, "the LoRA “ink”", "--lora-dir")
    (tmp_path / "loras").mkdir()
    assert_refused(ldm_here(*fine, "--lora-dir", tmp_path / "loras"), 2, "ink", "loras")
    tagged = made.png(tmp_path / "c.png", {"parameters": A1111_USUAL.replace("fox", "fox <lora:ink:0.8>")})
    assert_refused(ldm_here(*fine[:2], tagged, *fine[3:]), 2, "<lora:ink>", "--lora-dir")


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--clip-skip", "2"), 2)])
def test_layers_are_counted_from_the_last_of_sdxl_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int
) -> None:
    """There clip skip 2 is what all SDXL pictures are drawn with, and here 1; what is typed is this program's own. The
    small model has one layer."""
    source = made.png(tmp_path / "a.png", {"parameters": made.A1111})
    fine = ("txt2img", "--from-image", source, "-m", tiny_model(), "-q", "--json", "-o", tmp_path / "b.png", *options)
    assert_refused(ldm_here(*fine), 2, "clip_skip 2 does not fit")
    monkeypatch.setattr(Session, "family", property(lambda session: "Stable Diffusion XL"))
    out = ldm_here(*fine)
    assert out.code == code, out.err
    assert code or out.records[0]["clip_skip"] == 1


def test_strength_needs_the_picture_that_it_was_of(tmp_path: Path) -> None:
    text = made.HIRES.replace("Hires upscale: 2, Hires steps: 4, Hires upscaler: 4x-UltraSharp, ", "")
    source = made.png(tmp_path / "a.png", {"parameters": text})
    fine = ("--from-image", source, "-m", tiny_model(), "--steps", "2", "--json")
    alone = ldm_here("txt2img", *fine, "-o", tmp_path / "b.png")
    assert alone.code == 0, alone.err
    assert "strength 0.5, of an image that it does not hold" in alone.err
    with_it = ldm_here("img2img", *fine, "-i", source, "-o", tmp_path / "c.png")
    assert with_it.records[0]["strength"] == 0.5
    assert "strength" not in with_it.err


def test_info_says_what_would_be_taken(tmp_path: Path) -> None:
    source = made.comfy_png(tmp_path / "a.png", made.COMFY)
    (facts,) = ldm_here("info", "--json", source).records
    assert facts == {
        "kind": "picture", "made_by": "ComfyUI", "request": COMFY_FIELDS, "weights": {"model": "v1-5"},
        "not_taken": ["node FreeU"],
    }  # fmt: skip
    shown = ldm_here("info", source).out.decode()
    assert "made by: ComfyUI" in shown
    assert "sampler: dpmpp-2m" in shown
    assert "not taken: node FreeU\n" in shown


# ---- details ----


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ("Steps: 5, Sampler: Euler, Seed: 1", "schedule", "normal"),
        ("Steps: 5, Sampler: Euler, Schedule type: Automatic, Seed: 1", "schedule", "normal"),
        ("Steps: 5, Sampler: DPM++ 2M, Schedule type: Automatic, Seed: 1", "schedule", "karras"),
        ("Steps: 5, Sampler: DPM++ 2M SDE Exponential, Seed: 1", "schedule", "exponential"),
        ("Steps: 5, Sampler: DPM++ 2M, Schedule type: SGM Uniform, Seed: 1", "schedule", "sgm_uniform"),
        ("Steps: 5, Sampler: DDIM, Schedule type: Karras, Seed: 1", "schedule", None),
        ("Steps: 5, Sampler: LMS, Seed: 1", "sampler", None),
        ("Steps: 5, Sampler: DDIM, Eta: 0.5, Seed: 1", "eta", 0.5),
        ("Steps: 5, Sampler: Euler a, Eta: 0.5, Seed: 1", "eta", None),
        ("Steps: 5, Sampler: Euler, Seed: 0, CFG scale: 0", "seed", 0),
        ("Steps: 5, Sampler: Euler, Seed: -1", "seed", None),
        ("Steps: 5.5, Sampler: Euler, Seed: 1", "steps", None),
        ("Steps: 5, Sampler: Euler, Seed: 1, Emphasis: None", "prompt_syntax", "plain"),
        ("Steps: 5, Sampler: Euler, Seed: 1, Inpaint area: Only masked, Masked area padding: 8", "mask_padding", 8),
        ("Steps: 5, Sampler: Euler, Seed: 1, Mask mode: Inpaint not masked", "invert_mask", True),
        ("Steps: 5, Sampler: Euler, Seed: 1, Size: 512x768\nTemplate: {a|b}", "height", 768),
    ],
)
def test_the_text_of_a1111(said: str, field: str, value: Any) -> None:
    taken = read_infotext(f"a cat\nNegative prompt: x: 1, y: 2, z: 3\nand more\n{said}")
    assert taken is not None
    assert taken.fields.get(field) == value
    assert (taken.fields["prompt"], taken.fields["negative_prompt"]) == ("a cat", "x: 1, y: 2, z: 3\nand more")


def test_what_is_not_quite_the_same_under_the_same_name_is_said() -> None:
    taken = read_infotext("a\nSteps: 5, Sampler: UniPC, Seed: 1, RNG: CPU")
    assert (taken or Taken("")).left == ["unipc's variant bh1 and steps of its own"]
    graph = made.COMFY | {"3": made.COMFY["3"] | {"inputs": made.COMFY["3"]["inputs"] | {"scheduler": "beta"}}}
    assert "beta's steps, which are whole training steps there" in (read_comfy(json.dumps(graph)) or Taken("")).left


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nSteps: 5", "x: 1, y: 2, z: 3", "a: b, c: d\n\n"])
def test_text_that_is_none_is_no_request(text: str) -> None:
    assert read_infotext(text) is None


# ---- hostile ----

DEEP = "[" * 200_000
CYCLE = {
    "1": {"class_type": "KSampler", "inputs": {
        "seed": ["1", 0], "steps": ["2", 0], "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0],
        "latent_image": ["1", 0], "cfg": [["1", 0], 0]}},
    "2": {"class_type": "A", "inputs": {"text": ["3", 0], "value": ["3", 0], "clip": ["2", 0]}},
    "3": {"class_type": "B", "inputs": {"text": ["2", 0], "value": ["2", 0], "samples": ["1", 0]}},
}  # fmt: skip
CHAIN = {str(i): {"class_type": "Reroute", "inputs": {"value": [str(i + 1), 0], "text": [str(i + 1), 0]}}
         for i in range(9_000)}  # fmt: skip
WIDE = {str(i): {"class_type": "X", "inputs": {name: [str(j), 0] for name, j in zip("abcdefgh", range(i, i + 8),
        strict=True)}} for i in range(9_000)}  # fmt: skip
SAMPLER = {
    "class_type": "KSampler",
    "inputs": {
        "positive": ["0", 0],
        "negative": ["0", 0],
        "latent_image": ["0", 0],
        "steps": ["0", 0],
        "model": ["0", 0],
    },
}


@pytest.mark.parametrize(
    "graph",
    [CYCLE, CHAIN | {"s": SAMPLER}, WIDE | {"s": SAMPLER}, {"s": SAMPLER}, {"a": 1, "b": [], "c": {"inputs": 5}},
     {"s": {"inputs": {"positive": None, "latent_image": {"a": []}}, "class_type": ["x"]}},
     {"x": SAMPLER | {"inputs": SAMPLER["inputs"] | {
         "seed": "\x1b[31m", "cfg": 1e999, "steps": 10**400, "denoise": 1e-300}}},
     {str(i): SAMPLER for i in range(20_000)}],
    ids=["cycle", "chain", "wide", "dangling", "no nodes", "no sampler", "bad values", "many"],
)  # fmt: skip
def test_hostile_graphs_end(tmp_path: Path, graph: dict[str, Any]) -> None:
    taken = read_comfy(json.dumps(graph))
    assert taken is None or GenerationRequest(**taken.fields)
    shown = ldm_here("info", made.comfy_png(tmp_path / "a.png", graph))
    assert shown.code in (0, 65)
    assert "\x1b" not in shown.out.decode() + shown.err


@pytest.mark.parametrize(
    "keyword", ["parameters", "prompt", "Comment", "invokeai_metadata", "sd-metadata", "Dream", "XML:com.adobe.xmp"]
)
@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "{" + '"a":{' * 100_000,
        "[]",
        "{}",
        "null",
        '"x"',
        "a: " * 100_000,
        '"' * 99_999,
        '{"image": 5, "model": 5, "loras": 5, "prompt": 5, "uc": 5, "base_model": []}',
    ],
)
def test_hostile_text_is_no_request_or_one(tmp_path: Path, keyword: str, text: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(made.raw_png((b"tEXt", keyword.encode() + b"\0" + text.encode())))
    taken = read_foreign(path)
    assert taken is None or taken.fields["prompt"] in ("", "5")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param((b"tEXt", b"parameters\0" + b"x" * (100 << 20)), id="100 MB"),
        pytest.param((b"zTXt", b"prompt\0\0" + zlib.compress(b"{" * (200 << 20))), id="bomb"),
        pytest.param((b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b" " * (200 << 20))), id="iTXt bomb"),
    ],
)
def test_texts_that_are_too_large_are_refused_in_little_memory(tmp_path: Path, data: tuple[bytes, bytes]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(made.raw_png(data))
    refused = ldm("info", path, measure=True)  # which links no torch beside
    assert_refused(refused, 65, "a.png")
    assert refused.peak < 300 << 20


def test_pixels_that_lie_about_their_text_hold_none(tmp_path: Path) -> None:
    for size in (2**32 - 1, 8 << 20, 8):
        assert read_foreign(made.stealth_png(tmp_path / "a.png", {"Comment": "{}"}, size=size)) is None
    bomb = tmp_path / "b.png"
    made.stealth_png(bomb, {"Comment": "{" * 10, "x": " " * (4 << 20)})  # unpacks beyond what is read
    assert read_foreign(bomb) is None
    rgb = made.stealth_png(tmp_path / "c.png", {"Comment": json.dumps(made.NOVELAI)}, "stealth_rgbcomp")
    assert (read_foreign(rgb) or Taken("")).tool == "NovelAI"


KEYS = (
    "prompt", "seed", "steps", "inputs", "class_type", "positive", "latent_image", "model", "loras", "image", "size",
    "sampler", "scheduler", "width", "name", "weight", "uc", "base_model", "sui_image_params", "c", "1", "2",
)  # fmt: skip
JSON = st.deferred(
    lambda: st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8)
    | st.lists(JSON, max_size=3) | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5)
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_any_json_is_taken_or_not(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    for keyword in ("parameters", "prompt", "Comment", "invokeai_metadata", "sd-metadata"):
        path.write_bytes(made.raw_png((b"tEXt", keyword.encode() + b"\0" + json.dumps(value).encode())))
        taken = read_foreign(path)
        assert taken is None or GenerationRequest(**taken.fields)


# ---- beside sd-parsers ----


@pytest.mark.parametrize(
    "name",
    ["a1111.png", "a1111.jpg", "fooocus.png", "invoke.png", "invoke2.png", "dream.png", "novelai.png", "comfy.png"],
)
def test_sd_parsers_reads_the_same(tmp_path: Path, name: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    path = CORPUS[name][0](tmp_path / name)
    ours = read_foreign(path)
    theirs = sd_parsers.ParserManager().parse(path)
    assert ours is not None
    assert theirs is not None
    (sampler,) = theirs.samplers
    said = {key: str(value) for key, value in sampler.parameters.items()}
    for key, field in (("seed", "seed"), ("steps", "steps"), ("cfg_scale", "guidance_scale")):
        if key in said:
            assert float(said[key]) == float(ours.fields[field])
    if name == "novelai.png":  # whose weights are signs there
        return
    assert [one.value for one in theirs.prompts] in ([ours.fields["prompt"]], [])  # no texts over links there
    assert theirs.negative_prompts[0].value.replace("embedding:", "") == ours.fields["negative_prompt"]


@pytest.mark.parametrize(
    "name", ["a1111.png", "sd.cpp.png", "swarm.png", "swarm.jpg", "invoke.png", "dream.png", "easy.png"]
)
def test_sd_prompt_reader_reads_the_same(tmp_path: Path, name: str) -> None:
    """Of what it reads; its other forms are A1111's JPEG and WebP, Fooocus, Draw Things and ComfyUI, of which it makes
    errors or other texts here (1.3.5). It wants windows, and so is no dependency of the tests."""
    pytest.importorskip("piexif")
    reader = pytest.importorskip("sd_prompt_reader.image_data_reader")
    path = CORPUS[name][0](tmp_path / name)
    ours, theirs = read_foreign(path), reader.ImageDataReader(str(path))
    assert ours is not None
    assert (theirs.positive, theirs.negative) == (ours.fields["prompt"], ours.fields.get("negative_prompt", ""))
    for key, field in (("seed", "seed"), ("steps", "steps"), ("cfg", "guidance_scale")):
        assert float(theirs.parameter[key]) == float(ours.fields[field])
