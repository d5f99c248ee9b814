"""A model folder that says how it is best drawn with: generation_config.json, and who wins over it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_support import assert_refused, copy_model, ldm, replace, tiny_model, tiny_single_file
from hub_server import Hub

from ldmcli.checkpoints.layout import GENERATION, needed_files
from ldmcli.checkpoints.source import open_model
from ldmcli.config import Defaults
from ldmcli.errors import BadDataError, StorageError
from ldmcli.hub import fetch as hub
from ldmcli.spec import MAX_GUIDANCE, MAX_STEPS, GenerationRequest, fit_to_model

pytestmark = pytest.mark.timeout(300)
OWN = {"guidance_scale": 3, "num_inference_steps": 2, "sampler": "euler"}
TURBO = {
    "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "beta_schedule": "scaled_linear",
}  # fmt: skip
DAMAGED = "is not valid JSON"


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
        ({"guidance_scale": [3]}, "guidance_scale is [3], not a number."),
        ({"guidance_scale": -0.5}, "guidance_scale is -0.5, not a number from 0 to 1000."),
        ({"guidance_scale": 1000.5}, "guidance_scale is 1000.5, not a number from 0 to 1000."),
        ('{"guidance_scale": NaN}', "guidance_scale is nan, not a number."),
        ('{"guidance_scale": Infinity}', "guidance_scale is inf, not a number."),
        ('{"guidance_scale": -1e999}', "guidance_scale is -inf, not a number."),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, not a whole number from 1 to 999."),
        ({"num_inference_steps": 1000}, "num_inference_steps is 1000, not a whole number from 1 to 999."),
        ({"num_inference_steps": 20.0}, "num_inference_steps is 20.0, not a whole number from 1 to 999."),
        ({"num_inference_steps": False}, "num_inference_steps is False, not a whole number from 1 to 999."),
        ({"sampler": "DDIM"}, "sampler holds 'DDIM', which this version cannot run; it knows ddim, "),
        ({"sampler": ["ddim"]}, "sampler holds \"['ddim']\", which"),
        ({"sampler": "\x1b[31m"}, "\\x1b[31m"),
        ("", DAMAGED),
        ("{", DAMAGED),
        ("[" * 100_000, DAMAGED),
        ("[]", "does not hold a JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"{}" + b" " * (1 << 20), "is over 1 MiB"),
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


def test_a_refusal_is_one_sentence_of_the_command(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", {"sampler": "magic"})
    assert_refused(ldm("txt2img", "x", "-m", folder, "-o", tmp_path / "out"), 65, GENERATION, "'magic'", "it knows")
    (folder / GENERATION).unlink()
    (folder / GENERATION).symlink_to(tmp_path / "gone.json")
    assert_refused(ldm("info", folder), 66, GENERATION, "is a link to")
    (folder / GENERATION).unlink()
    os.mkfifo(folder / GENERATION)
    assert_refused(ldm("info", folder), 65, GENERATION, "is a pipe")


# ---- what it changes, and what not ----


def test_it_is_no_part_of_what_identifies_the_weights(tmp_path: Path) -> None:
    plain, said = open_model(copy_model(tmp_path / "plain")), open_model(saying(tmp_path / "said", OWN))
    assert said.config.defaults != plain.config.defaults
    assert model_sha256(said).result() == model_sha256(plain).result()
    assert said.config.text_encoders == plain.config.text_encoders  # what stored prompts go by, beside the weights


def test_a_request_wins_over_it(tmp_path: Path) -> None:
    config = open_model(saying(tmp_path / "model", OWN)).config
    asked = GenerationRequest("x", sampler="ddim", steps=5, guidance_scale=7.5)
    taken = fit_to_model(asked, config)
    assert (taken.sampler, taken.steps, taken.guidance_scale) == ("ddim", 5, 7.5)
    left = fit_to_model(GenerationRequest("x", steps=7), config)
    assert (left.sampler, left.steps, left.guidance_scale) == ("euler", 7, 3.0)


def test_pictures_and_records_tell_what_was_drawn_with(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", OWN)
    (told,) = ldm("txt2img", "x", "-m", folder, "-s", "1", "--json", "-o", tmp_path / "own.png").records
    (shown,) = ldm("info", "--json", tmp_path / "own.png").records
    for request in (told, shown["request"]):
        assert (request["sampler"], request["steps"], request["guidance_scale"]) == ("euler", 2, 3.0)
    text = ldm("info", tmp_path / "own.png").out.decode()
    assert "guidance scale: 3.0" in text
    # Options and variables win, each over its own field alone.
    drawn = ldm(
        "txt2img", "x", "-m", folder, "-s", "1", "--steps", "1", "--json", "-o", tmp_path / "asked.png",
        env={"LDM_GUIDANCE_SCALE": "7.5"},
    )  # fmt: skip
    (request,) = drawn.records
    assert (request["sampler"], request["steps"], request["guidance_scale"]) == ("euler", 1, 7.5)


def test_rows_of_a_batch_win_over_it(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", OWN)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "guidance_scale": 5, "sampler": "ddim"}\n{"prompt": "y", "steps": 1}\n')
    result = ldm("batch", rows, "-m", folder, "-o", tmp_path / "out")
    assert result.code == 0, result
    pictures = sorted((tmp_path / "out" / "images").rglob("*.png"))
    records = [ldm("info", "--json", picture).records[0]["request"] for picture in pictures]
    found = {one["prompt"]: (one["sampler"], one["steps"], one["guidance_scale"]) for one in records}
    assert found == {"x": ("ddim", 2, 5.0), "y": ("euler", 1, 3.0)}


def test_info_shows_it(tmp_path: Path) -> None:
    folder = saying(tmp_path / "model", OWN)
    (facts,) = ldm("info", "--json", folder).records
    assert facts["defaults"] == {"sampler": "euler", "steps": 2, "guidance_scale": 3.0}
    assert "  guidance scale: 3.0" in ldm("info", folder).out.decode().splitlines()


def test_help_says_that_models_have_their_own() -> None:
    shown = " ".join(ldm("txt2img", "--help").out.decode().split())
    assert shown.count("[default: the model's own; ") == 3  # of steps, sampler and guidance


# ---- models of the hub ----


def test_it_is_among_the_files_of_a_repository() -> None:
    files = {str(path.relative_to(tiny_model())) for path in tiny_model().rglob("*") if path.is_file()}
    index = json.loads((tiny_model() / "model_index.json").read_text())
    without = needed_files("lab/tiny", files, lambda _: index, half=False)
    assert GENERATION not in without
    assert set(needed_files("lab/tiny", files | {GENERATION}, lambda _: index, half=False)) == {*without, GENERATION}


def test_it_comes_with_a_model_and_is_added_to_copies_without_it(tmp_path: Path) -> None:
    with Hub().running() as server:
        server.add("lab/tiny", saying(tmp_path / "model", OWN))
        env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}
        pulled = Path(os.fsdecode(ldm("pull", "-q", "lab/tiny", env=env).out.strip()))
        assert json.loads((pulled / GENERATION).read_text()) == OWN
        # diffusers, which shares the cache, leaves it out.
        os.unlink((pulled / GENERATION).resolve())
        os.unlink(pulled / GENERATION)
        server.requests.clear()
        drawn = ldm("txt2img", "x", "-m", "lab/tiny", "--json", "-o", tmp_path / "hub.png", env=env)
        assert drawn.records[0]["guidance_scale"] == 3.0
        assert set(server.took()) == {GENERATION}
        # Once it is there, nothing but the newest commit is asked for.
        server.requests.clear()
        assert ldm("txt2img", "x", "-m", "lab/tiny", "-W", "63", env=env).code == 2
        assert server.took() + server.took("HEAD") == []


def test_where_it_cannot_be_fetched_the_copy_is_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit, told = "a" * 40, list[str]()
    kept = tmp_path / "snapshots" / commit

    def cut(*_: object) -> Path:
        raise StorageError("the line was cut.")

    monkeypatch.setattr(hub, "_is_offline", lambda: False)
    monkeypatch.setattr(hub, "_kept", lambda *_: (kept, ""))
    monkeypatch.setattr(hub, "_ask", lambda _: hub._Listing(commit, {GENERATION: 2}, {}))
    monkeypatch.setattr(hub, "_download", cut)
    monkeypatch.setattr(hub._log, "warning", lambda text, *given: told.append(text % given))
    assert hub.locate("lab/tiny", half=False) == kept
    assert told == ["the line was cut. The copy fetched before is used."]
