"""What shells complete: typed into real ones, and asked for as they ask; always quickly."""

import fcntl
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import assert_refused, environment, ldm, ldm_here, until

from ldmcli.cli.program import cli

# Records what it is run with, unless a shell asks what there is.
_LDM = f"""#!/bin/sh
[ -n "$_LDM_COMPLETE" ] && exec {sys.executable} -m ldmcli
printf '%s\\n' "$@" > "$RECORD.part"
mv "$RECORD.part" "$RECORD"
"""
_START = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(cat {script})"'),
    "zsh": (["-f", "-i"], "autoload -U compinit; compinit -u -D; source {script}"),
    "fish": (["--no-config", "--interactive"], "source {script}"),
}


class Shell:
    """A shell at a terminal, in a folder with some files."""

    def __init__(self, name: str, folder: Path) -> None:
        self._record = folder / "record"
        (folder / "bin").mkdir()
        (folder / "bin" / "ldm").write_text(_LDM)
        (folder / "bin" / "ldm").chmod(0o755)
        script = folder / f"completion.{name}"
        script.write_bytes(ldm_here("completion", name).out)
        options, init = _START[name]
        env = environment({"RECORD": str(self._record), "LDM_MODELS": str(folder / "models"), "TERM": "vt100"})
        env |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONPATH": ":".join(sys.path)}
        master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [str(shutil.which(name)), *options], stdin=slave, stdout=slave, stderr=slave, env=env, cwd=folder / "here",
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self._terminal, self.seen = master, b""
        self._type(f"{init.format(script=script)}; ldm started\r")
        assert self._recorded() == ["started"]

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _recorded(self) -> list[str]:
        def there() -> bool:
            while select.select([self._terminal], [], [], 0)[0]:
                self.seen += os.read(self._terminal, 1 << 16)
            return self._record.exists()

        until(there, "the command runs")
        words = self._record.read_text().splitlines()
        self._record.unlink()
        return words

    def completed(self, keys: str) -> list[str]:
        """The words of the command that comes of these keys, Tab and Enter."""
        self._type(f"{keys}\t\r")
        return self._recorded()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture(params=["bash", "zsh", "fish"])
def shell(request: pytest.FixtureRequest, files: Path) -> Iterator[Shell]:
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    started = Shell(request.param, files)
    yield started
    started.end()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    for folder in ("loras", "pictures of mine", "done", "drawn"):
        (here / folder).mkdir(parents=True)
    for name in ("apple one.png", "loras/glow.safetensors", "sd15.safetensors", "done/run.json"):
        (here / name).touch()
    (tmp_path / "models" / "anything-v5").mkdir(parents=True)
    (tmp_path / "models" / "anything-v5" / "model_index.json").touch()
    (tmp_path / "models" / "photo.safetensors").touch()
    return tmp_path


@pytest.mark.timeout(240)
def test_a_shell_completes_what_is_typed(shell: Shell) -> None:
    for keys, words in (
        ("ldm sampler", ["samplers"]),
        ("ldm txt2img x --negative-p", ["txt2img", "x", "--negative-prompt"]),
        ("ldm info appl", ["info", "apple one.png"]),
        ("ldm img2img x --image=appl", ["img2img", "x", "--image=apple one.png"]),
        ("ldm x -m any", ["x", "-m", "anything-v5"]),
        ("ldm x -m sd", ["x", "-m", "sd15.safetensors"]),
        ("ldm x --lora-dir loras --lora gl", ["x", "--lora-dir", "loras", "--lora", "glow"]),
        ("ldm x --sampler dpmpp-2m-", ["x", "--sampler", "dpmpp-2m-sde"]),
        ("ldm batch --status do", ["batch", "--status", "done"]),
        ("ldm batch rows.txt -o dr", ["batch", "rows.txt", "-o", "drawn/"]),
    ):
        found = shell.completed(keys)
        assert [one.removesuffix("/") for one in found] == [one.removesuffix("/") for one in words], shell.seen


def asked(*words: str, cwd: Path, **env: str) -> list[str]:
    """What a shell is told that completes the last of the words."""
    ways = {"_LDM_COMPLETE": "bash_complete", "COMP_WORDS": "\n".join(("ldm", *words)), "COMP_CWORD": str(len(words))}
    done = ldm_here(env=ways | env, cwd=cwd)
    assert done.code == 0, done
    return list(filter(None, done.out.decode().splitlines()))


def test_each_kind_of_value_has_its_own(files: Path) -> None:
    here, models = files / "here", str(files / "models")
    config, cache = files / "config" / "ldmcli", files / "cache" / "models--org--thing"
    config.mkdir(parents=True)
    cache.mkdir(parents=True)
    (config / "config.toml").write_text('lora_dir = "loras"\n[profiles.draft]\nsteps = 8\n')
    env = {"LDM_MODELS": models, "XDG_CONFIG_HOME": str(files / "config"), "HF_HUB_CACHE": str(cache.parent)}
    for words, expected in (
        (["x", "-m", ""], ["plain,anything-v5", "plain,photo", "plain,org/thing", "file,"]),
        (["x", "--lora", "g"], ["plain,glow", "file,g"]),  # the configuration file names the folder
        (["x", "--profile", ""], ["plain,draft"]),
        (["x", "--mask", "a"], ["plain,alpha", "file,a"]),
        (["x", "--upscale", "em"], ["plain,embedded", "file,em"]),
        (["x", "--hires-upscaler", "la"], ["plain,latent", "plain,lanczos", "file,la"]),
        (["x", "--device", "c"], ["plain,cpu", "plain,cuda"]),
        (["x", "--sched"], ["plain,--schedule"]),  # and not --scheduler, which no help shows
        (["x", "--control-type", "ti"], ["plain,tile"]),
        (["x", "--control-mode", "p"], ["plain,prompt"]),
        (["x", "--steps", ""], []),
        (["x", "--lora-dir", "l"], ["dir,l"]),
        (["x", "--lora", "style", ":", "0.8", "--schedule", "kar"], ["plain,karras"]),
        (["batch", "--status", ""], ["plain,done"]),
        (["batch", "--watch", "dr"], ["dir,dr"]),
        (["gallery", "d"], ["plain,done"]),
        (["config", "up"], ["plain,upscale"]),
        (["pull", "or"], ["plain,org/thing"]),
        (["upscale", "a"], ["file,a"]),
        (["canny", "a"], ["file,a"]),
        (["completion", "f"], ["plain,fish"]),
        (["a prompt"], []),
    ):
        if words[0] == "x" and "--mask" in words:
            words = ["img2img", *words]
        assert asked(*words, cwd=here, **env) == expected, words


def test_nothing_goes_wrong_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "ldmcli").mkdir()
    (tmp_path / "ldmcli" / "config.toml").write_bytes(b"\xff = [")
    env = {"LDM_MODELS": "nowhere", "HF_HUB_CACHE": "nowhere", "XDG_CONFIG_HOME": str(tmp_path)}
    for words in (["x", "-m", ""], ["x", "--profile", ""], ["x", "--lora", ""], ["batch", "--status", "no/where"]):
        assert all(line.startswith(("file,", "dir,")) for line in asked(*words, cwd=tmp_path, **env)), words
    assert asked("x", "-m", '""', "--negative-p", cwd=tmp_path) == ["plain,--negative-prompt"]
    for words in ([], ["nonsense"], ["--", ""], ["x", "--size", "axb", ""], ["x", "-m"], ["\x1b[2J", "-"]):
        asked(*words, cwd=tmp_path, **env)


def test_variables_that_no_shell_sets_are_said(tmp_path: Path) -> None:
    for env in ({"_LDM_COMPLETE": "nonsense"}, {"_LDM_COMPLETE": "bash_complete"}, {"_LDM_COMPLETE": "zsh_complete",
                "COMP_WORDS": "ldm", "COMP_CWORD": "many"}):  # fmt: skip
        assert_refused(ldm_here(env=env, cwd=tmp_path), 2, "_LDM_COMPLETE is not set as")


def test_every_option_with_files_completes_them() -> None:
    import click

    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for one in command.params:
            if any(word in (one.metavar or "") for word in ("FILE", "DIR", "PATH", "MODEL")) and name != "pull":
                context = click.Context(command, info_name=name, resilient_parsing=True)
                kinds = {item.type for item in one.shell_complete(context, "")}
                assert kinds & {"file", "dir"}, (name, one.name)


def test_completing_imports_neither_torch_nor_pillow(files: Path) -> None:
    code = (
        "import sys; from ldmcli.cli import run; run([]); "
        "assert not {'torch', 'PIL', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    env = {"_LDM_COMPLETE": "zsh_complete", "COMP_WORDS": "ldm x --lora-dir loras --lora ", "COMP_CWORD": "5"}
    done = ldm(program=(sys.executable, "-c", code), env=env, cwd=files / "here")
    assert done.code == 0, done.err
    assert b"glow" in done.out
