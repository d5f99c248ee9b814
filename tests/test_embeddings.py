"""`--embedding` and `--embedding-dir`: textual inversions from the command line to the record in the picture."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import noise, write
from cli_support import assert_refused, empty_tensors, ldm, ldm_here, pixels, replace, tiny_model, tiny_single_file
from safetensors.torch import load_file

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.spec import LoRA

SETTINGS = ("-s", "1", "--steps", "2", "-g", "5", "--dtype", "fp32", "--device", "cpu", "--no-cache")
WIDTH = 16  # of the tiny model's text encoder, whose tokens are single letters


def vectors(count: int = 3, seed: int = 1) -> torch.Tensor:
    return noise(count, WIDTH, seed=seed, scale=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of embeddings, one of which can be used."""
    folder = tmp_path / "embeddings"
    (folder / "more").mkdir(parents=True)
    write(folder / "glow.safetensors", {"emb_params": vectors()})
    return folder


def drawn(path: Path, prompt: str, *options: str | Path) -> np.ndarray:
    """The picture of a prompt with these options."""
    result = ldm_here("txt2img", prompt, "-m", tiny_model(), *SETTINGS, *options, "-o", path, "--overwrite")
    assert result.code == 0, result.err
    assert not result.err, result.err
    return pixels(path)


def refused(code: int, *words: str, options: tuple[str | Path, ...], prompt: str = "a glow") -> None:
    assert_refused(ldm_here("txt2img", prompt, "-m", tiny_model(), *SETTINGS, *options, "-o", os.devnull), code, *words)


def test_the_rows_of_tokens_draw_as_those_tokens_do(tmp_path: Path) -> None:
    (weights,) = (tiny_model() / "text_encoder").glob("*.safetensors")
    table = load_file(weights)["embeddings.token_embedding.weight"]
    ids = json.loads((tiny_model() / "tokenizer" / "vocab.json").read_text())
    path = write(tmp_path / "x.safetensors", {"emb_params": table[[ids["c"], ids["a"], ids["t</w>"]]]})
    for prompt, options in (
        ("a {}", ()),
        ("a dog", ("-n", "a {}")),
        ("a ({}:1.4) [{}]", ("--prompt-syntax", "weighted")),
        ("{} " * 40, ("--on-long-prompt", "chunk")),
    ):
        same = [
            drawn(tmp_path / f"{word}.png", prompt.format(*[word] * 40), *(o.format(word) for o in options), *named)
            for word, named in (("cat", ()), ("glow", ("--embedding", f"{path}:glow")))
        ]
        assert np.array_equal(*same)


def test_a_folders_word_is_its_files_name(tmp_path: Path, folder: Path) -> None:
    plain = drawn(tmp_path / "plain.png", "a glow")
    found = drawn(tmp_path / "found.png", "a glow", "--embedding-dir", folder)
    assert not np.array_equal(plain, found)
    assert np.array_equal(drawn(tmp_path / "named.png", "a glow", "--embedding", folder / "glow.safetensors"), found)
    assert np.array_equal(drawn(tmp_path / "case.png", "a GLOW", "--embedding-dir", folder), found)
    other = write(tmp_path / "other.safetensors", {"emb_params": vectors(seed=5)})
    both = ("--embedding-dir", str(folder), "--embedding", f"{other}:Glow")  # what is named counts first
    assert np.array_equal(
        drawn(tmp_path / "both.png", "a glow", *both), drawn(tmp_path / "one.png", "a glow", *both[2:])
    )
    glows = drawn(tmp_path / "glows.png", "a glows", "--embedding-dir", folder)
    assert np.array_equal(glows, drawn(tmp_path / "without.png", "a glows"))


def test_the_environment_names_them(tmp_path: Path, folder: Path) -> None:
    found = drawn(tmp_path / "found.png", "a glow and shine", "--embedding-dir", folder)
    command = ("txt2img", "a glow and shine", "-m", tiny_model(), *SETTINGS, "-o")
    environment = {"LDM_EMBEDDING_DIR": str(folder)}
    assert ldm_here(*command, tmp_path / "again.png", env=environment).code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), found)
    path = folder / "glow.safetensors"
    assert ldm_here(*command, tmp_path / "two.png", env={"LDM_EMBEDDING": f"{path};{path}:shine"}).code == 0
    words = [one["word"] for one in read_record(tmp_path / "two.png")["model"]["embeddings"]]
    assert words == ["glow", "shine"]


def test_only_the_files_of_words_in_prompts_are_opened(tmp_path: Path, folder: Path) -> None:
    for i in range(300):
        (folder / "more" / f"bad{i}.safetensors").write_bytes(b"damaged")
    write(folder / "wide.safetensors", {"emb_params": noise(2, 768)})
    write(folder / "more" / "double.safetensors", {"emb_params": vectors()})
    write(folder / "double.safetensors", {"emb_params": vectors()})
    (folder / "preview.png").write_bytes((Path(__file__).parent / "no-such").name.encode())
    shutil.copy(folder / "preview.png", folder / "glow.png")
    (folder / os.fsdecode(b"\xff.pt")).write_bytes(b"")
    drawn(tmp_path / "fine.png", "a glow, a preview", "-n", "bad, wider", "--embedding-dir", folder)
    refused(65, "bad7.safetensors", options=("--embedding-dir", folder), prompt="a bad7")
    refused(65, "bad7.safetensors", options=("--embedding-dir", folder, "-n", "bad7"))
    refused(65, "for Stable Diffusion 1.x", "the model is", options=("--embedding-dir", folder), prompt="a wide")
    refused(65, "double.safetensors", "same word", options=("--embedding-dir", folder), prompt="a double")
    refused(66, "no-such", "does not exist", options=("--embedding-dir", tmp_path / "no-such"))
    refused(65, "is no folder", options=("--embedding-dir", folder / "glow.safetensors"))


def test_what_is_named_is_there_or_an_error(tmp_path: Path, folder: Path) -> None:
    path = folder / "glow.safetensors"
    refused(66, "none.safetensors", options=("--embedding", "none.safetensors"))
    refused(
        2,
        "two embeddings",
        "glow",
        options=("--embedding", path, "--embedding", f"{write(tmp_path / 'b.safetensors', {'a': vectors()})}:GLOW"),
    )
    refused(2, "no word", options=("--embedding", f"{path}: "))
    refused(2, "empty", options=("--embedding", ""))
    result = ldm_here(
        "txt2img", "an apple", "-m", tiny_model(), *SETTINGS, "--embedding", path, "-o", tmp_path / "x.png"
    )
    assert "no prompt has the word “glow”" in result.err
    assert result.code == 0


def test_a_long_word_counts_with_all_its_vectors(tmp_path: Path, folder: Path) -> None:
    write(folder / "glow.safetensors", {"emb_params": vectors(70)})
    command = (
        "txt2img",
        "an apple glow",
        "-m",
        tiny_model(),
        *SETTINGS,
        "--embedding-dir",
        folder,
        "-o",
        tmp_path / "x.png",
    )
    cut = ldm_here(*command)
    assert "cut off: “glow”" in cut.err
    assert "embeddings" not in read_record(tmp_path / "x.png")["model"]
    assert_refused(ldm_here(*command, "--on-long-prompt", "error"), 2, "too much: “glow”")
    assert not ldm_here(*command, "--on-long-prompt", "chunk", "--overwrite").err


def test_a_picture_records_them_and_is_drawn_again(tmp_path: Path, folder: Path) -> None:
    named = write(tmp_path / "other.safetensors", {"clip_l": vectors(1, seed=2)})
    options = ("--embedding-dir", folder, "--embedding", f"{named}:ugly, no: x")
    first = drawn(tmp_path / "first.png", "a Glow", *options, "-n", "ugly, no: x")
    record = read_record(tmp_path / "first.png")
    glow, ugly = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "glow.safetensors", named))
    assert record["model"]["embeddings"] == [
        {"name": "glow", "word": "glow", "path": str(folder / "glow.safetensors"), "sha256": glow},
        {"name": "other", "word": "ugly, no: x", "path": str(named), "sha256": ugly},
    ]
    assert record["request"]["embeddings"] == [f"{named}:ugly, no: x"]
    assert f'TI hashes: "glow: {glow[:12]}, ugly no x: {ugly[:12]}"' in (read_parameters(tmp_path / "first.png") or "")

    def again(*options: str | Path) -> Any:
        return ldm_here(
            "txt2img", "--from-image", tmp_path / "first.png", *options, "-o", tmp_path / "again.png", "--overwrite"
        )

    result = again()
    assert (result.code, result.err) == (0, "")
    assert np.array_equal(pixels(tmp_path / "again.png"), first)
    assert again("--embedding", f"{folder / 'glow.safetensors'}:glow").code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), first)
    # Moved, and renamed: found by its hash.
    (tmp_path / "new").mkdir()
    shutil.move(folder / "glow.safetensors", tmp_path / "new" / "shine.safetensors")
    shutil.move(named, tmp_path / "new" / "plain.safetensors")
    assert_refused(again(), 66, "“glow”", str(folder / "glow.safetensors"), glow[:12], "--embedding")
    assert again("--embedding-dir", tmp_path / "new").code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), first)
    # Another prompt without the words needs none; another file of the same name is another picture.
    assert (
        ldm_here("txt2img", "an apple", "-n", "", "--from-image", tmp_path / "first.png", "-o", tmp_path / "x.png").code
        == 0
    )
    write(tmp_path / "new" / "glow.safetensors", {"emb_params": vectors(seed=9)})
    (tmp_path / "new" / "shine.safetensors").unlink()
    result = again("--embedding-dir", tmp_path / "new")
    assert "the embedding glow is not the one the picture was made with" in result.err
    assert not np.array_equal(pixels(tmp_path / "again.png"), first)


def test_rows_of_a_batch_have_their_own(tmp_path: Path, folder: Path) -> None:
    glow, other = str(folder / "glow.safetensors"), str(write(tmp_path / "other.safetensors", {"a": vectors(seed=3)}))
    rows = [
        {"prompt": "a glow", "seed": 1},
        {"prompt": "a glow", "seed": 1, "embeddings": [glow]},
        {"prompt": "a glow", "seed": 1, "embedding": f"{other}:glow; {glow}:shine"},
        {"prompt": "a glow", "seed": 1, "embeddings": ["none.safetensors"]},
        {"prompt": "a glow", "seed": 1, "embeddings": [[1]]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ldm_here("batch", tmp_path / "p.jsonl", "-m", tiny_model(), *SETTINGS, "-b", "4", "-o", tmp_path / "out")
    assert result.code == 3, result.err
    assert "line 4: none.safetensors" in result.err or "line 4: 'none.safetensors'" in result.err, result.err
    assert "line 5: embeddings" in result.err
    pictures = [pixels(path) for path in result.paths]
    assert np.array_equal(pictures[0], drawn(tmp_path / "0.png", "a glow"))
    assert np.array_equal(pictures[1], drawn(tmp_path / "1.png", "a glow", "--embedding", glow))
    assert np.array_equal(pictures[2], drawn(tmp_path / "2.png", "a glow", "--embedding", f"{other}:glow"))


def test_no_record_names_the_users_home(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a glow", "embeddings": [f"{folder}/glow.safetensors"]}))
    command = ("batch", tmp_path / "p.jsonl", "-m", tiny_model(), *SETTINGS, "-o", tmp_path / "out", "--json")
    result = ldm_here(*command, env={"HOME": str(tmp_path)})
    assert result.code == 0, result.err
    assert result.records[0]["request"]["embeddings"] == ["~/embeddings/glow.safetensors"]
    record = read_record(Path(result.records[0]["path"]))
    assert record["request"]["embeddings"] == ["~/embeddings/glow.safetensors"]
    assert record["model"]["embeddings"][0]["path"] == "~/embeddings/glow.safetensors"
    again = ldm_here(
        "txt2img", "--from-image", result.records[0]["path"], "-o", tmp_path / "x.png", env={"HOME": str(tmp_path)}
    )
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(Path(result.records[0]["path"]))), again.err


def test_a_batch_is_another_one_with_other_embeddings(tmp_path: Path, folder: Path) -> None:
    rows = tmp_path / "p.csv"
    rows.write_text("prompt,embeddings\na glow,\nan apple,\n")
    command = ("batch", rows, "-m", tiny_model(), *SETTINGS, "-o", tmp_path / "out", "--embedding-dir", folder)
    assert ldm_here(*command).code == 0
    sha256 = hashlib.sha256((folder / "glow.safetensors").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["embeddings"] == {"glow": sha256}
    assert ldm_here(*command).code == 0
    # Rows that are added may use further ones.
    write(folder / "shine.safetensors", {"emb_params": vectors(seed=4)})
    with rows.open("a") as file:
        file.write("a shine,\n")
    extended = ldm_here(*command, "--extend")
    assert len(extended.paths) == 1, extended.err
    write(folder / "glow.safetensors", {"emb_params": vectors(seed=7)})
    assert_refused(ldm_here(*command), 65, "another run", "model.embeddings.glow")
    assert_refused(ldm_here(*command, "--embedding", "none.pt"), 66, "none.pt")
    grid = (*command[:2], *SETTINGS, "-m", tiny_model(), "-o", tmp_path / "grid", "--embedding-dir", folder, "--grid")
    assert ldm_here(*grid, "negative_prompt=shine,dull").code == 0
    assert set(json.loads((tmp_path / "grid" / "run.json").read_text())["model"]["embeddings"]) == {"glow", "shine"}
    assert_refused(ldm_here(*grid, "embeddings=none.pt"), 66, "none.pt")


def test_a_loras_own_embeddings_are_there_with_it(tmp_path: Path) -> None:
    name = "lora_unet_conv_in"
    factors = {f"{name}.lora_up.weight": torch.zeros(8, 1, 1, 1), f"{name}.lora_down.weight": torch.zeros(1, 4, 3, 3)}
    path = write(tmp_path / "style.safetensors", factors | {"bundle_emb.glow.string_to_param.*": vectors()})
    bundled = drawn(tmp_path / "bundled.png", "a glow", "--lora", path)
    alone = write(tmp_path / "glow.safetensors", {"emb_params": vectors()})
    assert np.array_equal(bundled, drawn(tmp_path / "alone.png", "a glow", "--embedding", alone))
    assert "embeddings" not in read_record(tmp_path / "bundled.png")["model"]  # they are the LoRA's
    tagged = ("--lora-dir", tmp_path, "--prompt-syntax", "weighted")
    assert np.array_equal(bundled, drawn(tmp_path / "tagged.png", "a glow<lora:style:1>", *tagged))
    with Session(ModelSpec(str(tiny_model())), RuntimeSpec(device="cpu", dtype="fp32", cache=False)) as session:
        requests = [
            GenerationRequest("a glow", seed=1, steps=2, guidance_scale=5.0, loras=loras)
            for loras in ((), (LoRA(str(path)),)) * 2
        ]
        pictures = [picture.pixels() for picture in session.draw(requests, batch_size=4)]
    assert np.array_equal(pictures[1], bundled)
    assert np.array_equal(pictures[3], bundled)
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], bundled)


def test_an_embedding_is_described(tmp_path: Path) -> None:
    path = write(tmp_path / "badhands.safetensors", {"clip_l": noise(8, 768), "clip_g": noise(8, 1280)})
    facts = json.loads(ldm_here("info", "--json", path).out)
    expected = {"word": "badhands", "vectors": 8, "widths": [768, 1280], "family": "Stable Diffusion XL"}
    assert facts["is"] == "textual-inversion embedding"
    assert {name: facts[name] for name in expected} == expected
    lone = write(tmp_path / "toy.safetensors", {"any name": noise(1024)})
    facts = json.loads(ldm_here("info", "--json", lone).out)
    assert (facts["word"], facts["vectors"], facts["family"]) == ("toy", 1, "Stable Diffusion 2.x")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": noise(2, 768)}}, tmp_path / "old.pt")
    assert b"word: old" in ldm_here("info", "--allow-pickle", tmp_path / "old.pt").out
    assert_refused(ldm_here("txt2img", "x", "-m", path), 65, "textual-inversion embedding", "--embedding")


# ---- files that are not as they should be, in processes of their own ----


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


HOSTILE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "wide": (lambda path: write(path, {"a": noise(1, 1024)}), ("for Stable Diffusion 2.x", "the model is")),
    "two": (lambda path: write(path, {"clip_l": noise(1, 16), "clip_g": noise(1, 16)}), ("the model is",)),
    "nan": (lambda path: write(path, {"a": torch.full((1, 16), float("nan"))}), ("NaN",)),
    "none": (lambda path: write(path, {"a": noise(0, 16)}), ("not vectors",)),
    "many": (lambda path: write(path, {"a": noise(76, 16)}), ("holds 76 vectors, not 1 to 75",)),
    "checkpoint": (lambda path: shutil.copy(tiny_single_file(), path), ("checkpoint", "not an embedding")),
    "huge": (lambda path: replace(path, empty_tensors({"a": [75, 16]})[:-4]), ("cut short",)),
    "bomb": (lambda path: torch.save({"a": Bomb()}, path), ("posix.system",)),
    "folder": (lambda path: path.mkdir(), ("is a folder",)),
    "pipe": (lambda path: os.mkfifo(path), ("is a pipe",)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_sentence(kind: str, tmp_path: Path) -> None:
    build, words = HOSTILE[kind]
    build(tmp_path / "glow.safetensors")
    common = ("-m", tiny_model(), *SETTINGS, "--allow-pickle", "-o", tmp_path / "x.png")
    result = ldm("txt2img", "a glow", *common, "--embedding", tmp_path / "glow.safetensors", cwd=tmp_path)
    assert_refused(result, 65, "glow.safetensors", *words)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "x.png").exists()


def test_a_pickle_is_read_only_where_that_is_allowed(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors()}, "name": "x"}, tmp_path / "glow.pt")
    command = ("txt2img", "a glow", "-m", tiny_model(), *SETTINGS, "-o", tmp_path / "x.png")
    for options in (("--embedding", tmp_path / "glow.pt"), ("--embedding-dir", tmp_path)):
        assert_refused(ldm_here(*command, *options), 65, "glow.pt", "pickle", "--allow-pickle")
    assert ldm_here(*command, "--embedding", tmp_path / "glow.pt", "--allow-pickle").code == 0
    write(tmp_path / "glow.safetensors", {"emb_params": vectors()})  # which counts before the pickle
    same = drawn(tmp_path / "y.png", "a glow", "--embedding-dir", tmp_path)
    assert np.array_equal(same, pixels(tmp_path / "x.png"))


def test_words_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xffglow.safetensors")
    write(tmp_path / "x.safetensors", {"a": vectors()})
    shutil.copy(tmp_path / "x.safetensors", tmp_path / name)
    command = ("txt2img", "a glow toy", "-m", tiny_model(), *SETTINGS, "-o", tmp_path / "x.png")
    assert_refused(ldm(*command, "--embedding", tmp_path / name), 2, "embeddings", "Unicode")
    assert ldm(*command, "--embedding-dir", tmp_path).code == 0
    assert ldm(*command, "--embedding", f"{tmp_path / 'x.safetensors'}:Glow  toy", "--overwrite").code == 0
    assert read_record(tmp_path / "x.png")["model"]["embeddings"][0]["word"] == "Glow  toy"
