"""What the tests of the command line share: `ldm` as a real process, and a random model that draws in a moment."""

import atexit
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "tiny-emoji" / "model_index.json"
LDM = (sys.executable, "-m", "ldmcli")
SECONDS = 30  # bound of one refusal, which takes 0.1 s without torch and 2 s with it on a quiet machine
# FIELD_NOTES §3: what A1111 applies to the last line.
A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# Runs its arguments and writes their peak memory in KiB to descriptor 3. A process inherits the peak of the one that
# started it, so pytest itself (with torch) must not be the one.
_MEASURED = """
import os, resource, sys
child = os.fork()
if child == 0:
    os.close(3)
    os.execv(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(child, 0)
os.write(3, str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss).encode())
os._exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished `ldm` left: exit code (negative: killed by a signal), both outputs, wall time."""

    code: int
    out: bytes
    err: str
    seconds: float
    peak: int = 0  # bytes, where it was asked for

    @property
    def paths(self) -> list[Path]:
        """The reported paths; asserts that stdout holds nothing else."""
        paths = [Path(os.fsdecode(line)) for line in self.out.splitlines()]
        assert all(path.suffix in (".png", ".jpg", ".webp") and path.is_file() for path in paths), self
        return paths

    @property
    def records(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


def status_of(process: "subprocess.Popen[bytes]") -> int:
    """How a process ended, as a shell tells it: 128 and the signal's number where it died of one."""
    code = process.returncode
    return 128 - code if code < 0 else code


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without ldm's own variables, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.lstrip("_").startswith("LDM_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED"):
        kept.pop(name, None)
    return kept | {"OMP_NUM_THREADS": "1"} | dict(extra or {})


def ldm(
    *arguments: str | bytes | Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    program: Sequence[str] = LDM,
    timeout: float = 120,
    measure: bool = False,
) -> Result:
    """Run `ldm ARGUMENTS` to its end. Whatever happens, it must not show a traceback."""
    command = [*program, *(os.fspath(a) if isinstance(a, Path) else a for a in arguments)]
    began = time.perf_counter()
    peak = 0
    if measure:
        reading, writing = os.pipe()
        keep = f'exec 3>&{writing} {writing}>&-; exec "$@"'
        command = ["/bin/bash", "-c", keep, "-", sys.executable, "-S", "-c", _MEASURED, *command]
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=environment(env), cwd=cwd, timeout=timeout,
            pass_fds=[writing], check=False,
        )  # fmt: skip
        os.close(writing)
        with open(reading, "rb") as pipe:
            peak = int(pipe.read()) * 1024
    else:
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=environment(env), cwd=cwd, timeout=timeout, check=False
        )
    seconds = time.perf_counter() - began
    result = Result(done.returncode, done.stdout, done.stderr.decode("utf-8", "backslashreplace"), seconds, peak)
    assert "Traceback" not in result.err, result.err
    return result


def ldm_here(
    *arguments: str | bytes | Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """What `ldm ARGUMENTS` does, in this process: a hundred times faster, for all that is not about processes."""
    from ldmcli.cli import run

    log = logging.getLogger("ldmcli")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        streams = {name: stack.enter_context(tempfile.TemporaryFile()) for name in ("stdin", "stdout", "stderr")}
        streams["stdin"].write(stdin)
        streams["stdin"].seek(0)
        for name, stream in streams.items():
            patch.setattr(sys, name, io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", write_through=True))
        for name in set(os.environ) - set(environment(env)):
            patch.delenv(name)
        for name, value in environment(env).items():
            patch.setenv(name, value)
        if cwd:
            patch.chdir(cwd)
        began = time.perf_counter()
        code = run([os.fsdecode(argument) for argument in arguments])
        seconds = time.perf_counter() - began
        log.handlers.clear()
        out, err = ((stream.seek(0), stream.read())[1] for stream in (streams["stdout"], streams["stderr"]))
        return Result(code, out, err.decode("utf-8", "backslashreplace"), seconds)


def assert_refused(result: Result, code: int, *words: str, seconds: float = SECONDS) -> str:
    """Assert that `result` is a refusal: its exit code, nothing on stdout, one readable sentence with `words`."""
    assert result.code == code, result
    assert result.out == b"", result
    sentence = error_sentence(result.err)
    for word in words:
        assert word.lower() in sentence.lower(), sentence
    assert result.seconds < seconds, result
    return sentence


def error_sentence(err: str) -> str:
    """The error on stderr; asserts that it is one, at the end, in a line that a terminal shows as it stands."""
    lines = [line for line in err.splitlines() if line != "ldm: no CUDA device found; running on the CPU"]
    assert len(lines) == 1, err
    assert lines[0].startswith("ldm: error: "), err
    assert lines[0].endswith((".", "?")), err
    assert lines[0].isprintable(), err
    assert len(lines[0]) < 2500, err
    return lines[0]


def start(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, **streams: Any
) -> "subprocess.Popen[bytes]":
    """Start `ldm ARGUMENTS`, its streams pipes unless given."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([*LDM, *map(str, arguments)], env=environment(env), cwd=cwd, **pipes)


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for `condition` to become true, and return what it gave."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)
    return value


def chunk(kind: bytes, data: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(png: Path | bytes) -> np.ndarray:
    """The pixels of a whole, sound PNG, by Pillow."""
    from PIL import Image

    data = png if isinstance(png, bytes) else png.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def safetensors(header: bytes | str | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    header = json.dumps(header) if isinstance(header, dict) else header
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def empty_tensors(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """A safetensors file with tensors of these shapes, all zero, in 16 bits."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return safetensors(header, bytes(end))


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


# ---- the random model ----

_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 2, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 16, "attention_head_dim": 2,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [4, 4, 4, 8], "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4, "scaling_factor": 0.18215,
}  # fmt: skip
_TEXT = {
    "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "hidden_act": "quick_gelu", "bos_token_id": 512, "eos_token_id": 513,
}  # fmt: skip
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ldmcli-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_model() -> Path:
    """A random Stable Diffusion 1 in diffusers layout, 0.4 MB, that draws 16×16 pixels; change only a `copy_model`.

    Its tokens are single bytes, so a prompt of more than 75 letters is too long.
    """
    return make_model(_scratch() / "tiny", _UNET, _VAE, _TEXT)


@functools.cache
def tiny_model_of(channels: int) -> Path:
    """As `tiny_model`, with a U-Net of so many input channels."""
    return make_model(_scratch() / f"tiny-{channels}", _UNET | {"in_channels": channels}, _VAE, _TEXT)


def make_model(folder: Path, unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> Path:
    """Write random weights for these config.json and a tokenizer of bytes."""
    import torch
    from safetensors.torch import save_file

    from ldmcli.checkpoints import folder_config
    from ldmcli.conditioning.tokenizer import _byte_alphabet
    from ldmcli.networks.clip import TextTransformer
    from ldmcli.networks.unet import UNet
    from ldmcli.networks.vae import AutoencoderKL

    parts = (("unet", unet), ("vae", vae), ("text_encoder", text))
    for name, config in parts:
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(_INDEX))
    (folder / "tokenizer").mkdir()
    letters = _byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text_config = folder_config.text_encoder_config(
        folder / "text_encoder" / "config.json", "text_encoder", "CLIPTextModel"
    )
    modules = {
        "unet": UNet(folder_config.unet_config(folder / "unet" / "config.json")),
        "vae": AutoencoderKL(folder_config.vae_config(folder / "vae" / "config.json")),
        "text_encoder": TextTransformer(text_config),
    }
    for name, module in modules.items():
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        state = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        save_file(state, folder / name / f"{stem}.safetensors")
    return folder


@functools.cache
def tiny_single_file() -> Path:
    """The same kind of model as one file in Stable Diffusion's original layout (12 MB: CLIP's whole vocabulary)."""
    from safetensors.torch import load_file, save_file

    from ldmcli.checkpoints.families import SD1
    from ldmcli.checkpoints.key_map import UNET_PREFIX, VAE_PREFIX, disk_names
    from ldmcli.checkpoints.source import open_model

    unet = _UNET | {"block_out_channels": [32, 32], "norm_num_groups": 32, "attention_head_dim": 8}
    unet |= {"cross_attention_dim": 64}
    vae = _VAE | {"block_out_channels": [32] * 4, "norm_num_groups": 32}
    text = _TEXT | {"hidden_size": 64, "num_attention_heads": 1, "vocab_size": 49408, "bos_token_id": 49406}
    model = open_model(make_model(_scratch() / "parts", unet, vae, text | {"eos_token_id": 49407}))
    state = {}
    for part, prefix in (("unet", UNET_PREFIX), ("vae", VAE_PREFIX), ("text_encoder", SD1.texts[0].prefix)):
        source = model.part(part)
        tensors = load_file(source.files[0].path)
        names = disk_names(tensors, source.config, prefix, original=True)
        state |= {names[key][0]: tensor.half() for key, tensor in tensors.items()}
    path = _scratch() / "single.safetensors"
    save_file(state, path)
    return path


def copy_model(folder: Path) -> Path:
    """A copy of the random model at `folder` whose files may be replaced or deleted, but not written into."""
    shutil.copytree(tiny_model(), folder, copy_function=os.link)
    return folder


def replace(path: Path, content: bytes | str | dict[str, Any]) -> Path:
    """Put `content` (a dict: as JSON) in place of the file `path`, leaving whatever else links to it alone."""
    path.unlink(missing_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def reconfigured(folder: Path, part: str, **fields: Any) -> Path:
    """A copy of the random model at `folder`, whose config.json of `part` has `fields` changed."""
    copy_model(folder)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = folder / part / name
    config.parent.mkdir(exist_ok=True)
    before = json.loads(config.read_text()) if config.exists() else {}
    replace(config, before | fields)
    return folder
