"""Stage 0: render the training images from Noto Color Emoji.

Every image is one emoji somewhere on one background colour, larger or smaller; the colour's shade varies too. What the
emoji and the backgrounds are called, and which pairs are held out for ever, stands in emoji.py.

    python weights/recipe/data.py
"""

import random
from pathlib import Path

import numpy
import torch
from emoji import BACKGROUNDS, Emoji, emoji_of, held_out_background
from PIL import Image, ImageDraw, ImageFont
from presets import PRESETS, Preset, recipe_arguments
from training import save_atomically

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
GLYPH_SIZE = 109  # the one bitmap size of Noto Color Emoji
SMALLEST, LARGEST = 0.6, 0.92  # an emoji's share of the frame's side
SHADE, TINT = 14, 6  # how far a background may be lighter or darker, and each of its channels beside that, of 255

Colour = tuple[int, int, int]


def render_glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """One emoji as an RGBA image, cropped to what is not transparent and padded to a square; None where the font draws
    nothing."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


def load_glyphs(preset: Preset, font_path: Path = DEFAULT_FONT) -> tuple[tuple[Emoji, ...], list[Image.Image]]:
    """The preset's emoji that the font has, and their pictures. Ends the program where the font is missing or has no
    pictures of this size."""
    try:
        font = ImageFont.truetype(str(font_path), GLYPH_SIZE)
    except OSError as error:
        raise SystemExit(
            f"the emoji font {font_path} cannot be used ({error}); install Noto Color Emoji (Debian: apt-get install "
            "fonts-noto-color-emoji), or name it with --font."
        ) from None
    drawn = [(emoji, render_glyph(emoji.character, font)) for emoji in emoji_of(preset)]
    found = [(emoji, glyph) for emoji, glyph in drawn if glyph is not None]
    return tuple(emoji for emoji, _ in found), [glyph for _, glyph in found]


def placed(glyph: Image.Image, size: int, scale: float, place: tuple[float, float]) -> Image.Image:
    """The glyph in a transparent frame, RGBA. `scale` is its share of the frame's side, `place` where it lies in the
    room that is left: (0, 0) top left, (1, 1) bottom right."""
    side = round(size * scale)
    # premultiplied alpha keeps the edges free of the colour that transparent pixels happen to have
    small = glyph.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    layer = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    layer.paste(small, (round((size - side) * place[0]), round((size - side) * place[1])))
    return layer


def compose(glyph: Image.Image, colour: Colour, size: int, scale: float, place: tuple[float, float]) -> numpy.ndarray:
    """The glyph on a flat background: uint8 (size, size, 3); see `placed`."""
    return on_colour(placed(glyph, size, scale, place), colour)


def on_colour(layer: Image.Image, colour: Colour) -> numpy.ndarray:
    """A frame on a flat background: uint8 (height, width, 3)."""
    image = Image.new("RGBA", layer.size, (*colour, 255))
    image.alpha_composite(layer)
    return numpy.asarray(image.convert("RGB"))


def shaded(colour: Colour, rng: random.Random) -> Colour:
    """A colour a little lighter or darker, with a little of another tint."""
    shade = rng.uniform(-SHADE, SHADE)
    red, green, blue = (min(255, max(0, round(part + shade + rng.uniform(-TINT, TINT)))) for part in colour)
    return red, green, blue


def stack(images: list[numpy.ndarray]) -> torch.Tensor:
    """uint8 (N, 3, H, W) of pictures (H, W, 3)."""
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous()


def render_dataset(preset: Preset, glyphs: list[Image.Image], views: int, seed: int) -> dict[str, torch.Tensor]:
    """All emoji on all backgrounds, `views` of each pair: images uint8 (N, 3, size, size) and three label vectors."""
    rng = random.Random(seed)
    images, objects, backgrounds, held_out = [], [], [], []
    for object_index, glyph in enumerate(glyphs):
        for background_index, colour in enumerate(BACKGROUNDS.values()):
            for _ in range(views):
                scale, place = rng.uniform(SMALLEST, LARGEST), (rng.random(), rng.random())
                images.append(compose(glyph, shaded(colour, rng), preset.size, scale, place))
                objects.append(object_index)
                backgrounds.append(background_index)
                held_out.append(background_index == held_out_background(object_index))
    return {
        "images": stack(images),
        "objects": torch.tensor(objects),
        "backgrounds": torch.tensor(backgrounds),
        "held_out": torch.tensor(held_out),
    }


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def save_grid(images: torch.Tensor, path: Path, columns: int = 10, zoom: int = 1) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG of `columns` columns and at most 256 colours, which a third of
    the bytes is enough for."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((3, rows * height, columns * width), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * height, index % columns * width
        sheet[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(path, optimize=True)


def main() -> None:
    parser = recipe_arguments(__doc__)
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--views", type=int, help="images of each emoji on each background (default: the preset's)")
    args = parser.parse_args()

    preset = PRESETS[args.preset]
    emoji, glyphs = load_glyphs(preset, args.font)
    dataset = render_dataset(preset, glyphs, args.views or preset.views, args.seed)
    save_atomically({**dataset, "characters": [one.character for one in emoji]}, args.out / "dataset.pt")
    views = len(dataset["images"]) // (len(emoji) * len(BACKGROUNDS))
    one_each = [(i * len(BACKGROUNDS) + i % len(BACKGROUNDS)) * views + i % views for i in range(len(emoji))]
    save_grid(to_float(dataset["images"][one_each]), args.out / "dataset.png", columns=11, zoom=2)
    held = int(dataset["held_out"].sum())
    print(f"{len(emoji)} emoji, {len(dataset['images'])} images, {held} of them held out -> {args.out / 'dataset.pt'}")


if __name__ == "__main__":
    main()
