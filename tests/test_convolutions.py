"""When cuDNN tries its ways to compute a convolution."""

import pytest
import torch
from ldmcli.speed.cuda.convolutions import PAYS, chosen_for


@pytest.mark.parametrize(
    ("device", "steps", "tried"), [("cuda", PAYS, True), ("cuda", PAYS - 1, False), ("cpu", PAYS, False)]
)
def test_long_jobs_on_a_gpu_try(device: str, steps: int, tried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with chosen_for(torch.device(device), steps):
        assert torch.backends.cudnn.benchmark == tried
    assert not torch.backends.cudnn.benchmark


def test_what_a_caller_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with chosen_for(torch.device("cpu"), 1):
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
