"""Pictures that look alike and are not copies: cards of one layout, charts of one template, nearly empty pages.

Nobody may merge two of them. Together with neighbouring tiles of a photograph, tiles of one texture and distant frames of a
film they are the hard negatives of the planted suite.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from heliostat.data.copy_overlays import Colour, Pixels, filled, put_line, random_colour, random_words
from heliostat.errors import DataError

CARD_PIXELS = (224, 176)  # height, width
PAGE_PIXELS = (224, 160)
CHART_PIXELS = (160, 216)
_SMALL = 6  # height of a capital of small print, pixels
_INK: Colour = (45, 45, 50)
_BRAND: Colour = (28, 92, 140)
_GRID: Colour = (208, 210, 214)


def template_cards(pictures: Sequence[Pixels], rng: np.random.Generator) -> list[Pixels]:
    """One card per picture: the same header, frame, button and places, another picture, other words, another number.

    The picture takes 51 % of the card. Pictures must not be in the pool otherwise: a card is a framed copy of its picture.
    """
    return [_card(picture, rng) for picture in pictures]


def _card(picture: Pixels, rng: np.random.Generator) -> Pixels:
    card = filled(*CARD_PIXELS, (250, 250, 248))
    card[:26] = _BRAND
    put_line(card, "The Daily Market", left=10, baseline=18, height=8, colour=(255, 255, 255))
    top, left, height, width = 34, 12, 132, 152
    card[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    cv2.rectangle(card, (left - 3, top - 3), (left + width + 2, top + height + 2), _BRAND, 2)
    put_line(card, random_words(3, rng), left=12, baseline=186, height=8, colour=_INK)
    put_line(card, random_words(3, rng), left=12, baseline=201, height=_SMALL, colour=_INK)
    put_line(card, f"{rng.integers(3, 99)}.{rng.integers(10, 99)}", left=12, baseline=216, height=8, colour=_INK)
    cv2.rectangle(card, (112, 205), (164, 219), _BRAND, cv2.FILLED)
    put_line(card, "buy now", left=118, baseline=215, height=_SMALL, colour=(255, 255, 255))
    return card


def blank_pages(count: int, rng: np.random.Generator) -> list[Pixels]:
    """Sheets of nearly white paper, each with one to three short lines of its own and a page number."""
    pages = []
    for _ in range(count):
        height, width = PAGE_PIXELS
        page = filled(height, width, random_colour(rng, 244, 252))
        for _ in range(int(rng.integers(1, 4))):
            left, baseline = int(rng.integers(10, 50)), int(rng.integers(20, height - 30))
            put_line(page, random_words(3, rng), left=left, baseline=baseline, height=_SMALL, colour=_INK)
        put_line(page, str(rng.integers(1, 400)), left=width // 2 - 6, baseline=height - 10, height=_SMALL, colour=_INK)
        pages.append(page)
    return pages


def charts(count: int, rng: np.random.Generator) -> list[Pixels]:
    """Charts of one template: title, axes, grid and colours are the same, the eight bars and the line over them are not."""
    return [_chart(rng) for _ in range(count)]


def _chart(rng: np.random.Generator) -> Pixels:
    chart = filled(*CHART_PIXELS, (255, 255, 255))
    left, right, top, bottom = 28, 206, 26, 138
    put_line(chart, "Sales per month, all shops", left=28, baseline=17, height=8, colour=_INK)
    for step in range(5):
        level = bottom - step * (bottom - top) // 4
        cv2.line(chart, (left, level), (right, level), _GRID, 1)
        put_line(chart, str(25 * step), left=4, baseline=level + 3, height=_SMALL, colour=_INK)
    values, line = rng.uniform(0.05, 0.95, 8), rng.uniform(0.05, 0.95, 8)
    centres = left + (np.arange(8) + 0.5) * (right - left) / 8
    for number, (centre, value) in enumerate(zip(centres, values, strict=True)):
        near, far = (round(centre) - 7, bottom), (round(centre) + 7, round(bottom - value * (bottom - top)))
        cv2.rectangle(chart, near, far, (90, 150, 205), cv2.FILLED)
        put_line(chart, "JFMAMJJA"[number], left=round(centre) - 3, baseline=152, height=_SMALL, colour=_INK)
    corners = np.stack([centres, bottom - line * (bottom - top)], axis=1).round().astype(np.int32)
    cv2.polylines(chart, [corners], isClosed=False, color=(215, 95, 60), thickness=2, lineType=cv2.LINE_AA)
    cv2.line(chart, (left, bottom), (right, bottom), _INK, 1)
    return chart


def drawn_negatives(kind: str, count: int, pictures: Sequence[Pixels], rng: np.random.Generator) -> list[Pixels]:
    """`count` hard negatives of a drawn kind: template_card, blank_page or chart.

    pictures: what the cards show, one each. Raises DataError for another kind or for too few pictures.
    """
    if kind == "template_card":
        if len(pictures) < count:
            raise DataError(f"{count} cards need as many pictures and there are {len(pictures)}; ask for fewer")
        return template_cards(pictures[:count], rng)
    drawings = {"blank_page": blank_pages, "chart": charts}
    if kind not in drawings:
        raise DataError(f"no drawn hard negative {kind!r}; there are {', '.join(DRAWN_KINDS)}")
    return drawings[kind](count, rng)


DRAWN_KINDS = ("template_card", "blank_page", "chart")
