"""Whether contenders draw the same: their final latents and pixels against those of `ldm` in float32."""

from pathlib import Path
from typing import Any

STEPS = 4  # few, so that what 16 bits round away does not grow from step to step
BOUNDS = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}  # of the latents' relative error


def keep(file: str, latents: Any, pixels: Any | None) -> None:
    """Write a contender's final latents (pictures, channels, height, width) and pixels (pictures, height, width, 3),
    numpy's, for `compare`."""
    import numpy as np

    arrays = {"latents": latents} if pixels is None else {"latents": latents, "pixels": pixels}
    np.savez(file, allow_pickle=False, **arrays)


def compare(reference: Path, candidate: Path, dtype: str) -> dict[str, Any]:
    """How far the candidate's .npz is from the reference's, of the picture that is farthest: `latents`, the norm of the
    difference over the norm of the reference's; `max_level` and `mean_level` of 255, where both have pixels; and
    whether it `passed`."""
    import numpy as np

    with np.load(reference) as right, np.load(candidate) as other:
        ours, theirs = right["latents"].astype(np.float64), other["latents"].astype(np.float64)
        if ours.shape != theirs.shape:
            return {"passed": False, "reason": f"latents of shape {theirs.shape}, not {ours.shape}"}
        rows = ours.reshape(len(ours), -1), theirs.reshape(len(ours), -1)
        error = float((np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[0], axis=1)).max())
        result: dict[str, Any] = {"latents": error, "bound": BOUNDS[dtype], "passed": error <= BOUNDS[dtype]}
        if "pixels" in right and "pixels" in other:
            levels = np.abs(right["pixels"].astype(int) - other["pixels"].astype(int))
            means = levels.reshape(len(ours), -1).mean(axis=1)
            result |= {"max_level": int(levels.max()), "mean_level": float(means.max())}
    return result
