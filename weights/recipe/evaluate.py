"""Score an exported model: do its pictures show the emoji and the background of their prompts, also for pairs that were
held out of training, do they look like real ones, and what do guidance, sampler and steps change?

Every picture is drawn as `ldm txt2img` draws it and named by judge.py. Half of the prompts name pairs seen in training.
All settings get the same prompts and seeds, so that their rows can be compared picture by picture. Beside the model
stand real pictures of the same pairs, as they are and from the VAE: the latter show what the VAE alone loses.

Results are printed as they come and kept in OUT/evaluation.json: what is there for the same weights and settings is not
drawn again, so an evaluation that was stopped goes on; delete the file to draw all anew. At the end OUT/evaluation.md
has the tables as Markdown. The checks, in the order in which they run:

    real       the judge's own score, the Fréchet distance between sets of real pictures, the VAE's PSNR and SSIM
    guidance   DDIM of 25 steps at guidance 1, 3, 5 and 7.5: shares named right, Fréchet distance, difference of seeds
    negatives  how many hearts are red without and with a negative prompt against it
    samplers   PLMS of 10, 20, 25 and 50 steps and DDIM of 10, 25 and 50 at the guidance of record; with --full DDIM of
               20 steps, too, and all of them at each guidance

    python weights/recipe/evaluate.py                                       # weights/tiny-emoji, all tables
    python weights/recipe/evaluate.py --sheet sheet.png --curve curve.png   # the same, and two sheets to look at
    python weights/recipe/evaluate.py --only sheets --sheet sheet.png       # only that sheet
    python weights/recipe/evaluate.py FOLDER --prompts 88 --processes 2     # a first impression
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import DEFAULT_FONT, load_glyphs
from drawing import Artist, check_size
from emoji import Captions, Emoji
from evaluation_table import CHECKS, Results, tables
from features import DistanceToReal
from judge import Judge
from measures import peak_signal_to_noise, structural_similarity
from presets import PRESETS, recipe_arguments
from questions import Pairs, negative_rows, pairs_of, real_pictures, spread, varied
from sheets import draw_curve, draw_sheet
from torch import Tensor
from train_vae import reconstruct

from ldmcli.checkpoints.load import load_vae
from ldmcli.checkpoints.source import open_model
from ldmcli.errors import LdmError
from ldmcli.spec import GenerationRequest

GUIDANCES = (1.0, 3.0, 5.0, 7.5)
STEPS = (20, 50, 10, 25)  # first what tells whether PLMS at 20 is as good as DDIM at 50
STEPS_OF_RECORD = 25
VARIED, SEEDS = 22, 8  # prompts and pictures of each, for the diversity between seeds


class Evaluation:
    """A model, its judge and what was found out so far."""

    def __init__(self, args: argparse.Namespace, artist: Artist, results: Results) -> None:
        preset = PRESETS[args.preset]
        self.args, self.artist, self.results, self.size = args, artist, results, preset.size
        self.emoji, self.glyphs = load_glyphs(preset, args.font)
        self.captions, self.judge = Captions(self.emoji), Judge(self.glyphs, preset.size, args.device)
        self.pairs = pairs_of(len(self.emoji), args.prompts)
        self.to_real = DistanceToReal(real_pictures(self.glyphs, self.pairs * 4, self.size, args.seed + 1))

    def once(self, key: str, measure: Callable[[], dict]) -> None:
        """Measure, print and keep, unless it is kept already."""
        if key not in self.results:
            start = time.monotonic()
            found = measure()
            self.results.keep(key, {**found, "seconds": round(time.monotonic() - start, 1)})
        self.results.show(key)

    def draw(self, pairs: Pairs, guidance: float, sampler: str = "ddim", steps: int = STEPS_OF_RECORD) -> Tensor:
        """One picture of each pair's fullest caption, with seeds counting up."""
        common = {"guidance_scale": guidance, "sampler": sampler, "steps": steps}
        prompts = [self.captions.fullest(*pair) for pair in pairs]
        return self.artist(
            [GenerationRequest(prompt, seed=self.args.seed + i, **common) for i, prompt in enumerate(prompts)]
        )

    def score(self, images: Tensor) -> dict:
        """What the pictures of `self.pairs` are worth; "right" has a digit for each: are both right?"""
        objects, backgrounds = self.judge(images)
        wanted = torch.tensor([(pair.emoji, pair.background) for pair in self.pairs])
        held = torch.tensor([pair.held_out for pair in self.pairs])
        right, ground = objects == wanted[:, 0], backgrounds == wanted[:, 1]
        missed: dict[str, int] = {}
        for index in (~right).nonzero().flatten().tolist():
            name = f"{self.emoji[wanted[index, 0]].name} → {self.emoji[objects[index]].name}"
            missed[name] = missed.get(name, 0) + 1
        return {
            "object": [_share(right[~held]), _share(right[held])],
            "background": [_share(ground[~held]), _share(ground[held])],
            "frechet": self.to_real(images),
            "right": "".join(str(int(one)) for one in right & ground),
            "missed": dict(sorted(missed.items(), key=lambda item: (-item[1], item[0]))[:12]),
        }

    def real(self) -> None:
        """The judge and the measures on real pictures, and on those that the VAE gives back."""
        images = real_pictures(self.glyphs, self.pairs, self.size, self.args.seed + 2)
        few = real_pictures(self.glyphs, self.varied_pairs(), self.size, self.args.seed + 3)
        self.once("real", lambda: self.score(images) | varied(few, SEEDS))

        def through_vae() -> dict:
            bytes_ = ((images + 1) * 127.5).round().byte()
            vae = load_vae(open_model(self.args.folder), torch.device(self.args.device), torch.float32)
            decoded = reconstruct(vae, bytes_).cpu()
            quality = {"psnr": peak_signal_to_noise(images, decoded), "ssim": structural_similarity(images, decoded)}
            return self.score(decoded) | quality

        self.once("vae", through_vae)

    def varied_pairs(self) -> Pairs:
        return [pair for pair in spread(self.pairs, VARIED) for _ in range(SEEDS)]

    def guidance(self) -> None:
        """What guidance trades: every scale, and at each several pictures of the same prompts."""
        for guidance in GUIDANCES:
            self.cell(guidance, "ddim", STEPS_OF_RECORD)
        for guidance in GUIDANCES:
            self.once(f"varied {guidance:g}", lambda g=guidance: varied(self.draw(self.varied_pairs(), g), SEEDS))

    def samplers(self) -> None:
        guidances = GUIDANCES if self.args.full else (self.args.guidance_of_record,)
        for guidance in guidances:
            for steps in STEPS:
                for sampler in ("plms", "ddim"):
                    if self.args.full or (sampler, steps) != ("ddim", 20):  # at 20 it is PLMS that is in question
                        self.cell(guidance, sampler, steps)

    def cell(self, guidance: float, sampler: str, steps: int) -> None:
        self.once(
            f"{sampler} {steps} {guidance:g}", lambda: self.score(self.draw(self.pairs, guidance, sampler, steps))
        )

    def negatives(self) -> None:
        """How often a heart is red without and with a negative prompt against it."""

        def measure() -> dict:
            rows = negative_rows()
            common = {"guidance_scale": self.args.guidance_of_record, "steps": STEPS_OF_RECORD, "sampler": "ddim"}
            requests = [
                GenerationRequest(prompt, negative_prompt=row.negative, seed=self.args.seed + i, **common)
                for row in rows
                for i, prompt in enumerate(row.prompts)
            ]
            objects, _ = self.judge(self.artist(requests))
            found, start = [], 0
            for row in rows:
                names = [self.emoji[index] for index in objects[start : start + len(row.prompts)].tolist()]
                found.append({"prompt": row.title, "negative": row.negative} | _hearts(names))
                start += len(row.prompts)
            return {"rows": found}

        self.once("negative", measure)


def _share(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else float("nan")


def _hearts(found: list[Emoji]) -> dict:
    red = sum(emoji.name == "red heart" for emoji in found)
    hearts = sum(emoji.kind == "heart" for emoji in found)
    return {"pictures": len(found), "red": red, "hearts": hearts}


def identity(folder: Path, args: argparse.Namespace) -> str:
    """What results depend on: the bytes of the model's files and the settings of every picture."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    settings = (args.preset, args.prompts, args.seed, args.device.split(":")[0], args.dtype, args.guidance_of_record)
    return f"{digest.hexdigest()[:16]} {settings}"


def _arguments() -> argparse.ArgumentParser:
    parser = recipe_arguments(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("weights/tiny-emoji"),
                        help="a model as export.py writes it (default: weights/tiny-emoji)")  # fmt: skip
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT, help="Noto Color Emoji, as data.py had it")
    parser.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument(
        "--prompts", type=int, default=528, help="pictures in each row; 500 or more for numbers to quote (default: 528)"
    )
    parser.add_argument("--guidance-of-record", type=float, default=2.5, metavar="SCALE",
                        help="of the samplers' table, the negative prompts and the sheet (default: 2.5)")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="every sampler and number of steps at every guidance")
    parser.add_argument("--only", nargs="+", choices=(*CHECKS, "sheets"), metavar="CHECK",
                        help="only these checks; “sheets”: none of them, only the sheets asked for")  # fmt: skip
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw one picture of each emoji")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="also draw 8 seeds of one prompt at each guidance")
    parser.add_argument("--curve-prompt", default="a happy face on a blue background", metavar="TEXT")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1,
                        help="of one thread each, on a CPU (default: one a core)")  # fmt: skip
    parser.add_argument("--batch", type=int, help="pictures drawn together (default: 22; on a GPU 264)")
    parser.set_defaults(seed=1000)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    check_size(args.folder, PRESETS[args.preset].size)
    results = Results(args.out / "evaluation.json", identity(args.folder, args))
    batch = args.batch or (22 if args.device == "cpu" else 264)
    with Artist(args.folder, args.device, args.dtype, processes=args.processes, batch=batch) as artist:
        evaluation = Evaluation(args, artist, results)
        for check in CHECKS:
            if args.only is None or check in args.only:
                getattr(evaluation, check)()
        captions = evaluation.captions
        if args.sheet:
            draw_sheet(artist, captions, args.guidance_of_record, STEPS_OF_RECORD, args.sheet)
        if args.curve:
            draw_curve(artist, args.curve_prompt, GUIDANCES, STEPS_OF_RECORD, args.curve)
        pairs = evaluation.pairs
    if args.only == ["sheets"]:
        return
    text = tables(results, [pair.held_out for pair in pairs], args.guidance_of_record)
    (args.out / "evaluation.md").write_text(text, encoding="utf-8")
    print("\n" + text)


def main() -> None:
    try:
        parser = _arguments()
        args = parser.parse_args()
        if args.prompts < 20 or args.processes < 1:
            parser.error("--prompts must be 20 or more, --processes 1 or more")
        evaluate(args)
    except LdmError as error:
        raise SystemExit(f"evaluate.py: {error}") from error


if __name__ == "__main__":
    main()
