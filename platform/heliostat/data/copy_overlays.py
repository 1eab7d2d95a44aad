"""Things that people put on and around pictures: words, shapes, frames of screens, a second picture; drawn with OpenCV alone.

All functions take and return (height, width, 3) uint8 RGB, write into no input, and draw only from the generator that they get.
Sizes follow the picture, so that 48 pixels a side and 4,800 both work.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

_WORDS = """
again best blue buy city cloud coffee day every first follow free garden good green happy home house just know less life
light little look made market mood morning more music never new night now old only open original paper people photo
river road sale share slow small some story summer sun the these this time today travel tree under very walk water when
wild winter with world year your
"""
WORDS = tuple(_WORDS.split())
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX)
_FONT_PIXELS = 22  # height of a capital of the Hershey fonts at scale 1
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)


def random_words(count: int, rng: np.random.Generator) -> str:
    """`count` common English words in a row."""
    return " ".join(str(rng.choice(WORDS)) for _ in range(count))


def random_colour(rng: np.random.Generator, lowest: int = 0, highest: int = 255) -> Colour:
    """Any colour whose channels lie in the range."""
    red, green, blue = (int(value) for value in rng.integers(lowest, highest + 1, 3))
    return red, green, blue


def filled(height: int, width: int, colour: Colour) -> Pixels:
    """A picture of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def put_line(
    image: Pixels,
    words: str,
    *,
    left: int,
    baseline: int,
    height: float,
    colour: Colour = BLACK,
    font: int = cv2.FONT_HERSHEY_SIMPLEX,
    outline: Colour | None = None,
) -> None:
    """Write one line of text into `image` itself; height: of a capital, pixels."""
    scale, thickness = height / _FONT_PIXELS, max(1, round(height / 8))
    if outline is not None:
        reach = max(1, round(height / 10))
        for right, down in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
            place = (left + reach * right, baseline + reach * down)
            cv2.putText(image, words, place, font, scale, outline, thickness, cv2.LINE_AA)
    cv2.putText(image, words, (left, baseline), font, scale, colour, thickness, cv2.LINE_AA)


def line_width(words: str, height: float, font: int = cv2.FONT_HERSHEY_SIMPLEX) -> int:
    """Width in pixels that `put_line` will need."""
    (width, _), _ = cv2.getTextSize(words, font, height / _FONT_PIXELS, max(1, round(height / 8)))
    return int(width)


def with_text(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One or two lines of words: white with a black outline as on a meme, or dark in a light box; 8 to 14 % of the height."""
    written = image.copy()
    height, width = image.shape[:2]
    font = int(rng.choice(_FONTS))
    in_box = bool(rng.random() < 0.4)
    places = rng.permutation(["top", "bottom", "middle"])[: int(rng.integers(1, 3))].tolist()
    for place in places:
        words = random_words(int(rng.integers(2, 5)), rng)
        words = words.upper() if rng.random() < 0.5 else words
        capital = height * rng.uniform(0.08, 0.14)
        capital *= min(1.0, 0.92 * width / line_width(words, capital, font))
        left = max(0, (width - line_width(words, capital, font)) // 2)
        baseline = round({"top": 1.6 * capital, "middle": (height + capital) / 2, "bottom": height - 0.7 * capital}[place])
        if in_box:
            margin = max(1, round(0.45 * capital))
            corner = (left - margin, round(baseline - capital) - margin)
            far = (left + line_width(words, capital, font) + margin, baseline + margin)
            cv2.rectangle(written, corner, far, random_colour(rng, 200), cv2.FILLED)
            put_line(written, words, left=left, baseline=baseline, height=capital, colour=random_colour(rng, 0, 60), font=font)
        else:
            put_line(written, words, left=left, baseline=baseline, height=capital, colour=WHITE, font=font, outline=BLACK)
    return written


def with_logos(image: Pixels, rng: np.random.Generator) -> Pixels:
    """One to three small signs, 12 to 28 % of the shorter side each: a face, a star, a heart, or a badge with a letter."""
    marked = image.copy()
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        radius = max(4, round(min(height, width) * rng.uniform(0.06, 0.14)))
        x, y = int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius))
        draw = (_face, _star, _heart, _badge)[int(rng.integers(4))]
        draw(marked, x, y, radius, rng)
    return marked


def _face(image: Pixels, x: int, y: int, radius: int, rng: np.random.Generator) -> None:
    thick = max(1, radius // 8)
    cv2.circle(image, (x, y), radius, (255, int(rng.integers(190, 225)), 60), cv2.FILLED, cv2.LINE_AA)
    for side in (-1, 1):
        cv2.circle(
            image, (x + side * radius * 2 // 5, y - radius // 4), max(1, radius // 7), (70, 45, 0), cv2.FILLED, cv2.LINE_AA
        )
    cv2.ellipse(image, (x, y + radius // 8), (radius // 2, radius * 2 // 5), 0, 15, 165, (70, 45, 0), thick, cv2.LINE_AA)


def _star(image: Pixels, x: int, y: int, radius: int, rng: np.random.Generator) -> None:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2 + rng.uniform(-0.2, 0.2)
    length = radius * np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    corners = np.stack([x + length * np.cos(angle), y + length * np.sin(angle)], axis=1).round().astype(np.int32)
    cv2.fillPoly(image, [corners], random_colour(rng, 120), cv2.LINE_AA)


def _heart(image: Pixels, x: int, y: int, radius: int, rng: np.random.Generator) -> None:
    turn = np.linspace(0, 2 * np.pi, 40)
    across = 16 * np.sin(turn) ** 3
    up = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    corners = np.stack([x + across * radius / 17, y - up * radius / 17], axis=1).round().astype(np.int32)
    cv2.fillPoly(image, [corners], (int(rng.integers(200, 256)), 40, 70), cv2.LINE_AA)


def _badge(image: Pixels, x: int, y: int, radius: int, rng: np.random.Generator) -> None:
    letter = chr(ord("A") + int(rng.integers(26)))
    cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), random_colour(rng, 0, 160), cv2.FILLED)
    capital = 1.1 * radius
    left = x - line_width(letter, capital) // 2
    put_line(image, letter, left=left, baseline=round(y + capital / 2), height=capital, colour=WHITE)


def in_screenshot(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture on a telephone (bars above and below, a caption) or in a browser (tabs, address, a column of text)."""
    ground = WHITE if rng.random() < 0.6 else (24, 25, 28)
    ink = (40, 40, 44) if ground == WHITE else (225, 225, 228)
    return (_on_telephone if rng.random() < 0.5 else _in_browser)(image, ground, ink, rng)


def _on_telephone(image: Pixels, ground: Colour, ink: Colour, rng: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    bar = max(8, round(width * rng.uniform(0.10, 0.14)))
    caption = round(bar * rng.uniform(1.6, 2.6))
    screen = filled(height + 2 * bar + caption, width, ground)
    screen[2 * bar : 2 * bar + height] = image
    small = 0.32 * bar
    clock = f"{rng.integers(24)}:{rng.integers(60):02d}"
    put_line(screen, clock, left=bar // 3, baseline=round(0.62 * bar), height=small, colour=ink)
    cv2.rectangle(screen, (width - bar, bar // 3), (width - bar // 3, 2 * bar // 3), ink, 1)
    cv2.circle(
        screen,
        (round(0.6 * bar), round(1.5 * bar)),
        max(2, round(0.36 * bar)),
        random_colour(rng, 60, 220),
        cv2.FILLED,
        cv2.LINE_AA,
    )
    put_line(screen, random_words(1, rng), left=round(1.2 * bar), baseline=round(1.65 * bar), height=small, colour=ink)
    below = 2 * bar + height
    for place in range(3):
        centre = (round((0.6 + place) * bar), below + round(0.5 * bar))
        cv2.circle(screen, centre, max(2, round(0.26 * bar)), ink, 1, cv2.LINE_AA)
    put_line(screen, random_words(4, rng), left=bar // 3, baseline=below + round(1.4 * bar), height=small, colour=ink)
    return screen


def _in_browser(image: Pixels, ground: Colour, ink: Colour, rng: np.random.Generator) -> Pixels:
    height, width = image.shape[:2]
    bar, margin = max(8, round(0.09 * width)), max(3, round(width * rng.uniform(0.03, 0.08)))
    column = round(width * rng.uniform(0.0, 0.35))
    screen = filled(height + 2 * bar + 2 * margin, width + 2 * margin + column, ground)
    shade: Colour = (222, 225, 230) if ground == WHITE else (52, 54, 60)
    screen[:bar] = shade
    cv2.rectangle(screen, (bar // 2, bar // 4), (round(screen.shape[1] * 0.4), bar), ground, cv2.FILLED)
    for place, colour in enumerate(((237, 106, 94), (245, 191, 79), (98, 197, 84))):
        cv2.circle(
            screen,
            (screen.shape[1] - round((0.5 + 0.6 * place) * bar), bar // 2),
            max(1, bar // 5),
            colour,
            cv2.FILLED,
            cv2.LINE_AA,
        )
    put_line(screen, random_words(2, rng), left=bar, baseline=round(0.78 * bar), height=0.3 * bar, colour=ink)
    cv2.rectangle(screen, (bar // 2, round(1.15 * bar)), (screen.shape[1] - bar // 2, round(1.85 * bar)), shade, cv2.FILLED)
    address = f"www.{'-'.join(random_words(2, rng).split())}.example"
    put_line(screen, address, left=bar, baseline=round(1.65 * bar), height=0.3 * bar, colour=ink)
    top = 2 * bar + margin
    screen[top : top + height, margin : margin + width] = image
    for line in range(round(height / bar) if column > bar else 0):
        baseline = top + round((line + 0.6) * bar)
        put_line(screen, random_words(3, rng), left=width + 2 * margin, baseline=baseline, height=0.3 * bar, colour=ink)
    return screen


def drawn_picture(height: int, width: int, rng: np.random.Generator) -> Pixels:
    """A picture of nothing in particular: a sky, hills and round things in random colours; no two are alike."""
    picture = np.empty((height, width, 3), np.float32)
    mix = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    picture[:] = mix * random_colour(rng, 60) + (1 - mix) * random_colour(rng, 60)
    canvas = picture.astype(np.uint8)
    for layer in range(int(rng.integers(2, 5))):
        across = np.arange(0, width + 8, 8)
        wave = np.sin(across / width * rng.uniform(3, 14) + rng.uniform(0, 6)) * height * rng.uniform(0.03, 0.15)
        level = height * (0.4 + 0.15 * layer) + wave
        corners = np.concatenate([np.stack([across, level], axis=1), [[width, height], [0, height]]]).round().astype(np.int32)
        cv2.fillPoly(canvas, [corners], random_colour(rng, 10, 220), cv2.LINE_AA)
    for _ in range(int(rng.integers(3, 9))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        radius = max(2, round(min(height, width) * rng.uniform(0.03, 0.18)))
        cv2.circle(canvas, centre, radius, random_colour(rng), cv2.FILLED, cv2.LINE_AA)
    return np.asarray(np.clip(canvas + rng.normal(0, 4, canvas.shape), 0, 255), np.uint8)


def in_collage(image: Pixels, rng: np.random.Generator) -> Pixels:
    """The picture and a drawn one side by side or one above the other; the picture takes 50 to 70 % of the area."""
    height, width = image.shape[:2]
    share = rng.uniform(0.5, 0.7)
    if rng.random() < 0.5:
        pictures = [image, drawn_picture(height, max(1, int(width * (1 - share) / share)), rng)]
        axis = 1
    else:
        pictures = [image, drawn_picture(max(1, int(height * (1 - share) / share)), width, rng)]
        axis = 0
    return np.concatenate(pictures if rng.random() < 0.5 else pictures[::-1], axis=axis)
