"""What is installed is what is in the tree, and an installed copy finds its model."""

import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from ldmcli.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "ldmcli").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_two_rooms_share_a_file_name() -> None:
    """But for the files of commands, which are named as the command."""
    commands = {ROOT / "ldmcli" / "cli" / f"{name}.py" for name in COMMANDS}
    paths = set((ROOT / "ldmcli").rglob("*.py")) - commands
    names = Counter(path.name for path in paths if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]


def test_constraints_satisfy_the_lower_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = "\n".join([settings["options"]["install_requires"], *settings["options.extras_require"].values()])
    for requirement in map(Requirement, filter(None, wanted.split("\n"))):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is below {requirement.specifier}"


@pytest.mark.timeout(240)
def test_a_wheel_runs_elsewhere_with_its_model(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    # From a copy of what git knows, so that nothing else of this folder can slip in and nothing is left behind.
    copy = tmp_path / "tree"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\n"):
        if name and not name.startswith("tests/") and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    subprocess.run([*pip, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(("tests", "weights"))]
        archive.extractall(site)
    command = "import ldmcli, sys; from ldmcli.cli import main; print(ldmcli.__file__, file=sys.stderr); main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "txt2img", "a red apple", "--steps", "1", "-s", "7", "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stderr
    assert done.stdout == "out/ldm-7.png\n"
    assert (tmp_path / "out" / "ldm-7.png").read_bytes().startswith(b"\x89PNG")
    assert (site / "ldmcli" / "weights" / "realesr-animevideov3" / "model.safetensors").is_file()
    assert (site / "ldmcli" / "weights" / "realesr-animevideov3" / "LICENSE").is_file()
    assert (site / "ldmcli" / "weights" / "tiny-emoji" / "upscaler" / "model.safetensors").is_file()


def test_the_embedded_model_is_the_one_described() -> None:
    folder = ROOT / "weights" / "tiny-emoji"
    described = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (ROOT / "weights" / "README.md").read_text(), re.M))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(described.values()) == set(files)
    for digest, name in described.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in files.values()) < 25_000_000


def test_the_embedded_upscaler_is_the_one_described_and_comes_with_its_licence() -> None:
    folder = ROOT / "weights" / "realesr-animevideov3"
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "model.safetensors"]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (ROOT / "weights" / "README.md").read_text()
    assert "Xintao Wang" in (folder / "LICENSE").read_text()
    assert (ROOT / "ldmcli" / "weights" / folder.name).resolve() == folder


def test_the_embedded_control_network_is_the_one_described() -> None:
    file = ROOT / "weights" / "tiny-emoji-silhouette" / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (ROOT / "weights" / "README.md").read_text()
    assert file.stat().st_size <= 3_000_000
    assert (ROOT / "ldmcli" / "weights" / file.parent.name).resolve() == file.parent


def test_the_small_models_of_maps_and_classes_are_those_described() -> None:
    folder, described = ROOT / "weights" / "tiny-glyphs", (ROOT / "weights" / "README.md").read_text()
    files = ["class.classes.txt", "class.safetensors", "map.classes.txt", "map.png", "map.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    for model in folder.glob("*.safetensors"):
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        assert f"`tiny-glyphs/{model.name}`: `{digest}`" in " ".join(described.split())
        assert model.stat().st_size < 4_000_000
    assert sum(path.stat().st_size for path in (ROOT / "weights").rglob("*") if path.is_file()) < 40_000_000
