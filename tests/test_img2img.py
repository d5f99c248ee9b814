"""`ldm img2img` and sessions: pictures to draw on, masks, what is left as it was, and records that run again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import A1111, assert_refused, ldm_here, pixels
from conftest import loaded, open_session
from PIL import Image

from ldmcli import GenerationRequest, Session, remarks
from ldmcli.errors import BadDataError, MissingInputError, UsageError
from ldmcli.images.canvas import canvas_of
from ldmcli.images.metadata import read_parameters, read_record

SIZE = 64
FAST = ("--steps", "4", "-s", "3", "--dtype", "fp32", "--threads", "1", "--no-cache")


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of noise and slopes, so that every pixel tells."""
    path = tmp_path_factory.mktemp("in") / "apple.png"
    noise = np.random.default_rng(1).integers(0, 60, (SIZE, SIZE, 3))
    slopes = np.mgrid[:SIZE, :SIZE].sum(0)[..., None] + np.array([0, 40, 20])
    Image.fromarray((noise + slopes).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def spot(apple: Path) -> Path:
    """A mask: a square in the middle."""
    path = apple.with_name("spot.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[20:44, 20:44] = 255
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture(scope="module")
def session(model_folder: Path) -> Session:
    return open_session(model_folder)


def drawn(session: Session, prompt: str = "a pear", **settings: Any) -> np.ndarray:
    usual = {"seed": 3, "steps": 4, "width": SIZE, "height": SIZE}
    (picture,) = session.draw([GenerationRequest(prompt, **{**usual, **settings})])
    return picture.pixels()


# ---- strength ----


def test_full_strength_is_as_if_there_were_no_picture(session: Session, apple: Path) -> None:
    assert np.array_equal(drawn(session, image=str(apple), strength=1.0), drawn(session))


def test_a_stronger_drawing_is_further_from_the_picture(session: Session, apple: Path) -> None:
    found = [drawn(session, image=str(apple), strength=s).astype(int) for s in (0.0, 0.25, 0.5, 0.75)]
    apart = [np.abs(each - found[0]).mean() for each in found]
    assert apart == sorted(apart)
    assert len(set(apart)) == 4


def test_no_strength_takes_no_step(session: Session, apple: Path) -> None:
    heard: list[tuple[int, int]] = []
    request = GenerationRequest("a", image=str(apple), strength=0.0, steps=4, seed=1)
    (picture,) = session.draw([request], on_step=lambda p: heard.append((p.done, p.steps)))
    assert picture.pixels().shape == (SIZE, SIZE, 3)
    assert heard == [(0, 0)]


def test_progress_counts_the_steps_that_are_taken(session: Session, apple: Path) -> None:
    heard: list[tuple[int, int]] = []
    request = GenerationRequest("a", image=str(apple), strength=0.5, steps=5, seed=1)
    next(session.draw([request], on_step=lambda p: heard.append((p.done, p.steps))))
    assert heard == [(0, 2), (1, 2), (2, 2)]


def test_what_cannot_be_meant_is_said(session: Session, apple: Path) -> None:
    for settings, words in (
        ({"strength": 0.5}, "strength is for a request with an image"),
        ({"mask": "m.png"}, "mask is for a request with an image"),
        ({"image": str(apple), "strength": 0.01, "steps": 50}, "use 0.02 or more, or 0"),
        ({"image": str(apple), "strength": 1.5}, "strength 1.5 is not a number from 0 to 1"),
        ({"image": ""}, "image is empty; name a picture file"),
        ({"image": 3}, "image must be a path"),
        ({"image": str(apple), "resize": "squash"}, "stretch, crop, fill"),
        ({"image": str(apple), "invert_mask": 1}, "neither true nor false"),
    ):
        with pytest.raises(UsageError, match=words):
            session.fit(GenerationRequest("a", **settings))


@pytest.mark.parametrize("option", [("--invert-mask",), ("--mask-blur", "4"), ("--inpaint-area", "masked")])
def test_what_is_said_of_no_mask_changes_nothing_with_a_word(
    option: tuple[str, ...], tmp_path: Path, apple: Path
) -> None:
    remarks.sayings().clear()
    wide = tmp_path / "wide.png"
    Image.open(apple).crop((0, 0, 48, 24)).save(wide)
    done = img2img("a pear", "-i", wide, *option, "-o", tmp_path / "a.png")
    assert f"{option[0][2:].replace('-', '_')} is for a picture with a mask" in done.err
    assert img2img("a pear", "-i", wide, "-o", tmp_path / "b.png").err.count("mask") == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mask-padding", "4"), "mask_padding is for an inpaint_area of masked"),
        (("--inpaint-area", "masked", "--resize", "fill"), "resize changes nothing"),
        (("--strength", "1", "--masked-content", "zero"), "masked_content changes nothing where strength is 1"),
    ],
)
def test_what_a_mask_leaves_idle_is_said(
    options: tuple[str, ...], words: str, tmp_path: Path, apple: Path, spot: Path
) -> None:
    remarks.sayings().clear()
    usual = {"--strength": ("--strength", "1"), "--inpaint-area": ("--inpaint-area", "masked")}.get(options[0], ())
    for name, given in (("a.png", options), ("b.png", usual)):
        done = img2img("a pear", "-i", apple, "--mask", spot, *given, "-o", tmp_path / name)
        assert (words in done.err) == (given == options)
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


# ---- sizes, and what pictures may be ----


def test_the_size_is_the_pictures_own_down_to_a_whole_number_of_latents(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "odd.png"
    Image.new("RGB", (75, 50), "red").save(path)
    fitted = session.fit(GenerationRequest("a", image=path))
    assert (fitted.width, fitted.height, fitted.strength) == (72, 48, 0.75)
    assert fitted.recorded.strength == 0.75
    Image.new("RGB", (1, 1)).save(path)
    fitted = session.fit(GenerationRequest("a", image=path))
    assert (fitted.width, fitted.height) == (8, 8)


def test_bytes_are_as_good_as_a_path(session: Session, apple: Path) -> None:
    by_path, by_bytes = (drawn(session, image=each, strength=0.5) for each in (apple, apple.read_bytes()))
    assert np.array_equal(by_path, by_bytes)
    assert GenerationRequest("a", image=b"abc").to_dict()["image"] == "-"


def test_pictures_of_a_batch_are_those_drawn_alone(session: Session, apple: Path, spot: Path) -> None:
    common: dict[str, Any] = {"steps": 4, "strength": 0.75, "sampler": "euler-a", "width": SIZE, "height": SIZE}
    requests = [
        GenerationRequest("a pear", seed=1, image=apple, **common),
        GenerationRequest("a rose", seed=2, image=spot, **common),
        GenerationRequest("a rose", seed=2, steps=4, width=SIZE, height=SIZE, sampler="euler-a"),
    ]
    together = [picture.pixels() for picture in session.draw(requests, batch_size=3)]
    alone = [picture.pixels() for picture in session.draw(requests)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_the_encoder_is_read_once_a_picture_needs_it(model_folder: Path, apple: Path) -> None:
    with open_session(model_folder) as fresh:
        assert loaded(fresh)._encoder is None
        drawn(fresh)
        drawn(fresh, image=str(apple), strength=1.0)
        assert loaded(fresh)._encoder is None
        drawn(fresh, image=str(apple))
        encoder = loaded(fresh)._encoder
        assert encoder is not None
        assert not hasattr(encoder, "decoder")
        drawn(fresh, image=str(apple))
        assert loaded(fresh)._encoder is encoder


# ---- masks ----


@pytest.mark.parametrize("blur", [0.0, 3.0])
@pytest.mark.parametrize("area", ["whole", "masked"])
@pytest.mark.parametrize("inverted", [False, True])
def test_what_is_not_masked_is_as_it_was_bit_for_bit(
    session: Session, apple: Path, spot: Path, area: str, inverted: bool, blur: float
) -> None:
    found = drawn(session, image=apple, mask=spot, inpaint_area=area, invert_mask=inverted, mask_blur=blur)
    before, mask = pixels(apple), np.asarray(Image.open(spot)) > 127
    changed = (found != before).any(-1)
    kept = mask if inverted else ~mask
    if blur:  # its edge is soft for as far as three deviations
        rows, columns = np.nonzero(~kept)
        y, x = np.mgrid[:SIZE, :SIZE]
        near = np.zeros_like(kept)
        for row, column in zip(rows, columns, strict=True):
            near |= (abs(y - row) <= 11) & (abs(x - column) <= 11)
        kept = ~near
    assert not changed[kept].any()
    assert changed.any()


def test_without_pasting_back_the_rest_passes_the_autoencoder(session: Session, apple: Path, spot: Path) -> None:
    raw = drawn(session, image=apple, mask=spot, paste_back=False)
    assert (raw[:16] != pixels(apple)[:16]).any()


def test_the_surroundings_are_drawn_at_the_full_size(session: Session, tmp_path: Path) -> None:
    """And go back into a picture of any size."""
    path, mask = tmp_path / "wide.png", tmp_path / "mask.png"
    noise = np.random.default_rng(2).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    white = np.zeros((90, 150), np.uint8)
    white[40:60, 100:130] = 255
    Image.fromarray(white).save(mask)
    settings: dict[str, Any] = {"inpaint_area": "masked", "mask_padding": 8, "width": None, "height": None}
    fitted = session.fit(GenerationRequest("a", image=path, mask=mask, inpaint_area="masked"))
    assert (fitted.width, fitted.height) == (session.config.default_size,) * 2
    found = drawn(session, image=path, mask=mask, **settings)
    assert found.shape == (90, 150, 3)
    assert np.array_equal(found[white == 0], noise[white == 0])
    raw = drawn(session, image=path, mask=mask, paste_back=False, **settings)
    changed = (raw != noise).any(-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (27, 72, 92, 137)  # 46×46 around 36×46


def start_of(session: Session, **settings: Any) -> np.ndarray:
    """The latents (channels, height, width) that sampling starts from."""
    heard: list[np.ndarray] = []
    request = GenerationRequest("a", seed=3, steps=4, strength=0.5, sampler="ddim", **settings)
    next(session.draw([request], on_step=lambda progress: heard.append(progress.latents[0].numpy().copy())))
    return heard[0]


def test_repainting_starts_from_the_picture_from_noise_or_from_nothing(
    session: Session, apple: Path, spot: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.fromarray(255 - pixels(apple)).save(other)
    starts = {
        content: [start_of(session, image=image, mask=spot, masked_content=content) for image in (apple, other)]
        for content in ("original", "noise", "zero")
    }
    masked, kept = np.s_[:, 3:6, 3:6], np.s_[:, :2]  # of the latents
    for content, (one, another) in starts.items():
        assert np.array_equal(one[masked], another[masked]) == (content != "original")
        assert np.array_equal(one[kept], starts["original"][0][kept])
    step = starts["noise"][0][masked] - starts["zero"][0][masked]
    assert 0.3 < step.std() < 1  # noise of the picture's share


def test_colours_around_the_mask_grow_into_it(session: Session, spot: Path, tmp_path: Path) -> None:
    halves = np.zeros((SIZE, SIZE, 3), np.uint8)
    halves[:, :32, 0] = halves[:, 32:, 2] = 200
    mask = np.asarray(Image.open(spot)) > 127
    halves[mask] = (0, 255, 0)
    Image.fromarray(halves).save(tmp_path / "halves.png")
    request = GenerationRequest("a", image=tmp_path / "halves.png", mask=spot, masked_content="fill")
    found = canvas_of(session.fit(request)).pixels
    assert np.array_equal(found[~mask], halves[~mask])
    assert found[mask][:, 1].max() < 8
    red, _, blue = found[32, 20:44].T.astype(int)
    assert (red[0], blue[-1]) == (pytest.approx(200, abs=20),) * 2
    assert (np.diff(red) <= 2).all()
    assert (np.diff(blue) >= -2).all()


@pytest.mark.parametrize("content", ["fill", "noise", "zero"])
def test_what_repainting_starts_from_tells(session: Session, apple: Path, spot: Path, content: str) -> None:
    usual = drawn(session, image=apple, mask=spot, strength=0.5)
    other = drawn(session, image=apple, mask=spot, strength=0.5, masked_content=content)
    assert (usual != other).any()


def test_transparency_may_be_the_mask(session: Session, apple: Path, spot: Path, tmp_path: Path) -> None:
    path = tmp_path / "hole.png"
    picture = Image.open(apple).convert("RGB")
    picture.putalpha(Image.eval(Image.open(spot), lambda grey: 255 - grey))
    picture.save(path)
    found = drawn(session, image=path, mask="alpha")
    assert np.array_equal(found[:20], pixels(apple)[:20])
    assert (found[20:44, 20:44] != pixels(apple)[20:44, 20:44]).any()
    with pytest.raises(BadDataError, match="no transparency"):
        session.fit(GenerationRequest("a", image=apple, mask="alpha"))


def test_commands_and_rows_take_transparency_and_other_programs_names(apple: Path, spot: Path, tmp_path: Path) -> None:
    hole, out = tmp_path / "hole.png", tmp_path / "out.png"
    picture = Image.open(apple).convert("RGB")
    picture.putalpha(Image.eval(Image.open(spot), lambda grey: 255 - grey))
    picture.save(hole)
    done = img2img("a", "--init-img", hole, "--mask", "alpha", "--denoising-strength", "0.5", "-o", out)
    assert done.code == 0, done.err
    request = read_record(out)["request"]
    assert (request["image"], request["mask"], request["strength"]) == (str(hole), "alpha", 0.5)
    assert ldm_here("img2img", "--from-image", out, "-o", tmp_path / "again.png").code == 0
    row = {"prompt": "a", "init_image": "hole.png", "mask": "alpha", "denoising_strength": 0.5, "steps": 4, "seed": 3}
    of_row = batch(rows(tmp_path / "rows.jsonl", row), "-o", tmp_path / "run")
    for path in (tmp_path / "again.png", *of_row.paths):
        assert np.array_equal(pixels(path), pixels(out))
    assert len(of_row.paths) == 1


def test_only_a_mask_is_called_alpha(apple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert_refused(img2img("a", "-i", "alpha", "-o", out), 66, "alpha does not exist")
    own = tmp_path / "alpha"
    own.write_bytes(apple.read_bytes())
    assert img2img("a", "-i", "alpha", "-o", out, cwd=tmp_path).code == 0
    assert_refused(ldm_here("img2img", "--from-image", out, "-o", tmp_path / "b.png"), 66, "alpha")
    file = rows(tmp_path / "rows.jsonl", {"prompt": "a", "image": "alpha"})
    assert batch(file, "-o", tmp_path / "run").code == 0


def test_a_mask_that_leaves_nothing_is_said(session: Session, apple: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    Image.new("L", (SIZE, SIZE)).save(black)
    with pytest.raises(BadDataError, match="leaves nothing to repaint"):
        session.fit(GenerationRequest("a", image=apple, mask=black))
    session.fit(GenerationRequest("a", image=apple, mask=black, invert_mask=True))
    checked = batch(
        rows(tmp_path / "rows.jsonl", {"prompt": "a", "image": str(apple), "mask": "black.png"}), "--dry-run"
    )
    assert checked.code == 3, checked.err
    assert "leaves nothing to repaint" in checked.err


def test_a_mask_that_is_lost_on_the_way_to_the_size_is_said(session: Session, tmp_path: Path) -> None:
    large, dot = tmp_path / "large.png", tmp_path / "dot.png"
    Image.new("RGB", (16 * SIZE, 16 * SIZE), "red").save(large)
    mask = Image.new("L", (16 * SIZE, 16 * SIZE))
    mask.putpixel((100, 100), 255)
    mask.save(dot)
    request = GenerationRequest("a", image=large, mask=dot, width=SIZE, height=SIZE, steps=2)
    (picture,) = session.draw([request])
    with pytest.raises(BadDataError, match="leaves nothing to repaint"):
        picture.pixels()


# ---- the command, and records ----


def img2img(*words: Any, **settings: Any) -> Any:
    return ldm_here("img2img", *words, *FAST, **settings)


def test_a_picture_in_a_picture_out_and_its_record_runs_again(apple: Path, spot: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.png"
    done = img2img("a red apple", "-i", apple, "--mask", spot, "--strength", "0.6", "--mask-blur", "2", "-o", out)
    assert (done.code, done.paths) == (0, [out])
    record = read_record(out)
    assert record["request"]["strength"] == 0.6
    assert record["request"]["image"] == str(apple)
    assert set(record["inputs"]) == {"image", "mask"}
    said = dict(A1111.findall((read_parameters(out) or "").splitlines()[-1]))
    assert (said["Denoising strength"], said["Mask blur"]) == ("0.6", "2")
    for command in ("img2img", "txt2img"):
        again = ldm_here(command, "--from-image", out, "-o", tmp_path / f"{command}.png")
        assert again.code == 0, again.err
        assert "differ" not in again.err
        assert np.array_equal(pixels(tmp_path / f"{command}.png"), pixels(out))


def test_a_record_whose_picture_has_changed_or_gone_is_said(apple: Path, tmp_path: Path) -> None:
    own, out = tmp_path / "own.png", tmp_path / "out.png"
    own.write_bytes(apple.read_bytes())
    assert img2img("a red apple", "-i", own, "-o", out).code == 0
    Image.new("RGB", (SIZE, SIZE), "green").save(own)
    again = ldm_here("img2img", "--from-image", out, "-o", tmp_path / "a.png")
    assert again.code == 0
    assert "own.png is not the one the picture was made with" in again.err
    own.unlink()
    assert_refused(ldm_here("img2img", "--from-image", out, "-o", tmp_path / "b.png"), 66, "own.png", "--image")
    given = ldm_here("img2img", "--from-image", out, "-i", apple, "-o", tmp_path / "c.png")
    assert given.code == 0
    assert np.array_equal(pixels(tmp_path / "c.png"), pixels(out))


def test_a_picture_from_standard_input(apple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    done = img2img("a red apple", "-i", "-", "-o", out, stdin=apple.read_bytes())
    assert done.code == 0, done.err
    assert read_record(out)["request"]["image"] == "-"
    assert_refused(ldm_here("img2img", "--from-image", out, "-o", tmp_path / "b.png"), 66, "standard input", "--image")
    assert_refused(img2img("-", "-i", "-"), 2, "standard input is either")
    for option in ("--mask", "--depth"):
        assert_refused(img2img("a", "-i", apple, option, "-"), 2, "standard input may be the --image alone", option)
    assert_refused(img2img("a"), 2, "--image")


def test_standard_input_without_an_end_or_a_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmcli.cli.arguments.MAX_PICTURE", 1 << 20)
    commands = (("img2img", "a", "-i", "-", "-o", tmp_path / "a.png"), ("upscale", "-", "-o", tmp_path / "b.png"))
    for command in commands:
        assert_refused(ldm_here(*command, stdin=bytes((1 << 20) + 1)), 65, "standard input has more than 1 MiB")
        assert_refused(ldm_here(*command), 65, "standard input is empty")


def test_one_report_for_each_picture(apple: Path, tmp_path: Path) -> None:
    done = img2img("a pear", "a rose", "-i", apple, "-c", "2", "-b", "4", "--json", "-o", tmp_path)
    assert [record["seed"] for record in done.records] == [3, 4, 3, 4]
    assert {record["image"] for record in done.records} == {str(apple)}


# ---- batches ----


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def batch(*words: Any) -> Any:
    return ldm_here("batch", *words, "--steps", "2", "--dtype", "fp32", "--threads", "1", "--no-cache")


def test_rows_name_pictures_beside_their_file(apple: Path, spot: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(apple.read_bytes())
    (tmp_path / "in" / "m.png").write_bytes(spot.read_bytes())
    file = rows(
        tmp_path / "in" / "rows.jsonl",
        {"prompt": "a pear", "init_image": "a.png", "denoising_strength": 0.5, "id": "x"},
        {"prompt": "a rose", "image": "a.png", "mask": "m.png"},
        {"prompt": "a fox"},
        {"prompt": "a plum", "image": "gone.png"},
        {"prompt": "a lime", "image": "m.png", "mask": "https://example.org/m.png"},
        {"prompt": "a kiwi", "strength": 0.5},
    )
    out = tmp_path / "out"
    done = batch(file, "-o", out, "--json", "-b", "2")
    assert done.code == 3, done.err
    assert "line 4: " in done.err
    assert "gone.png does not exist" in done.err
    assert "line 5: " in done.err
    assert "is an address" in done.err
    assert "strength is for a request with an image" in done.err
    drawn_rows = {record["row"]: record["request"] for record in done.records if record["status"] == "done"}
    assert sorted(drawn_rows) == [1, 2, 3]
    assert drawn_rows[1]["image"] == str(tmp_path / "in" / "a.png")
    assert drawn_rows[1]["strength"] == 0.5
    assert "strength" not in drawn_rows[3]
    again = batch(file, "-o", out, "--json")
    assert [record for record in again.records if record["status"] == "done"] == []


def test_a_run_is_not_gone_on_with_when_its_pictures_have_changed(apple: Path, tmp_path: Path) -> None:
    own = tmp_path / "a.png"
    own.write_bytes(apple.read_bytes())
    file = rows(tmp_path / "rows.jsonl", {"prompt": "a pear", "image": "a.png"})
    assert batch(file, "-o", tmp_path / "out").code == 0
    file.write_text(file.read_text() + '\n{"prompt": "a fox", "image": "a.png", "strength": 0.5}\n')
    assert batch(file, "-o", tmp_path / "out", "--extend").code == 0
    Image.new("RGB", (SIZE, SIZE)).save(own)
    assert_refused(batch(file, "-o", tmp_path / "out"), 65, "another run", "pictures_sha256")


def test_a_picture_that_changes_while_others_are_drawn_fails_by_itself(
    session: Session, apple: Path, spot: Path, tmp_path: Path
) -> None:
    """Else its record would name another picture than it was made from."""
    names = ("a.png", "mask.png", "c.png")
    for name in names:
        (tmp_path / name).write_bytes((spot if name == "mask.png" else apple).read_bytes())
    common: dict[str, Any] = {"steps": 2, "image": tmp_path / "a.png"}
    requests = [
        GenerationRequest("a", seed=1, **common | {"image": tmp_path / "c.png"}),
        GenerationRequest("b", seed=2, **common),
        GenerationRequest("c", seed=3, **common | {"image": apple, "mask": tmp_path / "mask.png"}),
        GenerationRequest("d", seed=4, **common | {"image": apple}),
    ]
    fitted = [session.fit(request) for request in requests]
    Image.new("RGB", (SIZE, SIZE), "green").save(tmp_path / "a.png")
    Image.new("L", (SIZE, SIZE), 255).save(tmp_path / "mask.png")
    (tmp_path / "c.png").unlink()
    pictures = list(session.draw(fitted, batch_size=4))
    for picture, words in zip(pictures[:3], ("c.png does not exist", "a.png has changed", "mask.png has"), strict=True):
        with pytest.raises((BadDataError, MissingInputError), match=words):
            picture.pixels()
    assert pictures[3].pixels().shape == (SIZE, SIZE, 3)


def test_a_grid_of_strengths_on_one_picture(apple: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("a pear\n")
    done = batch(file, "-o", tmp_path / "out", "-i", apple, "--grid", "strength=0.5,1", "--json")
    assert done.code == 0, done.err
    assert [record["request"]["strength"] for record in done.records] == [0.5, 1.0]
    assert_refused(batch(file, "-o", tmp_path / "out", "-i", "-"), 2, "standard input is for rows")
