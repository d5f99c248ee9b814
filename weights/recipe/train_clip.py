"""Before the two stages: text and image encoders trained against each other, CLIP in miniature (Radford et al. 2021).

Both halves are used. The text encoder is where stage 2 begins, which trains it further together with the U-Net: from
nothing, that would cost most of a short run, since cross-attention has nothing to attend to until words mean something.
The image encoder's features stand in for the pretrained network of a perceptual loss in stage 1 (no such network is to
be had without a download): trained to tell emoji and backgrounds apart, they answer to shapes and edges rather than to
single pixels.

    python weights/recipe/train_clip.py
"""

import dataclasses
import itertools

import torch
from caption_table import CaptionTable
from data import to_float
from presets import PRESETS, recipe_arguments
from tokenizer import MAX_LENGTH
from torch import Tensor, nn
from torch.nn import functional as F
from training import half_precision, known_emoji, learning_rate, load, log, save_atomically, set_learning_rate

from ldmcli.config import TextEncoderConfig
from ldmcli.networks.clip import FeedForward, TextTransformer, TokenAttention


def text_config(vocabulary: int, width: int) -> TextEncoderConfig:
    return TextEncoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
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
        elif isinstance(module, TokenAttention):
            for project in (module.q_proj, module.k_proj, module.v_proj):
                nn.init.normal_(project.weight, std=into_sum)
            nn.init.normal_(module.out_proj.weight, std=width**-0.5)
        elif isinstance(module, FeedForward):
            nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.fc2.weight, std=into_sum)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def pooled(text_encoder: TextTransformer, tokens: Tensor) -> Tensor:
    """The state of each caption's end mark, (batch, width)."""
    states, _ = text_encoder(tokens)
    return states[torch.arange(len(tokens)), text_encoder.end_marks(tokens)]


class ImageEncoder(nn.Module):
    """Four strided convolutions from images (batch, 3, height, width) to unit vectors (batch, width)."""

    CHANNELS = (3, 32, 64, 96, 128)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(into, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU())
            for into, out in itertools.pairwise(self.CHANNELS)
        )
        self.out = nn.Linear(self.CHANNELS[-1] * 4 * 4, width)

    def features(self, images: Tensor) -> list[Tensor]:
        """What each level sees, fine to coarse: (batch, channels, height, width) of half the size before."""
        found = [images]
        for level in self.levels:
            found.append(level(found[-1]))
        return found[1:]

    def forward(self, images: Tensor) -> Tensor:
        coarse = F.adaptive_avg_pool2d(self.features(images)[-1], 4)
        return F.normalize(self.out(coarse.flatten(1)), dim=-1)


def targets(objects: Tensor, backgrounds: Tensor, chosen: Tensor, table: CaptionTable) -> Tensor:
    """Which image (row) each caption (column) of the batch describes: 1 or 0."""
    numbers, weights = table.fitting(objects, backgrounds)
    return ((numbers[:, :, None] == chosen) & (weights[:, :, None] > 0)).any(dim=1).float()


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy both ways; several captions of a batch may fit one image and share its probability."""
    logits = scale.exp().clamp(max=100.0) * image @ text.T
    by_image = F.cross_entropy(logits, match / match.sum(dim=1, keepdim=True))
    return (by_image + F.cross_entropy(logits.T, match.T / match.T.sum(dim=1, keepdim=True))) / 2


def main() -> None:
    parser = recipe_arguments(__doc__)
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()

    preset, device = PRESETS[args.preset], torch.device(args.device)
    steps, count = args.steps or preset.text_steps, preset.text_batch
    torch.manual_seed(args.seed)
    dataset = load(args.out / "dataset.pt")
    seen = ~dataset["held_out"]
    images, objects, backgrounds = (dataset[key][seen] for key in ("images", "objects", "backgrounds"))
    table = CaptionTable(args.out / "tokenizer", known_emoji(args))
    text_encoder = TextTransformer(text_config(int(table.tokens.max()) + 1, preset.text_width))
    start_as_clip(text_encoder)
    image_encoder = ImageEncoder(preset.text_width)
    project = nn.Linear(preset.text_width, preset.text_width, bias=False)
    scale = nn.Parameter(torch.tensor(2.66, device=device))  # ln(1 / 0.07), as CLIP starts
    parts = nn.ModuleList([text_encoder, image_encoder, project]).to(device)
    parameters = [*parts.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.01)

    for step in range(steps):
        chosen = torch.randint(len(images), (count,))
        picked = table.draw(objects[chosen], backgrounds[chosen])
        set_learning_rate(optimizer, learning_rate(args.rate, step, step / steps, warm_up=30))
        with half_precision(device):
            image = image_encoder(to_float(images[chosen].to(device)))
            text = F.normalize(project(pooled(text_encoder, table.tokens[picked].to(device))), dim=-1)
        match = targets(objects[chosen], backgrounds[chosen], picked, table).to(device)
        loss = contrastive_loss(image.float(), text.float(), scale, match)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            # an image counts as found when its nearest caption of the batch fits it
            found = match.gather(1, (image @ text.T).argmax(dim=1, keepdim=True)).mean().item()
            log(f"clip step {step + 1} loss {loss.item():.4f} captions found {found:.3f}", args.out / "clip.log")

    state = {"config": dataclasses.asdict(text_encoder.config), "text": text_encoder.state_dict()}
    save_atomically({**state, "image": image_encoder.state_dict()}, args.out / "clip.pt")


if __name__ == "__main__":
    main()
