"""What README and weights/README show is true: help texts, examples in Python, links and file names."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from readme_help import README, with_help

from ldmcli.cli.program import cli
from ldmcli.images.metadata import read_record

ROOT = README.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md")]


def _blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE)


def _run_python(source: str, folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_texts_are_those_that_ldm_prints() -> None:
    assert README.read_text() == with_help(README.read_text()), "run: make readme"


def test_the_example_in_python_draws_three_pictures_and_cancels(tmp_path: Path) -> None:
    (example,) = _blocks(README, "python")
    printed = _run_python(example, tmp_path).splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
    assert read_record(tmp_path / "2.png")["request"]["prompt"] == "a fox"
    assert printed.count("step 10 of 10") == 2  # two batches
    assert printed[-1] == "cancelled"


def test_diffusers_draws_the_embedded_model_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (snippet,) = _blocks(ROOT / "weights" / "README.md", "python")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    _run_python(snippet, tmp_path)
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")


def _commands() -> list[list[str]]:
    """The `ldm` commands in the documents' shell blocks and tables, as words."""
    found = []
    for document in DOCUMENTS:
        text = "\n".join(_blocks(document, "sh")) + "\n".join(re.findall(r"`(ldm [a-z][^`]*)`", document.read_text()))
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s\|\s|\s>\s", line.split("  #")[0]):
                if part.strip().startswith("ldm ") and "…" not in part:
                    found.append(shlex.split(part)[1:])
    return found


def test_every_option_of_every_command_shown_is_there() -> None:
    commands = _commands()
    assert len(commands) > 30
    for name, *words in commands:
        command = cli.get_command(click.Context(cli), name if " " not in name else "txt2img")
        assert command, name
        options = {spelling for parameter in command.params for spelling in parameter.opts}
        options |= {"--help", "--help-all", "-h"}
        shown = {word.split("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)}
        assert shown <= options, (name, shown - options)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_are_there(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", text)
    names = {first or second for first, second in links}
    assert not [name for name in names if not (document.parent / name).exists()]
    code = {name for name in re.findall(r"`((?:ldmcli|tests)/[\w/.]+)`", text)}
    assert not [name for name in code if document.name != "CHANGELOG.md" and not (ROOT / name).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of files")
def test_weights_that_readme_names_are_in_the_repository_and_no_pictures_beside_it() -> None:
    shipped = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = set(re.findall(r"weights/[\w./-]+\.(?:txt|csv|png|safetensors)", README.read_text()))
    assert named <= set(shipped)
    assert not [name for name in shipped if "/" not in name and name.endswith(".png")]
