"""A model folder that says how it is best drawn with: generation_config.json, and who wins over it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_support import assert_refused, copy_model, ldm_here, replace, tiny_single_file
from fork_server import quick
from hub_server import Hub

from ldmcli.checkpoints.layout import GENERATION
from ldmcli.checkpoints.source import open_model
from ldmcli.config import Defaults
from ldmcli.disk.hashes import FileHashes
from ldmcli.errors import BadDataError
from ldmcli.fitting import fit_to_model
from ldmcli.spec import MAX_GUIDANCE, MAX_STEPS, GenerationRequest

pytestmark = pytest.mark.timeout(300)
OWN = {"guidance_scale": 3, "num_inference_steps": 2, "sampler": "euler"}
TURBO = {
    "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "beta_schedule": "scaled_linear",
}  # fmt: skip


def saying(folder: Path, content: bytes | str | dict[str, Any]) -> Path:
    """A copy of the random model at `folder` with this generation_config.json."""
    replace(copy_model(folder) / GENERATION, content)
    return folder


def defaults_of(folder: Path, content: bytes | str | dict[str, Any]) -> Defaults:
    return open_model(saying(folder, content)).config.defaults


# ---- what the file says ----


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        ({}, Defaults()),
        (OWN, Defaults("euler", 2, 3.0)),
        ({"guidance_scale": 3.5}, Defaults(guidance_scale=3.5)),
        ({"num_inference_steps": 25}, Defaults(steps=25)),
        ({"sampler": "plms"}, Defaults("plms")),
        # As in diffusers, guidance up to 1 is none.
        ({"guidance_scale": 0, "num_inference_steps": 1}, Defaults(steps=1, guidance_scale=1.0)),
        ({"guidance_scale": 0.5}, Defaults(guidance_scale=1.0)),
        (
            {"guidance_scale": MAX_GUIDANCE, "num_inference_steps": MAX_STEPS},
            Defaults(steps=MAX_STEPS, guidance_scale=MAX_GUIDANCE),
        ),
        # What transformers writes of its own is not ours to judge; nor is null a value.
        ({"guidance_scale": None, "sampler": None, "num_inference_steps": None}, Defaults()),
        ({"_from_model_config": True, "steps": "many", "eos_token_id": [1, 2], "do_sample": True}, Defaults()),
    ],
)
def test_what_a_folder_says_wins_over_its_familys_way(tmp_path: Path, said: dict[str, Any], defaults: Defaults) -> None:
    assert defaults_of(tmp_path / "model", said) == defaults


def test_what_it_leaves_out_is_as_the_scheduler_has_it(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", {"guidance_scale": 1.5})
    (folder / "scheduler").mkdir()
    replace(folder / "scheduler" / "scheduler_config.json", TURBO)
    assert open_model(folder).config.defaults == Defaults("euler", 4, 1.5)


def test_a_single_file_takes_nothing_from_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    os.link(tiny_single_file(), file)
    replace(tmp_path / GENERATION, OWN)
    assert open_model(file).config.defaults == Defaults()


# ---- what it must not say ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"guidance_scale": "3"}, "guidance_scale is '3', not a number."),
        ({"guidance_scale": True}, "guidance_scale is True, not a number."),
        ({"guidance_scale": 1000.5}, "guidance_scale is 1000.5, not a number from 0 to 1000."),
        ('{"guidance_scale": NaN}', "guidance_scale is nan, not a number."),
        ('{"guidance_scale": -1e999}', "guidance_scale is -inf, not a number."),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, not a whole number from 1 to 999."),
        ({"num_inference_steps": 20.0}, "num_inference_steps is 20.0, not a whole number from 1 to 999."),
        ({"num_inference_steps": False}, "num_inference_steps is False, not a whole number from 1 to 999."),
        ({"sampler": "DDIM"}, "sampler holds 'DDIM', which this version cannot run; it knows ddim, "),
        ({"sampler": ["ddim"]}, "sampler holds \"['ddim']\", which"),
        ({"sampler": "\x1b[31m"}, "\\x1b[31m"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    tmp_path: Path, content: bytes | str | dict[str, Any], words: str
) -> None:
    folder = saying(tmp_path / "model", content)
    with pytest.raises(BadDataError) as refusal:
        open_model(folder)
    assert str(refusal.value).startswith(f"{folder / GENERATION}")
    assert words in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", {"sampler": "magic"})
    assert_refused(quick("txt2img", "x", "-m", folder, "-o", tmp_path / "out"), 65, GENERATION, "'magic'", "it knows")
    (folder / GENERATION).unlink()
    (folder / GENERATION).symlink_to(tmp_path / "gone.json")
    assert_refused(quick("info", folder), 66, GENERATION, "is a link to")


# ---- what it changes, and what not ----


def test_it_is_no_part_of_what_identifies_the_weights(tmp_path: Path) -> None:
    plain, said = open_model(copy_model(tmp_path / "plain")), open_model(saying(tmp_path / "said", OWN))
    assert said.config.defaults != plain.config.defaults
    assert said.sha256(FileHashes()).result() == plain.sha256(FileHashes()).result()


def test_a_request_wins_over_it(tmp_path: Path) -> None:
    config = open_model(saying(tmp_path / "model", OWN)).config
    asked = GenerationRequest("x", sampler="ddim", steps=5, guidance_scale=7.5)
    taken = fit_to_model(asked, config)
    assert (taken.sampler, taken.steps, taken.guidance_scale) == ("ddim", 5, 7.5)
    left = fit_to_model(GenerationRequest("x", steps=7), config)
    assert (left.sampler, left.steps, left.guidance_scale) == ("euler", 7, 3.0)


def test_commands_draw_with_it_and_show_it(tmp_path: Path) -> None:
    """Options and variables win, each over its own field alone."""
    folder = saying(tmp_path / "model", OWN)
    facts = quick("info", "--json", folder).records[0]
    assert facts["defaults"] == {"sampler": "euler", "steps": 2, "guidance_scale": 3.0}
    one = ("txt2img", "x", "-m", folder, "-s", "1", "--json", "-o", tmp_path / "own.png")
    (drawn,) = ldm_here(*one, "--steps", "1", env={"LDM_GUIDANCE_SCALE": "7.5"}).records
    (shown,) = quick("info", "--json", tmp_path / "own.png").records
    for request in (drawn, shown["request"]):
        assert (request["sampler"], request["steps"], request["guidance_scale"]) == ("euler", 1, 7.5)


def test_help_says_that_models_have_their_own() -> None:
    shown = " ".join(quick("txt2img", "--help").out.decode().split())
    assert shown.count("[default: the model's own; ") == 3  # of steps, sampler and guidance


# ---- models of the hub ----


def test_it_comes_with_a_model_and_is_added_to_copies_without_it(tmp_path: Path) -> None:
    with Hub().running() as server:
        server.add("lab/tiny", saying(tmp_path / "model", OWN))
        env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
        pulled = Path(os.fsdecode(quick("pull", "-q", "lab/tiny", env=env).out.strip()))
        assert json.loads((pulled / GENERATION).read_text()) == OWN
        # diffusers, which shares the cache, leaves it out.
        os.unlink((pulled / GENERATION).resolve())
        os.unlink(pulled / GENERATION)
        server.requests.clear()
        drawn = quick("txt2img", "x", "-m", "lab/tiny", "--json", "-o", tmp_path / "hub.png", env=env)
        assert drawn.records[0]["guidance_scale"] == 3.0
        assert set(server.took()) == {GENERATION}
        # Once it is there, nothing but the newest commit is asked for.
        server.requests.clear()
        assert quick("txt2img", "x", "-m", "lab/tiny", "-W", "63", env=env).code == 2
        assert server.took() + server.took("HEAD") == []
        # Where it cannot be fetched, the copy is used with a warning.
        (pulled / GENERATION).unlink()
        server.repositories["lab/tiny"].gated, server.repositories["lab/tiny"].token = True, "hf_token"
        opened = quick("txt2img", "x", "-m", "lab/tiny", "-W", "63", env=env)
        assert opened.code == 2
        assert "lab/tiny is gated" in opened.err
        assert "; the copy fetched before is used" in opened.err
