"""The configuration file: below command line and environment, with profiles, and what is wrong with it is named."""

import json
from pathlib import Path

import pytest
from cli_support import Result, assert_refused, ldm_here, tiny_model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "ldmcli").mkdir()
    path = tmp_path / "ldmcli" / "config.toml"
    path.write_text(
        f'model = "{tiny_model()}"\nsteps = 3\ncfg-scale = 2.5\nno_metadata = true\nsize = "8x16"\ndevices = "cpu"\n'
        '[profiles.draft]\nsteps = 1\nname = "{prompt}"\n'
    )
    return path


def draw(tmp_path: Path, *options: str, env: dict[str, str] | None = None) -> Result:
    return ldm_here("a cat", "-s", "1", "-o", tmp_path / "out", "--json", *options, env=env)


def test_it_is_below_environment_and_command_line(file: Path, tmp_path: Path) -> None:
    (record,) = draw(tmp_path).records
    expected = {"steps": 3, "guidance_scale": 2.5, "width": 8, "height": 16, "model": "tiny"}
    assert expected.items() <= record.items()
    assert b"ldmcli\0" not in Path(record["path"]).read_bytes()
    assert draw(tmp_path, env={"LDM_STEPS": "2"}).records[0]["steps"] == 2
    assert draw(tmp_path, "--steps", "1", env={"LDM_STEPS": "2"}).records[0]["steps"] == 1
    assert draw(tmp_path, "-W", "16").records[0]["width"] == 16


def test_a_profile_comes_before_the_rest_of_the_file(file: Path, tmp_path: Path) -> None:
    for options, env in ((["--profile", "draft"], {}), ([], {"LDM_PROFILE": "draft"})):
        (record,) = draw(tmp_path, *options, env=env).records
        assert (record["steps"], record["guidance_scale"]) == (1, 2.5)
        assert Path(record["path"]).name.startswith("a-cat")
    assert draw(tmp_path, "--profile", "draft", "--steps", "2").records[0]["steps"] == 2
    assert_refused(draw(tmp_path, "--profile", "drfat"), 2, "no profile 'drfat'", "did you mean draft?")
    file.unlink()
    assert_refused(draw(tmp_path, "--profile", "draft"), 2, "there is no configuration file")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("stpes = 3", 65, ["'stpes'", "did you mean steps?"]),
        ("zzzz = 3", 65, ["'zzzz'", "long names of options"]),
        ("steps = ", 65, ["config.toml", "no TOML"]),
        ("steps = true", 65, ["steps = True", "text or a number"]),
        ("steps = [1]", 65, ["steps = [1]", "text or a number"]),
        ("no-metadata = 1", 65, ["true or false"]),
        ("steps = 7.5", 2, ["--steps (from the configuration file) '7.5' is not a whole number"]),
        ("cfg = 1\nguidance-scale = 2", 65, ["cfg and guidance-scale", "leave out one"]),
        ("profiles = 3", 65, ["[profiles.NAME]"]),
        ('"\\u001b[31m" = 3', 65, ["x1b"]),
        ("x = " + "[" * 3000, 65, ["no TOML"]),
        ("#" * (1 << 20) + "##", 65, ["MiB"]),
        ("negative-prompt = 1979-05-27", 65, ["text or a number"]),
    ],
)
def test_what_is_wrong_with_it_is_named(file: Path, tmp_path: Path, text: str, code: int, words: list[str]) -> None:
    file.write_text(text)
    assert_refused(draw(tmp_path), code, *words)


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    assert_refused(draw(tmp_path), 65, "no TOML")
    file.unlink()
    file.mkdir()
    assert_refused(draw(tmp_path), 65, "is a folder")
    file.rmdir()
    file.symlink_to("/dev/zero")
    assert_refused(draw(tmp_path), 65, "is a device")


def test_keys_of_other_commands_are_left_to_them(file: Path, tmp_path: Path) -> None:
    """An output that is configured is where pictures go, not a gallery's first page."""
    file.write_text('output = "here"\npage-size = 2\nlora = ["a.safetensors:0.5"]\n')
    assert_refused(draw(tmp_path, "-m", str(tiny_model())), 66, "a.safetensors")
    (tmp_path / "empty").mkdir()
    assert_refused(ldm_here("gallery", tmp_path / "empty"), 66, "holds neither")
    assert ldm_here("samplers").code == 0


def test_config_shows_what_is_in_force_and_where_from(file: Path) -> None:
    def said(*options: str, env: dict[str, str] | None = None) -> dict[str, tuple[object, str]]:
        result = ldm_here("config", "--json", *options, env=env)
        assert result.code == 0, result
        return {one["option"]: (one["value"], one["from"]) for one in map(json.loads, result.out.splitlines())}

    found = said(env={"LDM_SEED": "7"})
    assert found["steps"] == ("3", "config.toml")
    assert found["seed"] == ("7", "LDM_SEED")
    assert found["devices"] == ("cpu", "config.toml")
    assert "sampler" not in found
    assert said("--profile", "draft")["steps"] == ("1", "profile draft")
    everything = said("txt2img", env={"LDM_STEPS": "9"})
    assert everything["steps"] == ("9", "LDM_STEPS")
    assert everything["no-cache"] == ("off", "default")
    assert "devices" not in everything
    assert_refused(ldm_here("config", "txt2igm"), 2, "txt2img")
    assert b"guidance-scale" in ldm_here("config").out
    assert "did you mean LDM_STEPS?" in ldm_here("config", env={"LDM_STPES": "3"}).err
    assert ldm_here("config", "--path").out.decode().strip() == str(file)


def test_without_a_file_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = ldm_here("config", env={"LDM_STEPS": ""})
    assert (result.code, result.out) == (0, b"")
    assert "there is no" in result.err
    assert "nothing is set" in result.err
