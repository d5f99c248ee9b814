"""Stage 2b: train the text encoder contrastively, as CLIP in miniature (Radford et al. 2021), then leave it
frozen.

A text encoder that starts from nothing together with the U-Net costs most of a short run: until words mean
something, cross-attention has nothing to attend to. A few hundred steps against a small image encoder,
which is thrown away afterwards, give each caption its own direction first.

    python weights/recipe/train_text.py
"""

import argparse
import dataclasses
import random
from pathlib import Path

import torch
from data import BACKGROUND_NAMES, OBJECT_NAMES, all_captions, captions, to_float
from tokenizer import MAX_LENGTH, tokenise
from torch import Tensor, nn
from torch.nn import functional as F
from training import learning_rate, load, log, save_atomically, set_learning_rate

from ldmcli.config import TextEncoderConfig
from ldmcli.models.text import CausalAttention, FeedForward, TextTransformer

WIDTH = 128


def text_config(vocabulary: int) -> TextEncoderConfig:
    return TextEncoderConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        layers=2,
        heads=4,
        max_length=MAX_LENGTH,
        activation="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


@torch.no_grad()
def start_as_clip(text_encoder: TextTransformer) -> None:
    """CLIP's own initial weights (Radford et al. 2021, in their code): every bias 0, and widths of normal numbers that
    keep the sum over all layers small."""
    width, layers = text_encoder.config.hidden_size, text_encoder.config.layers
    into_sum = (width * 2 * layers) ** -0.5
    for module in text_encoder.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, CausalAttention):
            for project in (module.q_proj, module.k_proj, module.v_proj):
                nn.init.normal_(project.weight, std=into_sum)
            nn.init.normal_(module.out_proj.weight, std=width**-0.5)
        elif isinstance(module, FeedForward):
            nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.fc2.weight, std=into_sum)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def pooled(text_encoder: TextTransformer, tokens: Tensor) -> Tensor:
    """The state of each caption's end mark, (batch, WIDTH)."""
    states, _ = text_encoder(tokens)
    return states[torch.arange(len(tokens)), text_encoder.end_marks(tokens)]


class ImageEncoder(nn.Module):
    """Five strided convolutions from (batch, 3, 64, 64) to unit vectors (batch, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((3, 32), (32, 64), (64, 96), (96, 128)):
            layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images), dim=-1)


class CaptionTable:
    """All captions as tokens, and of each (object, background) pair which captions fit it and how often."""

    def __init__(self, tokenizer: Path) -> None:
        self.texts = all_captions()
        self.tokens = tokenise(tokenizer, self.texts)
        number = {text: i for i, text in enumerate(self.texts)}
        self.fitting: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        for o in range(len(OBJECT_NAMES)):
            for b in range(len(BACKGROUND_NAMES)):
                weighted = captions(o, b)
                self.fitting[o, b] = (
                    [number[text] for text, _ in weighted],
                    [weight for _, weight in weighted],
                )

    def draw(self, objects: Tensor, backgrounds: Tensor, rng: random.Random) -> Tensor:
        """The number of one fitting caption for each pair."""
        pairs = zip(objects.tolist(), backgrounds.tolist(), strict=True)
        return torch.tensor([rng.choices(*self.fitting[pair])[0] for pair in pairs])


def targets(objects: Tensor, backgrounds: Tensor, chosen: Tensor, table: CaptionTable) -> Tensor:
    """Which image (row) each caption (column) of the batch describes: 1 or 0."""
    fits = [set(table.fitting[pair][0]) for pair in zip(objects.tolist(), backgrounds.tolist(), strict=True)]
    return torch.tensor([[float(caption in fit) for caption in chosen.tolist()] for fit in fits])


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy both ways; several captions of a batch may fit one image and share its probability."""
    logits = scale.exp().clamp(max=100.0) * image @ text.T
    by_image = F.cross_entropy(logits, match / match.sum(dim=1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, match.T / match.T.sum(dim=1, keepdim=True))) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/recipe/dataset.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/recipe/tokenizer"))
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    dataset = load(args.data)
    seen = ~dataset["held_out"]
    images, objects, backgrounds = (dataset[key][seen] for key in ("images", "objects", "backgrounds"))
    table = CaptionTable(args.tokenizer)
    text_encoder = TextTransformer(text_config(int(table.tokens.max()) + 1))
    start_as_clip(text_encoder)
    image_encoder, project = ImageEncoder(), nn.Linear(WIDTH, WIDTH, bias=False)
    scale = nn.Parameter(torch.tensor(2.66))  # ln(1 / 0.07), as CLIP starts
    parameters = [*text_encoder.parameters(), *image_encoder.parameters(), *project.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01)

    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch,))
        picked = table.draw(objects[chosen], backgrounds[chosen], rng)
        set_learning_rate(optimizer, learning_rate(args.rate, step, step / args.steps, warm_up=30))
        with torch.autocast("cpu", torch.bfloat16):
            image = image_encoder(to_float(images[chosen]))
            text = F.normalize(project(pooled(text_encoder, table.tokens[picked])), dim=-1)
        match = targets(objects[chosen], backgrounds[chosen], picked, table)
        loss = contrastive_loss(image.float(), text.float(), scale, match)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            # an image counts as found when its nearest caption of the batch fits it
            nearest = (image @ text.T).argmax(dim=1)
            found = match[torch.arange(args.batch), nearest].mean().item()
            log(
                f"text step {step + 1} loss {loss.item():.4f} captions found {found:.3f}",
                args.out / "text.log",
            )

    state = {"config": dataclasses.asdict(text_encoder.config), "model": text_encoder.state_dict()}
    save_atomically(state, args.out / "text.pt")


if __name__ == "__main__":
    main()
