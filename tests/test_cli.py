"""What `ldm` does when all goes well, and how it says no to a wrong command line."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from cli_support import (
    A1111,
    LDM,
    Result,
    assert_refused,
    chunk,
    copy_model,
    error_sentence,
    ldm,
    ldm_here,
    pixels,
    start,
    tiny_model,
    tiny_single_file,
)
from PIL import Image

from ldmcli.spec import MAX_SEED

pytestmark = pytest.mark.timeout(300)
SCRIPT = Path(sys.executable).with_name("ldm")
HEAVY = {"torch", "transformers", "tokenizers", "open_clip", "xformers", "safetensors", "numpy", "PIL", "diffusers"}
PROMPT = 'a "red" cat, on grass: détail'
NEGATIVE = "blurry, dark"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A folder with two pictures of seeds 5 and 6, and the run that drew them."""

    folder: Path
    result: Result


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn") / "new" / "pictures"
    program = [str(SCRIPT)] if SCRIPT.exists() else LDM
    arguments = ("txt2img", "-m", tiny_model(), PROMPT, "-n", NEGATIVE, "-s", "5", "-c", "2", "--steps", "2")
    return Drawn(folder, ldm(*arguments, "-o", folder, program=program))


def on_a_terminal(*arguments: str | Path, stream: str, env: dict[str, str] | None = None) -> tuple[Result, str]:
    """Run `ldm` with `stream`, or each of several, a terminal; returns the result and what the terminal received."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 40))
    process = start(*arguments, env=env, stdin=subprocess.DEVNULL, **dict.fromkeys(stream.split(), terminal))
    os.close(terminal)
    received = b""
    while True:
        try:
            received += (data := os.read(controller, 65536))
        except OSError:  # EIO: the last writer has closed it
            break
        if not data:
            break
    out, err = process.communicate(timeout=60)
    os.close(controller)
    return Result(process.returncode, out or b"", (err or b"").decode(), 0), received.decode()


# ---- lean starts ----


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["txt2img", "x", "--steps", "0"], 2), (["txt2img", "x", "-m", "nowhere.safetensors"], 66)],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str], code: int) -> None:
    result, imported = with_imports(*arguments)
    assert result.code == code
    assert "click" in imported
    assert not imported & HEAVY


def test_headers_are_read_without_torch() -> None:
    result, imported = with_imports("info", tiny_model(), tiny_single_file())
    assert result.code == 0
    assert not imported & {"torch", "transformers", "numpy", "safetensors"}


def with_imports(*arguments: str | Path) -> tuple[Result, set[str]]:
    """Run `ldm`; returns the result and the packages that it imported."""
    result = ldm(*arguments, program=[sys.executable, "-X", "importtime", "-m", "ldmcli"])
    lines = [line for line in result.err.splitlines() if "|" in line]
    return result, {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_a_terminal_of_another_encoding_takes_help_and_facts(tmp_path: Path) -> None:
    environ = {"PYTHONIOENCODING": "latin-1"}
    for command in ("--help", "txt2img --help", "batch --help", "samplers", "models"):
        assert ldm(*command.split(), env=environ).code == 0
    path = tmp_path / "one.png"
    drawn = ldm("txt2img", "-m", tiny_model(), "ein Kätzchen ★", "--steps", "1", "-o", path, env=environ)
    assert drawn.code == 0
    facts = ldm("info", path, env=environ)
    assert (facts.code, "Kätzchen ?".encode("latin-1") in facts.out) == (0, True)


def test_help_and_version() -> None:
    top = ldm_here("--help").out.decode()
    assert "txt2img" in top
    assert "Exit codes" in top
    for options in (["-h"], ["txt2img", "-h"], ["info", "-h"]):
        assert ldm_here(*options).out.startswith(b"Usage: ldm ")
    version = ldm_here("-V")
    assert (version.code, version.err) == (0, "")
    assert version.out.startswith(b"ldm ")
    assert ldm_here().err.startswith("Usage: ldm ")


def test_completion() -> None:
    script = ldm_here(env={"_LDM_COMPLETE": "bash_source"})
    assert script.code == 0
    assert b"_LDM_COMPLETE=bash_complete" in script.out
    words = {"_LDM_COMPLETE": "bash_complete", "COMP_WORDS": "ldm txt2img --ste", "COMP_CWORD": "2"}
    assert ldm_here(env=words).out == b"plain,--steps\n"


# ---- one run and its pictures ----


def test_stdout_holds_the_paths_and_nothing_else(drawn: Drawn) -> None:
    assert drawn.result.code == 0
    assert drawn.result.paths == [drawn.folder / "ldm-5.png", drawn.folder / "ldm-6.png"]
    assert sorted(drawn.folder.iterdir()) == drawn.result.paths
    first, second = (pixels(path) for path in drawn.result.paths)
    assert first.shape == second.shape == (16, 16, 3)
    assert not np.array_equal(first, second)
    # No terminal: no bar, no control characters; the seed was given, so it is not repeated.
    assert drawn.result.err in ("", "ldm: no CUDA device found; running on the CPU\n")


def test_metadata_reads_as_a1111_reads_it(drawn: Drawn) -> None:
    from PIL import Image

    with Image.open(drawn.result.paths[0]) as picture:
        text = picture.info["parameters"]
        record = json.loads(picture.info["ldmcli"])
    *lines, last = text.split("\n")
    assert lines == [PROMPT, f"Negative prompt: {NEGATIVE}"]
    values = dict(A1111.findall(last))
    assert len(values) >= 3
    expected = {"Steps": "2", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "5", "Size": "16x16", "Model": "tiny"}
    assert expected.items() <= values.items()
    assert values["Model hash"] == record["model"]["sha256"][:10]
    assert record["request"]["prompt"] == PROMPT


def test_info_tells_what_a_picture_holds(drawn: Drawn) -> None:
    shown = ldm_here("info", drawn.result.paths[0])
    assert shown.err == ""
    assert f"prompt: {PROMPT}" in shown.out.decode()
    facts = ldm_here("info", "--json", drawn.result.paths[1]).records
    assert len(facts) == 1
    assert facts[0]["kind"] == "picture"
    assert facts[0]["request"]["seed"] == 6
    assert facts[0]["request"]["negative_prompt"] == NEGATIVE


def test_again_in_the_same_folder(drawn: Drawn, tmp_path: Path) -> None:
    """Other names, nothing overwritten, the same pictures in one batch, and -q is silent."""
    for path in drawn.result.paths:
        os.link(path, tmp_path / path.name)
    before = [path.read_bytes() for path in drawn.result.paths]
    arguments = ("txt2img", "-m", tiny_model(), PROMPT, "-n", NEGATIVE, "-s", "5", "-c", "2", "--steps", "2")
    again = ldm_here(*arguments, "-b", "2", "-q", cwd=tmp_path)
    assert (again.code, again.err) == (0, "")
    assert again.out == b"ldm-5-2.png\nldm-6-2.png\n"
    assert [(tmp_path / path.name).read_bytes() for path in drawn.result.paths] == before
    for path in drawn.result.paths:
        one, batched = pixels(path).astype(int), pixels(tmp_path / f"{path.stem}-2.png").astype(int)
        assert abs(one - batched).max() <= 2  # kernels differ with the batch size by a rounding, no more


def test_a_picture_draws_itself_again(drawn: Drawn, tmp_path: Path) -> None:
    again = ldm("txt2img", "--from-image", drawn.result.paths[1], "-o", tmp_path, "--json")
    assert again.code == 0
    (record,) = again.records
    assert (record["path"], record["seed"]) == (str(tmp_path / "ldm-6.png"), 6)
    assert np.array_equal(pixels(tmp_path / "ldm-6.png"), pixels(drawn.result.paths[1]))
    assert ldm("info", tmp_path / "ldm-6.png").out == ldm("info", drawn.result.paths[1]).out


def test_options_win_over_the_picture(drawn: Drawn, tmp_path: Path) -> None:
    """And weights that have changed under the same name are told of."""
    copy = copy_model(tmp_path / "other")
    options = ("a dog", "--steps", "1", "-s", "9", "-W", "8", "--sampler", "plms", "-m", copy, "--no-metadata")
    picture = drawn.result.paths[0]
    again = ldm_here(
        "txt2img", "--from-image", picture, *options, "-o", tmp_path / "new.png", "--json", "--device", "cpu"
    )
    assert (again.code, again.err) == (0, "")
    expected = {"prompt": "a dog", "steps": 1, "seed": 9, "width": 8, "height": 16, "sampler": "plms"}
    assert (expected | {"negative_prompt": NEGATIVE, "model": "other"}).items() <= again.records[0].items()
    assert pixels(tmp_path / "new.png").shape == (16, 8, 3)
    assert_refused(ldm_here("info", tmp_path / "new.png"), 65, "no text at all")
    assert_refused(ldm_here("txt2img", "--from-image", tmp_path / "new.png"), 65, "no ldmcli record")


def test_a_picture_whose_model_has_changed_or_gone(drawn: Drawn, tmp_path: Path) -> None:
    text = ldm_here("info", "--json", drawn.result.paths[0]).records[0]
    record = {name: text[name] for name in ("version", "request", "model", "runtime")}
    data = drawn.result.paths[0].read_bytes()
    start_of_text = data.index(b"tEXt") - 4

    def with_model(path: str, sha256: str) -> Path:
        record["model"] |= {"path": path, "sha256": sha256}
        file = tmp_path / "asked.png"
        body = chunk(b"tEXt", b"ldmcli\0" + json.dumps(record).encode())
        file.write_bytes(data[:start_of_text] + body + chunk(b"IEND", b""))
        return file

    gone = with_model(str(tmp_path / "gone.safetensors"), "0" * 64)
    assert_refused(ldm_here("txt2img", "--from-image", gone), 66, "gone.safetensors", "not exist")
    changed = ldm_here(
        "txt2img", "--from-image", with_model(str(tiny_model()), "0" * 64), "-o", tmp_path, "--steps", "1"
    )
    assert changed.code == 0
    assert changed.err.count("is not the one the picture was made with") == 1


# ---- output ----


def test_overwrite_spares_what_the_run_itself_has_drawn(tmp_path: Path) -> None:
    """Two prompts with one seed are two pictures; the same command again replaces both."""
    names = [tmp_path / "ldm-5.png", tmp_path / "ldm-5-2.png"]
    for _ in range(2):
        options = ("-m", tiny_model(), "--steps", "2", "-s", "5", "-o", tmp_path, "--overwrite")
        assert ldm_here("txt2img", "a pear", "a tiger", *options).paths == names
        assert sorted(tmp_path.iterdir()) == sorted(names)
        drawn = [Image.open(name).text["parameters"].splitlines()[0] for name in names]
        assert drawn == ["a pear", "a tiger"]


def test_a_named_file_with_a_bar_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "one.png"
    path.parent.mkdir()
    path.write_bytes(b"old")
    common = ("txt2img", "-m", tiny_model(), "x", "--steps", "3", "-o", path)
    assert_refused(ldm_here(*common), 73, "one.png", "--overwrite")
    assert path.read_bytes() == b"old"
    os.mkfifo(tmp_path / "pipe.png")
    assert_refused(ldm_here(*common[:-1], tmp_path / "pipe.png", "--overwrite"), 73, "not a regular file")
    environ = {"NO_COLOR": "1", "LDM_VERBOSE": "1"}
    result, terminal = on_a_terminal(*common, "--overwrite", "--no-metadata", stream="stderr", env=environ)
    assert (result.code, result.out) == (0, f"{path}\n".encode())
    assert pixels(path).shape == (16, 16, 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["one.png"]
    assert "/3" in terminal  # the bar
    assert "step" in terminal
    assert "loading tiny …" in terminal
    assert "loaded in" in terminal  # -v
    assert all(len(line) <= 40 for line in re.split("[\r\n]+", terminal) if "ldm:" not in line)
    assert "\x1b[3" not in terminal  # no colour
    assert b"tEXt" not in path.read_bytes()


def test_a_batch_keeps_its_bar_out_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    common = ("batch", tmp_path / "p.txt", "-o", tmp_path / "out", "-m", tiny_model(), "--steps", "2", "--no-cache")
    result, terminal = on_a_terminal(*common, stream="stdout stderr")
    assert result.code == 0
    assert "loading" in terminal
    assert "/3" in terminal
    lines = [line.rpartition("\r")[2] for line in terminal.replace("\r\n", "\n").split("\n")]
    pictures = sorted(str(path) for path in (tmp_path / "out").rglob("*.png"))
    assert sorted(line for line in lines if line.endswith(".png")) == pictures
    assert lines[-2:] == ["ldm: 3 done + 0 failed = 3 rows, all of the input.", ""]


def test_png_data_on_stdout_and_every_option_from_the_environment(tmp_path: Path) -> None:
    """The command line wins over the environment; in a pipe no path is printed."""
    environ = {
        "LDM_MODEL": str(tiny_model()), "LDM_STEPS": "7", "LDM_SEED": "3", "LDM_WIDTH": "8", "LDM_HEIGHT": "16",
        "LDM_GUIDANCE_SCALE": "1", "LDM_SAMPLER": "ddim", "LDM_ETA": "0.5", "LDM_NEGATIVE_PROMPT": "no",
        "LDM_COUNT": "1", "LDM_BATCH_SIZE": "2", "LDM_OUTPUT": "-", "LDM_DTYPE": "fp32", "LDM_DEVICE": "cpu",
        "LDM_ATTENTION": "math", "LDM_QUIET": "1", "LDM_ON_LONG_PROMPT": "error",
    }  # fmt: skip
    result = ldm_here("txt2img", "x", "--steps", "2", env=environ, cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert pixels(result.out).shape == (16, 8, 3)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "piped.png").write_bytes(result.out)
    record = ldm_here("info", tmp_path / "piped.png", env={"LDM_JSON": "1"}).records[0]
    expected = {"steps": 2, "seed": 3, "guidance_scale": 1, "eta": 0.5, "negative_prompt": "no", "sampler": "ddim"}
    assert expected.items() <= record["request"].items()
    assert {"device": "cpu", "dtype": "fp32", "attention": "math"}.items() <= record["runtime"].items()


def test_every_option_has_its_variable() -> None:
    import click

    from ldmcli.cli.program import cli

    context = click.Context(cli)
    names = cli.list_commands(context)
    assert {"txt2img", "batch", "bench"} < set(names)
    for name in names:
        command = cli.get_command(context, name)
        assert command
        for parameter in command.params:
            of_pages = (name, parameter.name) == ("gallery", "output")  # LDM_OUTPUT is where pictures go
            if isinstance(parameter, click.Option) and parameter.name != "help" and not of_pages:
                # Of several names the first; the others are those of other programs.
                long = next(each for each in parameter.opts if each.startswith("--"))
                assert parameter.envvar == f"LDM_{long[2:].replace('-', '_').upper()}", f"{name} {parameter.name}"
    assert_refused(ldm_here("txt2img", "x", env={"LDM_STEPS": "0"}), 2, "steps 0")
    assert_refused(ldm_here("txt2img", "x", env={"LDM_STEPS": "many"}), 2, "--steps", "many")
    assert_refused(ldm_here("txt2img", "x", "--steps", "0", env={"LDM_STEPS": "1"}), 2, "steps 0")
    assert_refused(ldm_here("txt2img", "x", env={"LDM_OVERWRITE": "perhaps"}), 2, "--overwrite", "perhaps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "-", "--json"], ["--json", "-o -"]),
        (["-o", "one.png", "-c", "2"], ["one.png", "more than one"]),
        (["y", "-o", "one.png"], ["one.png", "more than one"]),
        (["-o", "one.gif"], ["one.gif", "PNG, JPEG or WebP"]),
        (["-o", "one.TIFF"], ["one.TIFF", "PNG"]),
    ],
)
def test_outputs_that_cannot_be_meant(tmp_path: Path, options: list[str], words: list[str]) -> None:
    assert_refused(ldm_here("txt2img", "-m", tiny_model(), "x", *options, cwd=tmp_path), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_no_png_data_for_a_terminal() -> None:
    result, terminal = on_a_terminal("txt2img", "-m", tiny_model(), "x", "-s", "1", "-o", "-", stream="stdout")
    assert (result.code, terminal) == (2, "")
    assert "terminal" in error_sentence(result.err)


# ---- prompts and seeds ----


def test_prompts_from_standard_input(tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, no final newline; other PROMPTs beside it; a random seed is reported."""
    lines = "\ufeffone é\r\n\r\n   \ntwo\nthree".encode()
    result = ldm_here(
        "txt2img", "-m", tiny_model(), "zero", "-", "--steps", "1", "-g", "100", "-o", tmp_path, "--json", stdin=lines
    )
    assert result.code == 0
    records = result.records
    assert [record["prompt"] for record in records] == ["zero", "one é", "two", "three"]
    seed = records[0]["seed"]
    assert f"ldm: seed {seed}\n" in result.err
    assert 0 <= seed <= MAX_SEED
    names = [f"ldm-{seed}.png", *(f"ldm-{seed}-{n}.png" for n in (2, 3, 4))]
    assert [Path(record["path"]).name for record in records] == names
    assert len({pixels(path).tobytes() for path in tmp_path.iterdir()}) == 4
    assert all(record["seconds"] > 0 and record["model"] == "tiny" for record in records)


def test_each_prompt_is_drawn_as_it_comes(tmp_path: Path) -> None:
    """A line that is no text ends the run with its number; what was drawn before stays."""
    process = start("txt2img", "-m", tiny_model(), "-", "-q", "-s", "1", "--steps", "1", "-o", tmp_path)
    assert process.stdin is not None
    assert process.stdout is not None
    for line, name in ((b"one\n", "ldm-1.png"), (b"\ntwo\n", "ldm-1-2.png")):
        process.stdin.write(line)
        process.stdin.flush()
        assert Path(os.fsdecode(process.stdout.readline().rstrip())) == tmp_path / name
        pixels(tmp_path / name)
    out, err = process.communicate(b"caf\xe9\n", timeout=60)
    assert (process.returncode, out) == (65, b"")
    sentence = error_sentence(err.decode())
    assert "line 4" in sentence
    assert "UTF-8" in sentence
    assert len(list(tmp_path.iterdir())) == 2


def test_endless_input_in_bounded_memory_until_the_reader_leaves(tmp_path: Path) -> None:
    process = start("txt2img", "-m", tiny_model(), "-", "-q", "-s", "1", "--steps", "1", "-W", "8", "-H", "8", "-o",
                    tmp_path, stdin=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    feeder = subprocess.Popen(["yes", "é" * 300], stdout=process.stdin)  # too long for the model: cut each time
    process.stdin.close()
    process.stdin = None

    def resident() -> int:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(20):
        process.stdout.readline()
    before = resident()
    for _ in range(60):
        process.stdout.readline()
    assert resident() - before < 16 << 20
    process.stdout.close()
    process.stdout = None
    assert process.wait(60) == 141
    feeder.kill()
    feeder.wait()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    for path in tmp_path.iterdir():
        pixels(path)


def test_no_prompts_are_no_error(tmp_path: Path) -> None:
    for lines in (b"", b"\n \r\n\n", b"\xef\xbb\xbf"):
        result = ldm_here("txt2img", "-m", tiny_model(), "-", "-o", tmp_path / "none", stdin=lines)
        assert (result.code, result.out) == (0, b"")
        assert result.err == "ldm: 0 prompts on standard input, nothing to draw\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-s", "abc"], ["seed", "abc"]),
        (["-s", "-2"], ["seed -2", str(MAX_SEED)]),
        (["-s", str(1 << 65)], [str(1 << 65), str(MAX_SEED)]),
        (["-s", str(MAX_SEED), "-c", "2"], ["--count 2", str(MAX_SEED)]),
        (["-c", "0"], ["--count", "0"]),
        (["-b", "0"], ["--batch-size", "0"]),
        (["--steps", "-1"], ["steps -1"]),
        (["--steps", "1000"], ["steps 1000", "999"]),
        (["--steps", "1" + "0" * 400], ["steps 1000"]),
        (["--steps", "9" * 5000], ["--steps"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["-g", "nan"], ["guidance_scale nan"]),
        (["-g", "inf"], ["guidance_scale inf"]),
        (["-g", "-1"], ["guidance_scale -1"]),
        (["-g", "1e400"], ["guidance_scale"]),
        (["--eta", "2"], ["eta 2"]),
        (["--eta", "0.5", "--sampler", "plms"], ["eta", "plms"]),
        (["--sampler", "euler\x1b[31m"], ["--sampler", "euler", "ddim"]),
        (["-W", "0"], ["width 0"]),
        (["-H", "-8"], ["height -8"]),
        (["-W", "131073"], ["width 131073"]),
        (["--device", "nonsense"], ["--device", "nonsense"]),
        (["--device", "cuda:x"], ["cuda:x"]),
        (["--dtype", "int4"], ["--dtype", "int4"]),
        (["--attention", "magic"], ["--attention", "magic"]),
        (["--on-long-prompt", "shout"], ["--on-long-prompt", "shout", "chunk"]),
        (["--no-such-option\x1b[31m\u202e"], ["--no-such-option"]),
    ],
)
def test_values_out_of_range_are_named_before_anything_is_opened(options: list[str], words: list[str]) -> None:
    sentence = assert_refused(ldm_here("txt2img", "x", "-m", "nowhere", *options), 2, *words)
    assert len(sentence) < 700


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-W", "513", "-H", "510"], ["513×510", "512×512"]),
        (["-W", "1"], ["1×16", "8×16"]),
        (["-W", "100000", "-H", "100000"], ["100000×100000", "GiB", "memory"]),
    ],
)
def test_sizes_that_the_model_cannot_draw(options: list[str], words: list[str]) -> None:
    assert_refused(ldm_here("txt2img", "x", "-m", tiny_model(), *options), 2, *words)


# ---- other models ----


def test_a_single_file(tmp_path: Path) -> None:
    path = tiny_single_file()
    result = ldm_here("txt2img", "x", "-m", path, "-W", "16", "-H", "8", "--steps", "1", "-s", "1", "-o", tmp_path)
    assert result.code == 0
    assert pixels(*result.paths).shape == (8, 16, 3)


def test_info_of_models(tmp_path: Path) -> None:
    folder = ldm_here("info", "--json", tiny_model()).records[0]
    assert (folder["kind"], folder["default_size"]) == ("model", "16x16")
    assert folder["parts"]["unet"]["block_channels"] == [8, 16]
    single = ldm_here("info", "--json", tiny_single_file()).records[0]
    assert single["is"] == "Stable Diffusion 1.x checkpoint"
    shown = ldm_here("info", tiny_single_file()).out.decode()
    assert "block channels: (32, 32)" in shown
    assert ldm_here("info", "--json", tiny_model() / "vae" / "diffusion_pytorch_model.safetensors").records[0][
        "is"
    ] == ("VAE only")


def test_info_of_several_files_tells_all_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    files = [tiny_model(), tmp_path / "broken.png", tmp_path / "gone.png", tiny_single_file()]
    result = ldm_here("info", *files)
    assert result.code == 65
    told = result.out.decode().splitlines()
    assert [line for line in told if not line.startswith("  ")] == [f"{files[0]}:", f"{files[3]}:"]
    assert [line[: len("ldm: error: ")] for line in result.err.splitlines()] == ["ldm: error: "] * 2
    facts = ldm_here("info", "--json", *files).records
    assert [(one["path"], one["kind"]) for one in facts] == [(str(files[0]), "model"), (str(files[3]), "model")]
