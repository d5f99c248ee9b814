"""Words that people type: a bare prompt is drawn, names of other programs work, and wrong words lead somewhere."""

from pathlib import Path

import click
import pytest
from cli_support import assert_refused, ldm, ldm_here, pixels, tiny_model
from PIL import Image

from ldmcli.cli import COMMANDS
from ldmcli.cli.command import Command, ungrouped
from ldmcli.cli.program import cli
from ldmcli.conditioning.hints import argument_hints

DRAW = ("-m", tiny_model(), "--steps", "1", "-W", "8", "-H", "8")


def drawn(*arguments: str | Path, env: dict[str, str] | None = None) -> list[dict[str, object]]:
    result = ldm_here(*arguments, "--json", env=env)
    assert result.code == 0, result
    return result.records


# ---- a bare prompt ----


def test_a_first_argument_that_is_no_command_is_drawn(tmp_path: Path) -> None:
    result = ldm("a red cat", *DRAW, "-s", "1", "-o", tmp_path)
    assert (result.code, result.paths) == (0, [tmp_path / "ldm-1.png"])
    assert Image.open(tmp_path / "ldm-1.png").text["parameters"].startswith("a red cat\n")
    assert ": \n" not in ldm_here("info", tmp_path / "ldm-1.png").out.decode()  # nothing where there is nothing to say


@pytest.mark.parametrize(
    "first",
    [["apple"], ["cat"], ["an"], ["-s", "1", "a"], ["--prompt", "a cat"], ["-pcat"], ["-"], ["--", "batch"], ["über"]],
)
def test_what_begins_as_a_prompt_is_drawn(first: list[str], tmp_path: Path) -> None:
    result = ldm_here(*DRAW, "-o", tmp_path, *first, stdin=b"a cat\n")
    again = ldm_here(*first, *DRAW, "-o", tmp_path, stdin=b"a cat\n") if first[0] != "--" else result
    assert (result.code, again.code) == (0, 0)
    assert [len(one.paths) for one in (result, again)] == [1, 1]


def test_options_of_img2img_alone_make_it_one(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    result = ldm_here("-i", tmp_path / "red.png", "a cat", "-m", tiny_model(), "--steps", "2", "-o", tmp_path)
    assert result.code == 0
    (path,) = result.paths
    assert b"red.png" in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", "a cat"], "did you mean ldm txt2img"),
        (["draw"], "did you mean ldm txt2img"),
        (["t2i"], "did you mean ldm txt2img"),
        (["i2i"], "did you mean ldm img2img"),
        (["list"], "did you mean ldm models"),
        (["btach", "prompts.txt", "-o", "out"], "did you mean ldm batch"),
        (["txt2imgg"], "did you mean ldm txt2img"),
        (["sampler"], "did you mean ldm samplers"),
        (["download", "a/b"], "did you mean ldm pull"),
        (["help"], "did you mean ldm --help"),
        (["--verison"], "did you mean --version"),
        (["train", "it"], "models are not trained"),
        (["prompts.txt"], "ldm batch prompts.txt"),
        (["apple.png"], "ldm info apple.png"),
        (["-m", "x", "batch", "prompts.txt"], "behind batch"),
        (["--no-such\x1b[31m"], "no option"),
        (["a cat", "--plms"], "did you mean --sampler plms"),
    ],
)
def test_a_near_miss_of_a_command_is_asked_about_and_not_drawn(words: list[str], told: str, tmp_path: Path) -> None:
    assert_refused(ldm_here(*words, cwd=tmp_path), 2, told)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_leads_to_those_that_are(tmp_path: Path) -> None:
    assert_refused(ldm_here("txt2img", "x", "-m", "sd15", cwd=tmp_path), 66, "sd15 does not exist", "ldm models lists")


# ---- names of other programs ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", "16x8"], {"width": 16, "height": 8}),
        (["--size", "16×8"], {"width": 16, "height": 8}),
        (["--size", "8"], {"width": 8, "height": 8}),
        (["--guidance", "3"], {"guidance_scale": 3}),
        (["--cfg", "3"], {"guidance_scale": 3}),
        (["--scheduler", "karras", "--sampler", "euler"], {"schedule": "karras"}),
    ],
)
def test_other_names_mean_the_same(options: list[str], expected: dict[str, object], tmp_path: Path) -> None:
    (record,) = drawn("txt2img", "x", "-m", tiny_model(), "--steps", "1", *options, "-o", tmp_path)
    assert expected.items() <= record.items()


def test_counts_and_prompts_by_other_names(tmp_path: Path) -> None:
    for count in ("--num-images", "--batch-count", "-c"):
        assert len(drawn("txt2img", "x", *DRAW, count, "2", "-o", tmp_path)) == 2
    asked = ("txt2img", "one", "-p", "two", "--prompt=three", *DRAW, "-o", tmp_path)
    assert [one["prompt"] for one in drawn(*asked)] == ["one", "two", "three"]
    env = {"LDM_PROMPT": "of the environment"}
    assert [one["prompt"] for one in drawn("txt2img", *DRAW, "-o", tmp_path, env=env)] == ["of the environment"]
    assert [one["prompt"] for one in drawn("txt2img", "x", *DRAW, "-o", tmp_path, env=env)] == ["x"]


def test_a_seed_of_minus_one_is_random_and_reported(tmp_path: Path) -> None:
    result = ldm_here("txt2img", "x", *DRAW, "--seed", "-1", "-o", tmp_path)
    (path,) = result.paths
    assert f"seed {path.stem.removeprefix('ldm-')}" in result.err


def test_size_is_of_whoever_says_it_last(tmp_path: Path) -> None:
    """The command line's width wins over the environment's size, and its size over the environment's width."""
    common = ("txt2img", "x", "-m", tiny_model(), "--steps", "1", "-o", tmp_path)
    (one,) = drawn(*common, "-W", "8", env={"LDM_SIZE": "16x8"})
    assert (one["width"], one["height"]) == (8, 8)
    (one,) = drawn(*common, "--size", "8x16", env={"LDM_WIDTH": "16"})
    assert (one["width"], one["height"]) == (8, 16)
    assert_refused(ldm_here(*common, "--size", "8x8", "-W", "16"), 2, "--size", "--width")


def test_what_a_network_predicts_by_short_and_long_names(tmp_path: Path) -> None:
    common = ("txt2img", "x", *DRAW, "--steps", "3", "-s", "1", "-o", tmp_path)
    names = ("v", "v_prediction", "v-prediction", "eps", "epsilon")
    seen = [pixels(ldm_here(*common, "--prediction-type", name).paths[0]).tobytes() for name in names]
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4]


# ---- wrong options and values ----


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--outdir", "o"], "did you mean --output?"),
        (["--n", "4"], "did you mean --count, or -n, the negative prompt?"),
        (["--stpes", "4"], "did you mean --steps?"),
        (["--num_inference_steps", "4"], "did you mean --steps?"),
        (["--ckpt", "x"], "did you mean --model?"),
        (["--eps"], "did you mean --prediction-type eps?"),
        (["--fp16"], "did you mean --dtype fp16?"),
        (["--medvram"], "did you mean --low-vram?"),
        (["--image", "a.png"], "--image is one of ldm img2img"),
        (["--tiling"], "seamless pictures are not drawn"),
        (["--hypernetwork", "h"], "--lora takes LoRAs"),
        (["--size", "big"], "--size 'big' is not WIDTHxHEIGHT"),
        (["--sampler", "eulr"], "did you mean euler?"),
        (["--steps"], "--steps needs a value; see ldm txt2img --help."),
        (["--upscale"], "--upscale needs a value, FILE|embedded; see ldm txt2img --help."),
        (["--json=1"], "--json takes no value"),
        (["--steps", "many"], "--steps 'many' is not a whole number; see ldm txt2img --help."),
        (["-g", "much"], "--guidance-scale 'much' is not a number"),
        (["--quality", "high"], "--quality 'high' is not a whole number"),
        (["-c", "0"], "--count 0 is not 1 or more"),
        (["-b", "9999"], "--batch-size 9999 is not from 1 to 1024"),
        (["--dtype", "int4"], "--dtype 'int4' is not known; choose from auto, fp16"),
    ],
)
def test_wrong_options_and_values_lead_somewhere(options: list[str], told: str) -> None:
    assert_refused(ldm_here("txt2img", "a cat", *options), 2, told)


@pytest.mark.parametrize("command", ["info", "gallery", "pull", "upscale"])
def test_what_is_missing_is_asked_for(command: str) -> None:
    assert_refused(ldm_here(command), 2, "ldm: error: give ", f"see ldm {command} --help.")
    assert_refused(ldm_here("gallery", "a", "b"), 2, "takes one DIR, and “b” is left over; put quotes around")
    assert_refused(ldm_here("batch", "a", "b"), 2, "takes one FILE, and “b” is left over; ldm txt2img draws prompts")
    assert_refused(ldm_here("sample", "a cat"), 2, "takes options alone, and “a cat” is none; ldm txt2img draws")
    assert_refused(ldm_here("samplers", "ddim"), 2, "ldm samplers takes options alone, and “ddim” is none; see")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["txt2img", "x", "-m", ""], "--model is empty; name a model, or leave it out"),
        (["txt2img", "x", "-o", ""], "--output is empty; name a file or a folder"),
        (["img2img", "x", "-i", ""], "--image is empty; name a file"),
        (["img2img", "x", "-i", "a.png", "--mask", ""], "--mask is empty; name a file"),
        (["img2img", "x", "-i", "a.png", "--vae", ""], "--vae is empty; name a model"),
        (["txt2img", "x", "--lora", ""], "--lora"),
        (["upscale", "a.png", "-o", "b.png", "-m", ""], "--upscaler is empty; name a file"),
        (["upscale", "", "-o", "x.png"], "IMAGE... is empty; name a picture; see"),
        (["canny", "", "-o", "x.png"], "IMAGE is empty; name a picture; see"),
        (["info", ""], "FILE... is empty; name a file; see"),
        (["gallery", ""], "DIR is empty; name a folder; see"),
        (["batch", ""], "is empty; name a file"),
    ],
)
def test_a_name_typed_as_nothing_is_no_folder(words: list[str], told: str, tmp_path: Path) -> None:
    assert_refused(ldm_here(*words, cwd=tmp_path), 2, told)


def test_where_a_wrong_value_comes_from() -> None:
    assert_refused(ldm_here("txt2img", "a cat", env={"LDM_STEPS": "many"}), 2, "--steps (from LDM_STEPS) 'many'")


def test_prompts_without_quotes_and_counts_after_n_are_remarked_on(tmp_path: Path) -> None:
    result = ldm_here("a", "red", "apple", *DRAW, "-n", "4", "-o", tmp_path)
    assert len(result.paths) == 3
    assert '3 prompts of one word each; with quotes, "a red apple" is one' in result.err
    assert "“4” is the negative prompt; --count" in result.err
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    (hint,) = argument_hints(["a red apple", str(tmp_path / "here.png"), str(tmp_path / "none.png")], "")
    assert "here.png” is drawn as a prompt; --image is for" in hint
    assert not list(argument_hints(["apple", "pear"], "blurry 4"))
    assert not list(argument_hints(["a red apple", "a pear", "a fig"], ""))


def test_grid_fields_by_their_options(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    common = ("batch", tmp_path / "p.txt", "-m", tiny_model(), "--dry-run", "--json")
    for grid in ("guidance-scale=1,2", "--guidance-scale=1,2", "-g=1,2", "cfg=1,2", "-W=8,16"):
        assert ldm_here(*common, "--grid", grid).records[0]["images"] == 2
    assert_refused(ldm_here(*common, "--grid", "size=8x8"), 2, "one grid of width")
    assert_refused(ldm_here(*common, "--grid", "foo=1"), 2, "negative-prompt")
    assert "like others" in ldm_here(*common, "--seed", "-1").err


# ---- help ----


def test_help_is_in_groups_with_what_everyone_needs_first() -> None:
    shown = ldm_here("txt2img", "--help").out.decode()
    sections = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections[0] == "Options:"
    assert sections[-1] == "Program:"
    assert {"Picture:", "Model:", "Prompt:", "Pictures in:", "Adapters:", "Output:", "Machine:"} < set(sections)
    first = shown.partition("Options:")[2].partition("\n\n")[0]
    assert first.count("\n  -") == 10
    assert "--kernels" not in shown
    assert "ldm txt2img --help-all" in shown
    everything = ldm_here("txt2img", "--help-all").out.decode()
    assert "--kernels" in everything
    assert "--cfg " not in everything


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_help_of_its_command(name: str) -> None:
    """And those that several commands have are in a group."""
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    shown = ldm_here(name, "--help-all").out.decode() or ldm_here(name, "--help").out.decode()
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    assert not [one.name for one in options if f"{one.opts[0]}" not in shown]
    if name in ("txt2img", "img2img", "batch"):
        assert not list(ungrouped(command))
