"""The JSON schema of a row says what the program takes: no less, and of single fields no more."""

import json
from pathlib import Path
from typing import Any

import pytest
from batch_support import batch, manifest
from cli_support import ldm_here
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmcli.batch.fields import COLUMNS, EXTRAS, SIZE, SYNONYMS, problem_of
from ldmcli.batch.items import Item
from ldmcli.batch.reading import open_rows
from ldmcli.batch.survey import items
from ldmcli.spec import CHOICES, RANGES, GenerationRequest

ROWS: list[dict[str, Any]] = [
    {"label": 207},
    {"class": "goldfish", "prompt": ""},
    {"layout": [[1, 0, 0, 1, 0.5], {"label": "dog", "box": [0, 0, 0.5, 1]}], "map": "m.png"},
    {"prompt": ""},
    {"prompt": "a fox", "seed": -1, "steps": 20, "guidance_scale": 7, "width": 512, "height": 512.0},
    {"prompt": "a fox", "negative_prompt": None, "sampler": "DPM++ 2M Karras", "cfg_scale": 7.5, "size": "512x768"},
    {"prompt": "a fox", "resolution": [512, 768], "id": 7, "count": 3, "extra": {"mood": [1]}, "metadata": {}},
    {"prompt": "a fox", "custom_id": "x", "guidance_interval": [0, 5.42], "prompt_syntax": "weighted"},
    {"prompt": "a fox", "lora": "a.safetensors:0.8", "embedding": "a.pt; b.pt"},
    {"prompt": "a fox", "loras": ["a", {"name": "b", "weight": 0.5}], "embeddings": ["a.pt:word"]},
    {"prompt": "a fox", "loras": {"name": "b"}, "hires": 2, "hires_upscaler": "Lanczos", "hires_steps": 10},
    {"prompt": "a fox", "image": "a.png", "mask": "alpha", "strength": 0.5, "hires": "1024x768", "paste_back": False},
    {"prompt": "a fox", "control_net": "a.pt", "control_image": "a.png", "canny": True, "control_strength": 1},
    {"prompt": "a fox", "control_net": ["a", "b"], "control_image": ["a.png"], "control_strength": "0.5; 1"},
    {"prompt": "a fox", "control_net": "a", "control_image": "a.png", "canny": [100, 200], "control_mode": "prompt"},
    {"prompt": "a fox", "ip_adapter": "a", "ip_adapter_image": "a.png", "ip_adapter_blocks": ["style"]},
]
REFUSED: list[dict[str, Any]] = [
    {"steps": 3},
    {"label": -1},
    {"layout": [[1, 0, 0, 2, 1]]},
    {"layout": [{"label": 1}]},
    {},
    {"prompt": None},
    {"prompt": 5},
    {"prompt": "a", "steps": 0},
    {"prompt": "a", "steps": "20"},
    {"prompt": "a", "stepz": 20},
    {"prompt": "a", "eta": 1.5},
    {"prompt": "a", "resize": "bigger"},
    {"prompt": "a", "loras": [{"weight": 1}]},
    {"prompt": "a", "invert_mask": "yes"},
    {"prompt": "a", "size": [1, 2, 3]},
    {"prompt": "a", "count": 0},
    {"prompt": "a", "extra": "b"},
    {"prompt": "a", "control_net": "a", "control_image": "b", "control_mode": ["loud"]},
]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(ldm_here("schema").out)


@pytest.fixture(scope="module")
def valid(schema: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


def takes(row: dict[str, Any], path: Path) -> bool:
    """Whether the program takes a row as JSON lines have it."""
    path.write_text(json.dumps(row) + "\n")
    return isinstance(next(items(open_rows(path), GenerationRequest("", image="a.png"), seed=1)), Item)


def test_every_field_is_there_and_described(schema: dict[str, Any]) -> None:
    synonyms = {other for others in SYNONYMS.values() for other in others.split()}
    assert set(schema["properties"]) == {*COLUMNS, *EXTRAS, SIZE, *synonyms}
    for name, property_ in schema["properties"].items():
        assert ("$ref" in property_) if name in synonyms else property_["description"].strip(), name
    defaults = {name: one["default"] for name, one in schema["properties"].items() if "default" in one}
    request = GenerationRequest("")
    assert defaults == {name: getattr(request, name) for name in defaults}
    assert {"eta", "clip_skip", "paste_back", "resize", "on_long_prompt"} < set(defaults)


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_those_that_the_program_takes(name: str, schema: dict[str, Any]) -> None:
    said = schema["properties"][name]
    low, high = RANGES[name]
    assert (said["minimum"], said["maximum"]) == (-1 if name == "seed" else low, high)
    for value, fits in ((low, True), (high, True), (low - 1, False), (high + 1, False), ("a", False), (True, False)):
        assert (problem_of(name, value) == "") is fits, (name, value)


@pytest.mark.parametrize("name", CHOICES)
def test_the_words_are_those_that_the_program_takes(name: str, schema: dict[str, Any]) -> None:
    assert schema["properties"][name]["enum"] == [*CHOICES[name], None]
    assert not any(problem_of(name, word) for word in CHOICES[name])
    assert "choose from" in problem_of(name, "another")


def test_rows_that_are_taken_are_valid(valid: Any, tmp_path: Path) -> None:
    for row in ROWS:
        assert takes(row, tmp_path / "rows.jsonl"), row
        assert valid(row), row


def test_rows_that_are_refused_are_not(valid: Any, tmp_path: Path) -> None:
    for row in REFUSED:
        assert not takes(row, tmp_path / "rows.jsonl"), row
        assert not valid(row), row


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 1100), st.floats(-2, 20, width=16), st.just(2**64 - 1),
    st.sampled_from(["", "a", "a; b", "512x768", "true", "Euler a", "karras", "latent", "style", "100,200", "fill"]),
    st.lists(st.integers(0, 300) | st.floats(0, 2, width=16) | st.sampled_from(["a", "guess", "tile"]), max_size=3),
    st.dictionaries(st.sampled_from(["name", "weight", "else"]), st.sampled_from(["a", 1, 0.5]), max_size=2),
)  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(row=st.dictionaries(st.sampled_from([*COLUMNS, *EXTRAS, SIZE, "cfg", "init_image"]), _VALUES, max_size=3))
def test_whatever_is_taken_is_valid(row: dict[str, Any], valid: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    row = {"prompt": "a"} | row
    if takes(row, tmp_path_factory.getbasetemp() / "row.jsonl"):
        assert valid(row), row


def test_requests_of_a_run_are_valid_rows(valid: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a fox"}\n{"prompt": "an owl", "sampler": "Euler a", "hires": 2}\n')
    assert batch(path, "-o", tmp_path / "out").code == 0
    for record in manifest(tmp_path / "out"):
        assert valid(record["request"]), record
