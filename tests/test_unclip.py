"""`ldm sample --image-embedding`: embeddings as they are typed, in rows and in pictures; and what cannot be meant."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Result, assert_refused, ldm_here, pixels
from graph_support import FakeRecorder, load_plainly, recording
from image_prompt_support import random_encoder
from oracle.seeded import seeded_pixels
from oracle.unclip_models import WIDTH, embeddings, original, unclip
from paper_models import small, write_model
from PIL import Image
from safetensors.torch import save_file
from test_serving import Served

from ldmcli import ModelSpec, RuntimeSpec, Session
from ldmcli.errors import BadDataError
from ldmcli.fitting import fit_to_model
from ldmcli.gallery.redraw import command
from ldmcli.images.metadata import read_record
from ldmcli.spec import GenerationRequest

FAST = ("--steps", "2", "--size", "64x48", "-s", "1", "--device", "cpu", "--dtype", "fp32", "--no-server")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, rows = tmp_path_factory.mktemp("unclip"), embeddings(3)
    pipeline = unclip()
    pipeline.save_pretrained(found / "model")
    save_file(original(pipeline, statistics=False), found / "file.safetensors")
    write_model(found / "cin256.safetensors", small("cin256"))
    damaged, whole = rows.clone(), torch.ones(2, WIDTH, dtype=torch.int32)
    damaged[1, 3] = torch.nan
    for name, tensors in {
        "rows": {"image_embeds": rows},
        "one": {"any": rows[1].clone()},
        "narrow": {"image_embeds": rows[:, :20].clone()},
        "cube": {"image_embeds": rows[:, None].clone()},
        "nan": {"image_embeds": damaged},
        "large": {"image_embeds": torch.full((1, WIDTH), 1e300, dtype=torch.float64)},
        "two": {"a": rows, "b": rows.clone()},
        "whole": {"image_embeds": whole},
        "empty": {"image_embeds": torch.ones(0, WIDTH)},
        "none": {},
    }.items():
        save_file(tensors, found / f"{name}.safetensors")
    (found / "cut.safetensors").write_bytes((found / "rows.safetensors").read_bytes()[:100])
    (found / "text.safetensors").write_text("hello")
    torch.save({"image_embeds": rows}, found / "rows.pt")
    Image.fromarray(seeded_pixels(50, 41)).save(found / "a.png")
    vision = random_encoder()  # of another width
    vision.save_pretrained(found / "other")
    return found


def run(folder: Path, *words: str | Path, command: str = "sample", model: str = "model") -> Result:
    return ldm_here(command, "-m", folder / model, *words, *FAST, cwd=folder)


def drawn(folder: Path, out: Path, *words: str | Path) -> list[np.ndarray]:
    result = run(folder, *words, "-o", out)
    assert result.code == 0, result.err
    return [pixels(path) for path in result.paths]


def test_each_row_is_a_picture(folder: Path, tmp_path: Path) -> None:
    found = drawn(folder, tmp_path / "all", "--image-embedding", "rows.safetensors", "-p", "a cat")
    assert len(found) == 3
    assert not any((found[i] == found[j]).all() for i in range(3) for j in range(i))
    for words in (
        ("--image-embedding", "rows.safetensors", "--embedding-row", "1"), ("--image-embedding", "one.safetensors"),
        ("--image-embedding", "rows.pt", "--embedding-row", "1", "--allow-pickle"),
    ):  # fmt: skip
        (alone,) = drawn(folder, tmp_path / words[-1], *words, "-p", "a cat")
        assert (alone == found[1]).all()


def test_a_picture_is_embedded_by_the_models_own_encoder(folder: Path, tmp_path: Path) -> None:
    given = ("--image-embedding", folder / "a.png", "-p", "a cat")
    (first,) = drawn(folder, tmp_path / "first.png", *given)
    assert set(read_record(tmp_path / "first.png")["inputs"]) == {"image_embedding", "image_encoder"}
    again = ldm_here("sample", "--from-image", tmp_path / "first.png", *FAST[-5:], "-o", tmp_path / "again.png")
    assert (again.code, again.err) == (0, "")
    assert (pixels(tmp_path / "again.png") == first).all()
    named = ("--image-encoder", folder / "model" / "image_encoder")
    assert run(folder, *given, *named, "-o", tmp_path / "b.png", model="file.safetensors").err == ""
    assert_refused(run(folder, *given, "-o", tmp_path / "c.png", model="file.safetensors"), 66, "--image-encoder")
    other = ("--image-encoder", folder / "other", "-o", tmp_path / "d.png")
    assert_refused(run(folder, *given, *other), 65, "and the model reads 40")
    row = ("--embedding-row", "1", "-o", tmp_path / "e.png")
    assert_refused(run(folder, *given, *row), 2, "embedding_row 1 is for a file of embeddings")


def test_an_encoder_that_is_fed_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    result = run(tmp_path, "--image-embedding", folder / "a.png", "-o", tmp_path / "a.png")
    assert_refused(result, 65, "image_mean is [0.5, 0.5, 0.5], which this version cannot run")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("image_normalizer/diffusion_pytorch_model.safetensors", "has no diffusion_pytorch_model.safetensors"),
        ("image_normalizer/config.json", "config.json is missing"),
        ("image_noising_scheduler/scheduler_config.json", "scheduler_config.json is missing"),
    ],
)
def test_folders_that_lack_something_say_so(part: str, said: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / part).unlink()
    assert_refused(run(tmp_path, "--image-embedding", folder / "one.safetensors"), 66, said)


def test_a_folder_whose_parts_are_of_two_models_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    for part, changes, said in (
        ("image_normalizer", {"embedding_dim": 41}, "reads embeddings of width 40, its normalizer scales 41"),
        ("unet", {"projection_class_embeddings_input_dim": 81}, "its class embedding is not that of an unCLIP model"),
        ("unet", {"class_embed_type": "timestep"}, 'class_embed_type is "timestep", which this version cannot run'),
    ):
        path = tmp_path / "model" / part / "config.json"
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | changes))
        assert_refused(run(tmp_path, "--image-embedding", folder / "one.safetensors"), 65, said)
        path.write_text(kept)


def test_recorded_steps_draw_the_same(folder: Path) -> None:
    plain = load_plainly(folder / "model")
    graphed = recording(plain, FakeRecorder())
    for row in range(2):
        asked = GenerationRequest(
            "", image_embedding=str(folder / "rows.safetensors"), embedding_row=row, steps=4, width=64, height=64
        )
        request = fit_to_model(asked, plain.config)
        assert torch.equal(graphed.draw([request]).latents, plain.draw([request]).latents)


@pytest.mark.parametrize("changed", ["own.safetensors", "own.png"])
def test_files_that_change_before_their_turn_are_not_drawn_from(changed: str, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "rows.safetensors", tmp_path / "own.safetensors")
    shutil.copy(folder / "a.png", tmp_path / "own.png")
    own = {"image": str(tmp_path / "own.png"), "image_embedding": str(tmp_path / "own.safetensors")}
    others = {"image": str(folder / "a.png"), "image_embedding": str(folder / "rows.safetensors")}
    with Session(ModelSpec(str(folder / "model")), RuntimeSpec(device="cpu", dtype="fp32")) as session:
        common: dict[str, Any] = {"embedding_row": 2, "steps": 2, "width": 64, "height": 48, "strength": 0.5}
        asked = [session.fit(GenerationRequest("", **common, **files)) for files in (own, others)]
        save_file({"image_embeds": embeddings(1)}, tmp_path / "new.safetensors")
        Image.fromarray(seeded_pixels(41, 50)).save(tmp_path / "new.png")
        (tmp_path / f"new{Path(changed).suffix}").replace(tmp_path / changed)
        first, second = session.draw(asked, batch_size=2)
        with pytest.raises(BadDataError, match=f"{changed} has changed since it was checked"):
            first.pixels()
        assert second.pixels().shape == (48, 64, 3)


def test_prompts_and_noise_change_the_picture(folder: Path, tmp_path: Path) -> None:
    given = ("--image-embedding", "one.safetensors")
    words: list[tuple[str, ...]] = [(), ("-p", "a cat"), ("-n", "a cat"), ("--noise-level", "700"), ("-g", "1")]
    found = [drawn(folder, tmp_path / str(i), *given, *one)[0] for i, one in enumerate(words)]
    assert not any((found[i] == found[j]).all() for i in range(len(found)) for j in range(i))


def test_a_record_draws_the_same_picture_again(folder: Path, tmp_path: Path) -> None:
    words = ("--image-embedding", folder / "rows.safetensors", "--embedding-row", "2", "-p", "a cat", "-n", "red")
    (first,) = drawn(folder, tmp_path, *words, "--noise-level", "300")
    path = tmp_path / "ldm-1.png"
    record = read_record(path)
    request = record["request"]
    assert (request["embedding_row"], request["noise_level"], request["prompt"]) == (2, 300, "a cat")
    assert set(record["inputs"]) == {"image_embedding"}
    for command_ in ("sample", "txt2img"):
        again = ldm_here(command_, "--from-image", path, *FAST[-5:], "-o", tmp_path / f"{command_}.png")
        assert again.code == 0, again.err
        assert (pixels(again.paths[0]) == first).all()
    typed = command(request, record["model"])
    assert "ldm sample --prompt 'a cat' --model" in typed
    assert "--embedding-row 2 --noise-level 300" in typed
    assert command(request | {"loras": [{"name": "a"}]}, record["model"]) == ""
    (other,) = drawn(folder, tmp_path / "b", "--from-image", path, "--image-embedding", "one.safetensors")
    assert (other != first).any()


def test_a_changed_file_is_remarked_on_and_a_lost_one_is_missed(folder: Path, tmp_path: Path) -> None:
    save_file({"image_embeds": embeddings(1)}, tmp_path / "own.safetensors")
    drawn(folder, tmp_path / "a.png", "--image-embedding", tmp_path / "own.safetensors")
    save_file({"image_embeds": embeddings(2)[1:].clone()}, tmp_path / "own.safetensors")
    again = ldm_here("sample", "--from-image", tmp_path / "a.png", *FAST[-5:], "-o", tmp_path / "b.png")
    assert again.code == 0
    assert "own.safetensors is not the one the picture was made with" in again.err
    (tmp_path / "own.safetensors").unlink()
    lost = ldm_here("sample", "--from-image", tmp_path / "a.png", *FAST[-5:], "-o", tmp_path / "c.png")
    assert_refused(lost, 66, "the picture's image embedding came from")


def test_rows_of_a_batch_name_embeddings(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a cat", "image_embedding": "rows.safetensors", "embedding_row": 2, "noise_level": 9, "seed": 1},
        {"image_embeds": "one.safetensors", "noise_level": 9, "seed": 1},
        {"image_embedding": "rows.safetensors", "seed": 1},
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    batch = ("rows.jsonl", "-o", tmp_path / "out", "--batch-size", "2", "--max-images", "1")
    begun = run(folder, *batch, command="batch")
    assert begun.code == 75, begun.err
    result = run(folder, *batch[:-2], command="batch")
    assert result.code == 3
    assert "the file of embeddings has 3; say which with embedding_row, 0 to 2" in result.err
    found = [pixels(path) for path in sorted((tmp_path / "out").glob("images/**/*.png"))]
    level = ("--noise-level", "9")
    row = ("--image-embedding", "rows.safetensors", "--embedding-row", "2")
    typed = drawn(folder, tmp_path / "a", *row, "-p", "a cat", *level)
    typed += drawn(folder, tmp_path / "b", "--image-embedding", "one.safetensors", *level)
    assert [(one == other).all() for one, other in zip(found, typed, strict=True)] == [True, True]


def test_a_server_draws_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    words = ("sample", "-m", "model", "--image-embedding", "rows.safetensors", "-p", "a cat", *FAST[:-1])
    alone = ldm_here(*words, "--no-server", "-o", tmp_path / "alone", cwd=folder)
    server = Served(tmp_path / "s.sock")
    found = server.run(*words, "-o", tmp_path / "served", cwd=folder)
    assert server.status()["models"]
    server.end()
    assert (alone.code, found.code, found.err) == (0, 0, alone.err)
    for one, other in zip(alone.paths, found.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_second_passes_read_the_same_embedding(folder: Path, tmp_path: Path) -> None:
    given = ("--image-embedding", "one.safetensors", "--noise-level", "500")
    (small_,) = drawn(folder, tmp_path / "small", *given)
    (large,) = drawn(folder, tmp_path / "large", *given, "--hires", "96x64", "--hires-strength", "0.9")
    assert (small_.shape, large.shape) == ((48, 64, 3), (64, 96, 3))


def test_info(folder: Path) -> None:
    for name, kind in (("model", "Stable Diffusion 2.x unCLIP, diffusers folder"), ("file.safetensors", "")):
        facts = ldm_here("info", folder / name, "--json").records[0]
        assert facts["is"] == (kind or facts["family"])
        assert facts["conditioned_on"] == "text, image_embedding"
        assert facts["prediction_type"] == "v_prediction"
        assert facts["parts"]["image_normalizer"]["hidden_size"] == WIDTH
        assert facts["parts"]["image_normalizer"]["parameters"] == (2 * WIDTH if kind else 0)
    facts = ldm_here("info", folder / "rows.safetensors", "--json").records[0]
    assert facts["is"] == "file of image embeddings"


def test_python_takes_paths() -> None:
    request = GenerationRequest("", image_embedding=Path("one.safetensors"))  # type: ignore[arg-type]
    assert request.image_embedding == "one.safetensors"
    assert "embedding_row" not in request.to_dict()


GIVEN = "--image-embedding"
REFUSED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "narrow": (65, (GIVEN, "narrow.safetensors"), "has embeddings of 20 numbers, and the model reads 40"),
    "cube": (65, (GIVEN, "cube.safetensors"), "holds image_embeds as F32 [3, 1, 40]"),
    "nan": (65, (GIVEN, "nan.safetensors"), "holds NaN or infinity"),
    "large": (65, (GIVEN, "large.safetensors"), "large.safetensors holds numbers that float32 does not"),
    "two": (65, (GIVEN, "two.safetensors"), "has 2 tensors, and none of them called image_embeds"),
    "whole": (65, (GIVEN, "whole.safetensors"), "holds image_embeds as I32"),
    "empty": (65, (GIVEN, "empty.safetensors"), "holds image_embeds as F32 [0, 40]"),
    "none": (65, (GIVEN, "none.safetensors"), "has no tensor"),
    "cut": (65, (GIVEN, "cut.safetensors"), "is cut short"),
    "text": (65, (GIVEN, "text.safetensors"), "is a text that begins “hello”"),
    "pickle": (65, (GIVEN, "rows.pt"), "is a pickle"),
    "absent": (66, (GIVEN, "absent.safetensors"), "absent.safetensors"),
    "no name": (2, (GIVEN, ""), "--image-embedding is empty; name a file"),
    "row beyond": (2, (GIVEN, "rows.safetensors", "--embedding-row", "3"), "which has rows 0 to 2"),
    "negative row": (2, (GIVEN, "rows.safetensors", "--embedding-row=-1"), "embedding_row -1 is not a whole number"),
    "row of nothing": (2, ("--embedding-row", "0"), "the model reads an embedding of a picture"),
    "level beyond": (2, (GIVEN, "one.safetensors", "--noise-level", "1000"), "noise_level 1000 is over 999"),
    "nothing": (2, (), "the model reads an embedding of a picture; give one, as `ldm sample --image-embedding FILE`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_sentence(name: str, folder: Path, tmp_path: Path) -> None:
    code, words, said = REFUSED[name]
    assert_refused(run(folder, *words, "-o", tmp_path / "out"), code, said)


def test_models_that_read_no_embedding_say_so(folder: Path, tmp_path: Path) -> None:
    given = (GIVEN, "one.safetensors", "-o", tmp_path / "out")
    assert_refused(run(folder, *given, model="cin256.safetensors"), 2, "image_embedding is not for this model")
    prompted = ("-p", "a cat", "--label", "1", "-o", tmp_path / "out")
    assert_refused(run(folder, *prompted, model="cin256.safetensors"), 2, "prompt is not for this model")
    noised = ("--label", "1", "--noise-level", "9", "-o", tmp_path / "out")
    said = "noise_level is for a model that enlarges pictures or reads embeddings of them, and this is none"
    assert_refused(run(folder, *noised, model="cin256.safetensors"), 2, said)
    assert_refused(run(folder, "a cat", command="txt2img"), 2, "the model reads an embedding of a picture")
