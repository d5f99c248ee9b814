"""What `make evaluate` measures with: the judge, the distances and the questions, on drawn shapes instead of emoji."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from recipe_support import EMOJI, glyphs, recipe_module

questions = recipe_module("questions")
SIZE = 64


@pytest.fixture(scope="module")
def pairs() -> list[tuple[int, int]]:
    return questions.pairs_of(len(EMOJI), 80)


@pytest.fixture(scope="module")
def pictures(pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Of all pairs, at places and in sizes and shades that vary."""
    return questions.real_pictures(glyphs(), pairs, SIZE, seed=3)


def test_the_judge_names_emoji_and_backgrounds(pairs: list[tuple[int, int]], pictures: torch.Tensor) -> None:
    judge = recipe_module("judge").Judge(glyphs(), SIZE)
    emoji, backgrounds = judge(pictures)
    assert torch.stack([emoji, backgrounds], dim=1).tolist() == [list(pair) for pair in pairs]
    # noise as of a poor model does not confuse it, other shapes do
    noisy = pictures + 0.2 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert (judge(noisy)[0] == emoji).float().mean() > 0.95
    upside_down = judge(pictures.flip(2))[0]
    assert (upside_down[emoji == 0] == 0).all()  # a disc is a disc
    others = recipe_module("judge").Judge(glyphs()[::-1], SIZE)(pictures)[0]
    assert others.tolist() == [len(EMOJI) - 1 - name for name in emoji.tolist()]


def test_half_of_the_pairs_are_held_out(pairs: list[tuple[int, int]]) -> None:
    emoji = recipe_module("emoji")
    for count, wanted in ((88, 528), (88, 100), (4, 80)):
        asked = questions.pairs_of(count, wanted)
        assert len(asked) == wanted
        assert sum(pair.held_out for pair in asked) == wanted // 2
        assert all(pair.held_out == (pair.background == emoji.held_out_background(pair.emoji)) for pair in asked)
        each = Counter(pair.emoji for pair in asked).values()
        assert max(each) - min(each) <= 1
    assert len({pair.background for pair in pairs if pair.emoji == 0}) > 5


def test_frechet_distance_of_gaussians() -> None:
    """Of x and 2 x + 3 with covariance C in D dimensions: |mean x + 3|² + tr C."""
    features = recipe_module("features")
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double() @ torch.rand(6, 6).double()
    wanted = (x.mean(dim=0) + 3).square().sum() + torch.cov(x.T).trace()
    assert features.frechet_distance(x, 2 * x + 3) == pytest.approx(wanted.item(), rel=1e-6)
    assert features.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_distance_to_real_pictures_tells_worse_ones(pairs: list[tuple[int, int]], pictures: torch.Tensor) -> None:
    distance = recipe_module("features").DistanceToReal(pictures)
    fresh = distance(questions.real_pictures(glyphs(), pairs, SIZE, seed=4))
    blurred = torch.nn.functional.avg_pool2d(pictures, 5, stride=1, padding=2)
    assert distance(pictures) < 1e-6 < fresh
    for worse in (blurred, pictures.flip(1), pictures[:8].repeat(10, 1, 1, 1)):  # soft; colours swapped; few
        assert distance(worse) > fresh


def test_difference_between_seeds() -> None:
    """Pictures that are the same differ by nothing; a shape that moves by 8 pixels differs in place alone."""
    data = recipe_module("data")
    glyph, blue = glyphs()[0], (50, 100, 220)

    def at(*places: tuple[float, float], scale: float = 0.5) -> torch.Tensor:
        return data.to_float(data.stack([data.compose(glyph, blue, SIZE, scale, place) for place in places]))

    still = questions.varied(at((0.5, 0.5), (0.5, 0.5)), seeds=2)
    assert still == {"difference": 0, "place": 0, "extent": 0}
    moved = questions.varied(at((0.25, 0.5), (0.5, 0.5)), seeds=2)
    # standard deviation of two centres 8 pixels apart, in one of two directions
    assert moved["place"] == pytest.approx((32 / 2) ** 0.5, rel=0.05)
    assert moved["extent"] == pytest.approx(0, abs=0.2)
    grown = questions.varied(torch.cat([at((0.5, 0.5)), at((0.5, 0.5), scale=0.75)]), seeds=2)
    assert grown["extent"] > 5 > 1 > grown["place"]


def test_results_survive_a_stop(tmp_path: Path) -> None:
    table = recipe_module("evaluation_table")
    results = table.Results(tmp_path / "evaluation.json", "one model")
    results.keep("ddim 25 3", {"object": [1.0, 0.5]})
    again = table.Results(tmp_path / "evaluation.json", "one model")
    assert "ddim 25 3" in again
    assert again["ddim 25 3"] == {"object": [1.0, 0.5]}
    other = table.Results(tmp_path / "evaluation.json", "another model")
    assert "ddim 25 3" not in other
    other.keep("plms 20 3", {})
    assert "ddim 25 3" in table.Results(tmp_path / "evaluation.json", "one model")


def test_how_near_reconstructions_are() -> None:
    measures = recipe_module("measures")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert measures.peak_signal_to_noise(images, images + 0.2) == pytest.approx(20, abs=1e-3)  # 10 log10(4 / 0.04)
    assert measures.structural_similarity(images, images) == pytest.approx(1, abs=1e-5)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    near, far = (measures.structural_similarity(images, images + strength * noise) for strength in (0.1, 0.5))
    assert 1 > near > far > 0
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    edges = recipe_module("ablate_vae").edge_strength
    assert edges(blurred) < 0.8 * edges(images)
