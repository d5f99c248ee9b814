"""--hires: a second, larger pass, its numbers, and what commands, records and batches say of it."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import A1111, assert_refused, ldm_here, pixels, tiny_model
from conftest import loaded, open_session
from PIL import Image
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact

from ldmcli import GenerationRequest, Session
from ldmcli.errors import UsageError
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.sampling.registry import SAMPLERS
from ldmcli.spec import HIRES_FIELDS

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, LARGE = 16, 32
FAST = ("-m", tiny_model(), "--steps", "3", "-W", "16", "-H", "16", "-s", "3", "--dtype", "fp32", "--no-cache")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(tiny_model()) as session:
        yield session


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that repeats each pixel twice a side."""
    path = tmp_path_factory.mktemp("nets") / "twice.safetensors"
    net = Compact(num_feat=4, num_conv=1, upscale=2)
    save_file({name: torch.zeros_like(value) for name, value in net.state_dict().items()}, path)
    return path


def request(**settings: Any) -> GenerationRequest:
    usual: dict[str, Any] = {"seed": 3, "steps": 3, "width": SIZE, "height": SIZE, "hires": "2", "hires_steps": 4}
    return GenerationRequest("a pear", **usual | settings)


def drawn(session: Session, **settings: Any) -> np.ndarray:
    (picture,) = session.draw([request(**settings)])
    return picture.pixels()


def small(session: Session, **settings: Any) -> np.ndarray:
    return drawn(session, **dict.fromkeys(HIRES_FIELDS), **settings)


def as_png(values: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    return data.getvalue()


# ---- what is drawn ----


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_second_pass_is_a_drawing_on_the_enlarged_picture(session: Session, sampler: str) -> None:
    """With every sampler: the same start, the same noise, as many steps as are asked for."""
    found = drawn(session, sampler=sampler, hires_upscaler="lanczos", hires_strength=0.6)
    first = Image.fromarray(small(session, sampler=sampler)).resize((LARGE, LARGE), Image.Resampling.LANCZOS)
    on_it = {"image": as_png(np.asarray(first)), "steps": 6, "strength": 0.7, "width": LARGE, "height": LARGE}
    assert np.array_equal(found, small(session, sampler=sampler, **on_it))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_latents_are_enlarged_by_every_sampler(session: Session, sampler: str) -> None:
    found = [drawn(session, sampler=sampler, hires_strength=strength) for strength in (0.0, 0.5, 1.0)]
    assert {each.shape for each in found} == {(LARGE, LARGE, 3)}
    assert len({each.tobytes() for each in found}) == 3


def test_a_network_enlarges(session: Session, twice: Path) -> None:
    first = small(session).repeat(2, 0).repeat(2, 1)
    on_it = {"image": as_png(first), "steps": 5, "strength": 0.9, "width": LARGE, "height": LARGE}
    assert np.array_equal(drawn(session, hires_upscaler=str(twice)), small(session, **on_it))
    assert drawn(session, hires_upscaler="embedded", hires="40x32").shape == (32, 40, 3)


@pytest.mark.parametrize("by_network", [False, True])
def test_a_picture_is_drawn_on_at_first_and_enlarged_then(session: Session, twice: Path, by_network: bool) -> None:
    """Each pass with the noise of the seed from its beginning, as AUTOMATIC1111 orders it."""
    given: dict[str, Any] = {"width": 24, "height": 16, "sampler": "euler-a"}
    on_it = given | {"image": as_png(small(session, **given)), "strength": 0.7}
    upscaler = str(twice) if by_network else "lanczos"
    found = drawn(session, hires_upscaler=upscaler, hires_strength=0.6, **on_it | {"width": None, "height": None})
    first = small(session, **on_it)
    if by_network:
        enlarged = first.repeat(2, 0).repeat(2, 1)
    else:
        enlarged = np.asarray(Image.fromarray(first).resize((48, 32), Image.Resampling.LANCZOS))
    again = {"image": as_png(enlarged), "steps": 6, "strength": 0.7, "width": 48, "height": 32}
    assert np.array_equal(found, small(session, **given | again))


def test_pictures_of_a_batch_are_those_drawn_alone(session: Session) -> None:
    requests = [request(seed=seed, sampler="euler-a", hires_upscaler="lanczos") for seed in range(3)]
    together = [picture.pixels() for picture in session.draw(requests, batch_size=3)]
    alone = [picture.pixels() for picture in session.draw(requests)]
    apart = [np.abs(one.astype(int) - other).max() for one, other in zip(together, alone, strict=True)]
    assert max(apart) <= 1


def test_progress_counts_the_steps_of_both_passes(session: Session) -> None:
    heard: list[tuple[int, int, int]] = []
    next(session.draw([request()], on_step=lambda p: heard.append((p.done, p.steps, p.latents.shape[2]))))
    assert [(done, steps) for done, steps, _ in heard] == [(done, 7) for done in range(8)]
    assert [size for *_, size in heard] == [heard[0][2]] * 4 + [heard[0][2] * 2] * 4


# ---- what may go wrong ----


def test_out_of_memory_draws_both_passes_in_strips(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(session, hires_upscaler="lanczos")
    vae = loaded(session).vae
    decode, sizes = vae.decode, list[int]()

    def limited(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(latents.shape[2])
        if latents.shape[2] > sizes[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(vae, "decode", limited)
    found = drawn(session, hires_upscaler="lanczos")
    assert sizes == [sizes[0], sizes[0] * 2]  # the third and fourth decoding are in strips
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
@pytest.mark.parametrize("part", ["U-Net", "VAE"])
def test_numbers_that_overflow_are_drawn_again_in_float32(session: Session, upscaler: str, part: str) -> None:
    wanted = drawn(session, hires_upscaler=upscaler)
    with open_session(tiny_model(), dtype="bf16") as halved:
        pipeline = loaded(halved)
        module = pipeline.model.unet if part == "U-Net" else pipeline.vae.decoder.up_blocks[-1]

        def overflow(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output if output.dtype == torch.float32 else output * float("inf")

        module.register_forward_hook(overflow)
        (picture,) = halved.draw([request(hires_upscaler=upscaler)])
        found = picture.pixels()
        assert picture.runtime["dtype"] == ("fp32" if part == "U-Net" else "bf16")
    assert np.abs(found.astype(int) - wanted).mean() < 8


def test_what_cannot_be_meant_is_said(session: Session) -> None:
    for settings, words in (
        ({"hires": "0.5"}, "neither a scale from 1 to 16 nor WIDTHxHEIGHT"),
        ({"hires": "x32"}, "neither a scale"),
        ({"hires": True}, "neither a scale"),
        ({"hires": "nan"}, "neither a scale"),
        (
            {"hires": "1.3"},
            "hires 1.3: size 20×20 does not fit the model, .* the nearest is 16×16",
        ),
        ({"hires": "33x32"}, "33×32 does not fit the model"),
        ({"hires": "100000x100000"}, "would need at least"),
        ({"hires_strength": 1.5}, "hires_strength 1.5 is not a number from 0 to 1"),
        ({"hires_strength": 0.001}, "the end of 4000 steps, and 4000 steps do not fit"),
        ({"hires_steps": 0}, "hires_steps 0 is not a whole number"),
        ({"hires_upscaler": ""}, "hires_upscaler is empty"),
        ({"hires_upscaler": 3}, "hires_upscaler must be text"),
        ({"hires": None}, "hires_steps is for a request with hires"),
        ({"image": tiny_picture(), "mask": tiny_picture()}, "hires draws the whole picture anew"),
    ):
        with pytest.raises(UsageError, match=words):
            session.fit(request(**settings))


def tiny_picture() -> bytes:
    return as_png(np.full((SIZE, SIZE, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("given", "recorded"), [(2, "2"), (1.5, "1.5"), ("2.0", "2"), (" 64 × 32 ", "64x32"), ("64X32", "64x32")]
)
def test_a_scale_or_a_size_has_one_spelling(given: Any, recorded: str) -> None:
    assert GenerationRequest("a", hires=given).to_dict()["hires"] == recorded


def test_a_request_without_a_second_pass_says_nothing_of_one(session: Session) -> None:
    fitted = session.fit(GenerationRequest("a"))
    assert not set(HIRES_FIELDS) & set(fitted.to_dict())
    fitted = session.fit(GenerationRequest("a", hires="2", steps=5))
    assert [fitted.to_dict()[name] for name in HIRES_FIELDS] == ["2", 0.7, 5, "latent"]


# ---- commands and records ----


def test_a_record_draws_the_picture_again_and_tells_a1111(twice: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(twice.read_bytes())
    cases = {
        "latent": ("2", "Hires upscale", "Latent"),
        "Lanczos": ("32x24", "Hires resize", "Lanczos"),
        str(own): ("2", "Hires upscale", "own"),
    }
    for i, (upscaler, (hires, title, name)) in enumerate(cases.items()):
        out, again = tmp_path / f"{i}.png", tmp_path / f"{i}-again.png"
        options = ("--hires", hires, "--hires-steps", "2", "--hires-strength", "0.5", "--hires-upscaler", upscaler)
        done = ldm_here("txt2img", "a pear", *FAST, *options, "-o", out)
        assert done.code == 0, done.err
        said = dict(A1111.findall((read_parameters(out) or "").splitlines()[-1]))
        assert (said[title], said["Hires steps"], said["Hires upscaler"]) == (hires, "2", name)
        assert (said["Denoising strength"], said["Size"]) == ("0.5", "16x16")
        assert set(read_record(out).get("inputs", {})) == ({"hires_upscaler"} if name == "own" else set())
        done = ldm_here("txt2img", "--from-image", out, "-o", again)
        assert done.code == 0, done.err
        assert "differ" not in done.err
        assert np.array_equal(pixels(again), pixels(out))
    net = Compact(num_feat=4, num_conv=1, upscale=2)
    save_file(net.state_dict(), own)
    done = ldm_here("txt2img", "--from-image", tmp_path / "2.png", "-o", tmp_path / "c.png")
    assert "own.safetensors is not the one the picture was made with" in done.err
    own.unlink()
    assert_refused(ldm_here("txt2img", "--from-image", tmp_path / "2.png"), 66, "own.safetensors")


@pytest.mark.parametrize(
    "environ",
    [
        {"LDM_HIRES": "2"},
        {"LDM_LABEL": "3"},
        {"LDM_IMAGE_EMBEDDING": "b.safetensors"},
        {"LDM_IMAGE": "a.png"},
        {"LDM_CONTROL_NET": "tiny-emoji-silhouette", "LDM_CONTROL_IMAGE": "a.png"},
    ],
)
def test_what_a_picture_was_drawn_without_the_environment_does_not_add(environ: dict[str, str], tmp_path: Path) -> None:
    assert ldm_here("txt2img", "a pear", *FAST, "-o", "a.png", cwd=tmp_path).code == 0
    for command in ("txt2img", "img2img", "sample"):
        again = (command, "--from-image", "a.png", "-o", f"{command}.png")
        done = ldm_here(*again, cwd=tmp_path, env=environ)
        assert (done.code, done.err) == (0, ""), command
        assert np.array_equal(pixels(tmp_path / f"{command}.png"), pixels(tmp_path / "a.png"))


def test_a_picture_in_a_larger_picture_out(tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(tiny_picture())
    out = tmp_path / "out.png"
    done = ldm_here("img2img", "a pear", *FAST, "-i", tmp_path / "in.png", "--hires", "2", "-o", out)
    assert done.code == 0, done.err
    assert pixels(out).shape == (LARGE, LARGE, 3)
    assert read_record(out)["request"]["strength"] == 0.75


def test_a_size_that_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    wide = ("--hires", "20000x16", "-o", tmp_path / "a.webp")
    refused = ldm_here("txt2img", "a", *FAST, *wide)
    assert (refused.code, refused.out) == (2, b"")
    assert "20000×16 is too large for WebP" in refused.err


# ---- batches ----


def batch(*words: Any) -> Any:
    return ldm_here("batch", *words, *FAST[:-5], "--dtype", "fp32", "--no-cache")


def test_rows_ask_for_a_second_pass_in_words_of_other_programs(twice: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a pear"},
        {"prompt": "a fig", "Hires upscale": 2, "Hires steps": 2, "Hires upscaler": "Latent", "hires_strength": 0.5},
        {"prompt": "a plum", "hires": "32x24", "hr_upscaler": f"../{twice.parent.name}/{twice.name}"},
        {"prompt": "a lime", "hires": "half"},
        {"prompt": "a kiwi", "hires_steps": 3},
    ]
    folder = twice.parent.parent / f"{tmp_path.name}-rows"
    folder.mkdir()
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    done = batch(file, "-o", out, "--json", "-b", "2")
    assert done.code == 3, done.err
    assert "hires 'half' is neither a scale" in done.err
    assert "hires_steps is for a request with hires" in done.err
    found = {record["row"]: record for record in done.records if record["status"] == "done"}
    assert sorted(found) == [1, 2, 3]
    assert not set(HIRES_FIELDS) & set(found[1]["request"])
    assert [found[2]["request"][name] for name in HIRES_FIELDS] == ["2", 0.5, 2, "latent"]
    assert found[3]["request"]["hires_upscaler"] == str(twice)
    shapes = [pixels(out / found[row]["path"]).shape[:2] for row in (1, 2, 3)]
    assert shapes == [(16, 16), (32, 32), (24, 32)]
    again = batch(file, "-o", out, "--json")
    assert [record for record in again.records if record["status"] == "done"] == []


def test_a_run_knows_its_second_pass(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("a pear\n")
    dry = batch(file, "--hires", "2", "--hires-steps", "5", "--dry-run", "--json")
    assert dry.records[0]["pixel_steps"] == 16 * 16 * 3 + 32 * 32 * 5
    assert batch(file, "-o", tmp_path / "out", "--hires", "2").code == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["hires"] == "2"
    assert_refused(batch(file, "-o", tmp_path / "out"), 65, "another run")
    assert batch(file, "-o", tmp_path / "plain").code == 0
    settings = json.loads((tmp_path / "plain" / "run.json").read_text())["settings"]
    assert not set(HIRES_FIELDS) & set(settings)
    grid = batch(file, "-o", tmp_path / "grid", "--grid", "hires=1,1.5,2", "--json")
    assert [record["request"]["hires"] for record in grid.records] == ["1", "1.5", "2"]
