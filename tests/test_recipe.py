"""The parts of the training recipe: captions, data, vocabulary, both stages' losses and what they draw."""

import argparse
import ast
import configparser
import dataclasses
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.comparing import relative
from recipe_support import EMOJI, RECIPE, VIEWS, glyphs, recipe_module
from torch import Tensor, nn

data, emoji_names, presets, training = map(recipe_module, ("data", "emoji", "presets", "training"))
tokenizer, train_clip, train_vae, train_unet = map(
    recipe_module, ("tokenizer", "train_clip", "train_vae", "train_unet")
)
losses, measures, ablate_vae, muon = map(recipe_module, ("vae_losses", "measures", "ablate_vae", "muon"))
SMOKE = presets.SMOKE


@pytest.fixture(scope="module")
def emoji() -> tuple[Any, ...]:
    by_name = {one.name: one for one in emoji_names.emoji_of(SMOKE)}
    return tuple(by_name[name] for name in EMOJI)


@pytest.fixture(scope="module")
def captions(emoji: tuple[Any, ...]) -> Any:
    return emoji_names.Captions(emoji)


@pytest.fixture(scope="module")
def dataset() -> dict[str, Tensor]:
    return data.render_dataset(SMOKE, glyphs(), VIEWS, seed=3)


def test_the_recipe_needs_only_what_ldmcli_installs() -> None:
    setup = configparser.ConfigParser()
    setup.read(RECIPE.parents[1] / "setup.cfg")
    installed = set(re.findall(r"^[a-z_]+", setup["options"]["install_requires"], re.MULTILINE))
    known = {"PIL" if name == "pillow" else name for name in installed} | {"ldmcli"} | set(sys.stdlib_module_names)
    scripts = {path.stem for path in RECIPE.glob("*.py")}
    for path in RECIPE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in known | scripts, f"{path.name} imports {name}"


def test_captions_name_emoji_in_several_ways_each_with_its_probability(captions: Any, emoji: tuple[Any, ...]) -> None:
    found = {(o, b): dict(captions(o, b)) for o in range(len(emoji)) for b in range(len(emoji_names.BACKGROUNDS))}
    for pair, texts in found.items():
        assert len(texts) == len(captions(*pair))
        assert min(texts.values()) > 0
        assert sum(texts.values()) == pytest.approx(1, abs=0.05)
    blue, gray = (emoji_names.BACKGROUND_NAMES.index(name) for name in ("blue", "gray"))
    for name, background, wanted in (
        ("red heart", blue, {"a red heart on a blue background", "a heavy black heart on blue", "a blue background"}),
        ("happy face", blue, {"a happy face", "a face"}),
        ("red apple", gray, {"red apple on a gray background", "red apple on a grey background"}),
    ):
        assert wanted <= set(found[EMOJI.index(name), background])
    assert captions.fullest(0, blue) == "a red apple on a blue background"
    first, *others = captions.every()
    assert first == ""
    assert sorted(others) == sorted({text for texts in found.values() for text in texts})


def test_each_word_has_a_token_and_captions_are_drawn_by_their_probabilities(
    captions: Any, emoji: tuple[Any, ...], tmp_path: Path
) -> None:
    texts = captions.every()
    words = Counter(word for text in texts for word in tokenizer._WORD.findall(text))
    size = tokenizer.write_tokenizer(tmp_path, tokenizer.learn_merges(words, 4000))
    tokens = tokenizer.tokenise(tmp_path, texts)
    assert tokens.shape == (len(texts), tokenizer.MAX_LENGTH)
    assert len({tuple(ids) for ids in tokens.tolist()}) == len(texts)
    for text, ids in zip(texts, tokens.tolist(), strict=True):
        assert ids.index(size - 1) == 1 + len(tokenizer._WORD.findall(text)), text
    table = recipe_module("caption_table").CaptionTable(tmp_path, emoji)
    objects, backgrounds = torch.zeros(5000, dtype=torch.long), torch.full((5000,), 4)
    drawn = Counter(table.texts[i] for i in table.draw(objects, backgrounds, torch.Generator().manual_seed(0)).tolist())
    weights = dict(captions(0, 4))
    assert set(drawn) == set(weights)
    for text in ("a red apple on a blue background", "red apple", "red"):
        assert drawn[text] / 5000 == pytest.approx(weights[text] / sum(weights.values()), rel=0.25)


def test_one_background_of_each_emoji_is_held_out(dataset: dict[str, Tensor]) -> None:
    pairs = zip(dataset["objects"].tolist(), dataset["backgrounds"].tolist(), dataset["held_out"].tolist(), strict=True)
    held = Counter((o, b) for o, b, out in pairs if out)
    assert held == {(o, emoji_names.held_out_background(o)): VIEWS for o in range(len(EMOJI))}
    neighbours = [emoji_names.held_out_background(number) for number in range(10)]
    assert sorted(neighbours) == list(range(10))  # every colour is held out for some emoji


def test_views_vary_in_place_size_and_shade_and_depend_on_the_seed_alone(dataset: dict[str, Tensor]) -> None:
    again, other = (data.render_dataset(SMOKE, glyphs(), VIEWS, seed=seed) for seed in (3, 4))
    assert all(torch.equal(dataset[key], again[key]) for key in dataset)
    assert not torch.equal(dataset["images"], other["images"])
    square = torch.cat([one["images"][one["objects"] == EMOJI.index("unicorn")] for one in (dataset, other)])
    corners, sides = set(), set()
    for image in square:
        glyph = (image.amin(dim=0) > 225).nonzero()
        if len(glyph) < SMOKE.size**2:  # on white it is not to be seen
            corners.add(tuple(glyph.min(dim=0).values.tolist()))
            sides.add(int(glyph[:, 0].max() - glyph[:, 0].min() + 1))
    assert len(corners) > 15
    assert len(sides) > 5
    shades = dataset["images"][:, :, 0, 0].unique(dim=0)
    assert len(shades) > len(EMOJI) * 10


@pytest.fixture
def vae(one_thread: None) -> Any:
    """An autoencoder of random weights whose latents are narrow around their means, and correlated."""
    torch.manual_seed(5)
    vae = train_vae.AutoencoderKL(SMOKE.vae).requires_grad_(False)
    vae.quant_conv.bias[4:] -= 12
    vae.quant_conv.weight[1] += 0.5 * vae.quant_conv.weight[0]
    return vae


def channels(vae: Any, images: Tensor) -> Tensor:
    """Drawn latents (channels, values)."""
    posterior = vae.encode(data.to_float(images))
    return posterior.sample(torch.Generator().manual_seed(0)).transpose(0, 1).flatten(1)


def test_straightening_changes_latents_and_no_picture(vae: Any, dataset: dict[str, Tensor]) -> None:
    images = dataset["images"]
    raw, before = channels(vae, images), train_vae.reconstruct(vae, images)
    assert torch.corrcoef(raw).triu(1).abs().max() > 0.1
    straight, nats = train_vae.straighten(vae, images)
    torch.testing.assert_close(train_vae.reconstruct(straight, images), before, atol=1e-4, rtol=0)

    latents = channels(straight, images) * straight.config.scaling_factor
    assert torch.corrcoef(latents).triu(1).abs().max() < 0.01
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(4), atol=0.01, rtol=0)
    torch.testing.assert_close(latents.std(dim=1), torch.ones(4), atol=0.01, rtol=0)
    logvar = straight.encode(data.to_float(images)).logvar
    assert logvar.var(dim=(0, 2, 3)).max() < 1e-9  # one for all images
    assert nats > 0


@pytest.fixture
def stage(one_thread: None, tmp_path: Path) -> Any:
    """Stage 1 with all terms; its perceptual network is untrained."""
    torch.manual_seed(7)
    encoder = train_clip.ImageEncoder(SMOKE.text_width)
    training.save_atomically({"image": encoder.state_dict()}, tmp_path / "clip.pt")
    args = argparse.Namespace(preset="smoke", device="cpu", out=tmp_path, rate=1e-3, optimizer="muon")
    weights = losses.Weights(gradient=0.5, perceptual=0.7, kl=0.3, adversarial=0.2)
    return train_vae.Stage1(train_vae.AutoencoderKL(SMOKE.vae), args, weights, training.Team())


@pytest.fixture
def batch(dataset: dict[str, Tensor]) -> Tensor:
    return data.to_float(dataset["images"][::20])


def loss_of(stage: Any, batch: Tensor, **weights: float) -> tuple[float, Tensor]:
    """Stage 1's loss with other weights on the same posterior noise, and the decoded images."""
    usual = stage.weights
    stage.weights = dataclasses.replace(usual, **weights)
    loss, decoded = stage.backward(batch, False, torch.Generator().manual_seed(0))
    stage.weights = usual
    stage.optimizer.zero_grad()
    return loss, decoded


def test_each_weight_switches_its_own_term(stage: Any, batch: Tensor) -> None:
    everything, decoded = loss_of(stage, batch)
    difference = decoded - batch
    across, down = (difference.diff(dim=dim).abs().mean().item() for dim in (3, 2))
    perceptual = losses.perceptual_loss(stage.eyes, batch, decoded).item()
    assert losses.perceptual_loss(stage.eyes, batch, batch).item() == 0 < perceptual
    pixels = difference.abs().mean().item() + difference.square().mean().item()
    assert everything - loss_of(stage, batch, gradient=0.0)[0] == pytest.approx(0.5 * (across + down), abs=1e-5)
    assert everything - loss_of(stage, batch, perceptual=0.0)[0] == pytest.approx(0.7 * perceptual, abs=1e-5)
    kl = (everything - loss_of(stage, batch, kl=0.0)[0]) / 0.3
    assert kl > 0.01
    assert everything - loss_of(stage, batch, kl=0.1)[0] == pytest.approx(0.2 * kl, abs=1e-5)
    assert loss_of(stage, batch, gradient=0.0, perceptual=0.0, kl=0.0)[0] == pytest.approx(pixels, abs=1e-5)


def test_the_critic_teaches_by_its_weight_and_learns_only_when_asked(stage: Any, batch: Tensor) -> None:
    def gradient(adversarial: bool, weight: float) -> Tensor:
        stage.weights = dataclasses.replace(stage.weights, adversarial=weight)
        stage.optimizer.zero_grad()
        stage.backward(batch, adversarial, torch.Generator().manual_seed(0))
        return stage.vae.decoder.conv_out.weight.grad.clone()

    def learns(adversarial: bool) -> bool:
        before = stage.critic.layers[0].weight.clone()
        stage.learn(batch, 1e-3, 0.0, training.Team(), torch.Generator(), adversarial=adversarial)
        return not torch.equal(before, stage.critic.layers[0].weight)

    without = gradient(False, 0.5)
    torch.testing.assert_close(gradient(True, 0.0), without)
    half, whole = (gradient(True, weight) - without for weight in (0.5, 1.0))
    assert half.norm() > 0.05 * without.norm()
    assert relative(2 * half, whole) < 0.05  # of products in bfloat16
    assert not learns(False)
    assert learns(True)


def test_the_critic_tells_real_patches_from_drawn_ones() -> None:
    torch.manual_seed(0)
    critic = losses.PatchDiscriminator()
    real, drawn = torch.ones(1, 3, 16, 16), -torch.ones(1, 3, 16, 16)
    assert critic(real).shape == (1, 1, 4, 4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        critic.loss(real, drawn).backward()
        optimizer.step()
    assert critic(real).mean() > 0.5 > -0.5 > critic(drawn).mean()


def test_the_average_forgets_the_start_quickly() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average, wanted = training.Average(model, 0.5), 0.0
    for update in range(1, 21):
        nn.init.constant_(model.weight, float(update))
        average.update(model)
        decay = min(0.5, (1 + update) / (10 + update))
        wanted = decay * wanted + (1 - decay) * update
        assert average.model.weight.item() == pytest.approx(wanted, rel=1e-5)
    assert not average.model.weight.requires_grad


def test_time_steps_are_drawn_one_from_each_share() -> None:
    levels = train_unet.Schedule(train_unet.ScheduleConfig()).alphas_cumprod
    alike = train_unet.timestep_density(levels, floor=1.0, boost=0.0)
    torch.testing.assert_close(alike, torch.full((1000,), 1e-3))
    by_snr = train_unet.timestep_density(levels, floor=0.1, boost=0.25)
    generator = torch.Generator().manual_seed(0)
    orders = set()
    for density in (alike, by_snr):
        drawn = train_unet.draw_timesteps(density, 8, generator)
        orders.add(tuple(drawn.argsort().tolist()))
        below = density.cumsum(0) - density
        for share, timestep in enumerate(drawn.sort().values.tolist()):
            assert below[timestep] < (share + 1) / 8 + 1e-6
            assert below[timestep] + density[timestep] > share / 8 - 1e-6
    assert tuple(range(8)) not in orders
    snr = levels / (1 - levels)
    strong, weak = int((snr > 50).nonzero().max()), 999
    assert by_snr[strong] / by_snr[weak] < 0.2  # little to learn where hardly anything is hidden


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [training.learning_rate(1.0, step, step / 100, warm_up=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == max(rates[8:12]) > 0.9
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (8, 576)])
def test_orthogonal_makes_all_directions_alike(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    skewed = left @ (values * 10 ** torch.linspace(0, -1.5, len(values))).diag() @ right
    made = left.T @ muon.orthogonal(skewed) @ right.T
    assert made.diagonal().min() > 0.5
    assert made.diagonal().max() < 1.3
    assert (made - made.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_muon_steps_hidden_matrices_and_adamw_the_rest(stage: Any, kind: str) -> None:
    parameters = dict(stage.vae.named_parameters())
    chosen = {id(matrix) for matrix in muon.hidden_matrices(stage.vae)}
    names = {name for name, parameter in parameters.items() if id(parameter) in chosen}
    left = {name for name, parameter in parameters.items() if parameter.ndim > 1} - names
    assert left == {f"{part}.{name}.weight" for part in ("encoder", "decoder") for name in ("conv_in", "conv_out")}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    muon.Descent(kind, stage.vae, 1e-2, training.Team()).step()
    for name, parameter in parameters.items():
        step = (before[name] - parameter.detach()) / 1e-2 - 0.01 * before[name]  # without the decay
        if kind == "muon" and name in names:
            wanted = 0.2 * max(step.flatten(1).shape) ** 0.5 * muon.orthogonal(parameter.grad.flatten(1))
            assert relative(step.flatten(1), wanted) < 1e-3, name
        else:  # AdamW's first step has one size everywhere, but where a gradient is next to nothing
            assert (step.abs() - 1).abs().mean() < 1e-3, name


def test_the_work_of_a_step_is_shared_out_evenly() -> None:
    matrices = [torch.nn.Parameter(torch.zeros(8 * i, 16)) for i in range(1, 12)]
    owners = muon._shared_out(matrices, 3)
    work = [matrix.numel() * min(matrix.shape) for matrix in matrices]
    loads = [sum(one for one, owner in zip(work, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) < 1.2 * min(loads)
    assert muon._shared_out(matrices, 1) == [0] * 11
