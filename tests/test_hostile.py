"""FIELD_NOTES §6: hostile configurations, prompts and pictures. Each is refused by name, in bounded time and memory."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import (
    LDM,
    assert_refused,
    chunk,
    copy_model,
    ldm,
    ldm_here,
    pixels,
    reconfigured,
    replace,
    tiny_model,
    tiny_single_file,
)
from fork_server import LEAN, quick
from PIL import Image
from safetensors.torch import save
from weight_corpus import UNET, rewritten

pytestmark = pytest.mark.timeout(300)


def draw(model: Path, *options: str, **more: Any) -> Any:
    """`ldm txt2img` with a model."""
    return quick("txt2img", "x", "-m", model, "-s", "1", "--steps", "1", *options, "-o", "out", **more)


def assert_lean_refusal(model: Path, code: int, *words: str) -> str:
    """`ldm txt2img` refuses this model before torch, leaving nothing behind."""
    result = draw(model, cwd=model.parent)
    assert result.peak < LEAN
    assert not (model.parent / "out").exists()
    return assert_refused(result, code, *words)


# ---- paths ----


@pytest.mark.parametrize("name", ["pipe", "folder", "picture.png", "cut", "huge"])
def test_files_that_are_no_adapter_embedding_or_upscaler(tmp_path: Path, name: str) -> None:
    """Named as one, they are refused at once, with the advice that belongs to it: a pipe is not even opened."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    whole = save({"body.0.weight": torch.zeros(4, 3, 3, 3)})
    (tmp_path / "cut").write_bytes(whole[:-8])
    header = b'{"body.0.weight":{"dtype":"F32","shape":[1048576,3,1024,1024],"data_offsets":[0,16]}}'
    (tmp_path / "huge").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    advice = {"--lora": "LoRA or another adapter", "--embedding": "textual-inversion", "--upscale": "an upscaler"}
    for option, cure in advice.items():
        result = quick("txt2img", "x", "-m", tiny_model(), option, name, "-o", "out.png", cwd=tmp_path)
        sentence = assert_refused(result, 65, name)
        assert "model_index" not in sentence
        assert cure in sentence or name not in ("pipe", "folder") or "name the adapter's file" in sentence
        assert result.peak < 1 << 30  # torch's libraries may be on their way
    assert_refused(quick("upscale", "picture.png", "-m", name, "-o", "out.png", cwd=tmp_path), 65, name)
    assert not (tmp_path / "out.png").exists()


def test_paths_that_a_shell_would_have_changed() -> None:
    assert_refused(quick("txt2img", "x", "-m", "~no-such-user/model"), 66, "not exist")
    assert_refused(quick("info", "~no-such-user/model"), 66, "not exist")
    assert_refused(quick("txt2img", "x", "-m", b"/tmp/\xff\x1b[31m"), 66, "\\udcff\\x1b[31m")


def test_a_picture_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("fifo.png", "/dev/zero"):
        assert_refused(quick("txt2img", "--from-image", tmp_path / name), 65)


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
    ("unet", {"in_channels": 6}, "another kind of U-Net (6 input channels)"),
    ("unet", {"norm_eps": -1}, "norm_eps"),
    ("unet", {"freq_shift": 4}, "freq_shift"),
    ("unet", {"cross_attention_dim": 32}, "not of one model"),
    ("unet", {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "attends"),
    ("unet", {"down_block_types": ["MagicBlock"] * 2}, "MagicBlock"),
    ("unet", {"addition_embed_type": "text_time"}, "not of one model"),
    ("unet", {"addition_embed_type": "image"}, "addition_embed_type"),
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
        ({"_class_name": "AltDiffusionPipeline", "text_encoder": ["alt", "Roberta"]}, "AltDiffusionPipeline"),
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
    assert_refused(draw(folder.parent, cwd=tmp_path), code, words)
    assert not (tmp_path / "out").exists()


# ---- weights that are sound numbers, and too large ----


def test_weights_that_overflow_never_give_a_black_picture(tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")

    def change(header: dict[str, Any], data: bytearray) -> None:
        for name in ("conv_in.weight", "conv_out.weight"):
            start, end = header[name]["data_offsets"]
            data[start:end] = struct.pack("<f", 3e38) * ((end - start) // 4)

    rewritten(folder / UNET, change)
    arguments = ("-s", "1", "--steps", "1", "--dtype", "fp32", "-o", "out")
    assert_refused(ldm_here("txt2img", "x", "-m", folder, *arguments, cwd=tmp_path), 1, "not finite")
    assert list((tmp_path / "out").iterdir()) == []


# ---- prompts ----


def test_prompts_that_are_no_text_are_refused_unloaded(tmp_path: Path) -> None:
    common = ("txt2img", "-m", tiny_model(), "-o", tmp_path / "out")
    assert_refused(quick(*common, b"caf\xe9"), 2, "prompt", "Unicode")
    assert_refused(quick(*common, "fine", "-n", b"\xed\xa0\x80"), 2, "negative_prompt", "Unicode")
    assert_refused(quick(*common, "-", stdin=b"a\0b\n"), 65, "line 1", "NUL")
    assert_refused(quick(*common, "-", stdin=b"\nfine\xff\n"), 65, "line 2", "0xff")
    assert_refused(quick(*common, "-", stdin=b"\xed\xa0\x80"), 65, "line 1", "UTF-8")
    long = quick(*common, "-", stdin=b"\n" + b"x" * (64 << 20))
    assert_refused(long, 65, "line 2", "longer than 4 MiB")
    assert long.peak < LEAN
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("letter", ["x", "\u0301"])
def test_the_longest_prompts_are_bounded(tmp_path: Path, letter: str) -> None:
    """One megabyte, refused for its length before weights are read, by CLIP's own vocabulary too."""
    prompt = (letter * (1 << 20)).encode()[: 1 << 20].decode("utf-8", "ignore") + "\n"
    for model in (tiny_model(), tiny_single_file()):
        common = ("txt2img", "-m", model, "-", "-o", tmp_path / "out", "--on-long-prompt", "error")
        result = quick(*common, stdin=prompt.encode())
        assert len(assert_refused(result, 2, "too much")) < 2000
        assert result.peak < 1 << 30


def test_long_empty_and_coloured_prompts_are_drawn(tmp_path: Path) -> None:
    """A prompt too long gives one warning with the text that was cut, safe to print; the picture keeps it all."""
    long = "x" * 75 + "CUT\x1b[31m\u202e\nend"
    result = quick("txt2img", "-m", tiny_model(), "", long, "two\nlines", "-n", "y" * 76, "-c", "2", "-s", "1",
                 "--steps", "1", "-o", tmp_path, "--device", "cpu")  # fmt: skip
    assert result.code == 0
    assert len(result.paths) == 6
    empty, *warnings = result.err.splitlines()
    assert "a prompt is empty" in empty
    assert len(warnings) == 2
    assert all(line.isprintable() and "75 tokens" in line for line in warnings)
    assert "“y”" in warnings[0]
    assert "“CUT\\x1b[31m\\u202e\\nend”" in warnings[1]
    assert_refused(
        quick("txt2img", "-m", tiny_model(), "a", long, "-s", "1", "--on-long-prompt", "error", "-o", tmp_path / "no"),
        2, "CUT\\x1b[31m\\u202e\\nend",
    )  # fmt: skip
    assert not (tmp_path / "no").exists()
    picture = result.paths[2]
    assert quick("info", "--json", picture).records[0]["request"]["prompt"] == long
    shown = quick("info", picture).out.decode()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert pixels(picture).std() > 0


# ---- pictures ----


def test_pictures_that_hold_no_request(tmp_path: Path) -> None:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0))
    end = chunk(b"IEND", b"")
    parameters = chunk(b"tEXt", b"parameters\0a cat\nSteps: 1, Sampler: Euler, Seed: 1")
    pictures = {
        "foreign.png": (head + chunk(b"tEXt", b"parameters\0a cat, Steps: 1") + end, ("AUTOMATIC1111",)),
        "comfy.png": (head + chunk(b"tEXt", b'prompt\0{"3":{}}') + end, ("ComfyUI",)),
        "cut.png": (head + parameters[:-9], ("cut off",)),
        "big.png": (head + chunk(b"tEXt", b"parameters\0" + b"x" * (70 << 20)) + end, ("MiB of text",)),
        "bomb.png": (head + chunk(b"zTXt", b"ldmcli\0\0" + zlib_bomb()) + end, ("zTXt",)),
        "wild.png": (head + chunk(b"tEXt", b'ldmcli\0{"version":"9"}') + end, ("request",)),
        "seed.png": (head + chunk(b"tEXt", b"ldmcli\0" + wild_record()) + end, ("seed", "abc")),
        "page.png": (b"<html>", ("no PNG, JPEG or WebP",)),
    }
    for name, (content, words) in pictures.items():
        (tmp_path / name).write_bytes(content)
        result = quick("txt2img", "--from-image", tmp_path / name, cwd=tmp_path)
        assert_refused(result, 65, name, *words)
        assert result.peak < LEAN
    assert_refused(quick("txt2img", "--from-image", tmp_path / "foreing.png"), 66, "foreign.png")
    assert_refused(quick("txt2img", "--from-image", tmp_path), 65, "folder")
    assert "a cat, Steps: 1" in quick("info", tmp_path / "foreign.png").out.decode()
    assert_refused(quick("info", tmp_path / "big.png"), 65, "MiB of text")


def zlib_bomb() -> bytes:
    import zlib

    return zlib.compress(bytes(200 << 20), 9)


def wild_record() -> bytes:
    model = {"name": "m", "path": "", "sha256": ""}
    request = {"prompt": "x", "seed": "abc\u202e"}
    return json.dumps({"version": "1", "request": request, "model": model, "runtime": {}}).encode()


# ---- devices ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cuda:7"), ("device cuda:7", "--device cpu")),
        (("--device", "cpu", "--attention", "xformers"), ("xformers", "CUDA", "--attention sdpa")),
        (("--device", "cpu", "--dtype", "fp16"), ("fp16", "--dtype bf16")),
    ],
    ids=" ".join,
)
def test_what_this_machine_cannot_do(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = draw(tiny_model(), *options, env={"CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path)
    assert_refused(result, 2, *words)
