"""The training recipe end to end: every stage as a process, killed and resumed, and the model that comes out."""

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load as load_pipeline
from oracle.comparing import draw, draw_with_diffusers, pixels_apart, relative
from recipe_support import (
    EMOJI,
    RECIPE,
    VIEWS,
    call_main,
    copy_run,
    finish,
    glyphs,
    recipe_module,
    take_team_step,
    write_dataset,
)
from torch import Tensor

from ldmcli.spec import GenerationRequest

train, training, train_unet = map(recipe_module, ("train", "training", "train_unet"))
SMOKE = ("--preset", "smoke", "--out")
SEEN = len(EMOJI) * 9 * VIEWS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    write_dataset(folder)
    options = ("--processes", "1", "--minutes-scale", "0.05")
    (folder / "printed.txt").write_text(finish(RECIPE / "train.py", *SMOKE, folder, *options))
    return folder


def unet_arguments(folder: Path, **options: object) -> Any:
    """train_unet.py's arguments, for its parts."""
    usual = {"preset": "smoke", "out": folder, "device": "cpu", "seed": 0, "text_dropout": 0.12, "offset": 0.12}
    usual |= {"posterior": 1.0, "start": None}
    return train.argparse.Namespace(**{**usual, "average": 0.99, "rate": 1e-3, "optimizer": "muon", **options})


@pytest.fixture
def batches(run: Path, tmp_path: Path) -> Any:
    folder = copy_run(run, tmp_path / "copy")
    return train_unet.Batches(unet_arguments(folder), train_unet.load_vae(folder / "vae.pt"), training.Team())


def test_a_run_goes_through_every_stage(run: Path) -> None:
    printed = (run / "printed.txt").read_text()
    assert f"data: {run / 'dataset.pt'} is there, left out" in printed
    for name in ("tokenizer", "clip", "vae", "decoder", "unet", "export"):
        assert f"\n{name}: took " in printed
    kept = (run / "train.log").read_text()
    assert "unet: took " in kept
    assert "vae ended" in (run / "vae.log").read_text()
    for name in ("tokenizer/vocab.json", "clip.pt", "vae.pt", "decoder.pt", "model.pt", "tiny-emoji/model_index.json"):
        assert (run / name).exists(), name
    assert json.loads((run / "train.json").read_text()) == {"preset": "smoke", "seed": 0, "optimizer": "muon"}


def test_the_export_draws_as_in_diffusers(run: Path, one_thread: None) -> None:
    from diffusers import StableDiffusionPipeline

    reference = StableDiffusionPipeline.from_pretrained(run / "tiny-emoji", local_files_only=True).to(
        "cpu", torch.float32
    )
    reference.set_progress_bar_config(disable=True)
    request = GenerationRequest("a red apple on a blue background", "a face", seed=3, steps=6, guidance_scale=3.0)
    ours, our_pixels = draw(load_pipeline(run / "tiny-emoji"), [request])
    theirs, their_pixels = draw_with_diffusers(reference, [request])
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert pixels_apart(our_pixels, their_pixels) <= 1
    assert our_pixels.shape == (1, 32, 32, 3)
    assert np.std(our_pixels) > 2


def test_held_out_pairs_are_never_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pictures are replaced by magenta, which no stage may then be trained on, nor with their captions."""
    folder = copy_run(run, tmp_path / "copy", "clip.pt", "vae.pt", "decoder.pt", "latents.pt", "model.pt")
    for checkpoint in folder.glob("*_checkpoint.pt"):
        checkpoint.unlink()
    dataset = training.load(folder / "dataset.pt")
    magenta = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    dataset["images"][dataset["held_out"]] = magenta
    training.save_atomically(dataset, folder / "dataset.pt")
    shown: dict[str, int] = {}
    pairs: set[tuple[int, int]] = set()

    def look(stage: str, images: Tensor) -> None:
        images = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round().byte()
        assert not (images == magenta).flatten(1).all(dim=1).any(), stage
        shown[stage] = shown.get(stage, 0) + len(images)

    def watched(stage: str, original: Any, argument: int = 0) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            look(stage, arguments[argument])
            return original(*arguments, **options)

        return call

    def draw_captions(table: Any, objects: Tensor, backgrounds: Tensor, generator: Any = None) -> Tensor:
        pairs.update(zip(objects.tolist(), backgrounds.tolist(), strict=True))
        return original_draw(table, objects, backgrounds, generator)

    table, clip, vae = (
        recipe_module("caption_table").CaptionTable,
        recipe_module("train_clip"),
        recipe_module("train_vae"),
    )
    original_draw = table.draw
    monkeypatch.setattr(table, "draw", draw_captions)
    monkeypatch.setattr(clip, "to_float", watched("clip", clip.to_float))
    monkeypatch.setattr(vae.Stage1, "learn", watched("vae", vae.Stage1.learn, 1))
    monkeypatch.setattr(vae, "straighten", watched("straighten", vae.straighten, 1))
    monkeypatch.setattr(train_unet, "to_float", watched("unet", train_unet.to_float))
    call_main("train_clip", *SMOKE, folder, "--steps", "20")
    call_main("train_vae", *SMOKE, folder, "--steps", "20")
    call_main("train_decoder", *SMOKE, folder, "--steps", "20")
    call_main("train_unet", *SMOKE, folder, "--steps", "20")
    assert shown == {"clip": 320, "vae": 320, "straighten": -(-SEEN // 5), "unet": SEEN}
    held_out = recipe_module("emoji").held_out_background
    assert len(pairs) == len(EMOJI) * 9
    assert not pairs & {(number, held_out(number)) for number in range(len(EMOJI))}


def test_batches_have_the_schedules_noise_and_as_many_empty_prompts_as_asked(batches: Any) -> None:
    """Noisy latents are √ᾱ z + √(1 - ᾱ) ε with ε the noise to predict, whose every channel is off by a number."""
    noisy, timesteps, tokens, noise = batches.draw(2000, torch.full((1000,), 1e-3), seed=2)
    level = batches.alphas_cumprod[timesteps][:, None, None, None]
    latents = (noisy - (1 - level).sqrt() * noise) / level.sqrt()
    assert latents[timesteps < 500].std().item() == pytest.approx(1, abs=0.1)
    assert (latents * noise)[timesteps < 900].mean().abs() < 0.02  # none of the noise is left in them
    assert noise.mean(dim=(2, 3)).std().item() == pytest.approx((0.12**2 + 1 / 64) ** 0.5, abs=0.01)
    assert (tokens == batches.table.tokens[0]).all(dim=1).float().mean().item() == pytest.approx(0.12, abs=0.03)


def test_stage_2_trains_text_and_unet_together(run: Path, batches: Any) -> None:
    stage = train_unet.Stage2(recipe_module("presets").SMOKE, unet_arguments(run), recipe_module("training").Team())
    start = {name: value.clone() for name, value in stage.denoiser.named_parameters()}
    alike = torch.full((1000,), 1e-3)
    for step in range(5):  # its last layers start at zero: what is before them learns from the third step on
        stage.learn(batches.draw(8, alike, step), 1e-2, 0.0, training.Team())
    for part in ("text.", "unet."):
        parameters = [(name, value) for name, value in stage.denoiser.named_parameters() if name.startswith(part)]
        assert sum(value.grad.norm() for _, value in parameters) > 1e-4, part
        assert any((value - start[name]).abs().max() > 1e-3 for name, value in parameters), part
    kept = training.load(run / "model.pt")
    clip = training.load(run / "clip.pt")["text"]
    assert any(not torch.equal(kept["text"][name], clip[name]) for name in clip)
    assert kept["text"].keys() == clip.keys()


def test_the_decoder_learns_on_and_the_encoder_does_not(run: Path) -> None:
    before, after = (training.load(run / name)["model"] for name in ("vae.pt", "decoder.pt"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    exported = load_pipeline(run / "tiny-emoji").vae.state_dict()
    assert torch.equal(exported["decoder.conv_out.weight"], after["decoder.conv_out.weight"].half().float())


def test_a_killed_stage_2_goes_on_to_the_same_weights(
    run: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights_of(folder: Path) -> dict[str, Tensor]:
        state = training.load(folder / "model.pt")
        return {f"{part}.{name}": value for part in ("unet", "text") for name, value in state[part].items()}

    def save_and_die(state: dict[str, Any], path: Path) -> None:
        training.save_atomically(state, path)
        raise ConnectionAbortedError

    absent = ("model.pt", "unet_checkpoint.pt")
    killed, unbroken = copy_run(run, tmp_path / "killed", *absent), copy_run(run, tmp_path / "unbroken", *absent)
    with monkeypatch.context() as patch:
        patch.setattr(train_unet, "save_atomically", save_and_die)
        with pytest.raises(ConnectionAbortedError):
            call_main("train_unet", *SMOKE, killed, "--steps", "8", "--save-at", "3")
    assert training.load(killed / "unet_checkpoint.pt")["step"] == 3
    assert not (killed / "model.pt").exists()

    call_main("train_unet", *SMOKE, killed, "--steps", "8", "--resume")
    call_main("train_unet", *SMOKE, unbroken, "--steps", "8")
    ours, theirs = weights_of(killed), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], before) for name, before in weights_of(run).items())


def test_a_team_of_two_takes_the_step_of_one(run: Path, batches: Any, tmp_path: Path, one_thread: None) -> None:
    folder = copy_run(run, tmp_path / "team")
    torch.save(batches.draw(8, torch.full((1000,), 1e-3), seed=4), folder / "batch.pt")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import recipe_support as support\n"
    (folder / "step.py").write_text(f"{script}support.take_team_step(support.Path({str(folder)!r}))\n")
    finish("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "step.py")
    take_team_step(folder)
    alone, first, second = (training.load(folder / f"rank_{name}.pt") for name in ("0_of_1", "0_of_2", "1_of_2"))
    assert torch.equal(first["weights"], second["weights"])
    assert relative(first["gradients"], alone["gradients"]) < 1e-4
    assert relative(first["weights"], alone["weights"]) < 1e-4
    assert first["told"] == second["told"] == pytest.approx(alone["told"], rel=1e-5)
    assert torch.equal(first["rows"][:, 0], torch.arange(5.0))
    assert torch.equal(second["rows"], alone["rows"])


def test_the_ablation_makes_a_table_and_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ablate = copy_run(run, tmp_path / "copy"), recipe_module("ablate_vae")
    options = (*SMOKE, folder, "--start-steps", "1", "--steps", "2", "--batch", "4", "--images", "4")
    call_main("ablate_vae", *options)
    table = (folder / "ablation" / "table.md").read_text()
    assert len(table.splitlines()) == 8
    figures = [json.loads(path.read_text()) for path in (folder / "ablation").glob("*.json")]
    assert len({found["edges"] for found in figures}) == 6
    assert {found["asked"]["start"] for found in figures} == {figures[0]["asked"]["start"]}

    done = []
    (folder / "ablation" / "without-perceptual.json").unlink()
    original = ablate.run
    monkeypatch.setattr(ablate, "run", lambda *given: (done.append(given[4]), original(*given)))
    call_main("ablate_vae", *options)
    assert done == ["without perceptual"]
    assert (folder / "ablation" / "table.md").read_text() == table


def test_the_upscaler_learns_from_what_the_model_draws_of_pairs_that_are_not_held_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upscaler_pairs, train_upscaler = recipe_module("upscaler_pairs"), recipe_module("train_upscaler")
    known = training.known_emoji(unet_arguments(run))
    monkeypatch.setattr(upscaler_pairs, "load_glyphs", lambda preset, font: (known, glyphs()))
    options = (*SMOKE, tmp_path, "--folder", run / "tiny-emoji", "--views", "1")
    call_main("upscaler_pairs", *options)
    found = training.load(tmp_path / "upscaler_pairs.pt")
    assert {name: tuple(images.shape) for name, images in found.items()} == {
        kind: (len(EMOJI) * 10, 3, 32, 32) for kind in ("reconstructed", "drawn")
    }
    view = upscaler_pairs.View(upscaler_pairs.Pair(1, 0), (0, 0, 0), side=20, left=4, top=7)
    for scale in (1, 4):
        filled = view.picture(glyphs(), 32, scale)[0].nonzero()  # the square
        assert (filled.amin(0).tolist(), filled.amax(0).tolist()) == (
            [7 * scale, 4 * scale], [27 * scale - 1, 24 * scale - 1]
        )  # fmt: skip

    pairs = upscaler_pairs.Pairs(upscaler_pairs.pairs_arguments("").parse_args(map(str, options)))
    held_out = [image for images in found.values() for image in images[pairs.held_out]]
    assert len(held_out) == 2 * len(EMOJI)
    learn, steps = train_upscaler.Training.learn, []

    def watched(stage: Any, small: Tensor, large: Tensor, rate: float) -> Tensor:
        assert large.shape == (len(small), 3, 128, 128)
        assert not any(torch.equal(one, other) for one in small for other in held_out)
        steps.append(rate)
        return learn(stage, small, large, rate)

    monkeypatch.setattr(train_upscaler.Training, "learn", watched)
    sizes = ("--batch", "4", "--channels", "4", "--layers", "1", "--start", "none", "--save-minutes", "0")
    for count, taken in ((2, 2), (3, 3)):  # the second goes on where the first ended
        call_main("train_upscaler", *options, *sizes, "--steps", count)
        assert len(steps) == taken
    call_main("measure_upscaler", *options, "--net", tmp_path / "upscaler" / "model.safetensors", "--count", "1")
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["Lanczos", "realesr-animevideov3", "its own"]
    assert all(len(re.findall(r"\d+\.\d\d dB \| -?\d\.\d{3}", line)) == 2 for line in table[2:])


def test_an_exported_model_goes_on_learning_from_views_made_anew(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, drawn = training.known_emoji(unet_arguments(run)), []
    monkeypatch.setattr(train_unet, "load_glyphs", lambda preset, font: (known, glyphs()))
    original = train_unet.Batches.draw
    monkeypatch.setattr(
        train_unet.Batches, "draw", lambda batches, *given: drawn.append(batches) or original(batches, *given)
    )
    start = run / "tiny-emoji"
    options = ("--start", start, "--views", "3", "--posterior", "0", "--steps", "2", "--save-minutes", "0")
    call_main("train_unet", *SMOKE, tmp_path, *options)
    held_out = recipe_module("emoji").held_out_background
    pairs = zip(drawn[0].objects.tolist(), drawn[0].backgrounds.tolist(), strict=True)
    assert Counter(pairs) == {(e, b): 3 for e in range(len(EMOJI)) for b in range(10) if b != held_out(e)}
    assert drawn[0].deviation.count_nonzero() == 0
    changed = {
        path.relative_to(start).parts[0]
        for path in start.rglob("*.*")
        if path.is_file() and path.read_bytes() != (tmp_path / "model" / path.relative_to(start)).read_bytes()
    }
    assert changed == {"unet", "text_encoder"}
    request = GenerationRequest("a red apple", seed=3, steps=2)
    assert draw(load_pipeline(tmp_path / "model"), [request])[1].shape == (1, 32, 32, 3)


def test_pairs_made_on_a_device_are_those_that_are_made_one_by_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upscaler_pairs = recipe_module("upscaler_pairs")
    known = training.known_emoji(unet_arguments(run))
    monkeypatch.setattr(upscaler_pairs, "load_glyphs", lambda preset, font: (known, glyphs()))
    options = upscaler_pairs.pairs_arguments("").parse_args(["--preset", "smoke", "--views", "1"])
    pairs = upscaler_pairs.PairsOnDevice(options, torch.device("cpu"))
    found = pairs.drawn(run / "tiny-emoji", batch=16)
    assert {name: tuple(images.shape) for name, images in found.items()} == {
        kind: (len(EMOJI) * 10, 3, 32, 32) for kind in ("reconstructed", "drawn")
    }
    for number in range(0, len(pairs.views), 3):
        view = pairs.views[torch.tensor([number])]
        pair = upscaler_pairs.Pair(int(view.objects), int(view.backgrounds))
        assert bool(pairs.held_out[number]) == pair.held_out
        colour, (top, left) = tuple(map(int, view.colours[0].tolist())), view.corners[0].tolist()
        one = upscaler_pairs.View(pair, colour, int(view.sides), left, top).picture(glyphs(), 32, 4)
        made = pairs.large(torch.tensor([number]))[0]
        assert (one.int() - made.int()).abs().max() <= 1


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What train.py says when it does not begin."""
    with pytest.raises(SystemExit) as ended:
        call_main("train", *arguments)
    assert ended.value.code not in (0, None)
    return f"{ended.value.code} {capsys.readouterr().err}"


def test_what_train_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run_to_end", lambda command, lock: pytest.fail("it began"))
    absent = tmp_path / "none.ttf"
    said = refused(capsys, *SMOKE, tmp_path / "a", "--font", absent)
    assert f"the emoji font {absent} is missing" in said
    assert "apt-get install fonts-noto-color-emoji" in said
    said = refused(capsys, "--preset", "cpu", "--out", tmp_path / "a")
    assert "--preset smoke --seed 0 --optimizer muon" in said
    assert "evenly" in refused(capsys, *SMOKE, tmp_path / "a", "--processes", "3")
    assert "one" in refused(capsys, *SMOKE, tmp_path / "a", "--processes", "2", "--device", "cuda")
    with (tmp_path / "a" / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # train.py wants it alone
        assert "another training is at work" in refused(capsys, *SMOKE, tmp_path / "a")


def test_stages_that_are_done_are_left_out_and_those_after_from_are_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, started = copy_run(run, tmp_path / "copy"), []
    monkeypatch.setattr(train, "run_to_end", lambda command, lock: started.append(command) or 0)
    options = ("--seed", "0", "--processes", "2", "--folder", tmp_path / "model")
    call_main("train", *SMOKE, folder, *options)
    assert [Path(command[1]).name for command in started] == ["export.py"]
    assert started[0][-1] == str(tmp_path / "model")
    assert capsys.readouterr().out.count("left out") == 6

    started.clear()
    call_main("train", *SMOKE, folder, *options, "--from", "vae")
    assert [next(Path(word).stem for word in command if word.endswith(".py")) for command in started] == [
        "train_vae",
        "train_decoder",
        "train_unet",
        "export",
    ]
    assert all("--nproc-per-node 2" in " ".join(command) and "--resume" in command for command in started[:3])
    assert (folder / "clip.pt").exists()
    assert not any((folder / f"{name}.pt").exists() for name in ("vae", "vae_checkpoint", "decoder", "model"))


def test_a_failed_stage_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = train.resume_command(["train.py", "--from", "vae", "--out", "x y", "--from=clip"])
    assert again.endswith("train.py --out 'x y'")
    for code, told in (("raise SystemExit(3)", "failed with exit status 3"), ("os.kill(os.getpid(), 9)", "SIGKILL")):
        command = [sys.executable, "-c", f"import os; {code}"]
        with pytest.raises(SystemExit, match="1"):
            train.run_stage("vae", command, train.Journal(tmp_path), 2, again)
        said = capsys.readouterr().out
        assert told in said
        assert again in said
    assert "exit status 3" in (tmp_path / "train.log").read_text()


def test_an_interrupted_training_ends_its_stage(tmp_path: Path) -> None:
    stage = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    script = (
        f"import signal, sys; sys.path.insert(0, {str(RECIPE)!r}); import train; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"command = [sys.executable, '-c', {stage!r}]\n"
        f"train.run_stage('vae', command, train.Journal(Path({str(tmp_path)!r})), sys.stdout.fileno(), 'THIS')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith(" "):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "to go on: THIS" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_team_shares_every_batch_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(recipe_module("presets").CPU, vae_batch=16, unet_batch=24)
    for cores, device, wanted in ((1, "cpu", 1), (3, "cpu", 2), (7, "cpu", 4), (64, "cpu", 8), (64, "cuda:0", 1)):
        monkeypatch.setattr(train, "available_cores", lambda cores=cores: cores)
        assert train.team_size(train.argparse.Namespace(processes=None, device=device), preset) == wanted
