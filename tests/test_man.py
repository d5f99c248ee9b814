"""The manual page: the help of all commands, in troff's words."""

import shutil
import subprocess

import click
import pytest
from cli_support import ldm_here

from ldmcli.cli import cli


@pytest.fixture(scope="module")
def source() -> str:
    done = ldm_here("man")
    assert (done.code, done.err) == (0, "")
    return done.out.decode()


def test_the_page_has_every_command_and_option(source: str) -> None:
    root = click.Context(cli)
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        (section,) = [part for part in source.split("\n.SH ") if part.startswith(f"LDM {name.upper()}\n")]
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0].replace("-", "\\-") in section, (name, option.name)
    assert "73 cannot create output" in source


def test_troff_finds_nothing_wrong(source: str) -> None:
    if shutil.which("groff") is None:
        pytest.skip("there is no groff here")
    groff = ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", "-P-cbou"]
    done = subprocess.run(groff, input=source.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    assert "--negative-prompt" in done.stdout.decode()
    assert r"\(, BREAK" in " ".join(done.stdout.decode().split())
