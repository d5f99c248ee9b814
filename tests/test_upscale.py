"""Pictures made larger: what goes in and comes out, sizes, metadata, and what is refused."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import A1111, assert_refused, ldm, ldm_here, pixels, tiny_model, tiny_single_file
from PIL import Image, PngImagePlugin
from recipe_support import recipe_module
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN

from ldmcli.errors import LdmError, NotFiniteError, UsageError
from ldmcli.images.encode import encode_pixels
from ldmcli.images.formats import Encoding
from ldmcli.images.metadata import read_parameters, read_record, text_chunks
from ldmcli.spec import GenerationRequest, RuntimeSpec
from ldmcli.speed.policy import Runtime, choose_runtime
from ldmcli.upscaling.target import Target, parse_size, upscaled
from ldmcli.upscaling.tiles import tiles
from ldmcli.upscaling.upscaler import Upscaler, open_upscaler

FP32 = choose_runtime(RuntimeSpec(device="cpu", dtype="fp32"))
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
MODEL = {"name": "tiny", "path": "/models/tiny", "sha256": "6ce0161689b3853acaa03779ec93eafe" * 2}


def compact(scale: int = 2, *, zero: bool = True, channels: int = 3) -> dict[str, torch.Tensor]:
    """A small network; of zeros, it repeats each pixel `scale` times a side."""
    torch.manual_seed(0)
    net = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=4, num_conv=1, upscale=scale)
    return {name: torch.zeros_like(value) if zero else value for name, value in net.state_dict().items()}


def repeated(values: np.ndarray, scale: int = 2) -> np.ndarray:
    return values.repeat(scale, 0).repeat(scale, 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that repeats each pixel twice a side."""
    path = tmp_path_factory.mktemp("nets") / "twice.safetensors"
    save_file(compact(), path)
    return path


@pytest.fixture(scope="module")
def upscaler(plain: Path) -> Upscaler:
    return Upscaler(open_upscaler(str(plain)), FP32)


def enlarged(tmp_path: Path, plain: Path, picture: Path, *options: str | Path) -> np.ndarray:
    """What `ldm upscale` makes of a picture, as Pillow reads it."""
    out = tmp_path / "enlarged.png"
    options = ("-m", plain, "-o", out, "--overwrite", "--dtype", "fp32", "-q", *options)
    result = ldm_here("upscale", picture, *options)
    assert result.code == 0, result
    with Image.open(out) as image:
        return np.asarray(image)


# --- pictures in


def test_colours_stay_in_their_order(tmp_path: Path, plain: Path) -> None:
    for name in ("a.png", "a.bmp", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        assert np.array_equal(enlarged(tmp_path, plain, tmp_path / name), repeated(PIXELS))


def test_grey_palettes_and_16_bits_become_rgb(tmp_path: Path, plain: Path) -> None:
    grey = PIXELS[..., 0]
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    few = Image.fromarray(PIXELS // 128 * 255)
    for name, image, expected in (
        ("grey", Image.fromarray(grey), grey[..., None].repeat(3, 2)),
        ("wide", wide, grey[..., None].repeat(3, 2)),
        ("palette", few.convert("P", palette=Image.Palette.ADAPTIVE, colors=8), PIXELS // 128 * 255),
        ("bits", Image.fromarray(grey > 127), (grey > 127)[..., None].repeat(3, 2) * np.uint8(255)),
    ):
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(enlarged(tmp_path, plain, tmp_path / f"{name}.png"), repeated(expected)), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_once(tmp_path: Path, plain: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, -1)[:, ::-1][::-1, ::-1],
        8: np.rot90,
    }  # fmt: skip
    upright = turns[orientation](PIXELS)
    if orientation == 7:
        upright = PIXELS[::-1, ::-1].swapaxes(0, 1)
    assert np.array_equal(enlarged(tmp_path, plain, tmp_path / "a.png"), repeated(upright))
    with Image.open(tmp_path / "enlarged.png") as image:
        assert image.getexif().get(0x0112, 1) == 1


def test_transparency_is_kept_where_the_format_has_it(tmp_path: Path, plain: Path) -> None:
    alpha = np.dstack([PIXELS, np.linspace(0, 255, 600).astype(np.uint8).reshape(20, 30)])
    half = np.dstack([PIXELS, np.full((20, 30), 128, np.uint8)])
    for each in (alpha, half):
        Image.fromarray(each).save(tmp_path / "a.png")
        assert np.array_equal(enlarged(tmp_path, plain, tmp_path / "a.png"), repeated(each))
    result = ldm_here("upscale", tmp_path / "a.png", "-m", plain, "-o", tmp_path / "a.jpg", "--quality", "100")
    assert "JPEG has no transparency" in result.err
    with Image.open(tmp_path / "a.jpg") as image:
        white = repeated(PIXELS).astype(int) * 128 // 255 + 127
        assert abs(np.asarray(image).astype(int) - white).mean() < 4


def test_a_network_for_grey_is_used_on_each_colour(tmp_path: Path) -> None:
    save_file(compact(channels=1), tmp_path / "grey.safetensors")
    net = Upscaler(open_upscaler(str(tmp_path / "grey.safetensors")), FP32)
    assert np.array_equal(net.enlarged(PIXELS), repeated(PIXELS))


# --- tiles


@pytest.mark.parametrize(
    ("width", "height", "size"), [(1, 1, 8), (100, 7, 8), (33, 64, 16), (96, 96, 32), (80, 80, 64)]
)
def test_tiles_cover_every_pixel_once_with_all_their_surroundings(width: int, height: int, size: int) -> None:
    covered = np.zeros((height * 2, width * 2), int)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    for tile in tiles(width, height, size, 4):
        assert tile.right - tile.left <= max(size, 8 + size)
        covered[tile.target(2)] += 1
        for axis in (columns, rows):
            large = repeated(axis)
            assert np.array_equal(repeated(axis[tile.source])[tile.inner(2)], large[tile.target(2)])
        assert tile.before == (min(4, tile.left), min(4, tile.top))
        assert tile.after == (min(4, width - tile.right), min(4, height - tile.bottom))
    assert (covered == 1).all()


def test_tiles_show_no_seam() -> None:
    """The embedded network looks 18 pixels around: what it makes in tiles is what it makes of the whole."""
    net = Upscaler(open_upscaler("embedded"), FP32)
    source = np.asarray(Image.open(Path(__file__).parent.parent / "weights" / "contact-sheet.png").convert("RGB"))
    part = source[:150, :130].copy()
    whole, tiled = (net.enlarged(part, tile=tile).astype(int) for tile in (0, 32))
    assert abs(whole - tiled).max() <= 1


def test_progress_counts_tiles(upscaler: Upscaler) -> None:
    heard: list[tuple[int, int]] = []
    upscaler.enlarged(np.zeros((200, 100, 3), np.uint8), tile=32, on_tile=lambda *told: heard.append(told))
    assert heard == [(i + 1, 28) for i in range(28)]


def test_memory_that_does_not_suffice_makes_tiles_smaller(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    computed = Upscaler._computed

    def limited(self: Upscaler, values: np.ndarray) -> np.ndarray:
        seen.append(max(values.shape))
        if max(values.shape) > 110:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return computed(self, values)

    monkeypatch.setattr(Upscaler, "_computed", limited)
    large = np.random.default_rng(1).integers(0, 256, (300, 200, 3), np.uint8)
    assert np.array_equal(upscaler.enlarged(large, tile=0), repeated(large))
    assert seen[:3] == [300, 182, 107]
    for error, words in (
        (MemoryError(), "smallest tiles"),
        (RuntimeError("shapes differ\nat"), "failed: shapes differ.$"),
    ):
        monkeypatch.setattr(Upscaler, "_computed", lambda self, values, e=error: (_ for _ in ()).throw(e))
        with pytest.raises(LdmError, match=words):
            upscaler.enlarged(large)


def test_numbers_that_overflow_are_repeated_in_float32(tmp_path: Path) -> None:
    state = compact(zero=False)
    state["body.0.weight"] *= 6e4
    state["body.2.weight"] *= 1e3
    state["body.4.weight"] *= 1e-7
    save_file(state, tmp_path / "large.safetensors")
    file = open_upscaler(str(tmp_path / "large.safetensors"))
    expected = Upscaler(file, FP32).enlarged(PIXELS)
    half = Runtime(torch.device("cpu"), torch.float16, torch.float32, "sdpa")
    net = Upscaler(file, half)
    assert abs(net.enlarged(PIXELS).astype(int) - expected).max() <= 1
    state["body.4.weight"] *= 1e30
    state["body.2.weight"] *= 1e30
    save_file(state, tmp_path / "endless.safetensors")
    with pytest.raises(NotFiniteError, match="not finite"):
        Upscaler(open_upscaler(str(tmp_path / "endless.safetensors")), FP32).enlarged(PIXELS)


# --- sizes


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (Target(), (60, 40)),
        (Target(1), (30, 20)),
        (Target(1.5), (45, 30)),
        (Target(3), (90, 60)),
        (Target(8), (240, 160)),
        (Target(20), (600, 400)),
        (Target(None, 100, 50), (100, 50)),
        (Target(None, 45), (45, 30)),
        (Target(None, None, 31), (46, 31)),
        (Target(0.1), (3, 2)),
    ],
)
def test_the_size_is_exact(upscaler: Upscaler, target: Target, size: tuple[int, int]) -> None:
    assert upscaled(upscaler, PIXELS, target).shape == (size[1], size[0], 3)
    assert target.size(30, 20, 2) == size


def test_other_sizes_are_pillows_lanczos_of_what_the_network_makes(upscaler: Upscaler) -> None:
    twice, four = Image.fromarray(repeated(PIXELS)), Image.fromarray(repeated(PIXELS, 4))
    lanczos = Image.Resampling.LANCZOS
    assert np.array_equal(upscaled(upscaler, PIXELS, Target(1.5)), np.asarray(twice.resize((45, 30), lanczos)))
    assert np.array_equal(upscaled(upscaler, PIXELS, Target(4)), np.asarray(four))
    cut = twice.crop((10, 0, 50, 40)).resize((30, 30), lanczos, box=None)
    assert abs(upscaled(upscaler, PIXELS, Target(None, 30, 30)).astype(int) - np.asarray(cut)).mean() < 12


def test_what_says_no_size_is_refused(tmp_path: Path) -> None:
    assert parse_size("12x34") == (12, 34)
    assert parse_size("12×") == (12, None)
    assert parse_size("X34") == (None, 34)
    for text in ("", "x", "12", "1x2x3", "-1x2", "ax2", "1.5x2", "²x3"):
        with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
            parse_size(text)
    for wrong in ({"scale": 0.0}, {"scale": 65.0}, {"scale": float("nan")}, {"width": 0}, {"height": 1 << 18},
                  {"scale": 2.0, "width": 4}):  # fmt: skip
        with pytest.raises(UsageError):
            Target(**wrong)
    for options in (["--scale", "many"], ["--scale", "2", "--size", "3x3"], ["--size", "9"], ["--tile", "-1"]):
        assert_refused(ldm_here("upscale", "a.png", "-o", tmp_path, *options), 2, options[-2].strip("-"))


# --- metadata


def fields_of(text: str | None) -> dict[str, str]:
    return dict(A1111.findall((text or "").rpartition("\n")[2]))


@pytest.mark.parametrize("encoding", [Encoding(), Encoding("jpeg"), Encoding("webp")], ids=["png", "jpeg", "webp"])
def test_what_a_picture_says_is_kept_and_added_to(tmp_path: Path, plain: Path, encoding: Encoding) -> None:
    text = text_chunks(GenerationRequest("a cat, 猫", seed=7, steps=3, sampler="ddim"), MODEL, {"dtype": "fp32"})
    source, out = tmp_path / f"a{encoding.ending}", tmp_path / f"b{encoding.ending}"
    source.write_bytes(encode_pixels(PIXELS, text, encoding))
    assert ldm_here("upscale", source, "-m", plain, "-o", out).code == 0
    before = read_parameters(source)
    assert read_parameters(out) == f"{before}, Postprocess upscale by: 2, Postprocess upscaler: twice"
    assert fields_of(read_parameters(out))["Seed"] == "7"
    upscaled_by = "Postprocess upscale by: 2, Postprocess upscaler: twice"
    assert read_record(out) == read_record(source) | {"upscaled": upscaled_by}
    ldm_here("upscale", out, "-m", plain, "-o", tmp_path / "c.png", "--size", "50x40")
    again = "Postprocess upscale to: 50x40, Postprocess upscaler: twice"
    assert read_record(tmp_path / "c.png")["upscaled"] == f"{upscaled_by}; {again}"
    assert "upscaled: Postprocess upscale by: 2" in ldm_here("info", out).out.decode()


def test_a_picture_that_says_nothing_says_then_what_was_done(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    odd = tmp_path / "4x, odd: net.safetensors"
    odd.write_bytes(plain.read_bytes())
    ldm_here("upscale", tmp_path / "a.png", "-m", odd, "-o", tmp_path / "b.png", "--scale", "1.5")
    text = read_parameters(tmp_path / "b.png")
    assert text == 'Postprocess upscale by: 1.5, Postprocess upscaler: "4x, odd: net"'
    assert fields_of(text)["Postprocess upscaler"] == '"4x, odd: net"'


def test_other_programs_text_stays_in_a_png_and_no_metadata_is_none(tmp_path: Path, plain: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", '{"nodes": []}')
    info.add_text("parameters", "a cat")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    enlarged(tmp_path, plain, tmp_path / "a.png")
    with Image.open(tmp_path / "enlarged.png") as image:
        image.load()
        assert image.info["workflow"] == '{"nodes": []}'
        assert image.info["parameters"].startswith("a cat\nPostprocess upscale by: 2")
    result = ldm_here("upscale", tmp_path / "a.png", "-m", plain, "-o", tmp_path / "b.webp")
    assert "left out: workflow" in result.err
    enlarged(tmp_path, plain, tmp_path / "a.png", "--no-metadata")
    with Image.open(tmp_path / "enlarged.png") as image:
        image.load()
        assert image.info == {}


def test_damaged_metadata_is_left_out_with_a_word(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.webp", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    result = ldm_here("upscale", tmp_path / "a.webp", "-m", plain, "-o", tmp_path / "b.png")
    assert result.code == 0
    assert "EXIF data ends too early" in result.err


# --- commands


def test_results_in_a_folder_have_their_pictures_names(tmp_path: Path, plain: Path) -> None:
    for name in ("one.png", "two.jpg"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    command = ("upscale", tmp_path / "one.png", tmp_path / "two.jpg", "-m", plain, "-o", tmp_path / "out")
    result = ldm_here(*command, "--json")
    assert result.code == 0, result
    assert [record["path"] for record in result.records] == [str(tmp_path / "out" / f"{n}.png") for n in ("one", "two")]
    assert (result.records[0]["width"], result.records[0]["height"], result.records[0]["upscaler"]) == (60, 40, "twice")
    assert_refused(ldm_here(*command), 73, "one.png", "--overwrite")
    assert ldm_here(*command, "--overwrite", "--format", "webp").paths == [
        tmp_path / "out" / "one.webp", tmp_path / "out" / "two.webp"
    ]  # fmt: skip


def test_a_pipeline_of_real_processes(tmp_path: Path, plain: Path) -> None:
    drawn = ldm("txt2img", "-m", tiny_model(), "a cat", "--steps", "1", "-s", "3", "-o", "-", "-q")
    large = ldm("upscale", "-", "-m", plain, "-o", "-", "-q", "--dtype", "fp32", stdin=drawn.out)
    assert large.code == 0, large
    assert np.array_equal(pixels(large.out), repeated(pixels(drawn.out)))
    (tmp_path / "a.png").write_bytes(large.out)
    assert read_record(tmp_path / "a.png")["request"]["prompt"] == "a cat"


def test_a_picture_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    result = ldm_here("upscale", tmp_path / "bad.png", tmp_path / "good.png", "-m", plain, "-o", tmp_path / "out")
    assert (result.code, result.paths) == (65, [tmp_path / "out" / "good.png"])
    assert "bad.png is damaged or cut off" in result.err


def test_memory_is_that_of_a_tile_and_the_pictures(tmp_path: Path, plain: Path) -> None:
    Image.new("RGB", (1500, 1500), "red").save(tmp_path / "a.png")
    peaks = []
    for tile in ("128", "0"):
        options = ("-m", plain, "-o", tmp_path / "b.png", "--overwrite", "--dtype", "fp32", "--tile", tile, "-q")
        result = ldm("upscale", tmp_path / "a.png", *options, measure=True)
        assert result.code == 0, result
        peaks.append(result.peak)
    assert peaks[0] < peaks[1] - (100 << 20)


# --- what is refused


def jpeg_bomb() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.png", b"", ["empty"]),
        ("page.png", b"<html></html>", ["no picture"]),
        ("cut.png", encode_pixels(PIXELS, {})[:200], ["damaged or cut off"]),
        ("bomb.png", jpeg_bomb(), ["too many pixels"]),
    ],
)
def test_hostile_pictures_are_refused_before_a_network_is_read(
    tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    result = ldm("upscale", tmp_path / name, "-o", tmp_path / "out.png", measure=True)
    assert_refused(result, 65, name, *words)
    assert result.peak < 700 << 20  # of which torch's libraries take most


def test_what_cannot_be_meant_is_refused_at_once(tmp_path: Path, plain: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "sub" / "a.jpg")
    a, other = tmp_path / "a.png", tmp_path / "sub" / "a.jpg"
    os.mkfifo(tmp_path / "pipe")
    for arguments, code, words in (
        ((tmp_path / "gone.png", "-o", tmp_path / "x.png"), 66, ["gone.png", "does not exist"]),
        ((tmp_path, "-o", tmp_path / "x.png"), 65, ["is a folder"]),
        ((tmp_path / "pipe", "-o", tmp_path / "x.png"), 65, ["is a pipe"]),
        (("https://example.org/a.png", "-o", tmp_path / "x.png"), 66, ["https://example.org"]),
        ((a, "-o", a), 73, ["a.png", "--overwrite"]),
        ((a, other, "-o", tmp_path / "out"), 2, ["2 pictures", "a.png"]),
        ((a, other, "-o", tmp_path / "x.png"), 2, ["x.png", "more than one"]),
        ((a, other, "-o", "-"), 2, ["-o -", "one picture"]),
        (("-", "-", "-o", tmp_path / "out"), 2, ["standard input", "once"]),
        ((a, "-o", tmp_path / "x.gif"), 2, ["x.gif"]),
        ((a,), 2, ["--output"]),
        ((a, "-o", tmp_path / "x.webp", "--size", "20000x3"), 2, ["20000×3", "WebP"]),
        ((a, "-o", a / "below" / "x.png"), 73, ["not a folder"]),
    ):
        assert_refused(ldm_here("upscale", *arguments, "-m", plain), code, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out", "pipe", "sub"]


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    cases: dict[str, tuple[dict[str, torch.Tensor], list[str]]] = {
        "lora": ({"lora_unet_x.lora_down.weight": torch.zeros(1, 2), "lora_unet_x.lora_up.weight": torch.zeros(2, 1)},
                 ["is a LoRA, not an upscaler"]),
        "vae": ({"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}, ["VAE only"]),
        "none": ({"something.weight": torch.zeros(1)}, ["no upscaler that is known", "something.weight [1]"]),
        "torn": ({key: value for key, value in compact().items() if key != "body.2.weight"}, ["is none"]),
        "deep": ({"body.0.weight": torch.zeros(4, 3, 3, 3), "body.1.weight": torch.zeros(4),
                  "model.1.sub.99999999.RDB1.conv1.0.weight": torch.zeros(1)}, ["counts beyond"]),
        "four": (compact(channels=4), ["4 channels"]),
        "whole": ({key: value.to(torch.int32) for key, value in compact().items()}, ["no floating numbers", "I32"]),
    }  # fmt: skip
    for name, (state, words) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        result = ldm_here(
            "upscale", tmp_path / "a.png", "-m", tmp_path / f"{name}.safetensors", "-o", tmp_path / "b.png"
        )
        assert result.code == 65, (name, result)
        for word in (f"{name}.safetensors", *words):
            assert word in result.err, result.err
    for model, words in (
        (tiny_single_file(), ["Stable Diffusion 1.x checkpoint"]),
        (tiny_model(), ["enlarges no pictures"]),
    ):
        assert_refused(ldm_here("upscale", tmp_path / "a.png", "-m", model, "-o", tmp_path / "b.png"), 65, *words)
    gone = ldm_here("upscale", tmp_path / "a.png", "-m", tmp_path / "gone.safetensors", "-o", tmp_path / "b.png")
    assert_refused(gone, 66, "gone.safetensors")
    assert not (tmp_path / "b.png").exists()


def test_info_tells_what_an_upscaler_is(tmp_path: Path, plain: Path) -> None:
    facts = ldm_here("info", "--json", plain).records[0]
    assert (facts["is"], facts["architecture"], facts["scale"]) == ("upscaler", "RealESRGAN Compact", 2)
    assert (facts["size"], facts["parameters"]) == ("4nf 1nc", sum(value.numel() for value in compact().values()))
    torch.save({"params_ema": compact(4)}, tmp_path / "net.pth")
    assert_refused(ldm_here("info", tmp_path / "net.pth"), 65, "pickle", "--allow-pickle")
    assert ldm_here("info", "--json", "--allow-pickle", tmp_path / "net.pth").records[0]["scale"] == 4
    torn = {key: value for key, value in compact().items() if key != "body.2.weight"}
    for name, state in {"torn": torn, "other": {"a.weight": torch.zeros(2, 3, 3, 3)}}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        assert "is: unknown" in ldm_here("info", tmp_path / f"{name}.safetensors").out.decode()


@pytest.mark.parametrize("wrapper", ["", "params_ema", "params", "state_dict", "model"])
def test_pickles_are_read_only_where_they_are_allowed(tmp_path: Path, wrapper: str) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    state: dict[str, Any] = compact()
    if wrapper:
        other = compact(zero=False)
        state = {"params": other, wrapper: state} if wrapper == "params_ema" else {wrapper: state}
    torch.save(state, tmp_path / "net.pth")
    command = ("upscale", tmp_path / "a.png", "-m", tmp_path / "net.pth", "-o", tmp_path / "b.png", "-q")
    assert_refused(ldm_here(*command), 65, "pickle", "--allow-pickle")
    assert ldm_here(*command, "--allow-pickle", "--dtype", "fp32").code == 0
    assert np.array_equal(pixels(tmp_path / "b.png"), repeated(PIXELS))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    torch.save({"params": Bad()}, tmp_path / "net.pth")
    command = ("upscale", tmp_path / "a.png", "-m", tmp_path / "net.pth", "-o", tmp_path / "b.png", "--allow-pickle")
    assert_refused(ldm_here(*command), 65, "may be code")
    assert not (tmp_path / "ran").exists()


def test_a_missing_package_is_named(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "spandrel", None)
    result = ldm_here("upscale", tmp_path / "a.png", "-m", plain, "-o", tmp_path / "b.png", "-q")
    assert_refused(result, 1, "package spandrel")


# --- pictures that are drawn


DRAW = ("-m", tiny_model(), "--steps", "1", "--dtype", "fp32", "-q")


def test_a_drawn_picture_is_made_larger_and_drawn_again_alike(tmp_path: Path, plain: Path) -> None:
    draw = ("txt2img", "a cat", "a dog", "-s", "3", "-b", "2", *DRAW)
    small = ldm_here(*draw, "-o", tmp_path / "small").paths
    large = ldm_here(*draw, "-o", tmp_path / "large", "--upscale", plain).paths
    for one, other in zip(small, large, strict=True):
        assert np.array_equal(pixels(other), repeated(pixels(one)))
    record = read_record(large[0])
    assert record["model"]["upscaler"] == str(plain)
    assert record["upscaled"] == "Postprocess upscale by: 2, Postprocess upscaler: twice"
    assert read_parameters(large[0]).endswith(", Postprocess upscale by: 2, Postprocess upscaler: twice")  # type: ignore[union-attr]
    again = ldm_here("txt2img", "a cat", "a dog", "--from-image", large[0], "-b", "2", "-q", "-o", tmp_path / "again")
    assert again.code == 0, again
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in large]
    ldm_here("upscale", small[0], "-m", plain, "-o", tmp_path / "later.png", "--dtype", "fp32")
    assert np.array_equal(pixels(tmp_path / "later.png"), pixels(large[0]))
    plainly = ldm_here("txt2img", "--from-image", tmp_path / "later.png", "-o", tmp_path / "plain.png")
    assert "made larger after it was drawn" in plainly.err
    assert pixels(tmp_path / "plain.png").shape == pixels(small[0]).shape


def test_embedded_is_the_models_own_network_where_its_folder_has_one(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model(), tmp_path / "tiny")
    draw = ("txt2img", "a cat", "-s", "3", "--upscale", "embedded", "-m", folder, *DRAW[2:])
    general = ldm_here(*draw, "-o", tmp_path / "general").paths[0]
    assert read_record(general)["upscaled"].endswith("upscaler: realesr-animevideov3")
    small = pixels(ldm_here("txt2img", "a cat", "-s", "3", *DRAW, "-o", tmp_path / "small").paths[0])
    (folder / "upscaler").mkdir()
    save_file(compact(), folder / "upscaler" / "model.safetensors")
    own = ldm_here(*draw, "-o", tmp_path / "own").paths[0]
    assert np.array_equal(pixels(own), repeated(small))
    assert read_record(own)["upscaled"].endswith("upscaler: tiny upscaler")
    larger = ("--hires", "2", "--hires-strength", "0", "--hires-upscaler", "embedded")
    second = ldm_here(*draw[:4], "-m", folder, *DRAW[2:], *larger, "-o", tmp_path / "second").paths[0]
    again = ("txt2img", "-o", tmp_path / "again.png", "--overwrite", "--from-image")
    for picture in (own, second):
        assert "differ" not in ldm_here(*again, picture).err
    save_file(compact(zero=False), folder / "upscaler" / "model.safetensors")
    for picture in (own, second):
        changed = ldm_here(*again, picture)
        assert changed.err.count("the upscaler embedded is not the one the picture was made with") == 1
    assert "differ" not in ldm_here(*again, own, "--upscale", "embedded").err
    (folder / "upscaler" / "model.safetensors").write_bytes(b"nothing")
    assert_refused(ldm_here(*draw, "-o", tmp_path), 65, "upscaler/model.safetensors")


def test_a_wrong_upscaler_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    for name, code in ((tiny_single_file(), 65), (tmp_path / "gone.safetensors", 66)):
        result = ldm_here("txt2img", "a cat", *DRAW, "-o", tmp_path / "out", "--upscale", name)
        assert_refused(result, code, "gone" if code == 66 else "not an upscaler")
    assert not (tmp_path / "out").exists()


def test_a_batch_makes_its_pictures_larger_and_resumes_with_the_same_network(tmp_path: Path, plain: Path) -> None:
    (tmp_path / "rows.txt").write_text("a cat\na dog\n")
    command = ("batch", tmp_path / "rows.txt", *DRAW, "-o", tmp_path / "out", "--devices", "cpu")
    first = ldm_here(*command, "--upscale", plain)
    assert first.code == 0, first
    sizes = {pixels(path).shape for path in first.paths}
    shape = pixels(ldm_here("txt2img", "x", *DRAW, "-o", tmp_path).paths[0]).shape
    assert sizes == {(shape[0] * 2, shape[1] * 2, 3)}
    assert ldm_here(*command, "--upscale", plain).out == b""
    assert_refused(ldm_here(*command), 65, "model.upscaler")
    changed = tmp_path / plain.name
    save_file(compact(zero=False), changed)
    assert_refused(ldm_here(*command, "--upscale", changed), 65, "upscaler_sha256")


# --- the embedded network


def test_the_embedded_network_beats_lanczos() -> None:
    """On emoji made a quarter as large: what was there before comes back closer."""
    sheet = Image.open(Path(__file__).parent.parent / "weights" / "contact-sheet.png").convert("RGB")
    before = sheet.crop((8, 8, 520, 392))
    small = before.resize((128, 96), Image.Resampling.LANCZOS)
    net = Upscaler(open_upscaler("embedded"), FP32)
    by_lanczos = np.asarray(small.resize(before.size, Image.Resampling.LANCZOS))
    by_network = net.enlarged(np.asarray(small))

    def psnr(found: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / ((found.astype(float) - np.asarray(before)) ** 2).mean()))

    assert psnr(by_network) > psnr(by_lanczos) + 0.5


def test_number_types_and_commands_agree(tmp_path: Path) -> None:
    net = Upscaler(open_upscaler("embedded"), FP32)
    bf16 = Upscaler(open_upscaler("embedded"), choose_runtime(RuntimeSpec(device="cpu", dtype="bf16")))
    smooth = np.asarray(Image.fromarray(PIXELS).resize((60, 40), Image.Resampling.LANCZOS))
    assert abs(net.enlarged(smooth).astype(int) - bf16.enlarged(smooth)).mean() < 1.5
    Image.fromarray(smooth).save(tmp_path / "a.png")
    ldm_here("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--dtype", "fp32", "-q")
    assert np.array_equal(pixels(tmp_path / "b.png"), net.enlarged(smooth))
    assert json.loads(ldm_here("upscale", tmp_path / "a.png", "-o", tmp_path / "c.png", "--json").out)["width"] == 240


def test_what_a_network_cannot_compute_in_is_refused_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = ESRGAN(num_filters=8, num_blocks=1, scale=2)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    from spandrel import ImageModelDescriptor

    before = ImageModelDescriptor.__init__

    def narrow(self: Any, *arguments: Any, **settings: Any) -> None:
        before(self, *arguments, **settings | {"supports_bfloat16": False})

    monkeypatch.setattr(ImageModelDescriptor, "__init__", narrow)
    file = open_upscaler(str(tmp_path / "net.safetensors"))
    bf16 = choose_runtime(RuntimeSpec(device="cpu", dtype="bf16"))
    with pytest.raises(UsageError, match="--dtype fp32"):
        Upscaler(file, bf16, asked=True)
    assert np.array_equal(Upscaler(file, bf16).enlarged(PIXELS), Upscaler(file, FP32).enlarged(PIXELS))


def test_weights_of_ncnn_become_those_of_a_compact_net() -> None:
    """By the script that made the embedded network's file."""
    state = {name: value.numpy() for name, value in compact(zero=False).items()}
    kinds = {1: "PReLU", 4: "Convolution"}
    layers, data = ["7767517", "5 5", "Input in 0 1 data"], b""
    for number in (0, 1, 2, 3, 4):
        weight = state[f"body.{number}.weight"]
        numbers = f"0={weight.shape[0]} 1=3 6={weight.size}" if weight.ndim == 4 else f"0={weight.size}"
        layers.append(f"{kinds[weight.ndim]} layer{number} 1 1 {number} {number + 1} {numbers}")
        data += b"\x47\x6b\x30\x01" + weight.astype("<f2").tobytes() if weight.ndim == 4 else weight.tobytes()
        data += b"\0" * (-len(data) % 4)
        data += state[f"body.{number}.bias"].tobytes() if weight.ndim == 4 else b""
    converted = recipe_module("convert_upscaler").converted("\n".join(layers), data)
    assert converted.keys() == state.keys()
    for name, value in converted.items():
        expected = state[name].astype(np.float16) if value.ndim == 4 else state[name]
        assert np.array_equal(value, expected), name
    with pytest.raises(ValueError, match="left over"):
        recipe_module("convert_upscaler").converted("\n".join(layers), data + b"\0\0\0\0")


def test_a_scale_is_no_upscaler(tmp_path: Path) -> None:
    result = ldm_here("txt2img", "x", "--upscale", "2", "-o", tmp_path / "x.png")
    assert_refused(result, 2, "an upscaler is a file, or embedded, and 2 is neither", "ldm upscale --scale")
