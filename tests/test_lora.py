"""`--lora`: adapters merged into a model, from the command line to the record in the picture."""

import contextlib
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_support import lora_for, write
from batch_support import item, setup_in
from cli_support import assert_refused, ldm_here, pixels, tiny_model

from ldmcli import GenerationRequest, ModelSpec, RuntimeSpec, Session
from ldmcli.adapters.adapter import open_adapter
from ldmcli.batch.worker import Worker
from ldmcli.images.metadata import read_parameters, read_record
from ldmcli.spec import LoRA

DRAWN = (
    "txt2img",
    "a red apple",
    "-s",
    "1",
    "--steps",
    "3",
    "-g",
    "5",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--no-cache",
)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora_for(tiny_model(), tmp_path_factory.mktemp("lora") / "style.safetensors")


def drawn(path: Path, *loras: str, env: dict[str, str] | None = None) -> np.ndarray:
    """The picture of these `--lora` options."""
    options = [word for one in loras for word in ("--lora", one)]
    result = ldm_here(*DRAWN, "-m", tiny_model(), *options, "-o", path, env=env)
    assert result.code == 0, result.err
    return pixels(path)


def test_weights_of_zero_are_the_model_and_others_are_not(tmp_path: Path, lora: Path) -> None:
    base = drawn(tmp_path / "base.png")
    assert np.array_equal(drawn(tmp_path / "zero.png", f"{lora}:0"), base)
    whole, unet, text = (
        drawn(tmp_path / f"{i}.png", f"{lora}{weights}") for i, weights in enumerate(("", ":1:0", ":0:1"))
    )
    pictures = [base, whole, unet, text]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert np.array_equal(drawn(tmp_path / "twice.png", f"{lora}:0.5", f"{lora}:0.5"), whole) or (
        np.abs(drawn(tmp_path / "t.png", f"{lora}:0.5", f"{lora}:0.5").astype(int) - whole).max() <= 1
    )


def hash_of(path: Path) -> str:
    """A1111's hash of a LoRA: of what follows the header."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return hashlib.sha256(path.read_bytes()[8 + header :]).hexdigest()


def test_a_picture_records_its_loras_and_is_drawn_again_from_that(tmp_path: Path) -> None:
    lora = lora_for(tiny_model(), tmp_path / "style, v2.safetensors")
    first = drawn(tmp_path / "first.png", f"{lora}:0.7:0.2")
    (recorded,) = read_record(tmp_path / "first.png")["request"]["loras"]
    sha256 = hash_of(lora)
    assert recorded == {
        "name": "style, v2", "path": str(lora), "sha256": sha256, "weight": 0.7, "text_weight": 0.2, "in_prompt": False,
    }  # fmt: skip
    assert f'Lora hashes: "style v2: {sha256[:12]}"' in (read_parameters(tmp_path / "first.png") or "")
    again = ldm_here("txt2img", "--from-image", tmp_path / "first.png", "-o", tmp_path / "again.png")
    assert again.code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), first)
    lora_for(tiny_model(), lora, seed=1)
    other = ldm_here("txt2img", "--from-image", tmp_path / "first.png", "-o", tmp_path / "other.png")
    assert "the LoRA style, v2 is not the one the picture was made with" in other.err


@pytest.mark.parametrize("name", ["style", "renamed"])
def test_a_lora_that_moved_is_found_in_the_folder_or_named(name: str, tmp_path: Path) -> None:
    lora = lora_for(tiny_model(), tmp_path / "style.safetensors")
    first = drawn(tmp_path / "first.png", str(lora))
    (tmp_path / "loras").mkdir()
    lora_for(tiny_model(), tmp_path / "loras" / "other.safetensors", seed=5)
    lora_for(tiny_model(), tmp_path / "loras" / "style.safetensors", seed=6)  # by another's name
    lora.rename(tmp_path / "loras" / f"{name}.safetensors")
    again = ("txt2img", "--from-image", tmp_path / "first.png", "-o", tmp_path / "again.png", "--overwrite")
    assert_refused(ldm_here(*again), 66, "the LoRA style", hash_of(tmp_path / "loras" / f"{name}.safetensors")[:12])
    result = ldm_here(*again, "--lora-dir", tmp_path / "loras")
    assert result.code == 0, result.err
    assert np.array_equal(pixels(tmp_path / "again.png"), first)


def test_a_batch_draws_with_loras_and_knows_its_own(tmp_path: Path, lora: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red apple", "seed": 1}\n')
    common = ("batch", tmp_path / "p.jsonl", "-m", tiny_model(), *DRAWN[2:], "-o", tmp_path / "out")
    result = ldm_here(*common, "--lora", f"{lora}:0.5")
    assert result.code == 0, result.err
    assert np.array_equal(pixels(result.paths[0]), drawn(tmp_path / "one.png", f"{lora}:0.5"))
    assert_refused(ldm_here(*common), 65, "another run", "loras")


def test_another_familys_lora_is_an_error_that_names_it(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_7_attn2_to_k"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.ones(640, 2)}
    path = write(tmp_path / "xl.safetensors", factors)
    result = ldm_here(*DRAWN, "-m", tiny_model(), "--lora", path, "-o", tmp_path / "x.png")
    assert_refused(result, 65, "xl.safetensors", "Stable Diffusion XL")
    assert not (tmp_path / "x.png").exists()
    assert_refused(ldm_here(*DRAWN, "-m", tiny_model(), "--lora", "none.safetensors"), 66, "none.safetensors")
    assert_refused(ldm_here(*DRAWN, "--lora", f"{path}:nan"), 2, "FILE:WEIGHT")


def test_a_lora_is_described(lora: Path) -> None:
    facts = json.loads(ldm_here("info", "--json", lora).out)
    assert facts["rank"] == 2
    assert facts["trigger_words"] == ["glow toy"]
    assert_refused(ldm_here("txt2img", "x", "-m", lora), 65, "LoRA", "--lora")


RUNTIME = RuntimeSpec(device="cpu", dtype="fp32", cache=False)


def request(*loras: LoRA, **settings: Any) -> GenerationRequest:
    return GenerationRequest("a red apple", **({"seed": 1, "steps": 3, "loras": loras} | settings))


def fresh(wanted: GenerationRequest, model: Path | None = None, runtime: RuntimeSpec = RUNTIME) -> np.ndarray:
    """A request's picture by a session of its own."""
    with Session(ModelSpec(str(model or tiny_model())), runtime) as session:
        (picture,) = session.draw([wanted])
        return picture.pixels()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[GenerationRequest]:
    """Requests of the LoRAs A, none, B, A and B, B and A, A again."""
    folder = tmp_path_factory.mktemp("sets")
    a, b = (LoRA(str(lora_for(tiny_model(), folder / f"{n}.safetensors", seed=n, size=0.5)), 0.8, 0.6) for n in (1, 2))
    return [request(*loras) for loras in ((a,), (), (b,), (a, b), (b, a), (a,))]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_session_changes_its_loras_bit_for_bit(dtype: str, sets: list[GenerationRequest]) -> None:
    runtime = dataclasses.replace(RUNTIME, dtype=dtype)
    wanted = [fresh(one, runtime=runtime) for one in sets]
    with Session(ModelSpec(str(tiny_model())), runtime) as session:
        for _ in range(2):  # the second time layers are laid out for what they are called with
            for one, pixels_of in zip(sets, wanted, strict=True):
                (picture,) = session.draw([one])
                assert np.array_equal(picture.pixels(), pixels_of)
        assert session._drawer is not None
        merger = session._drawer.pipeline.model.merger
        assert merger is not None
        changed = {key for copies in merger._base.values() for key in copies}
        assert changed == {"weight"}
        assert len(merger._base) == len(open_adapter(Path(sets[0].loras[0].name)).changes)
        list(session.draw([sets[1]]))
        assert not merger._base  # copies of what is changed alone
    assert len({pixels_of.tobytes() for pixels_of in wanted[:4]}) == 4


def test_a_file_that_is_written_anew_is_merged_anew(tmp_path: Path) -> None:
    """Of the same names and shapes, as a trainer writes it again and again."""
    lora = tmp_path / "style.safetensors"
    with Session(ModelSpec(str(tiny_model())), RUNTIME) as session:
        for seed in (1, 2):
            lora_for(tiny_model(), lora, seed=seed, size=0.5)
            (picture,) = session.draw([request(LoRA(str(lora)))])
            assert np.array_equal(picture.pixels(), fresh(request(LoRA(str(lora)))))


def test_requests_of_other_loras_are_never_drawn_together(sets: list[GenerationRequest]) -> None:
    with Session(ModelSpec(str(tiny_model())), RUNTIME) as session:
        together: list[int] = []
        pictures = list(
            session.draw(sets, batch_size=6, on_step=lambda progress: together.append(len(progress.requests)))
        )
        assert set(together) == {1, 2}  # A alone is asked for twice
    for one, picture in zip(sets, pictures, strict=True):
        assert np.abs(picture.pixels().astype(int) - fresh(one)).max() <= 1


def test_rows_of_a_batch_have_their_own_loras(sets: list[GenerationRequest], tmp_path: Path) -> None:
    rows = []
    for i, one in enumerate(sets):
        texts = [f"{lora.name}:{lora.weight}:{lora.text_weight}" for lora in one.loras]
        objects = [{"name": lora.name, "weight": lora.weight, "text_weight": lora.text_weight} for lora in one.loras]
        rows.append({"prompt": one.prompt, "seed": 1, "loras": texts if i % 2 else objects})
    rows.append({"prompt": "a red apple", "seed": 1})  # the command's
    bad = {"prompt": "x", "loras": str(tmp_path / "none.safetensors")}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    default = sets[2].loras[0]
    common = (
        "batch", tmp_path / "p.jsonl", "-m", tiny_model(), "--steps", "3", "--dtype", "fp32", "--device", "cpu",
        "--no-cache", "-b", "1", "--lora", f"{default.name}:{default.weight}:{default.text_weight}", "-o",
        tmp_path / "out",
    )  # fmt: skip
    result = ldm_here(*common)
    assert result.code == 3, result.err
    assert "none.safetensors' does not exist" in result.err or "none.safetensors does not exist" in result.err
    wanted = [*map(fresh, sets), fresh(sets[2])]
    found = sorted(result.paths)
    assert len(found) == len(wanted)
    for path, pixels_of in zip(found, wanted, strict=True):
        assert np.array_equal(pixels(path), pixels_of)
    assert ldm_here(*common).code == 3  # goes on: nothing is left to draw
    lora_for(tiny_model(), Path(sets[0].loras[0].name), seed=9)
    try:
        changed = ldm_here(*common)
        assert changed.code == 65
        assert "row 1 (line 1, id '1') is not what it was" in changed.err
    finally:
        lora_for(tiny_model(), Path(sets[0].loras[0].name), seed=1, size=0.5)


def test_a_lora_that_goes_while_a_batch_is_drawn_fails_its_rows(tmp_path: Path) -> None:
    """Its rows alone; what was checked is not relied on."""
    with contextlib.closing(Worker(setup_in(tmp_path), "w")) as worker:
        gone = LoRA("gone", path=str(tmp_path / "gone.safetensors"), sha256="0" * 64)
        rows = [item(i, steps=1, loras=(gone,) if i == 1 else ()) for i in range(3)]
        outcomes = [future.result() for future in worker.submit(rows)]
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert (outcomes[1].code, "the LoRA gone (000000000000) is not at" in outcomes[1].error) == (66, True)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["x:nan"], "FILE:WEIGHT"),
        ([{"weight": 1}], "to have a name"),
        ([{"name": "x", "wait": 1}], "no field 'wait'"),
        ([{"name": "x", "weight": "many"}], "weight 'many' is not a number"),
        (5, "is not a list"),
        ([5], "FILE:WEIGHT or an object"),
        (["x"] * 65, "at most 64"),
    ],
)
def test_rows_that_say_no_lora_are_bad(value: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "loras": value}) + "\n")
    result = ldm_here("batch", tmp_path / "p.jsonl", "-m", tiny_model(), "--dry-run")
    assert result.code == 3
    assert words in result.err


def test_a_table_has_a_column_of_loras(sets: list[GenerationRequest], tmp_path: Path) -> None:
    lora = sets[0].loras[0]
    (tmp_path / "p.csv").write_text(f'prompt,lora,seed\na red apple,"{lora.name}:0.8:0.6; {lora.name}:0",1\n')
    result = ldm_here(
        "batch", tmp_path / "p.csv", "-m", tiny_model(), "--steps", "3", "--dtype", "fp32", "--device", "cpu",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert np.array_equal(pixels(result.paths[0]), fresh(sets[0]))


# ---- named by prompts ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of LoRAs: style; below it two of one alias; one in PEFT's way."""
    folder = tmp_path_factory.mktemp("loras")
    (folder / "more").mkdir()
    (folder / "peft").mkdir()
    lora_for(tiny_model(), folder / "style.safetensors", alias="glow")
    lora_for(tiny_model(), folder / "more" / "one.safetensors", seed=1, alias="twice")
    lora_for(tiny_model(), folder / "more" / "two.safetensors", seed=2, alias="twice")
    lora_for(tiny_model(), folder / "peft" / "adapter_model.safetensors", seed=3)
    return folder


@pytest.mark.parametrize(
    ("prompt", "loras"),
    [
        ("a red apple<lora:style:0.7:0.2>", [("style", 0.2, 0.7)]),
        ("<lora:glow:0.7>a red apple", [("style", 0.7, 0.7)]),
        ("a <lyco:style:te=0.7:unet=0.2>red apple", [("style", 0.2, 0.7)]),
        ("a <lora:style:unet=0.2:0.7>red apple", [("style", 0.2, 0.7)]),
        ("a red <lora:more/one:unet=0.5>apple<LORA:two>", [("more/one", 0.5, 1.0), ("more/two", 1.0, 1.0)]),
        ("a red apple<lora:style:0>", []),
    ],
)
def test_a_weighted_prompt_names_loras(prompt: str, loras: list[Any], folder: Path, tmp_path: Path) -> None:
    common = (*DRAWN[2:], "-m", tiny_model(), "--prompt-syntax", "weighted")
    result = ldm_here("txt2img", prompt, *common, "--lora-dir", folder, "-o", tmp_path / "a.png")
    assert result.code == 0, result.err
    given = [word for name, w, t in loras for word in ("--lora", f"{folder / name}.safetensors:{w}:{t}")]
    result = ldm_here("txt2img", "a red apple", *common, *given, "-o", tmp_path / "b.png")
    assert result.code == 0, result.err
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    recorded = read_record(tmp_path / "a.png")["request"]
    assert recorded["prompt"] == prompt
    assert all(lora["in_prompt"] and len(lora["sha256"]) == 64 for lora in recorded["loras"])
    assert (read_parameters(tmp_path / "a.png") or "").startswith(f"{prompt}\n")
    again = ldm_here("txt2img", "--from-image", tmp_path / "a.png", "-o", tmp_path / "again.png")
    assert again.code == 0, again.err
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "a.png"))
    other = ldm_here("txt2img", "a red apple", "--from-image", tmp_path / "a.png", "-o", tmp_path / "base.png")
    assert other.code == 0, other.err  # another prompt, without what the first one named
    assert "loras" not in read_record(tmp_path / "base.png")["request"]


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("<lora:stile:1>", (), "<lora:stile> did you mean style"),
        ("<lora:twice:1>", (), "<lora:twice> did you mean one or two"),
        ("<lora:zzzz>", (), "<lora:zzzz> check the name"),
        ("<lora:/etc/passwd>", (), "names no LoRA"),
        ("<lora:style:x>", (), "“x” for a weight"),
        ("<lora:style:1:1:1>", (), "no weight of its own"),
        ("<lora:style:te=1:1>", (), "no weight of its own"),
        ("<lora:style:dyn=4>", (), "“dyn=4”"),
        ("<lora:>", (), "has no name"),
        ("a fox <lora:style:1", (), "“<lora:style:1” begins as a LoRA and is none"),
        ("a < lora:style:1>, red", (), "lora:style:1” begins as a LoRA and is none"),
        ("<hypernet:style:1>", (), "hypernetwork"),
        ("x", ("-n", "<lora:style:1>"), "stands in the negative prompt"),
    ],
)
def test_a_name_that_cannot_be_meant_is_refused(
    prompt: str, options: tuple[str, ...], words: str, folder: Path, tmp_path: Path
) -> None:
    common = ("-m", tiny_model(), "--prompt-syntax", "weighted", *options)
    result = ldm_here("txt2img", prompt, *common, "--lora-dir", folder)
    assert result.code == 2
    assert all(word in result.err for word in words.split(" ", 1)), result.err
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    rows = ldm_here("batch", tmp_path / "p.jsonl", *common, "--lora-dir", folder, "--dry-run")
    assert rows.code == 3
    assert words.rsplit(" ", 1)[-1] in rows.err


def test_names_need_a_folder(folder: Path, tmp_path: Path) -> None:
    weighted = ("txt2img", "<lora:style>", "-m", tiny_model(), "--prompt-syntax", "weighted")
    assert_refused(ldm_here(*weighted), 2, "--lora-dir")
    assert_refused(ldm_here(*weighted, "--lora-dir", tmp_path / "none"), 66, "is no folder")
    assert_refused(ldm_here(*weighted[:2], *weighted[2:4], "--lora", "stile", "--lora-dir", folder), 2, "style")
    by_name = drawn(tmp_path / "a.png", "style:0.5", env={"LDM_LORA_DIR": str(folder)})
    assert np.array_equal(by_name, drawn(tmp_path / "b.png", f"{folder / 'style.safetensors'}:0.5"))
    peft = drawn(tmp_path / "c.png", "peft", env={"LDM_LORA_DIR": str(folder)})
    assert np.array_equal(peft, drawn(tmp_path / "d.png", str(folder / "peft" / "adapter_model.safetensors")))


def test_rows_of_a_batch_name_loras(folder: Path, tmp_path: Path) -> None:
    prompts = ["a red apple<lora:style:0.5>", "a red apple", "a red apple<lora:one>", "a <lora:style:0.5>red apple"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": one, "seed": 1}) + "\n" for one in prompts))
    result = ldm_here(
        "batch", tmp_path / "p.jsonl", "-m", tiny_model(), *DRAWN[4:], "--prompt-syntax", "weighted", "--lora-dir",
        folder, "-b", "1", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    files = {0: "style:0.5", 2: "more/one:1", 3: "style:0.5"}
    for i, path in enumerate(sorted(result.paths)):
        options = []
        if i in files:
            name, _, weight = files[i].partition(":")
            options = [f"{folder / name}.safetensors:{weight}"]
        assert np.array_equal(pixels(path), drawn(tmp_path / f"{i}.png", *options))
    lines = [json.loads(line) for line in (tmp_path / "out/manifest/worker-0.jsonl").read_text().splitlines()]
    assert {line["row"]: len(line["request"].get("loras", ())) for line in lines} == {1: 1, 2: 0, 3: 1, 4: 1}


def test_a_lora_that_only_seems_to_be_named_by_a_prompt_is_refused(folder: Path, tmp_path: Path) -> None:
    row = {"prompt": "a red apple", "loras": {"name": "style", "in_prompt": True}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    result = ldm_here(
        "batch", tmp_path / "p.jsonl", "-m", tiny_model(), *DRAWN[4:], "--lora-dir", folder, "-o", tmp_path / "out"
    )
    assert result.code == 3, result.err
    assert "is said to be named by the prompt" in result.err


# ---- what some want ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lcm-lora-sdv1-5", {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}),
        ("sdxl_lightning_8step_lora", {"sampler": "euler", "schedule": "trailing", "steps": 8, "guidance_scale": 1.0}),
        ("Hyper-SD15-8steps-CFG-lora", {"sampler": "ddim", "schedule": "trailing", "steps": 8, "guidance_scale": 5.0}),
        ("sd_xl_turbo_lora_v1", {"sampler": "euler-a", "schedule": "trailing", "steps": 4, "guidance_scale": 1.0}),
    ],
)
def test_a_lora_of_a_distilled_model_says_what_it_wants(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = lora_for(tiny_model(), tmp_path / f"{name}.safetensors")
    facts = json.loads(ldm_here("info", "--json", path).out)
    assert facts["wants"] == options
    common = (
        "txt2img",
        "x",
        "-m",
        tiny_model(),
        "--lora",
        path,
        "--steps",
        "2",
        "--overwrite",
        "-o",
        tmp_path / "a.png",
    )
    result = ldm_here(*common)
    assert result.code == 0, result.err
    assert f"--sampler {options['sampler']}" in result.err
    assert re.search("is (an LCM|a Lightning|a Hyper-SD|a Turbo) LoRA", result.err)
    assert f"--guidance-scale {options['guidance_scale']:g}" in result.err
    assert "--steps" not in result.err
    assert "--sampler" not in ldm_here(*common, "--sampler", "euler", "-g", "3").err


@pytest.mark.parametrize("name", ["lightning_bolt", "hyperrealistic", "turbocharger", "style", "elcmoon"])
def test_other_loras_want_nothing(name: str, tmp_path: Path) -> None:
    assert "wants" not in json.loads(
        ldm_here("info", "--json", lora_for(tiny_model(), tmp_path / f"{name}.safetensors")).out
    )
