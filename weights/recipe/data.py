"""Stage 0: render the training images and their captions from Noto Color Emoji.

Every image is one emoji on one flat background colour, slightly scaled and shifted. For each emoji one
background is held out for ever: no stage sees that pair, so evaluate.py can ask whether the model composes
or only remembers.

    python weights/recipe/data.py --out runs/recipe/dataset.pt
"""

import argparse
import random
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

DEFAULT_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian: fonts-noto-color-emoji
SIZE = 64  # pixels along each side of a training image
GLYPH_SIZE = 109  # the one bitmap size of Noto Color Emoji

# caption name -> (article, emoji)
OBJECTS: dict[str, tuple[str, str]] = {
    "red apple": ("a", "🍎"),
    "orange": ("an", "🍊"),
    "pear": ("a", "🍐"),
    "banana": ("a", "🍌"),
    "lemon": ("a", "🍋"),
    "watermelon": ("a", "🍉"),
    "strawberry": ("a", "🍓"),
    "cherries": ("", "🍒"),
    "grapes": ("", "🍇"),
    "pineapple": ("a", "🍍"),
    "carrot": ("a", "🥕"),
    "mushroom": ("a", "🍄"),
    "pumpkin": ("a", "🎃"),
    "pizza": ("a", "🍕"),
    "hamburger": ("a", "🍔"),
    "donut": ("a", "🍩"),
    "birthday cake": ("a", "🎂"),
    "tiger": ("a", "🐯"),
    "rabbit": ("a", "🐰"),
    "whale": ("a", "🐳"),
    "cat": ("a", "🐱"),
    "dog": ("a", "🐶"),
    "bear": ("a", "🐻"),
    "panda": ("a", "🐼"),
    "frog": ("a", "🐸"),
    "pig": ("a", "🐷"),
    "monkey": ("a", "🐵"),
    "lion": ("a", "🦁"),
    "fox": ("a", "🦊"),
    "penguin": ("a", "🐧"),
    "owl": ("an", "🦉"),
    "fish": ("a", "🐠"),
    "octopus": ("an", "🐙"),
    "crab": ("a", "🦀"),
    "turtle": ("a", "🐢"),
    "butterfly": ("a", "🦋"),
    "ladybug": ("a", "🐞"),
    "house": ("a", "🏠"),
    "car": ("a", "🚗"),
    "rocket": ("a", "🚀"),
    "sailboat": ("a", "⛵"),
    "bus": ("a", "🚌"),
    "soccer ball": ("a", "⚽"),
    "basketball": ("a", "🏀"),
    "balloon": ("a", "🎈"),
    "gift": ("a", "🎁"),
    "light bulb": ("a", "💡"),
    "crown": ("a", "👑"),
    "tree": ("a", "🌳"),
    "cactus": ("a", "🌵"),
    "rose": ("a", "🌹"),
    "sunflower": ("a", "🌻"),
    "cloud": ("a", "☁"),
    "sun": ("a", "☀"),
    "moon": ("a", "🌙"),
    "star": ("a", "⭐"),
    "snowman": ("a", "⛄"),
    "heart": ("a", "❤"),
    "ghost": ("a", "👻"),
    "robot": ("a", "🤖"),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 48),
    "orange": (240, 140, 40),
    "yellow": (250, 225, 90),
    "green": (60, 160, 80),
    "blue": (50, 100, 220),
    "purple": (130, 70, 180),
    "pink": (250, 170, 200),
    "gray": (128, 128, 128),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}

OBJECT_NAMES = tuple(OBJECTS)
BACKGROUND_NAMES = tuple(BACKGROUNDS)


def held_out_background(object_index: int) -> int:
    """The index of the background on which this emoji is never shown in training."""
    return (7 * object_index + 3) % len(BACKGROUNDS)


def captions(object_index: int, background_index: int) -> list[tuple[str, float]]:
    """All captions of one image with their probabilities."""
    name = OBJECT_NAMES[object_index]
    background = BACKGROUND_NAMES[background_index]
    article = OBJECTS[name][0]
    named = f"{article} {name}".strip()
    spellings = ("gray", "grey") if background == "gray" else (background,)
    weighted = [(named, 0.12), (name, 0.12)]
    for colour in spellings:
        ground = f"{'an' if colour == 'orange' else 'a'} {colour} background"
        share = 1 / len(spellings)
        weighted += [
            (f"{named} on {ground}", 0.40 * share),
            (f"{name} on {ground}", 0.12 * share),
            (f"{name}, {colour} background", 0.12 * share),
            (f"{named} on {colour}", 0.12 * share),
        ]
    return weighted


def caption(object_index: int, background_index: int) -> str:
    """The fullest caption: "a red apple on a blue background"."""
    name, background = OBJECT_NAMES[object_index], BACKGROUND_NAMES[background_index]
    ground = f"{'an' if background == 'orange' else 'a'} {background} background"
    return f"{OBJECTS[name][0]} {name} on {ground}".strip()


def all_captions() -> list[str]:
    """Every caption there is, sorted, held-out pairs included; the first is the empty one."""
    found = {
        text
        for object_index in range(len(OBJECTS))
        for background_index in range(len(BACKGROUNDS))
        for text, _ in captions(object_index, background_index)
    }
    return ["", *sorted(found)]


def render_glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji as an RGBA image, cropped to what is not transparent and padded to a square."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {character!r}")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square


def compose(glyph: Image.Image, colour: tuple[int, int, int], scale: float, shift: tuple[int, int]) -> numpy.ndarray:
    """The glyph on a flat background: uint8 (64, 64, 3). `scale` is its share of the frame, `shift` in
    pixels."""
    side = round(SIZE * scale)
    # premultiplied alpha keeps the edges free of the colour that transparent pixels happen to have
    small = glyph.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    layer = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    layer.paste(small, ((SIZE - side) // 2 + shift[0], (SIZE - side) // 2 + shift[1]))
    image = Image.new("RGBA", (SIZE, SIZE), (*colour, 255))
    image.alpha_composite(layer)
    return numpy.asarray(image.convert("RGB"))


def load_glyphs(font_path: Path) -> list[Image.Image]:
    font = ImageFont.truetype(str(font_path), GLYPH_SIZE)
    return [render_glyph(character, font) for _, character in OBJECTS.values()]


def reference_images(font_path: Path, background_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean views of every emoji on one background, as uint8 (N, 3, 64, 64), and the emoji's index of
    each."""
    colour = BACKGROUNDS[BACKGROUND_NAMES[background_index]]
    images, labels = [], []
    for object_index, glyph in enumerate(load_glyphs(font_path)):
        for scale in (0.82, 0.87, 0.92):
            for shift in ((0, 0), (-2, 0), (2, 0), (0, -2), (0, 2)):
                images.append(compose(glyph, colour, scale, shift))
                labels.append(object_index)
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def render_dataset(font_path: Path, jitters: int, seed: int) -> dict[str, torch.Tensor]:
    """All emoji on all backgrounds, `jitters` views of each: images uint8 (N, 3, 64, 64) and three label
    vectors."""
    rng = random.Random(seed)
    images, objects, backgrounds, held_out = [], [], [], []
    for object_index, glyph in enumerate(load_glyphs(font_path)):
        for background_index, colour in enumerate(BACKGROUNDS.values()):
            for _ in range(jitters):
                shift = (rng.randint(-2, 2), rng.randint(-2, 2))
                images.append(compose(glyph, colour, rng.uniform(0.82, 0.92), shift))
                objects.append(object_index)
                backgrounds.append(background_index)
                held_out.append(background_index == held_out_background(object_index))
    return {
        "images": torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(),
        "objects": torch.tensor(objects),
        "backgrounds": torch.tensor(backgrounds),
        "held_out": torch.tensor(held_out),
    }


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def save_grid(images: torch.Tensor, path: Path, columns: int = 10, zoom: int = 1) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as one PNG of `columns` columns and at most 256 colours, which
    a third of the bytes is enough for."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--jitters", type=int, default=16, help="views of each emoji on each background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/recipe/dataset.pt"))
    args = parser.parse_args()

    dataset = render_dataset(args.font, args.jitters, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dataset, args.out)
    first = torch.arange(len(OBJECTS)) * len(BACKGROUNDS) + torch.arange(len(OBJECTS)) % len(BACKGROUNDS)
    save_grid(to_float(dataset["images"][first * args.jitters]), args.out.with_suffix(".png"), zoom=2)
    print(f"{len(dataset['images'])} images, {int(dataset['held_out'].sum())} of them held out -> {args.out}")


if __name__ == "__main__":
    main()
