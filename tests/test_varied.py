"""What a grid varies is seen under its pictures, on sheets and in galleries."""

import re
from pathlib import Path

import pytest
from cli_support import ldm_here, tiny_model

from ldmcli.gallery import sheet
from ldmcli.gallery.varied import caption, fields_of_grid


def test_captions_begin_with_what_varies() -> None:
    request = {"prompt": "a cat", "steps": 20, "guidance_scale": 7.5, "loras": [{"name": "x.st"}], "schedule": None}
    assert caption(request, ["guidance_scale", "steps"]) == "guidance scale 7.5 · steps 20 · a cat"
    assert caption(request, ["loras", "schedule"]) == "loras x.st · a cat"
    assert caption(request, []) == "a cat"
    assert caption({"prompt": "", "label": 22, "steps": 20}, ["steps", "label"]) == "steps 20 · class 22"


def test_a_grids_sheet_and_gallery_show_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    write = sheet.write_sheet

    def noted(path: Path, pictures: list[sheet.SheetPicture], run: Path) -> int:
        entries = list(pictures)
        captions.extend(one.caption for one in entries)
        return write(path, entries, run)

    monkeypatch.setattr(sheet, "write_sheet", noted)
    (tmp_path / "p.txt").write_text("a cat\n")
    out = tmp_path / "out"
    grid = ("--grid", "eta=0,0.5", "--grid", "steps=1,2", "--sheet", out / "sheet.png", "--sampler", "ddim")
    assert ldm_here("batch", tmp_path / "p.txt", "-m", tiny_model(), "-o", out, *grid).code == 0
    assert captions == [f"eta {eta} · steps {steps} · a cat" for eta in ("0", "0.5") for steps in (1, 2)]
    assert fields_of_grid(out) == ["eta", "steps"]
    assert ldm_here("gallery", out).code == 0
    page = (out / "index.html").read_text()
    assert re.findall(r'class="varied"><bdi>(.*?)</bdi>', page) == [
        f"steps {steps} · eta {eta}" for eta in ("0", "0.5") for steps in (1, 2)
    ]
    assert fields_of_grid(tmp_path) == []
