"""Pictures as other programs write them, made here in each one's own form: what they say, and where they say it."""

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cli_support import chunk
from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXIF, USER_COMMENT, MODEL, MAKE = 0x8769, 0x9286, 0x0110, 0x010F
PROMPT, NEGATIVE = "a (red:1.2) fox, [snow]", "blurry, (ugly)"

A1111 = f"""{PROMPT}
Negative prompt: {NEGATIVE}
Steps: 7, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 12345, Size: 16x24, \
Model hash: 6ce0161689, Model: v1-5-pruned, VAE: vae-ft-mse.safetensors, Clip skip: 2, Token merging ratio: 0.3, \
Lora hashes: "a: 1234, b: 5678", Version: v1.10.1"""
HIRES = """a castle
Steps: 10, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 16x16, Denoising strength: 0.5, RNG: CPU, \
Hires upscale: 2, Hires steps: 4, Hires upscaler: 4x-UltraSharp, Version: f2.0.1"""
CIVITAI = """a lighthouse
Negative prompt: bad
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 9, Size: 512x768, Clip skip: 2, RNG: CPU, \
Created Date: 2024-05-01T00:00:00.1234567Z, \
Civitai resources: [{"type":"checkpoint","modelVersionId":128713,"modelName":"DreamShaper, 8"},\
{"type":"lora","weight":0.8,"modelVersionId":87153}], Civitai metadata: {}"""
SD_CPP = """a cat
Steps: 20, CFG scale: 7.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 42, Size: 512x512, \
Model: sd-v1-4.ckpt, RNG: cuda, Sampler: euler_a karras, Version: stable-diffusion.cpp"""
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8", "base_model_hash": "aeb7e9e689",
    "clip_skip": 2, "full_negative_prompt": ["blurry"], "full_prompt": ["a fox"], "guidance_scale": 4.0,
    "loras": [["sd_xl_offset_example-lora_1.0.safetensors", 0.1, "4852686128"]], "metadata_scheme": "fooocus",
    "negative_prompt": "blurry", "performance": "Speed", "prompt": "a fox", "refiner_model": "None",
    "refiner_switch": 0.5, "resolution": "(1152, 896)", "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras",
    "seed": "77", "sharpness": 2.0, "steps": 30, "styles": "['Fooocus V2']", "vae": "Default (model)",
    "version": "Fooocus v2.5.0",
}  # fmt: skip
SWARM = {
    "sui_image_params": {
        "prompt": "a fox", "negativeprompt": "blurry", "model": "models/sd_xl_base_1.0", "seed": 5, "steps": 20,
        "cfgscale": 6.5, "aspectratio": "1:1", "width": 1024, "height": 768, "sampler": "euler_ancestral",
        "scheduler": "sgm_uniform", "automaticvae": True, "loras": ["style/ink"], "loraweights": ["0.7"],
        "swarm_version": "0.9.5.0",
    },
}  # fmt: skip
INVOKE = {
    "generation_mode": "sdxl_txt2img", "positive_prompt": "a fox", "negative_prompt": "blurry", "width": 512,
    "height": 640, "seed": 3, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0.1, "steps": 30,
    "scheduler": "dpmpp_2m_k", "clip_skip": 0, "controlnets": [{"control_model": {"name": "canny"}}], "loras": [
        {"model": {"name": "ink", "hash": "x", "base": "sd-1"}, "weight": 0.6},
    ],
    "model": {"key": "k", "hash": "blake3:ab", "name": "stable-diffusion-v1-5", "base": "sd-1", "type": "main"},
    "app_version": "5.0.0",
}  # fmt: skip
INVOKE_2 = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6cb27103",
    "app_version": "2.3",
    "image": {
        "prompt": [{"prompt": "a fox [blurry]", "weight": 1}], "steps": 50, "cfg_scale": 7.5, "threshold": 0,
        "perlin": 0, "height": 512, "width": 640, "seed": 33, "seamless": False, "type": "txt2img", "sampler": "k_lms",
    },
}  # fmt: skip
DREAM = '"a fox [blurry]" -s 50 -S 1234 -W 512 -H 640 -C 7.5 -A k_euler_a'
NOVELAI = {
    "prompt": "{{a fox}}, [snow] (x)", "steps": 28, "height": 1216, "width": 832, "scale": 5.0, "uncond_scale": 1.0,
    "cfg_rescale": 0.0, "seed": 11, "n_samples": 1, "noise_schedule": "karras", "sampler": "k_euler_ancestral",
    "sm": True, "sm_dyn": False, "request_type": "PromptGenerateRequest", "uc": "blurry", "signed_hash": "ab==",
}  # fmt: skip
EASY = {
    "prompt": "a fox", "negative_prompt": "blurry", "seed": "8", "use_stable_diffusion_model": "C:\\models\\sd-v1-5",
    "sampler_name": "euler_a", "width": "512", "height": "640", "num_inference_steps": "25", "guidance_scale": "7.5",
}  # fmt: skip
DRAW_THINGS = {
    "c": "a fox", "uc": "blurry", "seed": 4, "steps": 20, "scale": 7, "size": "512x640", "sampler": "DPM++ 2M Karras",
    "model": "sd_v1.5_f16.ckpt", "strength": 1,
}  # fmt: skip
KOHYA = {
    "prompt": "a fox", "negative-prompt": "blurry", "seed": "21", "sampler": "euler_a", "steps": "20", "scale": "7.5",
}  # fmt: skip
COMFY: dict[str, Any] = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 99, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
        "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15/v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry, embedding:bad", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "ink.safetensors", "strength_model": 0.8, "strength_clip": 0.5, "model": ["13", 0],
        "clip": ["4", 1]}},
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "a fox"}},
    "13": {"class_type": "FreeU", "inputs": {"b1": 1.1, "model": ["4", 0]}},
}  # fmt: skip
COMFY_SECOND = COMFY | {
    "20": {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0], "scale_by": 1.5}},
    "21": {"class_type": "KSampler", "inputs": COMFY["3"]["inputs"] | {
        "seed": 100, "steps": 12, "denoise": 0.55, "latent_image": ["20", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0], "vae": ["4", 2]}},
}  # fmt: skip
COMFY_CUSTOM = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "xl.safetensors"}},
    "2": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a (red) fox [x]", "text_l": "y", "clip": ["1", 1]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}},
    "4": {"class_type": "CFGGuider", "inputs": {
        "cfg": 4.5, "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0]}},
    "5": {"class_type": "RandomNoise", "inputs": {"noise_seed": 2**63}},
    "6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "7": {"class_type": "BasicScheduler", "inputs": {
        "scheduler": "simple", "steps": 5, "denoise": 0.5, "model": ["1", 0]}},
    "8": {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0], "vae": ["1", 2]}},
    "9": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
    "10": {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["5", 0], "guider": ["4", 0], "sampler": ["6", 0], "sigmas": ["7", 0], "latent_image": ["8", 0]}},
    "11": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}},
    "12": {"class_type": "PreviewImage", "inputs": {"images": ["11", 0]}},
}  # fmt: skip


COMFY_CONTROLLED = COMFY | {
    "30": {"class_type": "ControlNetApplyAdvanced", "inputs": {
        "positive": ["6", 0], "negative": ["7", 0], "strength": 1.0, "image": ["31", 0]}},
    "31": {"class_type": "LoadImage", "inputs": {"image": "pose.png"}},
    "3": COMFY["3"] | {"inputs": COMFY["3"]["inputs"] | {"positive": ["30", 0], "negative": ["30", 1]}},
}  # fmt: skip
COMFY_ZEROS = COMFY | {
    "40": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
    "3": COMFY["3"] | {"inputs": COMFY["3"]["inputs"] | {"negative": ["40", 0]}},
}  # fmt: skip


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size, 128 if mode == "L" else (90, 120, 150, 255)[: len(mode)])


def png(path: Path, texts: Mapping[str, str], **settings: Any) -> Path:
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text) if text.isascii() else info.add_itxt(keyword, text)
    picture().save(path, "PNG", pnginfo=info, **settings)
    return path


def with_comment(path: Path, text: str) -> Path:
    """A JPEG or WebP, by its name, with a UserComment as AUTOMATIC1111 writes it."""
    exif = Image.Exif()
    exif.endian = ">"
    exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    picture().save(path, exif=exif)
    return path


def with_tags(path: Path, tags: Mapping[int, str]) -> Path:
    """A picture with EXIF tags that are meant for cameras, as ComfyUI's WebP has them."""
    exif = Image.Exif()
    for tag, text in tags.items():
        exif[tag] = text
    picture().save(path, exif=exif)
    return path


def comfy_png(path: Path, graph: Any) -> Path:
    return png(path, {"prompt": json.dumps(graph), "workflow": json.dumps(_workflow(graph))})


def _workflow(graph: dict[str, Any]) -> dict[str, Any]:
    """The same graph as ComfyUI's window shows it, as far as others read that: who leads to whom."""
    nodes = {
        key: node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    links = [
        [i, value[0], value[1], key, 0, name.upper()]
        for i, (key, name, value) in enumerate(
            (key, *pair) for key, node in nodes.items() for pair in node["inputs"].items() if isinstance(pair[1], list)
        )
        if len(value) == 2
    ]
    return {"nodes": [{"id": key, "type": node.get("class_type")} for key, node in nodes.items()], "links": links}


def stealth_png(path: Path, texts: Mapping[str, Any], magic: str = "stealth_pngcomp", size: int | None = None) -> Path:
    """Texts in the lowest bits, column by column."""
    body = json.dumps(texts).encode()
    if magic.endswith("comp"):
        packer = zlib.compressobj(wbits=31)
        body = packer.compress(body) + packer.flush()
    data = magic.encode() + (8 * len(body) if size is None else size).to_bytes(4, "big") + body
    pixels = np.array(picture("RGBA", (192, 192)))
    columns = pixels.transpose(1, 0, 2).copy()
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    channels = columns[..., 3:] if "png" in magic else columns[..., :3]
    flat = channels.reshape(-1) & 0xFE
    flat[: len(bits)] |= bits
    channels[...] = flat.reshape(channels.shape)
    Image.fromarray(columns.transpose(1, 0, 2)).save(path)
    return path


def raw_png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with these chunks before its pixels, however wrong."""
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    data = buffer.getvalue()
    return data[:33] + b"".join(chunk(kind, body) for kind, body in chunks) + data[33:]
