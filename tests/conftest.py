"""Fixtures that several test files share. Nothing heavy is imported before a test asks for it."""

import gc
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ldmcli import Session
    from ldmcli.pipeline.pipeline import Pipeline


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that the tests run keep their cache here and read no configuration of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session", autouse=True)
def own_interrupts() -> None:
    """A shell that runs the tests in the background has them ignore SIGINT, and so would the commands they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """What a command that ran in the test's own process left behind is undone: the collector that one switched off
    which failed before it had read a model; the log, to which pytest listens in one way where it propagates and in
    another where it does not; the number of threads that torch computes with; what signals do."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.enable()
    logger = logging.getLogger("ldmcli")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Models this small run faster in one thread, and much faster where others use the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_model(one_thread: None) -> Any:
    """diffusers' StableDiffusionPipeline: a small SD1 with random weights, float32. Not to be changed."""
    from oracle.random_model import random_pipeline

    return random_pipeline()


@pytest.fixture(scope="session")
def model_folder(random_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`random_model` as a diffusers folder. Not to be changed: copy what a test wants otherwise."""
    from oracle.random_model import save

    return save(random_model, tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="session")
def model_file(random_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as one file in the original layout."""
    from oracle.compvis_layout import compvis_state
    from safetensors.torch import save_file

    parts = (random_model.unet, random_model.vae, random_model.text_encoder)
    state = compvis_state(*(part.state_dict() for part in parts))
    path = tmp_path_factory.mktemp("random") / "model.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> "Pipeline":
    """This program's pipeline of `model_folder`, on the CPU in float32. Not to be changed."""
    return load(model_folder)


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The model that comes with the program. A clone without it is broken: that is a failure, not a skip."""
    from ldmcli.checkpoints.source import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def embedded_pipeline(embedded_folder: Path, one_thread: None) -> "Pipeline":
    """This program's pipeline of the embedded model, on the CPU in float32. Not to be changed."""
    return load(embedded_folder)


@pytest.fixture(scope="session")
def embedded_diffusers(embedded_folder: Path, one_thread: None) -> Any:
    """diffusers' pipeline of the embedded model, in float32."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cpu", torch.float32)


def open_session(path: Path | None, **settings: Any) -> "Session":
    """A session with a model on disk, on the CPU in float32 and one thread unless the `settings` say otherwise: fields
    of a ModelSpec or a RuntimeSpec."""
    from ldmcli import ModelSpec, RuntimeSpec, Session

    model = {
        name: settings.pop(name) for name in ("vae", "refiner", "prediction_type", "image_encoder") if name in settings
    }
    runtime: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "threads": 1, "cache": False}
    return Session(ModelSpec(path and str(path), **model), RuntimeSpec(**(runtime | settings)))


def loaded(session: "Session") -> "Pipeline":
    """The pipeline in a session."""
    session.load()
    assert session._drawer is not None
    return session._drawer.pipeline


def load(path: Path, dtype: str = "fp32", attention: str = "auto") -> "Pipeline":
    """This program's pipeline of a model on disk, on the CPU."""
    return loaded(open_session(path, dtype=dtype, attention=attention))


@pytest.fixture(scope="session")
def family_models(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random models of every family, in every layout: see `oracle.family_models.FamilyModels`."""
    from oracle.family_models import FamilyModels

    return FamilyModels(tmp_path_factory.mktemp("families"))
