"""Pictures in the terminal and as they grow: `ldm show`, --show, --preview and --preview-file."""

import base64
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from cli_support import assert_refused, environment, ldm_here, pixels, tiny_model
from PIL import Image

from ldmcli import GenerationRequest, RuntimeSpec, Session
from ldmcli.pipeline.previewing import linear_images

FAST = ("--dtype", "fp32", "--device", "cpu", "--steps", "4", "-s", "1", "--no-server")
SIXEL = "\x1b[?62;4c"  # what a terminal answers that has them
KITTY = "\x1b[?62c\x1b_Gi=1;OK\x1b\\"
PLAIN = "\x1b[?62c"
RED, BLUE = "200;40;40", "30;60;220"


def in_terminal(
    *arguments: str | Path,
    answers: str = PLAIN,
    stdin: bytes | None = None,
    code: int = 0,
    term: str = "xterm-256color",
    size: tuple[int, ...] = (24, 80, 800, 480),
    env: dict[str, str] | None = None,
) -> str:
    """What `ldm ARGUMENTS` writes to a terminal of 24 lines and 80 columns, or another `size` in these and pixels, that
    has typed `answers` before anything is asked; `stdin` is a pipe's."""
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size))
    without_echo = termios.tcgetattr(terminal)
    without_echo[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, without_echo)
    os.write(controller, answers.encode())
    own = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); sys.argv[0] = 'ldm'; "
    terminals = ("TERM_PROGRAM", "LC_TERMINAL", "TMUX", "STY")
    own_env = {name: value for name, value in environment().items() if name not in terminals}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{own} from ldmcli.cli import main; main()", *map(str, arguments)],
        stdin=terminal if stdin is None else subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
        env=own_env | {"COLORTERM": "truecolor", "TERM": term, "NO_COLOR": "1"} | (env or {}),
        start_new_session=True,
    )
    os.close(terminal)
    if stdin is not None:
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
    shown = b""
    while True:
        try:
            shown += (data := os.read(controller, 1 << 16))
        except OSError:  # its end, on Linux
            break
        if not data:
            break
    os.close(controller)
    text = shown.decode()
    assert process.wait(60) == code, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red above blue."""
    path = tmp_path_factory.mktemp("pictures") / "two.png"
    colours = np.array([[[200, 40, 40]], [[30, 60, 220]]], np.uint8).repeat(8, 0).repeat(16, 1)
    Image.fromarray(colours).save(path)
    return path


def test_a_terminal_without_graphics_shows_half_blocks_in_the_pictures_colours(picture: Path, tmp_path: Path) -> None:
    shown = in_terminal("show", picture, tmp_path / "none.png", picture, code=66)
    assert shown.count("▀") == 2 * 16 * 8  # two pixels a character
    first, last = shown.index(f"38;2;{RED};48;2;{RED}m"), shown.rindex(f"38;2;{BLUE};48;2;{BLUE}m")
    assert first < last
    assert shown.count(f"{picture}\r\n") == 2
    assert "none.png does not exist" in shown


@pytest.mark.parametrize(("answers", "begins"), [(SIXEL, "\x1bP"), (KITTY, "\x1b_Gi=")])
def test_a_terminal_with_graphics_gets_every_pixel(picture: Path, answers: str, begins: str) -> None:
    shown = in_terminal("show", "-", answers=answers, stdin=picture.read_bytes())
    assert begins in shown
    assert "▀" not in shown


@pytest.mark.parametrize("env", [{"TERM_PROGRAM": "iTerm.app"}, {"TERM_PROGRAM": "WezTerm"}, {"LC_TERMINAL": "iTerm2"}])
def test_iterm2_gets_the_file(picture: Path, env: dict[str, str]) -> None:
    shown = in_terminal("show", picture, env=env)
    found = re.search(r"\x1b\]1337;File=inline=1;size=(\d+);width=32;height=16;preserveAspectRatio=1:(\S+)\a", shown)
    assert found
    data = base64.b64decode(found[2])
    assert len(data) == int(found[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels(picture))
    assert "\x1b[c" not in shown  # nothing is asked
    assert "▀" in in_terminal("show", picture, env=env, term="tmux-256color")
    assert "▀" in in_terminal("show", picture, env=env | {"TMUX": "default,1,0"})


def test_pictures_go_into_no_pipe(picture: Path, tmp_path: Path) -> None:
    assert_refused(ldm_here("show", picture), 2, "standard output is no terminal")
    assert "no colours" in in_terminal("show", picture, term="dumb", code=2)
    assert "its size is 0" in in_terminal("show", picture, size=(0, 0, 0, 0), code=2)
    result = ldm_here("txt2img", "a fox", "-m", tiny_model(), *FAST, "--show", "-o", tmp_path)
    assert [path.name for path in result.paths] == ["ldm-1.png"]
    assert result.err == "ldm: warning: standard output is no terminal, so --show shows nothing\n"
    enlarged = ldm_here("upscale", picture, "--show", "--scale", "1", "-o", tmp_path / "large.png")
    assert "no terminal" in enlarged.err
    assert len(enlarged.paths) == 1


def test_a_picture_is_shown_as_it_grows_and_then_itself(tmp_path: Path) -> None:
    shown = in_terminal(
        "txt2img", "a fox", "-m", tiny_model(), *FAST, "--steps", "3", "--show", "--preview", "1", "-q", "-o", tmp_path
    )
    gone = r"\x1b\[8A\x1b\[J"  # the preview's eight lines of 16 pixels
    picture = r"(?:(?:\x1b\[[\d;]*m▀\x1b\[0m){16}\r\n){8}"
    path = re.escape(f"{tmp_path}/ldm-1.png\r\n")
    whole = re.search(f"{picture}{gone}{picture}{gone}{picture}{gone}{path}{picture}$", shown)
    assert whole, "the previews, each in place of the one before, and the picture below its path"
    last = shown[shown.rindex("ldm-1.png") :]
    colours = re.findall(r"38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)", last)
    found = np.array(colours, int).reshape(8, 16, 2, 3).transpose(0, 2, 1, 3).reshape(16, 16, 3)
    assert np.array_equal(found, pixels(tmp_path / "ldm-1.png"))


def test_a_batch_shows_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a fox\nan owl\n")
    rows = ("batch", tmp_path / "rows.txt", "-o", tmp_path / "run", "-m", tiny_model(), *FAST[:-3], "--no-server")
    shown = in_terminal(*rows, "--show", "-q")
    assert shown.count("▀") == 2 * 16 * 8
    assert re.findall(r"images/\S+", shown) == [f"images/00000/{path.name}" for path in run_files(tmp_path / "run")]


def run_files(run: Path) -> list[Path]:
    return sorted((run / "images" / "00000").iterdir())


def test_a_preview_file_holds_the_pictures_of_the_last_previewed_step(tmp_path: Path) -> None:
    command = ("txt2img", "a fox", "a cat", "-m", tiny_model(), *FAST, "-b", "2")
    plain = ldm_here(*command, "-o", tmp_path / "plain")
    file = tmp_path / "new" / "grows.png"
    seen = ldm_here(*command, "-o", tmp_path / "seen", "--preview", "3", "--preview-file", file)
    assert [path.read_bytes() for path in seen.paths] == [path.read_bytes() for path in plain.paths]
    assert pixels(file).shape == (16, 32, 3)
    at_three = file.stat().st_mtime_ns
    assert ldm_here(*command, "-o", tmp_path / "again", "--preview-file", file, "--preview", "5").code == 0
    assert file.stat().st_mtime_ns == at_three, "there are but four steps"
    assert ldm_here(*command, "-o", tmp_path / "anew", "--preview-file", file).code == 0
    assert file.stat().st_mtime_ns != at_three, "its own file is replaced"


def test_what_previews_are_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    Image.new("RGB", (2, 2)).save(mine)
    command = ("txt2img", "a fox", "-m", tiny_model(), *FAST)
    assert_refused(ldm_here(*command, "--preview", "2"), 2, "--show", "--preview-file")
    assert_refused(ldm_here(*command, "--preview", "0", "--show"), 2, "--preview")
    assert_refused(ldm_here(*command, "--preview-file", "a.jpg"), 2, ".png")
    assert_refused(ldm_here(*command, "--preview-file", "a.png", "-o", "a.png", cwd=tmp_path), 2, "same file")
    assert_refused(ldm_here(*command, "--preview-file", mine, "-o", tmp_path), 73, "mine.png", "--preview-file")
    assert sorted(tmp_path.iterdir()) == [mine]


def test_a_model_of_its_own_latents_is_decoded_for_previews() -> None:
    seen: list[np.ndarray] = []

    def see(progress: object) -> None:
        seen.extend(np.frombuffer(data, np.uint8).reshape(h, w, 3) for w, h, data in progress.preview())  # type: ignore[attr-defined]

    with Session(runtime=RuntimeSpec(device="cpu", dtype="fp32")) as session:
        (drawn,) = session.draw([GenerationRequest("a red apple", seed=7, steps=3)], on_step=see)
        assert len(seen) == 3
        assert np.abs(seen[-1].astype(int) - drawn.pixels()).mean() < 3, "the last step predicts the picture"


def test_published_maps_of_latents_to_colours() -> None:
    import torch

    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 0, 0, 1] = 1
    first = linear_images(latents, 0.18215)
    assert first is not None
    assert first[0, :, 0].T.tolist() == pytest.approx(np.array([[0, 0, 0], [0.298, 0.207, 0.208]]))
    larger = linear_images(latents, 0.13025)
    assert larger is not None
    assert ((larger[0, :, 0].T + 1) * 127.5).round().tolist() == [[150, 140, 130], [210, 200, 190]]
    assert linear_images(latents, 1.0) is None
    assert linear_images(torch.zeros(1, 16, 1, 1), 0.18215) is None
