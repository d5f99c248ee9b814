"""Models of the hub, fetched by the real program from a server on loopback that speaks the hub's protocol."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import EMBEDDED, Result, assert_refused, pixels, start, tiny_model, tiny_single_file, until
from fork_server import LEAN, quick
from hub_server import Hub
from safetensors.torch import load_file, save
from test_cli import on_a_terminal

from ldmcli.checkpoints.layout import needed_files
from ldmcli.checkpoints.source import open_model
from ldmcli.errors import BadDataError, CannotCreateError, MissingInputError, StorageError
from ldmcli.hub.faults import reworded
from ldmcli.hub.fetch import HubModel, parse
from ldmcli.images.metadata import read_record

pytestmark = pytest.mark.timeout(300)
UNET = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hf_aSecretThatMustNotBeSeen"
PROMPT = "a red apple on a blue background"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().running() as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Any:
    """Run `ldm` in an empty folder with `hub` as its hub and a cache of its own."""
    here = tmp_path / "here"
    here.mkdir()

    def run(*arguments: str | Path, **env: str) -> Result:
        hub.requests.clear()
        return quick(*arguments, env=environment(hub, tmp_path) | env, cwd=here)

    return run


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """What sends a process to `hub`, with its cache in `folder`."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": ""}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pulled(result: Result) -> Path:
    """The one path that `ldm pull` printed."""
    assert result.code == 0, result
    (line,) = result.out.splitlines()
    return Path(os.fsdecode(line))


def assert_opened(result: Result) -> None:
    """Assert that `ldm txt2img` got as far as fitting a width of 63 pixels to the model: it is found and open."""
    assert result.code == 2, result
    assert "ldm: error: size 63×" in result.err, result


def with_extras(folder: Path) -> dict[str, bytes]:
    """A model's files, with all that repositories have beside them."""
    extras = (
        "README.md", "unet/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack", "unet/model.onnx",
        "safety_checker/config.json", "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json",
        "emoji-pruned.ckpt", "emoji.safetensors", "vae/diffusion_pytorch_model.fp16.bin",
    )  # fmt: skip
    return contents(folder) | dict.fromkeys(extras, b"not to be fetched")


# ---- fetching ----


def test_a_model_is_fetched_drawn_and_kept(hub: Hub, run: Any, tmp_path: Path) -> None:
    hub.add("lab/emoji", with_extras(EMBEDDED.parent))
    first = run("txt2img", PROMPT, "-m", "lab/emoji", "-s", "1", "--steps", "2", "-o", tmp_path / "hub.png")
    assert first.paths == [tmp_path / "hub.png"], first
    rest = [data for name, data in contents(EMBEDDED.parent).items() if name != "model_index.json"]  # after the index
    assert f"ldm: fetching lab/emoji: {len(rest)} files, {sum(map(len, rest)) / 1e6:.1f} MB" in first.err
    assert "%|" not in first.err  # no bar where there is no terminal
    assert set(hub.took()) == set(contents(EMBEDDED.parent))
    assert pixels(first.paths[0]).shape == (64, 64, 3)
    # What is there is not fetched again; one question tells that it is still the newest.
    again = run("txt2img", PROMPT, "-m", "lab/emoji", "-W", "63")
    assert_opened(again)
    assert "fetching" not in again.err
    assert [(request.method, request.path) for request in hub.requests] == [
        ("GET", "api/models/lab/emoji/revision/main")
    ]


def test_only_the_folder_is_printed_and_every_file_is_whole(hub: Hub, run: Any) -> None:
    hub.add("lab/emoji", with_extras(tiny_model()))
    result = run("pull", "lab/emoji")
    folder = pulled(result)
    assert contents(folder) == contents(tiny_model())
    assert "ldm: lab/emoji: Stable Diffusion 1" in result.err
    assert open_model(folder).name == "emoji"
    assert result.peak < LEAN, "torch is not needed"
    quiet = run("pull", "lab/emoji", "-q")
    assert (pulled(quiet), quiet.err) == (folder, "")
    assert not any("agent-harnesses" in request.path for request in hub.requests)


def test_other_tools_find_what_was_pulled(hub: Hub, run: Any, tmp_path: Path) -> None:
    hub.add("lab/emoji", tiny_model())
    folder = pulled(run("pull", "lab/emoji"))
    code = (
        "import huggingface_hub as h; print(h.hf_hub_download('lab/emoji', 'unet/config.json', local_files_only=True))"
    )
    env = os.environ | environment(hub, tmp_path)
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(folder / "unet" / "config.json")


def test_what_changed_on_the_hub_is_fetched_and_no_more(hub: Hub, run: Any) -> None:
    files = contents(tiny_model())
    hub.add("lab/emoji", files)
    before = pulled(run("pull", "lab/emoji"))
    hub.add(
        "lab/emoji", files | {"scheduler/scheduler_config.json": b"{}", "unet/config.json": files["unet/config.json"]}
    )
    after = pulled(run("pull", "lab/emoji"))
    assert before != after
    assert not any(request.path.startswith("blobs") for request in hub.requests)


@pytest.mark.parametrize(("option", "variant"), [("--fp16", "fp16."), ("--full", "")])
def test_the_variant_asked_for_is_fetched(hub: Hub, run: Any, option: str, variant: str) -> None:
    files = contents(tiny_model())
    for path in [path for path in files if path.endswith(".safetensors")]:
        files[path.replace(".safetensors", ".fp16.safetensors")] = files[path]
    del files[UNET]  # this part has only the one
    hub.add("lab/emoji", files)
    folder = pulled(run("pull", "lab/emoji", option))
    weights = {path for path in contents(folder) if path.endswith(".safetensors")}
    assert weights == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        f"vae/diffusion_pytorch_model.{variant}safetensors",
        f"text_encoder/model.{variant}safetensors",
    }


def test_shards_are_fetched_and_read(hub: Hub, run: Any) -> None:
    files, state = contents(tiny_model()), load_file(tiny_model() / UNET)
    names = sorted(state)
    shards = {"diffusion_pytorch_model-1.safetensors": names[::2], "diffusion_pytorch_model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        files[f"unet/{shard}"] = save({name: state[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    files[UNET + ".index.json"] = json.dumps(index).encode()
    del files[UNET]
    hub.add("lab/emoji", files)
    folder = pulled(run("pull", "lab/emoji"))
    assert set(contents(folder)) == set(files)
    # huggingface_hub keeps what it fetched by Xet in a store for all repositories, linked to from each.
    store = folder.parents[2] / "blobs" / "ab"
    store.mkdir(parents=True)
    for shard in shards:
        blob = (folder / "unet" / shard).resolve()
        blob.rename(store / blob.name)
        blob.symlink_to(store / blob.name)
    assert pulled(run("pull", "lab/emoji")) == folder
    assert hub.took() == []


def test_revisions(hub: Hub, run: Any) -> None:
    old = hub.add("lab/emoji", tiny_model(), "v1.0")
    hub.add("lab/emoji", contents(tiny_model()) | {"scheduler/scheduler_config.json": b"{}"})
    folder = pulled(run("pull", "lab/emoji@v1.0"))
    assert folder.name == old
    assert pulled(run("pull", f"lab/emoji@{old}")) == folder
    assert_refused(run("pull", "lab/emoji@v2"), 66, "no revision 'v2'")
    # A commit cannot change: nothing is asked.
    assert_opened(run("txt2img", "x", "-m", f"lab/emoji@{old}", "-W", "63"))
    assert hub.requests == []


def test_a_vae_by_itself(hub: Hub, run: Any) -> None:
    files = contents(tiny_model() / "vae")
    hub.add("lab/vae", files | {"README.md": b"", "diffusion_pytorch_model.bin": b""})
    result = run("pull", "lab/vae")
    assert contents(pulled(result)) == files
    assert "--vae" in result.err
    assert pulled(run("pull", "lab/vae", HF_HUB_OFFLINE="1")) == pulled(result)
    assert b"lab/vae" not in run("models").out  # it draws nothing


def test_one_file_of_a_repository(hub: Hub, run: Any) -> None:
    hub.add("lab/checkpoints", {"old/v1.safetensors": tiny_single_file().read_bytes(), "v1.ckpt": b"pickle"})
    path = pulled(run("pull", "lab/checkpoints/old/v1.safetensors"))
    assert path.name == "v1.safetensors"
    assert set(hub.took()) == {"old/v1.safetensors"}
    assert_refused(run("pull", "lab/checkpoints"), 65, "no model_index.json", "lab/checkpoints/old/v1.safetensors")
    assert_refused(
        run("pull", "lab/checkpoints/v2.safetensors"), 66, "no file v2", "lab/checkpoints/old/v1.safetensors"
    )


# ---- what breaks ----


def test_a_cut_is_mended_in_the_same_run(hub: Hub, run: Any) -> None:
    hub.add("lab/emoji", EMBEDDED.parent)
    hub.cuts = [0, 0, *[11 << 20] * 4]  # of the large files, only that of the U-Net is longer
    folder = pulled(run("pull", "lab/emoji"))
    assert contents(folder) == contents(EMBEDDED.parent)
    assert any(request.begin for request in hub.requests)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_the_next_run_fetches_only_the_rest(hub: Hub, run: Any, tmp_path: Path, number: int) -> None:
    hub.add("lab/emoji", EMBEDDED.parent)
    hub.stall = 11 << 20
    process = start("pull", "lab/emoji", env=environment(hub, tmp_path))
    blobs = tmp_path / "hf" / "hub" / "models--lab--emoji" / "blobs"
    until(lambda: any(part.stat().st_size >= 8 << 20 for part in blobs.glob("*.incomplete")), "half the download")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-number, b"")
    assert b"Traceback" not in err
    # What has come so far is not taken for the whole model.
    assert_refused(run("pull", "lab/emoji", HF_HUB_OFFLINE="1"), 66, "HF_HUB_OFFLINE", "ldm pull lab/emoji")
    assert not any(record["name"] == "lab/emoji" and record["family"] for record in run("models", "--json").records)
    hub.stall = None
    result = run("pull", "lab/emoji")
    assert contents(pulled(result)) == contents(EMBEDDED.parent)
    resumed = [request.begin for request in hub.requests if request.path.startswith("blobs") and request.begin]
    assert len(resumed) == 1
    assert resumed[0] >= 8 << 20
    assert not list(blobs.glob("*.incomplete"))


def test_two_runs_at_once_share_the_work(hub: Hub, tmp_path: Path) -> None:
    hub.add("lab/emoji", EMBEDDED.parent)
    processes = [start("pull", "-q", "lab/emoji", env=environment(hub, tmp_path)) for _ in range(2)]
    (one, noise), (other, more) = (process.communicate(timeout=60) for process in processes)
    assert (noise, more) == (b"", b"")
    assert one == other
    assert contents(Path(os.fsdecode(one.strip()))) == contents(EMBEDDED.parent)
    large = [request.path for request in hub.requests if request.path.startswith("blobs")]
    assert len(large) == len(set(large)) == 4


def test_damage_on_the_way_is_noticed(hub: Hub, run: Any) -> None:
    hub.add("lab/emoji", EMBEDDED.parent)
    hub.corrupt = True
    result = run("pull", "lab/emoji")
    assert result.code == 74
    assert "arrived damaged" in result.err
    hub.corrupt = False
    assert contents(pulled(run("pull", "lab/emoji"))) == contents(EMBEDDED.parent)


def test_offline(hub: Hub, run: Any) -> None:
    hub.add("lab/emoji", tiny_model())
    offline = {"HF_HUB_OFFLINE": "1"}
    assert_refused(run("pull", "lab/emoji", **offline), 66, "not in the hub cache", "HF_HUB_OFFLINE", "ldm pull")
    assert_refused(run("txt2img", "x", "-m", "lab/emoji", **offline), 66, "HF_HUB_OFFLINE", "ldm pull lab/emoji")
    folder = pulled(run("pull", "lab/emoji"))
    assert_opened(run("txt2img", "x", "-m", "lab/emoji", "-W", "63", **offline))
    assert hub.requests == []
    (folder / "vae" / "config.json").unlink()
    assert_refused(run("txt2img", "x", "-m", "lab/emoji", **offline), 66, "lacks vae/config.json", "ldm pull")
    # Online, what is missing is mended.
    assert contents(pulled(run("pull", "lab/emoji"))) == contents(tiny_model())


def test_a_hub_that_cannot_be_reached(hub: Hub, run: Any) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_refused(run("pull", "lab/emoji", **nobody), 74, "http://127.0.0.1:9", "run the same again")
    hub.add("lab/emoji", tiny_model())
    run("pull", "lab/emoji")
    opened = run("txt2img", "x", "-m", "lab/emoji", "-W", "63", **nobody)
    assert_opened(opened)
    assert "warning: cannot fetch lab/emoji" in opened.err
    assert "; the copy fetched before is used" in opened.err
    hub.web_page = True
    assert_refused(run("pull", "lab/emoji"), 74, "does not answer as a model hub", "HF_ENDPOINT")


def test_what_the_repository_lacks_is_named_before_weights_are_fetched(hub: Hub, run: Any) -> None:
    files = contents(tiny_model())
    hub.add("lab/part", {path: data for path, data in files.items() if path != "vae/config.json"})
    hub.add("lab/empty", {"README.md": b""})
    pickles = {path.replace(".safetensors", ".bin"): data for path, data in files.items()}
    hub.add("lab/pickles", pickles)
    hub.add("lab/mixed", pickles | {"text_encoder/model.safetensors": b""})
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["a", "b"]}
    hub.add("lab/flux", files | {"model_index.json": json.dumps(index).encode()})
    assert_refused(run("pull", "lab/part"), 66, "lacks vae/config.json")
    assert not any(path.endswith(".safetensors") for path in hub.took())
    assert_refused(run("pull", "lab/empty"), 65, "no model_index.json")
    assert_refused(run("pull", "lab/pickles"), 65, "only as a pickle", "safetensors")
    assert_refused(run("pull", "lab/mixed"), 65, "unet are there only as a pickle")
    assert_refused(run("pull", "lab/flux"), 65, "FluxPipeline")


def test_a_cache_that_cannot_be_written(hub: Hub, run: Any, tmp_path: Path) -> None:
    hub.add("lab/emoji", tiny_model())
    (tmp_path / "file").write_text("")
    assert_refused(run("pull", "lab/emoji", HF_HOME=str(tmp_path / "file")), 74, "hub cache")


# ---- who may read ----


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, run: Any, tmp_path: Path) -> None:
    hub.add("lab/private", EMBEDDED.parent)
    hub.repositories["lab/private"].token = TOKEN
    result = run("pull", "-v", "lab/private", HF_TOKEN=TOKEN)
    pulled(result)
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} == {TOKEN}
    assert {request.token for request in hub.requests if request.host == "localhost"} == {""}
    assert TOKEN not in result.err
    assert not any(TOKEN.encode() in data for data in contents(tmp_path).values())


def test_who_may_not_read_is_told_what_to_do(hub: Hub, run: Any) -> None:
    hub.add("lab/gated", tiny_model())
    hub.repositories["lab/gated"].gated = True
    hub.repositories["lab/gated"].token = TOKEN
    assert_refused(run("pull", "lab/gated"), 66, "gated", f"{hub.endpoint}/lab/gated", "HF_TOKEN")
    assert_refused(run("pull", "lab/nothing"), 66, "lab/nothing", "check the name", "HF_TOKEN")
    assert_refused(run("pull", "lab/nothing", HF_TOKEN=TOKEN), 66, "no model lab/nothing", "check the name")
    sentence = assert_refused(run("pull", "lab/gated", HF_TOKEN="outdated"), 66, "refuses", "HF_TOKEN")
    assert "outdated" not in sentence


# ---- names ----


def test_what_is_here_wins_over_the_hub(hub: Hub, run: Any, tmp_path: Path) -> None:
    here = tmp_path / "here" / "lab" / "emoji"
    here.parent.mkdir()
    here.symlink_to(tiny_model())
    hub.add("lab/emoji", {})
    assert_opened(run("txt2img", "x", "-m", "lab/emoji", "-W", "63"))
    assert hub.requests == []
    # A name in a folder that is here is a path, mistyped or not.
    mistyped = run("txt2img", "x", "-m", "lab/emojy")
    assert mistyped.code == 66
    assert "its folder has emoji" in mistyped.err
    assert "lab/emojy@main" in mistyped.err
    # So is one in a folder that people call so, where the hub might have an organisation of that name.
    for option in ("-m", "--vae", "--lora"):
        sentence = run("txt2img", "x", option, "models/sd15")
        assert sentence.code == 66, sentence
        assert "models is what folders are called, so models/sd15 is a path" in sentence.err
        assert "models/sd15@main" in sentence.err
    assert hub.requests == []
    assert "there is no model models/sd15" in run("txt2img", "x", "-m", "models/sd15@main", HF_TOKEN=TOKEN).err


def test_the_hub_is_asked_aloud(hub: Hub, run: Any) -> None:
    hub.add("lab/emoji", tiny_model())
    first = run("txt2img", "x", "-m", "lab/emoji", "-W", "63")
    assert "ldm: there is no lab/emoji here; asking the hub (http" in first.err
    assert "asking the hub" not in run("txt2img", "x", "-m", "lab/emoji", "-W", "63").err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("org/name", HubModel("org/name")),
        ("org/name@v1.0", HubModel("org/name", "", "v1.0")),
        ("org/name@refs/pr/4", HubModel("org/name", "", "refs/pr/4")),
        ("Org-1/na_me.v2", HubModel("Org-1/na_me.v2")),
        ("org/name/file.safetensors", HubModel("org/name", "file.safetensors")),
        ("org/name/a/b.safetensors@main", HubModel("org/name", "a/b.safetensors", "main")),
        *((typed, None) for typed in (
            "", "name", "org/", "/name", "/org/name", "./name", "~/name", "../name", "org/name/", "org//name",
            "org/name.safetensors", "org/name.ckpt", "org/name.git", "org/na--me", "org/na..me", "org/name@",
            "org/name@a/../b", "org/name@-x", "org/name@a b", "org/name/file.bin", "org/name/../x.safetensors",
            "org/näme", "org/name\n", "-org/name", "org/name/ /.safetensors@", "C:/name",
        )),
    ],
)  # fmt: skip
def test_names(typed: str, meant: HubModel | None) -> None:
    assert parse(typed) == meant
    assert meant is None or str(meant) == typed


def test_what_is_no_name_is_refused(run: Any) -> None:
    assert_refused(run("pull", "emoji"), 2, "'emoji'", "ORG/NAME")
    assert run("pull").code == 2


# ---- ldm models ----


def test_models_at_hand(hub: Hub, run: Any, tmp_path: Path) -> None:
    weights = tmp_path / "here" / "weights"
    weights.mkdir()
    (weights / "mine").symlink_to(tiny_model())
    (weights / "single.safetensors").symlink_to(tiny_single_file())
    (weights / "broken.safetensors").write_text("<!doctype html>")
    (weights / "notes.txt").write_text("no model")
    (weights / "folder").mkdir()
    hub.add("lab/emoji", EMBEDDED.parent)
    hub.add("lab/damaged", contents(tiny_model()) | {"README.md": b"another commit"})
    hub.add("lab/llm", {"model.safetensors": b"x" * 10})
    hub.add("lab/files", {"one.safetensors": tiny_single_file().read_bytes()}, "v2")
    run("pull", "lab/emoji")
    pulled(run("pull", "lab/files/one.safetensors@v2"))
    (pulled(run("pull", "lab/damaged")) / "unet" / "config.json").unlink()
    result = run("models", "--json")
    assert result.code == 0, result
    assert hub.requests == []
    found = {record["name"]: record for record in result.records}
    assert list(found) == [
        "tiny-emoji", "weights/broken.safetensors", "weights/mine", "weights/single.safetensors", "lab/damaged",
        "lab/emoji", "lab/files/one.safetensors@v2",
    ]  # fmt: skip
    assert "unet/config.json" in found["lab/damaged"]["error"]
    assert "web page" in found["weights/broken.safetensors"]["error"]
    runnable = {name for name, record in found.items() if not record["error"]}
    assert runnable == set(found) - {"lab/damaged", "weights/broken.safetensors"}
    assert all(found[name]["family"].startswith("Stable Diffusion 1") for name in runnable)
    assert found["lab/emoji"]["bytes"] == sum(map(len, contents(EMBEDDED.parent).values()))
    assert found["lab/files/one.safetensors@v2"]["bytes"] == tiny_single_file().stat().st_size
    lines = run("models").out.decode().splitlines()
    assert len(lines) == len(found)
    assert "the default" in lines[0]
    assert f"{found['lab/emoji']['bytes'] / 1e6:.1f} MB" in lines[5]
    assert "cannot be run" in lines[4]


def test_what_is_listed_is_a_name_to_type(hub: Hub, run: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine").symlink_to(tiny_model())
    (own / "single.safetensors").symlink_to(tiny_single_file())
    hub.add("lab/emoji", tiny_model())
    pulled(run("pull", "lab/emoji"))
    (tmp_path / "here" / "lab").mkdir()
    listed = [record["name"] for record in run("models", "--json", LDM_MODELS=str(own)).records]
    assert listed == ["tiny-emoji", "mine", "single.safetensors", "lab/emoji@main"]
    for name in (*listed, "single", str(EMBEDDED.parent)):
        assert_opened(run("txt2img", "x", "-m", name, "-W", "63", LDM_MODELS=str(own)))
    assert run("info", "mine", LDM_MODELS=str(own)).code == 0
    assert_refused(run("txt2img", "x", "-m", "mine"), 66, "mine")
    (tmp_path / "here" / "tiny-emoji").mkdir()  # which the name would mean
    assert run("models", "--json").records[0]["name"] == str(EMBEDDED.parent)


def test_models_without_a_cache_or_weights(run: Any) -> None:
    result = run("models")
    assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 1)
    assert result.peak < LEAN


def test_models_without_a_home(run: Any) -> None:
    """Of its own, and with no account that has one: there is no cache then."""
    result = run("models", HF_HOME="~no-such-user/hf")
    assert (result.code, result.err, len(result.out.splitlines())) == (0, "", 1)


def test_a_bar_on_a_terminal(hub: Hub, tmp_path: Path) -> None:
    hub.add("lab/emoji", EMBEDDED.parent)
    result, shown = on_a_terminal("pull", "lab/emoji", stream="stderr", env=environment(hub, tmp_path))
    assert result.code == 0
    assert "text_encoder/model.safetensors: 100%" in shown
    assert Path(os.fsdecode(result.out.strip())).is_dir()
    hub.add("lab/other", EMBEDDED.parent)
    result, shown = on_a_terminal("pull", "-q", "lab/other", stream="stderr", env=environment(hub, tmp_path))
    assert (result.code, shown) == (0, "")


# ---- the parts by themselves ----


class _Broken(Exception):
    """Looks like httpx's TransportError, which is told by its name."""


_Broken.__name__ = "TransportError"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "is full; make room"),
        (PermissionError(errno.EACCES, "Permission denied"), CannotCreateError, "cannot write to the hub cache"),
        (OSError(errno.EIO, "Input/output error"), StorageError, "cannot be used"),
        (json.JSONDecodeError("no JSON", "", 0), StorageError, "HF_ENDPOINT"),
        (_Broken("Name or service not known\x1b[2J"), StorageError, "run the same again"),
    ],
)
def test_errors_are_one_sentence(error: Exception, kind: type, words: str) -> None:
    said = reworded(error, "org/name", None, "https://huggingface.co", "cache/hub")
    assert type(said) is kind
    assert words in str(said)
    assert str(said).isprintable()
    assert reworded(RuntimeError("a fault of ours"), "org/name", None, "", "") is None


def test_hostile_indexes() -> None:
    names = {"unet/config.json", "vae/config.json", "model_index.json", UNET + ".index.json"}
    names |= {"vae/diffusion_pytorch_model.safetensors"}
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for weight_map in ({"a": "../../x.safetensors"}, {"a": "/x.safetensors"}, {"a": "x.bin"}, {}, [], None, {"a": 1}):
        read = {"model_index.json": index, UNET + ".index.json": {"weight_map": weight_map}}
        with pytest.raises(BadDataError, match="org/name: unet/"):
            needed_files("org/name", names, read.__getitem__, half=True)
    read = {"model_index.json": index, UNET + ".index.json": {"weight_map": {"a": "there-is-none.safetensors"}}}
    with pytest.raises(MissingInputError, match="there-is-none"):
        needed_files("org/name", names, read.__getitem__, half=True)


def test_models_whose_parts_are_called_otherwise_are_fetched_whole() -> None:
    index = {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    text = {"bert": ["ldm", "LDMBertModel"], "tokenizer": ["transformers", "BertTokenizer"]}
    networks = {"unet": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model", "bert": "model"}
    files = [f"{part}/{name}" for part, stem in networks.items() for name in ("config.json", f"{stem}.safetensors")]
    files += ["model_index.json", "tokenizer/vocab.txt", "README.md"]
    assert set(needed_files("a/b", files, lambda name: index | text, half=False)) == {*files} - {"README.md"}
    found = needed_files("a/b", files, lambda name: index, half=False)
    assert set(found) == {file for file in files if file.startswith(("model_index", "unet", "vqvae"))}


def test_of_unclip_models_what_scales_and_noises_embeddings_is_fetched_too() -> None:
    parts = ("unet", "vae", "image_normalizer")
    index = {part: ["diffusers", "Any"] for part in (*parts, "image_noising_scheduler", "image_encoder")}
    wanted = [f"{part}/{name}" for part in parts for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    wanted += ["model_index.json", "image_noising_scheduler/scheduler_config.json"]
    files = [*wanted, "image_encoder/config.json", "image_encoder/model.safetensors"]
    assert set(needed_files("a/b", files, lambda name: index, half=False)) == set(wanted)


def test_an_embedding_is_fetched_by_the_name_of_its_repository(hub: Hub, run: Any, tmp_path: Path) -> None:
    tensors = {"<toy>": torch.ones(16)}
    hub.add("lab/toy", {"README.md": b"x", "learned_embeds.safetensors": save(tensors), "concept_images/0.jpeg": b"x"})
    hub.add("lab/old", {"learned_embeds.bin": b"PK\x03\x04 data.pkl"})
    command = ("txt2img", "a <toy>, a cat", "-m", tiny_model(), "-s", "1", "--steps", "1", "-o", tmp_path / "x.png")
    for _ in range(2):
        drawn = run(*command, "--embedding", "lab/toy", "--overwrite")
        assert drawn.code == 0, drawn
        assert "no prompt has" not in drawn.err
    (used,) = read_record(tmp_path / "x.png")["model"]["embeddings"]
    assert (used["word"], used["path"]) == ("<toy>", "lab/toy")
    assert hub.took() == []
    again = run("txt2img", "--from-image", tmp_path / "x.png", "-o", tmp_path / "y.png")
    assert (again.code, pixels(tmp_path / "y.png").tolist()) == (0, pixels(tmp_path / "x.png").tolist())
    assert_refused(run(*command, "-q", "--embedding", "lab/old:toy"), 65, "pickle", "--allow-pickle")
