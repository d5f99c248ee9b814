"""Sheets to look at: what the model knows, and what guidance does."""

from collections.abc import Sequence
from pathlib import Path

import torch
from data import save_grid
from drawing import Artist
from emoji import Captions
from questions import pairs_of

from ldmcli.spec import GenerationRequest

COLUMNS = 11


def draw_sheet(artist: Artist, captions: Captions, guidance: float, steps: int, path: Path) -> None:
    """One picture of each emoji on a background seen with it in training, seeds 0, 1, …"""
    count = len(captions.emoji)
    seen = {pair.emoji: pair for pair in pairs_of(count, 2 * count) if not pair.held_out}
    common = {"guidance_scale": guidance, "steps": steps, "sampler": "ddim"}
    images = artist([GenerationRequest(captions.fullest(*seen[i]), seed=i, **common) for i in range(count)])
    save_grid(images, path, columns=COLUMNS)
    print(f"{count} pictures at guidance {guidance:g} -> {path}", flush=True)


def draw_curve(artist: Artist, prompt: str, guidances: Sequence[float], steps: int, path: Path, seeds: int = 8) -> None:
    """One prompt: a row for each guidance, a column for each seed from 0."""
    rows = [
        artist([GenerationRequest(prompt, seed=i, guidance_scale=g, steps=steps, sampler="ddim") for i in range(seeds)])
        for g in guidances
    ]
    save_grid(torch.cat(rows), path, columns=seeds)
    print(f"“{prompt}”: rows are guidance {', '.join(f'{g:g}' for g in guidances)} -> {path}", flush=True)
