"""`ldm sample`: classes, layouts and maps as they are typed, in rows and in pictures; and what cannot be meant."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Result, assert_refused, ldm_here, pixels, tiny_model
from paper_models import PUBLISHED, class_map, small, write_model
from PIL import Image

from ldmcli.conditioning.class_names import ClassNames
from ldmcli.images.metadata import read_record

FAST = ("--steps", "2", "--device", "cpu", "--dtype", "fp32", "--no-server")
SIZED = ("--size", "40x24", *FAST)
BOXES = [{"label": 3, "box": [0.1, 0.2, 0.55, 0.9]}, {"label": "dog", "box": [0.5, 0, 1, 0.33]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sample")
    for name in PUBLISHED:
        write_model(found / f"{name}.safetensors", small(name))
    (found / "cin256-v2.classes.txt").write_text("tench\ngoldfish, Carassius auratus\ncrane\ncrane\n")
    (found / "layout2img.classes.txt").write_text("\n".join("abc") + "\ncat\ndog\n")
    (found / "boxes.json").write_text(json.dumps(BOXES))
    Image.fromarray(class_map(40, 24, 5)).save(found / "map.png")
    coloured = Image.fromarray(class_map(40, 24, 5)).convert("P")
    coloured.putpalette([7 * i % 256 for i in range(768)])
    coloured.save(found / "palette.png")
    Image.new("RGB", (40, 24), (1, 2, 3)).save(found / "colours.png")
    Image.fromarray(np.full((24, 40), 65535, np.uint16)).save(found / "wide.png")
    Image.fromarray(np.full((24, 40), 255, np.uint8)).save(found / "none.png")
    Image.fromarray(class_map(40, 24, 5)).save(found / "map.jpg", quality=100)
    (found / "damaged.png").write_bytes((found / "map.png").read_bytes()[:60])
    return found


def sample(folder: Path, model: str, *words: str | Path, command: str = "sample", **how: Any) -> Result:
    return ldm_here(command, "-m", folder / f"{model}.safetensors", *words, cwd=folder, **how)


def drawn(folder: Path, out: Path, model: str, *words: str | Path) -> list[np.ndarray]:
    result = sample(folder, model, *words, *SIZED, "-s", "1", "-o", out)
    assert result.code == 0, result.err
    return [pixels(path) for path in result.paths]


def test_several_classes_and_seeds_are_a_picture_each(folder: Path, tmp_path: Path) -> None:
    found = drawn(folder, tmp_path / "a", "cin256-v2", "--label", "0", "--label", "goldfish", "-c", "2")
    assert len(found) == 4
    assert not any((found[i] == found[j]).all() for i in range(4) for j in range(i))
    (by_number,) = drawn(folder, tmp_path / "b", "cin256-v2", "--label", "1")
    assert (by_number == found[2]).all()


def test_guidance_leads_away_from_the_null_class(folder: Path, tmp_path: Path) -> None:
    (null,) = drawn(folder, tmp_path / "null", "cin256-v2", "--label", "10", "-g", "1")
    (away,) = drawn(folder, tmp_path / "away", "cin256-v2", "--label", "10", "-g", "4")
    assert (null == away).all()  # from a class to itself there is no way
    assert (drawn(folder, tmp_path / "a", "cin256-v2", "--label", "1", "-g", "4")[0] != null).any()


def test_classes_without_a_null_class_are_drawn_unguided(folder: Path, tmp_path: Path) -> None:
    model = dataclasses.replace(small("cin256-v2"), labels=1000)
    write_model(tmp_path / "all.safetensors", model)
    result = sample(tmp_path, "all", "--label", "999", *SIZED, "--json", "-o", tmp_path / "a.png")
    assert result.records[0]["guidance_scale"] == 1.0
    refused = sample(tmp_path, "all", "--label", "9", "-g", "2", *SIZED, "-o", tmp_path / "b.png")
    assert_refused(refused, 2, "guidance_scale is not for this model")


def test_a_record_draws_the_same_picture_again(folder: Path, tmp_path: Path) -> None:
    given = {
        "celeba256": (), "cin256": ("--label", "4"), "layout2img": ("--layout", folder / "boxes.json"),
        "semantic": ("--map", folder / "map.png"),
    }  # fmt: skip
    for model, words in given.items():
        (first,) = drawn(folder, tmp_path / model, model, *words)
        path = tmp_path / model / "ldm-1.png"
        for command in ("sample", "txt2img"):
            again = ldm_here(command, "--from-image", path, *FAST, "-o", tmp_path / command / f"{model}.png")
            assert again.code == 0, again.err
            assert (pixels(again.paths[0]) == first).all()
    request = read_record(tmp_path / "layout2img" / "ldm-1.png")["request"]
    assert list(map(list, request["layout"])) == [[3, 0.1, 0.2, 0.55, 0.9], [4, 0.5, 0.0, 1.0, 0.33]]
    record = read_record(tmp_path / "semantic" / "ldm-1.png")
    assert set(record["inputs"]) == {"map"}
    assert "Label: 4" in Image.open(tmp_path / "cin256" / "ldm-1.png").text["parameters"]


def test_a_map_gives_the_size_and_may_have_a_palette(folder: Path, tmp_path: Path) -> None:
    for name in ("map", "palette"):
        result = sample(folder, "semantic", "--map", f"{name}.png", *FAST, "-s", "1", "-o", tmp_path / f"{name}.png")
        assert result.code == 0, result.err
    grey, coloured = (pixels(tmp_path / f"{name}.png") for name in ("map", "palette"))
    assert grey.shape == (24, 40, 3)
    assert (grey == coloured).all()
    stretched = sample(folder, "semantic", "--map", "map.png", "--size", "24x24", *FAST, "-o", tmp_path / "s.png")
    assert "the map is 40×24, which is of another shape" in stretched.err


def test_rows_name_classes_layouts_and_maps(folder: Path, tmp_path: Path) -> None:
    rows = {
        "cin256-v2": ('{"label": 1, "seed": 1}\n{"class": "tench", "seed": 1}\n', "--label=1", "--label=0"),
        "layout2img": (json.dumps({"layout": BOXES, "seed": 1}) + "\n", "--layout=boxes.json"),
        "semantic": ('{"map": "map.png", "seed": 1}\n', "--map=map.png"),
    }
    for model, (text, *words) in rows.items():
        (folder / "rows.jsonl").write_text(text)
        result = sample(folder, model, "rows.jsonl", "-o", tmp_path / model, *SIZED, command="batch")
        assert result.code == 0, result.err
        typed = drawn(folder, tmp_path / f"{model} typed", model, *words)
        paths = sorted((tmp_path / model).glob("images/**/*.png"))
        assert [(pixels(path) == one).all() for path, one in zip(paths, typed, strict=True)] == [True] * len(typed)
    (folder / "rows.csv").write_text("label,seed\ngoldfish,1\n")
    result = sample(folder, "cin256-v2", "rows.csv", "-o", tmp_path / "csv", *SIZED, command="batch")
    assert result.code == 0, result.err


def test_info_says_what_a_model_is_conditioned_on(folder: Path) -> None:
    told = {
        "celeba256": "nothing",
        "cin256": "label",
        "txt2img-1p4B": "text",
        "layout2img": "layout",
        "semantic": "map",
    }
    for name, kind in told.items():
        facts = ldm_here("info", folder / f"{name}.safetensors", "--json").records[0]
        assert (facts["conditioned_on"], facts["is"]) == (kind, facts["family"])


# Words, or a box, or how many of them.
REFUSED: dict[str, tuple[int, str, tuple[Any, ...], str]] = {
    "class beyond": (2, "cin256-v2", ("--label", "1001"), "label 1001 is none of the model's classes, 0 to 10"),
    "negative class": (2, "cin256-v2", ("--label=-1",), "the model has no class called “-1”"),
    "two of a name": (2, "cin256-v2", ("--label", "crane"), "“crane” is the name of classes 2, 3"),
    "misspelled": (2, "cin256-v2", ("--label", "tenhc"), "did you mean tench?"),
    "no list": (2, "cin256", ("--label", "tench"), "no list of names is beside the model"),
    "no class": (2, "cin256", (), "the model reads a class; give one, as `ldm sample --label CLASS`"),
    "class of none": (2, "celeba256", ("--label", "1"), "label is not for this model, which reads nothing"),
    "guided": (2, "celeba256", ("-g", "3"), "guidance_scale is not for this model"),
    "rescaled": (2, "celeba256", ("--guidance-rescale", "0.5"), "guidance_rescale is not for this model"),
    "guided without null": (2, "layout2img", ("--layout", "boxes.json", "-g", "3"), "guidance_scale is not for this"),
    "box outside": (2, "layout2img", ([0.5, 0, 1.2, 1],), "is not inside the picture"),
    "box of nothing": (2, "layout2img", ([0.5, 0, 0.5, 1],), "has no area"),
    "too many boxes": (2, "layout2img", (31,), "layout has 31 objects; the model takes 30"),
    "no layout": (66, "layout2img", ("--layout", "absent.json"), "absent.json"),
    "empty": (2, "layout2img", ("--layout", ""), "--layout is empty; name a file, or leave it out"),
    "refined": (65, "celeba256", ("--refiner", "celeba256.safetensors"), "reads no prompts, and a refiner goes on"),
    "colours": (65, "semantic", ("--map", "colours.png"), "is no semantic map"),
    "many classes": (65, "semantic", ("--map", "wide.png"), "has class 65535, and the model knows 0 to 4 and 255"),
    "no classes": (65, "semantic", ("--map", "none.png"), "the map has no class"),
    "damaged": (65, "semantic", ("--map", "damaged.png"), "is damaged or cut off"),
    "lossy": (65, "semantic", ("--map", "map.jpg"), "is a JPEG, whose pixels are only about what was saved"),
    "no map": (66, "semantic", ("--map", "absent.png"), "absent.png"),
    "map for text": (2, "txt2img-1p4B", ("--map", "map.png"), "map is not for this model, which reads prompts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_sentence(name: str, folder: Path, tmp_path: Path) -> None:
    code, model, words, said = REFUSED[name]
    if words and not isinstance(words[0], str):
        sides, count = (words[0], 1) if isinstance(words[0], list) else ([0, 0, 1, 1], words[0])
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps([{"label": 1, "box": sides}] * count))
        words = ("--layout", str(path))
    assert_refused(sample(folder, model, *words, *FAST, "-o", tmp_path / "out"), code, said)


def test_a_model_that_reads_prompts_is_said_to(tmp_path: Path) -> None:
    for words in (("sample",), ("txt2img", " ")):
        drawn = ldm_here(*words, "-m", tiny_model(), *FAST, "-s", "1", "-o", tmp_path, "--overwrite")
        assert drawn.code == 0
        assert "warning: a prompt is empty, and tiny reads prompts, as in `ldm " in drawn.err
    (tmp_path / "p.csv").write_text('prompt,seed\n"",1\n"",2\na fox,3\n')
    rows = ldm_here("batch", tmp_path / "p.csv", "-m", tiny_model(), "--dry-run")
    assert rows.err.count("a prompt is empty") == 1


def test_a_layout_that_says_something_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text('[{"label": 1, "label": 2, "box": [0, 0, 1, 1]}]')
    result = sample(folder, "layout2img", "--layout", tmp_path / "boxes.json", *FAST, "-o", tmp_path / "out")
    assert_refused(result, 65, "field 'label' is there twice")


def test_lines_of_names_end_as_editors_count_them() -> None:
    names = ClassNames("tench\u2028\x0b\x1c\x85 Tinca\r\ngoldfish\nshark")
    assert [names.number(name) for name in ("goldfish", "shark")] == [1, 2]


def test_prompts_are_refused_by_models_that_read_none(folder: Path, tmp_path: Path) -> None:
    for words in (("a fox",), ("", "-n", "a cat"), ("", "--clip-skip", "2")):
        result = sample(folder, "cin256", *words, *FAST, "-o", tmp_path, command="txt2img")
        assert_refused(result, 2, "`ldm sample --label CLASS`")


def test_a_text_model_without_its_vocabulary_says_where_it_goes(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "bert.safetensors"
    model.symlink_to(folder / "txt2img-1p4B.safetensors")
    refused = ldm_here("txt2img", "a fox", "-m", model, *FAST)
    assert_refused(refused, 66, "needs BERT's vocabulary", "bert.vocab.txt or vocab.txt")
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(folder / "txt2img-1p4B.vocab.txt", tmp_path / "tokenizer" / "vocab.txt")
    beside = ldm_here("txt2img", "a fox", "-m", model, *SIZED, "--size", "80x48", "-s", "1", "-o", tmp_path / "a.png")
    own = sample(folder, "txt2img-1p4B", "a fox", *SIZED, "--size", "80x48", "-s", "1", "-o", tmp_path / "b.png",
                 command="txt2img")  # fmt: skip
    assert (beside.code, own.code) == (0, 0), beside.err
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    assert_refused(ldm_here("txt2img", "a fox", "-m", model, *FAST), 65, "it has no [CLS]")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(200))]))
    assert_refused(ldm_here("txt2img", "a fox", "-m", model, *FAST), 65, "they are not of one model")
