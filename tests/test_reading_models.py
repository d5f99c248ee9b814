"""Models that read more than latents: those that edit pictures by words, and those that read depth maps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import A1111, assert_refused, ldm_here, pixels, tiny_model, tiny_model_of
from conftest import open_session
from graph_support import FakeRecorder, load_plainly, recording
from oracle.comparing import pictures_of
from PIL import Image

from ldmcli import GenerationRequest, Session
from ldmcli.errors import BadDataError, LdmError
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.session import opened

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 32
FAST = ("--steps", "3", "-s", "3", "--dtype", "fp32", "--no-cache")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, another, a mask, and the picture's depth in 16 bits, in 8, and behind a shape of its
    own."""
    folder = tmp_path_factory.mktemp("in")
    noise = np.random.default_rng(1)
    for name in ("apple", "pear"):
        Image.fromarray(noise.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    near = noise.integers(0, 200, (SIZE, SIZE), np.uint8)
    Image.fromarray(near).save(folder / "near.png")
    Image.fromarray(near.astype(np.uint16) * 5 + 1000).save(folder / "near16.png")
    Image.fromarray(255 - near).save(folder / "far.png")
    Image.fromarray(near[:, :16]).save(folder / "narrow.png")
    Image.fromarray(np.dstack([near, near.T, near])).save(folder / "coloured.png")
    Image.new("L", (SIZE, SIZE), 7).save(folder / "flat.png")
    return folder


@pytest.fixture(scope="module")
def editor() -> Session:
    return open_session(tiny_model_of(8))


@pytest.fixture(scope="module")
def depths() -> Session:
    return open_session(tiny_model_of(5))


def request(folder: Path, **settings: Any) -> GenerationRequest:
    files = {name: str(folder / f"{settings[name]}.png") for name in ("image", "mask", "depth") if name in settings}
    usual = {"image": str(folder / "apple.png"), "seed": 3, "steps": 3}
    return GenerationRequest(**{"prompt": "red", **usual, **settings, **files})


def drawn(session: Session, folder: Path, **settings: Any) -> np.ndarray:
    (picture,) = session.draw([request(folder, **settings)])
    return picture.pixels()


def img2img(channels: int, *words: Any, **settings: Any) -> Any:
    return ldm_here("img2img", *words, "-m", tiny_model_of(channels), *FAST, **settings)


# ---- editing by words ----


def test_what_bears_on_an_edited_picture(editor: Session, inputs: Path) -> None:
    usual = drawn(editor, inputs)
    assert usual.shape == (SIZE, SIZE, 3)
    assert np.array_equal(usual, drawn(editor, inputs, image_guidance_scale=1.5))
    for other in (
        {"image": "pear"},
        {"prompt": "blue"},
        {"negative_prompt": "fog"},
        {"guidance_scale": 3.0},
        {"image_guidance_scale": 1.0},
        {"image_guidance_scale": 0.0},
        {"guidance_rescale": 0.5},
        {"guidance_interval": (0.0, 1.0)},
    ):
        assert (usual != drawn(editor, inputs, **other)).any(), other


def test_edited_pictures_of_a_batch_are_those_drawn_alone(editor: Session, inputs: Path) -> None:
    """Their prompts of equal length, and of several."""
    long = {"on_long_prompt": "chunk", "prompt": "r" * 100}
    for settings in ({}, long):
        requests = [request(inputs, seed=i, image=name, **settings) for i, name in enumerate(("apple", "pear"))]
        together = [picture.pixels() for picture in editor.draw(requests, batch_size=2)]
        alone = [picture.pixels() for picture in editor.draw(requests)]
        assert np.abs(np.stack(together).astype(int) - np.stack(alone)).max() <= 1


@pytest.mark.parametrize("channels", [5, 8])
def test_recorded_steps_read_each_picture(inputs: Path, channels: int) -> None:
    """As on a GPU, where a recording made for one picture is replayed for another."""
    plain = load_plainly(tiny_model_of(channels))
    graphed = recording(plain, FakeRecorder())
    for i, name in enumerate(("apple", "pear")):
        requests = [request(inputs, image=name, steps=6, width=SIZE, height=SIZE)]
        if channels == 5:
            requests = [dataclasses.replace(requests[0], depth=str(inputs / f"{['near', 'far'][i]}.png"))]
        found, wanted = (pictures_of(pipeline, requests).astype(int) for pipeline in (graphed, plain))
        assert np.abs(found - wanted).max() <= 1


def test_an_edited_picture_is_recorded_and_drawn_again(inputs: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.png", tmp_path / "b.png"
    done = img2img(8, "make it red", "-i", inputs / "apple.png", "--image-cfg-scale", "2", "-o", out)
    assert done.code == 0, done.err
    record = read_record(out)
    assert (record["request"]["image_guidance_scale"], record["request"]["strength"]) == (2.0, None)
    said = dict(A1111.findall((read_parameters(out) or "").splitlines()[-1]))
    assert said["Image CFG scale"] == "2"
    assert "Denoising strength" not in said
    assert ldm_here("img2img", "--from-image", out, "-o", again).code == 0
    assert np.array_equal(pixels(out), pixels(again))
    done = img2img(8, "make it red", "-i", inputs / "apple.png", "-o", tmp_path / "c.png")
    assert read_record(tmp_path / "c.png")["request"]["image_guidance_scale"] == 1.5


def test_unguided_editing_says_that_the_picture_does_not_guide(editor: Session, inputs: Path, caplog: Any) -> None:
    opened._say_once.cache_clear()
    editor.fit(editor.fit(request(inputs, guidance_scale=1.0)).recorded)
    assert "image_guidance_scale" not in caplog.text
    editor.fit(request(inputs, guidance_scale=1.0, image_guidance_scale=2.0))
    assert "image_guidance_scale changes nothing where guidance_scale is 1" in caplog.text


@pytest.mark.parametrize("channels", [5, 8])
def test_a_refiner_reads_latents_alone(inputs: Path, channels: int) -> None:
    """At its steps the picture and the depth map are known no more."""
    own = {"depth": "near", "strength": 1.0} if channels == 5 else {}
    with open_session(tiny_model_of(channels), refiner=str(tiny_model())) as session:
        early, late = (drawn(session, inputs, refiner_start=start, **own) for start in (0.4, 1.0))
        plain = drawn(open_session(tiny_model_of(channels)), inputs, **own)
    assert np.array_equal(late, plain)
    assert (early != late).any()


# ---- depth maps ----


def test_what_bears_on_a_picture_of_known_depth(depths: Session, inputs: Path) -> None:
    usual = drawn(depths, inputs, depth="near")
    assert np.array_equal(usual, drawn(depths, inputs, depth="near16"))  # the range makes no difference
    for other in ({"depth": "far"}, {"image": "pear"}, {"strength": 0.4}):
        assert (usual != drawn(depths, inputs, **{"depth": "near", **other})).any(), other
    full = drawn(depths, inputs, depth="near", strength=1.0)
    assert np.array_equal(full, drawn(depths, inputs, depth="near", strength=1.0, image="pear"))


@pytest.mark.parametrize("resize", ["crop", "fill"])
def test_depth_comes_to_the_size_as_its_picture_does(
    depths: Session, inputs: Path, tmp_path: Path, resize: str
) -> None:
    near = Image.open(inputs / "near.png")
    box = (0, 8, 32, 24) if resize == "crop" else (-16, 0, 48, 32)
    edges = ((0, 0), (16, 16)) if resize == "fill" else ((0, 0), (0, 0))
    for name in ("near", "apple"):
        array = np.asarray(Image.open(inputs / f"{name}.png"))
        array = array[8:24] if resize == "crop" else np.pad(array, (*edges, *[(0, 0)] * (array.ndim - 2)), mode="edge")
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    size = {"width": box[2] - box[0], "height": box[3] - box[1]}
    assert near.size == (SIZE, SIZE)
    found = drawn(depths, inputs, depth="near", resize=resize, **size)
    assert np.array_equal(found, drawn(depths, tmp_path, depth="near", **size))


@pytest.mark.parametrize("area", ["whole", "masked"])
def test_parts_of_a_picture_of_known_depth(depths: Session, inputs: Path, area: str) -> None:
    found = drawn(depths, inputs, depth="near", mask="mask", inpaint_area=area, mask_padding=0, width=32, height=32)
    before, mask = pixels(inputs / "apple.png"), np.asarray(Image.open(inputs / "mask.png")) > 127
    assert np.array_equal(found[~mask], before[~mask])
    other = drawn(depths, inputs, depth="far", mask="mask", inpaint_area=area, mask_padding=0, width=32, height=32)
    assert (found != other).any()


def test_a_depth_map_is_recorded_and_read_again(inputs: Path, tmp_path: Path) -> None:
    own, out = tmp_path / "own.png", tmp_path / "a.png"
    own.write_bytes((inputs / "near.png").read_bytes())
    done = img2img(5, "red", "-i", inputs / "apple.png", "--depth", own, "-o", out)
    assert done.code == 0, done.err
    record = read_record(out)
    assert record["request"]["depth"] == str(own)
    assert set(record["inputs"]) == {"image", "depth"}
    again = ldm_here("img2img", "--from-image", out, "-o", tmp_path / "b.png")
    assert again.code == 0, again.err
    assert "differ" not in again.err
    assert np.array_equal(pixels(out), pixels(tmp_path / "b.png"))
    own.write_bytes((inputs / "far.png").read_bytes())
    changed = ldm_here("img2img", "--from-image", out, "-o", tmp_path / "c.png")
    assert "the depth" in changed.err
    assert "differ" in changed.err
    own.unlink()
    assert_refused(ldm_here("img2img", "--from-image", out, "-o", tmp_path / "d.png"), 66, "own.png", "--depth")


def test_rows_have_pictures_depths_and_scales(inputs: Path, tmp_path: Path) -> None:
    own = tmp_path / "in"
    own.mkdir()
    for name in ("apple", "near"):
        (own / f"{name}.png").write_bytes((inputs / f"{name}.png").read_bytes())
    rows = [
        {"prompt": "a", "image": "apple.png", "depth_map": "near.png"},
        {"prompt": "b", "image": "apple.png"},
        {"prompt": "c", "image": "apple.png", "depth": "near.png", "image_cfg_scale": 2},
        {"prompt": "d", "image": "apple.png", "depth": "gone.png"},
    ]
    (own / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--steps", "2", "--strength", "0.7", "--dtype", "fp32", "--no-cache", "-m", tiny_model_of(5))
    command = ("batch", own / "rows.jsonl", *options, "-o", tmp_path / "out")
    done = ldm_here(*command, "--json")
    assert done.code == 3, done.err
    for words in ("its depth map; give both", "is for a model that edits pictures", "gone.png does not exist"):
        assert words in done.err
    (record,) = [record for record in done.records if record["status"] == "done"]
    assert record["request"]["depth"] == str(own / "near.png")
    (own / "near.png").write_bytes((inputs / "far.png").read_bytes())
    changed = ldm_here(*command)
    assert changed.code == 65
    assert "input.pictures_sha256" in changed.err


@pytest.mark.parametrize(("channels", "reads"), [(4, None), (5, "depth"), (8, "image"), (9, "mask")])
def test_info_tells_what_a_model_reads(channels: int, reads: str | None) -> None:
    path = tiny_model() if channels == 4 else tiny_model_of(channels)
    assert ldm_here("info", "--json", path).records[0]["reads"] == reads


# ---- what is refused ----


@pytest.mark.parametrize(
    ("channels", "settings", "words"),
    [
        (8, {"image": None}, "the model edits pictures; give it one"),
        (8, {"strength": 0.5}, "strength is not for a model that edits pictures"),
        (8, {"mask": "mask"}, "mask is not for a model that edits pictures"),
        (8, {"depth": "near"}, "depth is for a model that reads depth maps"),
        (8, {"hires": "2"}, "hires is not for a model that edits pictures"),
        (8, {"image_guidance_scale": -1.0}, "image_guidance_scale -1.0 is not a number from 0"),
        (5, {"image": None}, "a picture and its depth map; give both"),
        (5, {}, "a picture and its depth map; give both"),
        (5, {"depth": "near", "image_guidance_scale": 1.5}, "for a model that edits pictures by words"),
        (5, {"depth": "near", "hires": "2"}, "hires is not for a model"),
        (5, {"depth": "coloured"}, "coloured.png has colours, and a depth map is grey"),
        (5, {"depth": "flat"}, "the depth map is the same everywhere"),
        (4, {"depth": "near"}, "depth is for a model that reads depth maps"),
        (4, {"image_guidance_scale": 1.5}, "image_guidance_scale is for a model that edits pictures"),
        (9, {"image_guidance_scale": 1.5}, "image_guidance_scale is for a model that edits pictures"),
    ],
)
def test_what_does_not_go_together_is_said(inputs: Path, channels: int, settings: dict[str, Any], words: str) -> None:
    fields = dict(settings)
    without = fields.pop("image", "") is None
    session = open_session(tiny_model() if channels == 4 else tiny_model_of(channels))
    with pytest.raises(LdmError, match=words):
        session.fit(dataclasses.replace(request(inputs, **fields), **({"image": None} if without else {})))


def test_a_map_that_is_flat_in_the_size_that_is_drawn_is_said(depths: Session, inputs: Path, tmp_path: Path) -> None:
    dot = Image.new("L", (16 * SIZE, 16 * SIZE))
    dot.putpixel((100, 100), 255)
    dot.save(tmp_path / "dot.png")
    (picture,) = depths.draw([dataclasses.replace(request(inputs), depth=str(tmp_path / "dot.png"))])
    with pytest.raises(BadDataError, match="the same everywhere"):
        picture.pixels()


@pytest.mark.parametrize("name", ["mask", "depth"])
def test_what_is_of_another_shape_than_its_picture_is_said(inputs: Path, name: str, caplog: Any) -> None:
    opened._say_once.cache_clear()
    with open_session(tiny_model_of(5)) as session:
        session.fit(request(inputs, depth="near", mask="mask"))
        assert "shape" not in caplog.text
        session.fit(request(inputs, **{"depth": "near", name: "narrow"}))
    assert f"the {name} is 16×32 and the picture 32×32, which is of another shape" in caplog.text


def test_other_models_commands_name_what_is_for_editing(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    drawing = ("-m", tiny_model_of(8), *FAST, "-o", out)
    assert_refused(ldm_here("txt2img", "red", *drawing), 2, "the model edits pictures", "img2img")
    assert_refused(img2img(8, "red", "-i", inputs / "apple.png", "--strength", "0.5", "-o", out), 2, "strength")
    (tmp_path / "rows.txt").write_text("red\n")
    assert_refused(ldm_here("bench", "-m", tiny_model_of(8)), 2, "the model edits pictures")
