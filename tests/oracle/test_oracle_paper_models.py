"""The latent diffusion paper's models draw what CompVis' own code draws, with the same weights and noise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle.make_paper_models import LABEL, LATENTS, RUNS, SCALE, SEED, STEPS, kept, runs_of
from paper_models import LAYOUT, PROMPT, PUBLISHED, class_map, small, write_model
from PIL import Image

from ldmcli.session import Session
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec

FACTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("paper_models.json").read_text())
FP32 = RuntimeSpec(device="cpu", dtype="fp32", cache=False)
CASES = [(name, run) for name in PUBLISHED for run in runs_of(name)]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module", params=PUBLISHED)
def drawn(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Session]]:
    path = write_model(folder / f"{request.param}.safetensors", small(request.param))
    with Session(ModelSpec(str(path)), FP32) as session:
        yield request.param, session


def request_for(session: Session, name: str, folder: Path, **settings: Any) -> GenerationRequest:
    model, factor = small(name), session.config.vae.factor
    own: dict[str, Any] = {}
    if model.labels:
        own["label"] = LABEL
    elif model.classes:
        own["map"] = str(folder / "map.png")
        Image.fromarray(class_map(LATENTS[1] * 4, LATENTS[0] * 4, model.classes)).save(own["map"])
    elif model.text and model.text[3] == 92:
        own["layout"] = LAYOUT
    elif model.text:
        own["prompt"] = PROMPT
    size = {"width": factor * LATENTS[1], "height": factor * LATENTS[0]}
    usual = {"prompt": "", "seed": SEED, "steps": STEPS, "guidance_scale": 1.0}
    return GenerationRequest(**(usual | size | own | settings))


def test_latents_and_pictures_are_the_original_codes(drawn: tuple[str, Session], folder: Path) -> None:
    name, session = drawn
    for run in runs_of(name):
        (picture,) = session.draw([request_for(session, name, folder, **RUNS[run])])
        pixels, expected = picture.pixels(), np.array(FACTS[name][run])
        assert np.abs(np.array(kept(picture.latents)) - expected).max() < 1e-4 * np.abs(expected).max(), run
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()  # those of the last run
    levels = (np.array(FACTS[name]["decoded"]) / 2 + 0.5).clip(0, 1) * 255
    assert np.abs(np.array(kept(planes)) - levels).max() <= 1


def test_pictures_do_not_depend_on_what_is_drawn_beside_them(drawn: tuple[str, Session], folder: Path) -> None:
    name, session = drawn
    scale = SCALE if "guided" in runs_of(name) else 1.0
    requests = [request_for(session, name, folder, seed=seed, guidance_scale=scale) for seed in (1, 2, 3)]
    together = [picture.pixels() for picture in session.draw(requests, batch_size=3)]
    (alone,) = session.draw(requests[1:2])
    assert np.abs(together[1].astype(int) - alone.pixels()).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).max() > 9
