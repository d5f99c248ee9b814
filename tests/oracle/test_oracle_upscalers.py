"""Upscalers of several architectures against spandrel's own forward, whole and in tiles."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import spandrel
import torch
from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.DAT import DAT
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.HAT import HAT
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR

from ldmcli.spec import RuntimeSpec
from ldmcli.speed.policy import choose_runtime
from ldmcli.upscaling.upscaler import Upscaler, open_upscaler

FP32 = choose_runtime(RuntimeSpec(device="cpu", dtype="fp32"))
NETS: dict[str, Callable[[], torch.nn.Module]] = {
    "Compact": lambda: Compact(num_feat=8, num_conv=2, upscale=4),
    "ESRGAN": lambda: ESRGAN(num_filters=8, num_blocks=1, scale=4),
    "Real-ESRGAN x2": lambda: ESRGAN(num_filters=8, num_blocks=1, scale=2, shuffle_factor=2),
    "SwinIR": lambda: SwinIR(
        embed_dim=12, depths=[2], num_heads=[2], window_size=8, upscale=2, upsampler="pixelshuffledirect", img_size=64
    ),
    "DAT": lambda: DAT(embed_dim=60, depth=[1], num_heads=[6], split_size=[8, 8], upscale=2, img_size=64),
    "HAT": lambda: HAT(embed_dim=60, depths=[1], num_heads=[6], window_size=8, upscale=2, img_size=64),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
}


@pytest.mark.parametrize("name", NETS)
def test_pictures_are_those_of_spandrel(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name]().eval()
    save_file(
        {key: value.contiguous().clone() for key, value in net.state_dict().items()}, tmp_path / "net.safetensors"
    )
    upscaler = Upscaler(open_upscaler(str(tmp_path / "net.safetensors")), FP32)
    pixels = np.random.default_rng(0).integers(0, 256, (45, 57, 3), np.uint8)
    theirs = spandrel.ModelLoader().load_from_file(tmp_path / "net.safetensors")
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    expected = (theirs(values)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    ours = upscaler.enlarged(pixels)
    assert (upscaler.scale, upscaler.architecture) == (theirs.scale, theirs.architecture.name)
    assert ours.shape == expected.shape
    assert abs(ours.astype(int) - expected).max() <= 1
    assert (ours == expected).mean() > 0.99
    assert upscaler.enlarged(pixels[:1, :2].copy()).shape == (theirs.scale, 2 * theirs.scale, 3)
