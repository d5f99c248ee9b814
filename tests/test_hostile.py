"""FIELD_NOTES §6: hostile models, prompts and pictures. Each is refused by name, in bounded time and memory."""

import dataclasses
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import (
    LDM,
    assert_refused,
    chunk,
    copy_model,
    empty_tensors,
    error_sentence,
    ldm,
    pixels,
    read_safetensors,
    reconfigured,
    replace,
    safetensors,
    tiny_model,
    tiny_single_file,
)

pytestmark = pytest.mark.timeout(300)
LEAN = 150 << 20  # bytes: what a refusal without torch may take; Python alone takes 20 MB
UNET = "unet/diffusion_pytorch_model.safetensors"
JUNK = b"\x1b[31m\xe2\x80\xae"  # colours the terminal, and turns what follows around
USE_OF_PICKLE = "it was unpickled"


def draw(model: Path, *options: str, seed: int = 1, output: str | Path = "out", **more: Any) -> Any:
    """`ldm txt2img` with a model, in the model's folder; a refusal must leave nothing there."""
    return ldm("txt2img", "x", "-m", model, "-s", str(seed), "--steps", "1", *options, "-o", output, **more)


def assert_lean_refusal(model: Path, code: int, *words: str) -> str:
    """`ldm txt2img` refuses this model before torch, and `ldm info` says no more than that."""
    result = draw(model, cwd=model.parent if model.parent.is_dir() else None, measure=True)
    assert result.peak < LEAN
    assert not (model.parent / "out").exists()
    return assert_refused(result, code, *words)


# ---- paths ----


def test_a_missing_model_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "lighthouse-v2.safetensors").touch()
    assert_lean_refusal(tmp_path / "lighthouse-v1.safetensors", 66, "not exist", "lighthouse-v2.safetensors")
    assert_lean_refusal(tmp_path / "no" / "such" / "folder.safetensors", 66, "nor does its folder")
    assert_lean_refusal(tmp_path / ("n" * 300), 66, "not exist")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert_lean_refusal(tmp_path / "dangling", 66, "link", "gone")
    assert_refused(ldm("txt2img", "x", "-m", "~no-such-user/model"), 66, "not exist")
    assert_refused(ldm("info", "~no-such-user/model"), 66, "not exist")
    assert_refused(ldm("txt2img", "x", "-m", "", cwd=tmp_path), 65, "model_index.json")
    assert_refused(ldm("txt2img", "x", "-m", b"/tmp/\xff\x1b[31m"), 66, "\\udcff\\x1b[31m")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's name is short
        listener.bind("s")
        os.chdir(here)
        for name, what in (("fifo.safetensors", "pipe"), ("s", "socket"), ("/dev/zero", "device")):
            for command in (["txt2img", "x", "-m"], ["info"], ["txt2img", "--from-image"]):
                result = ldm(*command, tmp_path / name)
                assert_refused(result, 65, *([] if "--from-image" in command else [what]), seconds=10)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_lean_refusal(tmp_path / "loop", 65, "circle")
    (tmp_path / "folder").mkdir()
    assert_lean_refusal(tmp_path / "folder", 65, "model_index.json")
    (tmp_path / "folder" / "v1.safetensors").touch()
    assert_lean_refusal(tmp_path / "folder", 65, "did you mean", "v1.safetensors")


def test_an_unreadable_file(tmp_path: Path) -> None:
    """Root reads everything, so it becomes another user first."""
    path = tmp_path / "secret.safetensors"
    path.touch(mode=0o000)
    program = LDM if os.geteuid() else ("setpriv", "--reuid=65534", "--clear-groups", *LDM)
    for asked in (path, tmp_path):
        tmp_path.chmod(0o000 if asked == tmp_path else 0o755)
        try:
            result = ldm("info", asked, program=program)
        except FileNotFoundError:
            pytest.skip("root reads everything, and there is no setpriv to become another user")
        finally:
            tmp_path.chmod(0o755)
        if "ldm: " not in result.err:
            pytest.skip(f"the other user cannot run this Python: {result.err}")
        assert_refused(result, 66, "not readable")


# ---- files that are no weights ----


class _Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (f"print({USE_OF_PICKLE!r}); open('unpickled', 'w')",)


def torch_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Bomb()))


def test_other_files_are_named_with_their_cure(tmp_path: Path) -> None:
    kinds: dict[str, tuple[bytes, tuple[str, ...]]] = {
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", ("git lfs pull",)),
        "page": (b"<!DOCTYPE html><html>" + JUNK + b"</html>", ("web page", "download")),
        "answer": (b'{"error":"Repository not found"}', ("JSON", "download")),
        "old.ckpt": (pickle.dumps(_Bomb(), 2), ("pickle", "convert")),
        "empty": (b"", ("empty",)),
        "text": (b"Entry not found", ("Entry not found",)),
        "gguf": (b"GGUF\x03\0\0\0" + bytes(64), ("GGUF",)),
        "junk": (JUNK * 20, ("no safetensors",)),
    }
    for name, (content, words) in kinds.items():
        (tmp_path / name).write_bytes(content)
        assert_lean_refusal(tmp_path / name, 65, name, *words)
    torch_zip(tmp_path / "new.ckpt")
    assert_lean_refusal(tmp_path / "new.ckpt", 65, "pickle", "convert")
    assert_refused(ldm("info", tmp_path / "new.ckpt", cwd=tmp_path), 65, "pickle")
    assert_refused(ldm("info", tmp_path / "page"), 65, "web page")
    assert not (tmp_path / "unpickled").exists()


def header_bombs() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    entry = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
    twice = b'{"a\\u001b":' + json.dumps(entry).encode() + b',"a\\u001b":' + json.dumps(entry).encode() + b"}"
    empty = '{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    million = ",".join(f'"{i}":{empty}' for i in range(1_000_000)) + " " * 100
    whole = safetensors({"a": entry, "b": entry | {"data_offsets": [4, 8]}}, bytes(8))
    return {
        "2^64": (struct.pack("<Q", 2**64 - 1) + b"{}", ("claim",)),
        "99 MB": (struct.pack("<Q", 99 << 20) + b"{" + b" " * (99 << 20), ("claim",)),
        "million": (safetensors(b"{" + million.encode() + b"}"), ("claim",)),
        "half": (safetensors(b"{" + million[: len(million) // 2].encode()), ("far beyond any model",)),
        "deep": (safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ("deep",)),
        "twice": (safetensors(twice, bytes(4)), ("twice", "a\\x1b")),
        "overlap": (safetensors({"a": entry, "b": entry}, bytes(4)), ("overlapping",)),
        "hole": (safetensors({"a": entry | {"data_offsets": [4, 8]}}, bytes(8)), ("hole of 4 bytes",)),
        "huge": (safetensors({"a": entry | {"shape": [1 << 62, 1 << 62]}}, bytes(4)), ("impossibly large",)),
        "cut": (whole[:-1], ("cut short",)),
        "cut in header": (whole[:40], ("cut short",)),
        "longer": (whole + b"\0", ("after its last",)),
        "none": (safetensors({}), ("no tensors",)),
        "surrogate": (safetensors(b'{"\\ud800":' + json.dumps(entry).encode() + b"}", bytes(4)), ("surrogate",)),
    }


def test_broken_headers(tmp_path: Path) -> None:
    for name, (content, words) in header_bombs().items():
        path = replace(tmp_path / "model.safetensors", content)
        sentence = assert_lean_refusal(path, 65, "model.safetensors", *words)
        assert len(sentence) < 600, name
        if name == "half":
            assert_refused(ldm("info", path, measure=True), 65, *words)


# ---- sound files that are no Stable Diffusion 1 ----


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_unet_mid.lora_down.weight": [4, 8], "lora_unet_mid.alpha": []}, ["LoRA"]),
        ({"encoder.conv_in.weight": [4, 3, 3, 3], "decoder.conv_in.weight": [4, 4, 3, 3]}, ["VAE only"]),
        ({"model.diffusion_model.input_blocks.0.0.weight": [4, 4, 3, 3],
          "conditioner.embedders.1.model.x": [1]}, ["SDXL"]),
        ({"model.diffusion_model.input_blocks.0.0.weight": [4, 4, 3, 3],
          "cond_stage_model.model.transformer.resblocks.0.x": [1]}, ["Stable Diffusion 2"]),
        ({"control_model.input_hint_block.0.weight": [1]}, ["ControlNet"]),
        ({"double_blocks.0.x": [1], "img_in.weight": [1]}, ["Flux"]),
        ({f"some\x1b[31m.{i}": [2] for i in range(9)}, ["no model", "some\\x1b[31m.0", "4 more"]),
    ],
)  # fmt: skip
def test_other_models_are_named(tmp_path: Path, shapes: dict[str, list[int]], words: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(empty_tensors(shapes))
    assert_lean_refusal(path, 65, *words)
    info = ldm("info", path)
    if "SDXL" in words or "Flux" in words or "LoRA" in words:
        assert info.code == 0
        assert words[0] in info.out.decode()


def test_an_inpainting_model_and_strange_shapes_in_one_file(tmp_path: Path) -> None:
    header, data = read_safetensors(tiny_single_file())
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    del data
    first = "model.diffusion_model.input_blocks.0.0.weight"
    path = tmp_path / "model.safetensors"
    for changes, words in (
        ({first: [32, 9, 3, 3]}, ["inpainting"]),
        ({name: [33, *shape[1:]] for name, shape in shapes.items() if name.endswith("out_layers.3.weight")},
         ["33 channels", "32 norm groups"]),
        ({"nonsense.weight": [1]}, ["no known part", "nonsense.weight"]),
        ({"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": [1, 64]}, ["1 tokens"]),
        ({f"model.diffusion_model.input_blocks.{i}.x": [0] for i in range(50_000)}, ["fit no Stable Diffusion"]),
    ):  # fmt: skip
        replace(path, empty_tensors(shapes | changes))
        assert_lean_refusal(path, 65, *words)
    del shapes["first_stage_model.post_quant_conv.weight"]
    replace(path, empty_tensors(shapes))
    assert_lean_refusal(path, 65, "post_quant_conv.weight", "missing")


# ---- folders ----


CONFIGURATIONS: list[tuple[str, dict[str, Any], str]] = [
    ("unet", {"block_out_channels": [1]}, "down_block_types"),
    ("unet", {"block_out_channels": []}, "block_out_channels"),
    ("unet", {"block_out_channels": [1, 1], "norm_num_groups": 1, "attention_head_dim": 1}, "freq_shift"),
    ("unet", {"block_out_channels": "\x1b[31m\u202e"}, "\\x1b[31m\\u202e"),
    ("unet", {"norm_num_groups": 3}, "norm groups"),
    ("unet", {"attention_head_dim": 3}, "3 attention heads"),
    ("unet", {"layers_per_block": 10**9}, "layers_per_block"),
    ("unet", {"layers_per_block": 10**6}, "1000000 layers"),
    ("unet", {"transformer_layers_per_block": 10**6}, "1000000 transformer layers"),
    ("unet", {"transformer_layers_per_block": [1, 10**6]}, "1000000 transformer layers"),
    ("unet", {"sample_size": 1 << 24}, "picture size"),
    ("unet", {"out_channels": 8}, "gives 8"),
    ("unet", {"in_channels": 9}, "inpainting"),
    ("unet", {"norm_eps": -1}, "norm_eps"),
    ("unet", {"freq_shift": 4}, "freq_shift"),
    ("unet", {"cross_attention_dim": 32}, "not of one model"),
    ("unet", {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "attends"),
    ("unet", {"down_block_types": ["MagicBlock"] * 2}, "MagicBlock"),
    ("unet", {"addition_embed_type": "text_time"}, "SDXL"),
    ("vae", {"in_channels": 1}, "red, green and blue"),
    ("vae", {"scaling_factor": 0}, "scaling_factor"),
    ("vae", {"layers_per_block": 10**6}, "1000000 layers"),
    ("vae", {"norm_num_groups": 3}, "norm groups"),
    ("vae", {"latent_channels": 8}, "not of one model"),
    ("text_encoder", {"num_hidden_layers": 10**6}, "1000000 layers"),
    ("text_encoder", {"num_attention_heads": 3}, "3 attention heads"),
    ("text_encoder", {"hidden_act": "\x1b[31m"}, "hidden_act"),
    ("text_encoder", {"max_position_embeddings": 1 << 24}, "tokens"),
    ("text_encoder", {"max_position_embeddings": 1}, "1 tokens"),
    ("text_encoder", {"vocab_size": 100}, "not of one model"),
    ("text_encoder", {"layer_norm_eps": -1}, "norm_eps"),
    ("scheduler", {"num_train_timesteps": 1 << 24}, "training steps"),
    ("scheduler", {"beta_start": -1}, "betas"),
    ("scheduler", {"beta_end": 5}, "betas"),
    ("scheduler", {"trained_betas": ["x"] * 1000}, "trained_betas"),
    ("scheduler", {"trained_betas": [0.9] * 1000}, "betas"),
    ("scheduler", {"prediction_type": "\x1b"}, "prediction_type"),
    ("scheduler", {"beta_schedule": "cosine"}, "cosine"),
]


@pytest.mark.parametrize(("part", "fields", "words"), CONFIGURATIONS)
def test_absurd_configurations(tmp_path: Path, part: str, fields: dict[str, Any], words: str) -> None:
    assert_lean_refusal(reconfigured(tmp_path / "model", part, **fields), 65, words)


def test_broken_configurations(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    config = folder / "unet" / "config.json"
    for content, words in (
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"block_out_channels":' + b"[" * 900 + b"]" * 900 + b"}", "block_out_channels"),
        (b'{"sample_size":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"sample_size":1e999}', "sample_size"),
        (b" " * (2 << 20), "too large"),
    ):
        replace(config, content)
        assert_lean_refusal(folder, 65, "config.json", words)
    config.unlink()
    assert_lean_refusal(folder, 66, "config.json", "missing")
    os.mkfifo(config)
    assert_lean_refusal(folder, 65, "config.json", "pipe")
    index = folder / "model_index.json"
    for value, words in (
        ({"_class_name": "StableDiffusionXLPipeline"}, "SDXL"),
        ({"_class_name": "Flux\x1b[31m", "transformer": []}, "Flux\\x1b[31m"),
        ({"text_encoder": ["transformers", "T5"]}, "is a model, not"),
    ):
        replace(index, value)
        assert_lean_refusal(folder, 65, words)


_ENDS = '"<|startoftext|>":512,"<|endoftext|>":513'


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("vocab.json", None, 66, "incomplete"),
        ("vocab.json", "{", 65, "not valid JSON"),
        ("vocab.json", "[]", 65, "JSON object"),
        ("vocab.json", "{}", 65, "<|startoftext|>"),
        ("vocab.json", '{"a":"b"}', 65, "token ids"),
        ("vocab.json", '{"<|startoftext|>":0,"<|endoftext|>":-5}', 65, "number -5"),
        ("vocab.json", '{"<|startoftext|>":0,"<|endoftext|>":99999999999999999999}', 65, "not of one model"),
        ("vocab.json", '{"<|startoftext|>":0,"<|endoftext|>":514}', 65, "0 to 513"),
        ("merges.txt", "a b c\n", 65, "two tokens"),
        ("merges.txt", "zz \x1b[31m\n", 65, "zz"),
        ("merges.txt", "a b\n", 65, "'a' and 'b'"),
        ("tokenizer_config.json", '{"pad_token":"no\\u001b"}', 65, "no\\x1b"),
        ("tokenizer.json", '{"model":{"vocab":{%s},"merges":["a b"]}}'.replace("%s", _ENDS), 65, "'a' and 'b'"),
        ("tokenizer.json", '{"model":{"vocab":{%s},"merges":[["a",5]]}}'.replace("%s", _ENDS), 65, "two tokens"),
        ("tokenizer.json", '{"model":[]}', 65, "tokenizer"),
        ("tokenizer.json", '{"model":{"vocab":{%s},"merges":5}}'.replace("%s", _ENDS), 65, "tokenizer"),
        ("tokenizer.json", '{"model":{"vocab":{},"merges":[1]}}', 65, "tokenizer"),
    ],
)
def test_broken_tokenizers(tmp_path: Path, name: str, content: str | None, code: int, words: str) -> None:
    folder = copy_model(tmp_path / "model") / "tokenizer"
    if name == "tokenizer.json" or content is None:
        (folder / "vocab.json").unlink()
    if content is not None:
        replace(folder / name, content)
    assert_lean_refusal(folder.parent, code, words)


def test_broken_parts_of_a_folder(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    weights = folder / UNET
    whole = weights.read_bytes()
    replace(weights, whole[: len(whole) // 2])
    assert_lean_refusal(folder, 65, "cut short")
    weights.unlink()
    assert_lean_refusal(folder, 66, "no diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    assert_lean_refusal(folder, 65, "pickle", "convert")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(whole)
    header, _ = read_safetensors(outside)
    index = weights.with_name(f"{weights.name}.index.json")
    (folder / "unet" / "link.safetensors").symlink_to(outside)
    for name, words in (("../../outside.safetensors", "beside"), ("link.safetensors", "out of the folder")):
        replace(index, {"weight_map": {key: name for key in header if key != "__metadata__"}})
        assert_lean_refusal(folder, 65, words)
    index.unlink()
    index.symlink_to(index)
    assert_lean_refusal(folder, 65, "circle")


# ---- weights that only loading can judge ----


def rewritten(path: Path, change: Callable[[dict[str, Any], bytearray], object]) -> None:
    header, data = read_safetensors(path)
    body = bytearray(data)
    change(header, body)
    replace(path, safetensors(header, bytes(body)))


def test_missing_extra_and_misshapen_weights(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")

    def change(header: dict[str, Any], _data: bytearray) -> None:
        for name in sorted(name for name in header if name.startswith("down_blocks.0."))[:7]:
            header[f"extra\x1b.{name}"] = header.pop(name)
        bias = header["conv_in.bias"]
        bias["shape"] = [2, 4]

    rewritten(folder / UNET, change)
    result = draw(folder, cwd=tmp_path)
    sentence = assert_refused(
        result, 65, "lacks tensors", "and 2 more", "extra\\x1b.down", "conv_in.bias: [2, 4] for [8]"
    )
    assert sentence.count("extra\\x1b") == 5


def test_not_a_number_in_weights(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")

    def change(header: dict[str, Any], data: bytearray) -> None:
        start, end = header["conv_out.weight"]["data_offsets"]
        data[end - 4 : end] = struct.pack("<f", float("nan"))
        assert start < end

    rewritten(folder / UNET, change)
    assert_refused(draw(folder, cwd=tmp_path), 65, "NaN", "conv_out.weight")


def test_weights_that_overflow_never_give_a_black_picture(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")

    def change(header: dict[str, Any], data: bytearray) -> None:
        for name in ("conv_in.weight", "conv_out.weight"):
            start, end = header[name]["data_offsets"]
            data[start:end] = struct.pack("<f", 3e38) * ((end - start) // 4)

    rewritten(folder / UNET, change)
    assert_refused(draw(folder, "--dtype", "fp32", cwd=tmp_path), 1, "not finite")
    assert list((tmp_path / "out").iterdir()) == []


# ---- prompts ----


def test_prompts_that_are_no_text_are_refused_unloaded(tmp_path: Path) -> None:
    common = ("txt2img", "-m", tiny_model(), "-o", tmp_path / "out")
    assert_refused(ldm(*common, b"caf\xe9"), 2, "prompt", "Unicode")
    assert_refused(ldm(*common, "fine", "-n", b"\xed\xa0\x80"), 2, "negative_prompt", "Unicode")
    assert_refused(ldm(*common, "-", stdin=b"a\0b\n"), 65, "line 1", "NUL")
    assert_refused(ldm(*common, "-", stdin=b"\nfine\xff\n"), 65, "line 2", "0xff")
    assert_refused(ldm(*common, "-", stdin=b"\xed\xa0\x80"), 65, "line 1", "UTF-8")
    long = ldm(*common, "-", stdin=b"\n" + b"x" * (64 << 20), measure=True)
    assert_refused(long, 65, "line 2", "longer than 1048576 bytes")
    assert long.peak < LEAN
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("letter", ["x", "x ", "\u0301", " ", "'", "é"])
def test_the_longest_prompts_are_bounded(tmp_path: Path, letter: str) -> None:
    """One megabyte, refused for its length before weights are read, by CLIP's own vocabulary too."""
    prompt = (letter * (1 << 20)).encode()[: 1 << 20].decode("utf-8", "ignore") + "\n"
    models = (tiny_model(), tiny_single_file()) if letter != " " else ()
    for model in models:
        common = ("txt2img", "-m", model, "-", "-o", tmp_path / "out", "--on-long-prompt", "error")
        result = ldm(*common, stdin=prompt.encode(), measure=True)
        sentence = assert_refused(result, 2, "too much")
        assert len(sentence) < 2000
        assert result.peak < 1 << 30


def test_long_empty_and_coloured_prompts_are_drawn(tmp_path: Path) -> None:
    """A prompt too long gives one warning with the text that was cut, safe to print; the picture keeps it all."""
    long = "x" * 75 + "CUT\x1b[31m\u202e\nend"
    result = ldm("txt2img", "-m", tiny_model(), "", long, "two\nlines", "-n", "y" * 76, "-c", "2", "-s", "1",
                 "--steps", "1", "-o", tmp_path, "--device", "cpu")  # fmt: skip
    assert result.code == 0
    assert len(result.paths) == 6
    warnings = result.err.splitlines()
    assert len(warnings) == 2
    assert all(line.isprintable() and "75 tokens" in line for line in warnings)
    assert "“y”" in warnings[0]
    assert "“CUT\\x1b[31m\\u202e\\nend”" in warnings[1]
    assert_refused(
        ldm("txt2img", "-m", tiny_model(), "a", long, "-s", "1", "--on-long-prompt", "error", "-o", tmp_path / "no"),
        2, "CUT\\x1b[31m\\u202e\\nend",
    )  # fmt: skip
    assert not (tmp_path / "no").exists()
    picture = result.paths[2]
    assert ldm("info", "--json", picture).records[0]["request"]["prompt"] == long
    shown = ldm("info", picture).out.decode()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert pixels(picture).std() > 0


# ---- pictures ----


def test_pictures_that_hold_no_request(tmp_path: Path) -> None:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0))
    end = chunk(b"IEND", b"")
    parameters = chunk(b"tEXt", b"parameters\0a cat\nSteps: 1, Sampler: Euler, Seed: 1")
    pictures = {
        "foreign.png": (head + parameters + end, ("AUTOMATIC1111",)),
        "comfy.png": (head + chunk(b"tEXt", b'prompt\0{"3":{}}') + end, ("ComfyUI",)),
        "cut.png": (head + parameters[:-9], ("cut off",)),
        "big.png": (head + chunk(b"tEXt", b"parameters\0" + b"x" * (70 << 20)) + end, ("MiB of text",)),
        "bomb.png": (head + chunk(b"zTXt", b"ldmcli\0\0" + zlib_bomb()) + end, ("zTXt",)),
        "wild.png": (head + chunk(b"tEXt", b'ldmcli\0{"version":"9"}') + end, ("request",)),
        "seed.png": (head + chunk(b"tEXt", b"ldmcli\0" + wild_record()) + end, ("seed", "abc")),
        "page.png": (b"<html>", ("not a PNG",)),
    }
    for name, (content, words) in pictures.items():
        (tmp_path / name).write_bytes(content)
        result = ldm("txt2img", "--from-image", tmp_path / name, cwd=tmp_path, measure=True)
        assert_refused(result, 65, name, *words)
        assert result.peak < LEAN
    assert_refused(ldm("txt2img", "--from-image", tmp_path / "foreing.png"), 66, "foreign.png")
    assert_refused(ldm("txt2img", "--from-image", tmp_path), 65, "folder")
    assert "Sampler: Euler" in ldm("info", tmp_path / "foreign.png").out.decode()
    assert_refused(ldm("info", tmp_path / "big.png", measure=True), 65, "MiB of text")


def zlib_bomb() -> bytes:
    import zlib

    return zlib.compress(bytes(200 << 20), 9)


def wild_record() -> bytes:
    model = {"name": "m", "path": "", "sha256": ""}
    request = {"prompt": "x", "seed": "abc\u202e"}
    return json.dumps({"version": "1", "request": request, "model": model, "runtime": {}}).encode()


# ---- devices ----


@dataclasses.dataclass(frozen=True)
class Choice:
    options: tuple[str, ...]
    words: tuple[str, ...]


@pytest.mark.parametrize(
    "choice",
    [
        Choice(("--device", "cuda"), ("device cuda", "--device cpu")),
        Choice(("--device", "cuda:7"), ("device cuda:7", "--device cpu")),
        Choice(("--device", "cpu", "--attention", "xformers"), ("xformers", "CUDA", "--attention sdpa")),
        Choice(("--device", "cpu", "--dtype", "fp16"), ("fp16", "--dtype bf16")),
    ],
    ids=lambda choice: " ".join(choice.options),
)
def test_what_this_machine_cannot_do(tmp_path: Path, choice: Choice) -> None:
    result = draw(tiny_model(), *choice.options, env={"CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path)
    assert_refused(result, 2, *choice.words)
    assert error_sentence(result.err).endswith(".")
