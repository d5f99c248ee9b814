"""Whether contenders draw the same: their final latents and pixels against those of `ldm` in float32."""

from pathlib import Path
from typing import Any

STEPS = 4  # few, so that what 16 bits round away does not grow from step to step
BOUNDS = {"fp32": 1e-3, "bf16": 0.2, "fp16": 0.2}  # of the latents' relative error


def keep(file: str, latents: Any, pixels: Any | None) -> None:
    """Write a contender's final latents and picture, numpy's, for `compare`."""
    import numpy as np

    arrays = {"latents": latents} if pixels is None else {"latents": latents, "pixels": pixels}
    np.savez(file, allow_pickle=False, **arrays)


def compare(reference: Path, candidate: Path, dtype: str) -> dict[str, Any]:
    """How far the candidate's .npz is from the reference's: `latents`, the norm of the difference over the norm of the
    reference's; `max_level` and `mean_level` of 255 in the picture, where both have one; and whether it `passed`."""
    import numpy as np

    with np.load(reference) as right, np.load(candidate) as other:
        ours, theirs = right["latents"].astype(np.float64), other["latents"].astype(np.float64)
        if ours.shape != theirs.shape:
            return {"passed": False, "reason": f"latents of shape {theirs.shape}, not {ours.shape}"}
        error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))
        result: dict[str, Any] = {"latents": error, "bound": BOUNDS[dtype], "passed": error <= BOUNDS[dtype]}
        if "pixels" in right and "pixels" in other:
            levels = np.abs(right["pixels"].astype(int) - other["pixels"].astype(int))
            result |= {"max_level": int(levels.max()), "mean_level": float(levels.mean())}
    return result
