"""`ldm serve` and the commands that draw with it: the same files, words and exit codes as without it."""

import contextlib
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_support import noise, write
from cli_support import Result, environment, ldm_here, start, tiny_model, until
from control_support import random_control
from control_support import write as write_network
from image_prompt_support import random_encoder, write_ip_adapter
from paper_models import class_map, small, write_model
from picture_models import small as small_of_pictures
from PIL import Image
from test_lora import lora_for

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session, remarks
from ldmcli.checkpoints.source import open_model
from ldmcli.image_prompt import image_prompts_of
from ldmcli.named_files import named_files, with_files
from ldmcli.serving.connection import Connection, connect
from ldmcli.upscaling.upscaler import open_upscaler

FAST = ("--dtype", "fp32", "--device", "cpu", "--steps", "3", "-s", "1")
TINY = ("-m", "model", *FAST)


class Served:
    """A server in a process of its own, and where it listens."""

    def __init__(self, path: Path, *options: str) -> None:
        self.env = {"LDM_SERVER": str(path)}
        self.process = start("serve", *options, env=self.env)
        until(lambda: self._up() or self.process.poll() is not None, "a server listens")

    def run(self, *arguments: str | Path, **how: Any) -> Result:
        """A command in this process, which draws with the server."""
        remarks.sayings().clear()
        return ldm_here(*arguments, env=self.env, **how)

    def connect(self) -> Connection:
        connection = self._up()
        assert connection is not None
        return connection

    def _up(self) -> Connection | None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(self.env).items():
                patch.setenv(name, value)
            return connect()

    def status(self) -> dict[str, Any]:
        with contextlib.closing(self.connect()) as connection:
            return connection.call("status")

    def end(self) -> str:
        """Stop it; what it wrote to standard error."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[1].decode()


@pytest.fixture(scope="module")
def place_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "s.sock"


@pytest.fixture(scope="module")
def served(place_: Path) -> Iterator[Served]:
    server = Served(place_, "--max-models", "2")
    yield server
    assert "Traceback" not in server.end()
    assert server.process.returncode == 0
    assert not place_.exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, family_models: Any) -> Path:
    """A folder with what commands read: a model, pictures, a mask, LoRAs, embeddings, rows."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model").symlink_to(tiny_model())
    (folder / "probed.safetensors").symlink_to(family_models.path("sd2-v", "file"))
    picture = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray((picture[..., 0] > 128).astype(np.uint8) * 255).save(folder / "mask.png")
    Image.fromarray(np.dstack([picture, picture[..., 0]])).save(folder / "clear.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "bad.safetensors").write_bytes(b"nothing")
    (folder / "larger.safetensors").symlink_to(open_upscaler("embedded").weights.path)
    (folder / "loras").mkdir()
    (folder / "words").mkdir()
    lora_for(tiny_model(), folder / "loras" / "toy.safetensors")
    lora_for(tiny_model(), folder / "one.safetensors", seed=2)
    write(folder / "words" / "glow.safetensors", {"emb_params": noise(3, 16, scale=1.0)})
    write_network(folder / "net.safetensors", random_control(open_model(tiny_model()).config.unet).state_dict())
    write_ip_adapter(folder, open_model(tiny_model()).config.unet, "base")
    random_encoder().save_pretrained(folder / "image_encoder")
    (folder / "rows.jsonl").write_text('{"prompt": "a fox", "count": 3}\n{"prompt": "an owl", "steps": 2}\n')
    for name, model in (("class", "cin256-v2"), ("layout", "layout2img"), ("map", "semantic")):
        write_model(folder / f"{name}.safetensors", small(model))
    write_model(folder / "bsr.safetensors", small_of_pictures("bsr_sr"))
    (folder / "class.classes.txt").write_text("goldfish\ntench\n")
    (folder / "boxes.json").write_text('[{"label": 3, "box": [0.1, 0, 0.5, 1]}]')
    Image.fromarray(class_map(32, 24, 5)).save(folder / "classes.png")
    own = Path(__file__).parent.parent / "weights" / "tiny-emoji-silhouette" / "model.safetensors"
    (folder / "own.safetensors").symlink_to(own)
    steered = '{"prompt": "a cat", "control_net": "own.safetensors", "control_image": "mask.png"}\n'
    (folder / "steered.jsonl").write_text(steered)
    (folder / "bad.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "an owl", "steps": -2}\n')
    assert ldm_here(*COMMANDS["embedded"], "-o", "drawn.png", cwd=folder).code == 0
    return folder


def comparable(result: Result, folder: Path) -> tuple[int, bytes, str, dict[str, list[bytes]]]:
    """What a command left: exit code, outputs, and files but for times."""
    times = rb'"(seconds|phases|marks|peaks|time|check|started)": (\{[^}]*\}|[\d.]+|"[^"]*")'
    kept = {
        str(path.relative_to(folder)): sorted(re.sub(times, b"", path.read_bytes()).splitlines())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock") and path.suffix not in (".sqlite",)
    }
    return result.code, re.sub(times, b"", result.out), result.err, kept


SMALL = ("-W", "32", "-H", "24")
_SHOWN = ("--ip-adapter", "base.safetensors")
COMMANDS: dict[str, tuple[str, ...]] = {
    "embedded": ("txt2img", "a red apple", *FAST),
    "bare": ("a red apple", *FAST, "-o", "new/"),
    "several": ("txt2img", "an apple", "a pear", "-c", "3", "-b", "2", *FAST),
    "json": ("txt2img", "a fox", *TINY, "--json", "-c", "2"),
    "webp": ("txt2img", "a fox", *TINY, "-o", "a.webp", "--lossless"),
    "previews": ("txt2img", "a fox", "an owl", *TINY, "-b", "2", "--preview", "2", "--preview-file", "grows.png"),
    "stdout": ("txt2img", "a fox", *TINY, "-o", "-"),
    "stdin": ("txt2img", "-", *TINY),
    "plain": ("txt2img", "a fox", *TINY, "--no-metadata", "-o", "new/"),
    "overlong": ("txt2img", "f" * 90, *TINY, "-n", "b" * 90),
    "hint": ("txt2img", "a (fox:1.2)", *TINY, "-g", "0.5"),
    "hires": ("txt2img", "a fox", *TINY, "--hires", "2", "--hires-upscaler", "lanczos"),
    "upscaled": ("txt2img", "a fox", *TINY, "--upscale", "embedded"),
    "upscaled by a file": ("txt2img", "a fox", *TINY, "--upscale", "larger.safetensors", "--json"),
    "lora": ("txt2img", "a fox", *TINY, "--lora", "one.safetensors:0.7"),
    "tag": ("txt2img", "a <lora:toy:0.8> fox", *TINY, "--lora-dir", "loras", "--prompt-syntax", "weighted"),
    "embedding": ("txt2img", "a glow", *TINY, "--embedding", "words/glow.safetensors"),
    "embeddings": ("txt2img", "a glow", "a gleam", *TINY, "--embedding-dir", "words"),
    "unused": ("txt2img", "a fox", *TINY, "--embedding", "words/glow.safetensors"),
    "img2img": ("img2img", "a fox", *TINY, "-i", "a.png", "--strength", "0.7"),
    "mask": ("img2img", "a fox", *TINY, "-i", "a.png", "--mask", "mask.png", "--mask-blur", "1", "--json"),
    "alpha": ("img2img", "a fox", *TINY, "-i", "clear.png", "--mask", "alpha"),
    "control": ("txt2img", "a fox", *TINY, "--control-net", "net.safetensors", "--control-image", "a.png", "--canny"),
    "control with picture": ("img2img", "a fox", *FAST, "-i", "a.png", "--control-net", "silhouette", "-c", "2"),
    "piped control": ("img2img", "a fox", *TINY, "-i", "-", "--control-net", "net.safetensors", "--json"),
    "steered rows": ("batch", "steered.jsonl", "-o", "out", *FAST),
    "probed": ("txt2img", "a fox", *FAST, "-m", "probed.safetensors", "-W", "64", "-H", "64"),
    "again": ("txt2img", "--from-image", "drawn.png", "--steps", "2", "-o", "new.png"),
    "image prompt": ("txt2img", "a", *TINY, *_SHOWN, "--ip-adapter-image", "a.png", "--ip-adapter-mask", "mask.png"),
    "image encoder": ("img2img", "a fox", *TINY, *_SHOWN, "-i", "a.png", "--image-encoder", "image_encoder"),
    "piped picture": ("img2img", "a fox", *TINY, "-i", "-"),
    "idle option": ("img2img", "a fox", *TINY, "-i", "a.png", "--invert-mask"),
    "batch": ("batch", "rows.jsonl", "-o", "out", *FAST, "-b", "2"),
    "controlled batch": (
        *("batch", "rows.jsonl", "-o", "out", *FAST, "-b", "2"),
        *("--control-net", "silhouette", "--control-image", "a.png"),
    ),
    "bad rows": ("batch", "bad.jsonl", "-o", "out", *TINY, "--json"),
    "upscale": ("upscale", "a.png", "-o", "large.png", "--device", "cpu", "--dtype", "fp32"),
    "upscale some": (
        "upscale",
        "a.png",
        "bad.png",
        "clear.png",
        "-o",
        "l/",
        "--size",
        "20x",
        "--format",
        "jpeg",
        "--device",
        "cpu",
    ),
    "upscale by a file": ("upscale", "a.png", "-m", "larger.safetensors", "-o", "b.png", "--device", "cpu"),
    "drawn larger": ("upscale", "a.png", "clear.png", "-m", "bsr.safetensors", "-o", "l/", *FAST, "--json"),
    "drawn larger by patches": ("upscale", "a.png", "-m", "bsr.safetensors", "-o", "b.webp", *FAST, "--tile", "16"),
    "drawn larger in vain": ("upscale", "a.png", "-m", "bsr.safetensors", "-o", "b.png", "--noise-level", "9"),
    "drawn larger from nothing": ("upscale", "bad.png", "-m", "bsr.safetensors", "-o", "b.png", *FAST),
    "drawn larger by none": ("upscale", "a.png", "-m", "model", "-o", "b.png", *FAST),
    "piped upscale": ("upscale", "-", "-o", "-", "--device", "cpu", "--dtype", "fp32", "--scale", "1.5"),
    "class": ("sample", "-m", "class.safetensors", "--label", "tench", "--label", "4", *FAST, *SMALL),
    "layout": ("sample", "-m", "layout.safetensors", "--layout", "boxes.json", "--json", *FAST, *SMALL),
    "map": ("sample", "-m", "map.safetensors", "--map", "classes.png", *FAST),
    "piped map": ("sample", "-m", "map.safetensors", "--map", "-", *FAST, *SMALL),
    "class beyond": ("sample", "-m", "class.safetensors", "--label", "1001", *FAST),
    "no model": ("txt2img", "a fox", "-m", "nothing.safetensors"),
    "bad model": ("txt2img", "a fox", "-m", "bad.safetensors"),
    "size": ("txt2img", "a fox", "-W", "13", *TINY),
    "sampler": ("txt2img", "a fox", "--sampler", "dpmpp-2m", "--eta", "1", *TINY),
    "dtype": ("txt2img", "a fox", *TINY, "--dtype", "fp16"),
    "device": ("txt2img", "a fox", *TINY, "--device", "cuda:7"),
    "long prompt": ("txt2img", "f" * 90, *TINY, "--on-long-prompt", "error"),
    "no picture": ("img2img", "a fox", *TINY, "-i", "nothing.png"),
    "bad picture": ("img2img", "a fox", *TINY, "-i", "bad.png"),
    "no lora": ("txt2img", "a fox", *TINY, "--lora", "nothing.safetensors"),
    "wrong lora": ("txt2img", "a fox", *FAST, "--lora", "one.safetensors"),
    "no control": ("txt2img", "a fox", *TINY, "--control-net", "nothing.safetensors", "--control-image", "a.png"),
    "wrong control": ("txt2img", "a fox", *FAST, "--control-net", "net.safetensors", "--control-image", "a.png"),
    "no control picture": ("txt2img", "a fox", *FAST, "--control-net", "silhouette", "--control-image", "none.png"),
    "no place": ("txt2img", "a fox", *TINY, "-o", "a.png/b.png"),
    "taken": ("txt2img", "a fox", *TINY, "-o", "a.png"),
    "no upscaler": ("upscale", "a.png", "-o", "b.png", "-m", "nothing.safetensors"),
    "bad upscaler": ("upscale", "a.png", "-o", "b.png", "-m", "bad.safetensors"),
    "bad upscaled": ("upscale", "bad.png", "-o", "b.png"),
    "large": ("upscale", "a.png", "-o", "b.webp", "--size", "20000x20", "--device", "cpu"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_the_same_with_a_server(name: str, served: Served, files: Path, tmp_path: Path) -> None:
    command, found = COMMANDS[name], []
    picture = files / ("classes.png" if name == "piped map" else "a.png")
    stdin = picture.read_bytes() if name.startswith("piped") else b"a fox\n\nan owl\n"
    before = served.status()["drawn"]
    for number, extra in enumerate(((), ("--no-server",))):
        folder = tmp_path / "same"
        folder.mkdir()
        for each in files.iterdir():
            (folder / each.name).symlink_to(each)
        found.append(comparable(served.run(*command, *extra, stdin=stdin, cwd=folder), folder))
        folder.rename(tmp_path / f"done{number}")
    assert found[0][:3] == found[1][:3]
    assert found[0][3].keys() == found[1][3].keys()
    for path, data in found[0][3].items():
        assert data == found[1][3][path], path
    drawn = sum(path.endswith((".png", ".webp")) for path in found[1][3]) + (name == "stdout") - (name == "previews")
    if found[1][0] == 0 and command[0] != "upscale":
        read = sum(each.suffix == ".png" for each in files.iterdir())
        assert served.status()["drawn"] - before == drawn - read


@pytest.mark.parametrize("command", ["embedded", "img2img", "upscale", "upscale by a file", "drawn larger by patches"])
def test_a_client_imports_nothing_that_computes(command: str, served: Served, files: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from ldmcli.cli import run; code = run(sys.argv[1:]); "
        "print(code, sorted({'torch', 'PIL', 'numpy', 'tokenizers', 'ldmcli.session'} & set(sys.modules)))"
    )
    words = [*COMMANDS[command], "-o", str(tmp_path / "new.webp")]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=files, env=environment(served.env), capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == b"0 []", done


def test_every_file_of_a_request_is_found_from_another_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    session = Session(ModelSpec(), RuntimeSpec(dtype="fp32", device="cpu"))
    request = GenerationRequest(
        "a cat", image="a.png", mask="mask.png",
        control_net=("own.safetensors", "silhouette"), control_image=("mask.png", "a.png"),
    )  # fmt: skip
    seen: list[str] = []
    shown = {"ip_adapter": "base.safetensors", "ip_adapter_image": "b.png", "ip_adapter_mask": "none;m.png"}
    request = dataclasses.replace(request, **shown)  # which is for another model
    prompts = image_prompts_of(vars(dataclasses.replace(request, ip_adapter=["base.safetensors"] * 2)))
    fitted = session.fit(dataclasses.replace(request, **dict.fromkeys(shown, ())))
    fitted = dataclasses.replace(fitted, image_prompts=prompts)
    fitted = with_files(fitted, lambda path: seen.append(path) or f"/there/{path}")  # type: ignore[func-returns-value]
    assert {fitted.image, fitted.mask} == {"/there/a.png", "/there/mask.png"}
    assert [(each.net, each.image) for each in fitted.controls] == [
        ("/there/own.safetensors", "/there/mask.png"), ("silhouette", "/there/a.png"),
    ]  # fmt: skip
    assert [(each.adapter, each.image, each.mask) for each in fitted.image_prompts] == [
        ("/there/base.safetensors", "/there/b.png", None), ("/there/base.safetensors", "/there/b.png", "/there/m.png"),
    ]  # fmt: skip
    assert set(named_files(request)) == set(seen)
    assert fitted.recorded.control_net == request.control_net
