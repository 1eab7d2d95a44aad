"""Contact sheets: what curation decided, where it was least sure first, as static pages for the eye.

Every page is one HTML file that loads nothing: pictures are small JPEGs of our own encoding inside it, there is no script, and
whatever strangers wrote (names, URLs, labels) is escaped. The same rows give the same bytes.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from heliostat.config import StrictModel
from heliostat.curation.ledger import Decisions
from heliostat.curation.ledger_facts import LedgerFacts
from heliostat.curation.pages import render_template
from heliostat.data.config import DecodeConfig
from heliostat.data.decode import ImageRejected, decode
from heliostat.storage import Store

# Shapes: N rows of the pool, E edges of the copy graph, R evaluation images.

SHEETS = "sheets/"
_TEMPLATE = Path(__file__).parent / "sheet.html.j2"
_READERS = 8  # images wait for the object store, not for a core
_JPEG_QUALITY = 80
_PIXELATED_SIDE = 10  # pixels of an image that nobody should have to look at
_SOURCE_CHARACTERS = 120


class SheetsConfig(StrictModel):
    """Which contact sheets are made, and how large."""

    enabled: bool = True
    """Whether sheets are made at all."""

    margin: float = Field(default=0.05, gt=0, lt=1)
    """Pairs whose similarity is at most so far from the threshold are shown, the nearest to it first."""

    pairs: int = Field(default=400, ge=0)
    """Pairs on the sheet of the margin, at most; half from each side of the threshold where both sides have them."""

    components: int = Field(default=100, ge=0)
    """Largest components that are shown."""

    images_per_component: int = Field(default=12, gt=0)
    """Images shown of each, its representative first, the least similar ones next."""

    evaluation_hits: int = Field(default=10_000, ge=0)
    """Images that show an evaluation image, at most; the page says how many there are."""

    clusters: int = Field(default=200, ge=0)
    """Matched clusters that are shown: the largest ones."""

    images_per_cluster: int = Field(default=10, gt=0)
    """Images of each, drawn with the seed."""

    images_per_reason: int = Field(default=60, ge=0)
    """Images of every stage and reason that drops, drawn with the seed; the same number on the sheets about detectors."""

    thumbnail_pixels: int = Field(default=160, ge=16, le=512)
    """Longer side of a picture."""

    pictures_per_page: int = Field(default=240, ge=2)
    """A sheet goes on on another page after so many: about 2 MB."""

    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""


@dataclass(frozen=True)
class Pairs:
    """Edges of the copy graph. first, second: int64 (E,), rows; similarity: float32 (E,)."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float32]


@dataclass(frozen=True)
class Review:
    """What the sheets show.

    columns: rows -> table with source, label, width, height, format, in the order of the rows. read_image, read_kept,
    read_reference: the bytes of a row as it came, of a row as it was kept (faces blurred), of an evaluation image; None where
    there are none. settings: thresholds by name, as in the ledger. nsfw: float32 (N,), NaN without a score. num_faces: int32
    (N,). matched: int32 (N,), matched cluster of retrieval that a row lies in, -1 for none.
    """

    facts: LedgerFacts
    decisions: Decisions
    columns: Callable[[NDArray[np.int64]], pa.Table]
    read_image: Callable[[int], bytes | None]
    read_kept: Callable[[int], bytes | None]
    read_reference: Callable[[int], bytes | None]
    settings: Mapping[str, float | None] = field(default_factory=dict)
    pairs: Pairs | None = None
    nsfw: NDArray[np.float32] | None = None
    num_faces: NDArray[np.int32] | None = None
    matched: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Frame:
    """One picture to be shown. row: of the pool, or of the evaluation images if is_reference. note: what stands below it."""

    row: int
    note: str = ""
    is_reference: bool = False
    is_kept: bool = False
    is_pixelated: bool = False


@dataclass(frozen=True)
class Strip:
    """Pictures that belong together, and a line above them."""

    title: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Sheet:
    """A subject. num_found: how many there were to show, of which num_shown are."""

    name: str
    title: str
    note: str
    strips: tuple[Strip, ...]
    num_found: int

    @property
    def num_shown(self) -> int:
        """Strips, or pictures where there is only one strip."""
        return len(self.strips[0].frames) if len(self.strips) == 1 else len(self.strips)


def decision_of(review: Review, row: int) -> str:
    """`kept`, or who dropped a row and why."""
    stage, reason = review.decisions.causes[int(review.decisions.cause[row])]
    return f"dropped: {stage}, {reason}" if stage else "kept"


def write_sheets(files: Store, review: Review, sheets: Sequence[Sheet], config: SheetsConfig) -> list[dict[str, Any]]:
    """Write the pages below `sheets/`; returns per sheet what the report lists: name, title, num_shown, num_found, keys."""
    written = []
    for sheet in sheets:
        pages = list(_pages(sheet.strips, config.pictures_per_page))
        keys = [f"{SHEETS}{sheet.name}-{number:03d}.html" for number in range(len(pages))]
        for number, strips in enumerate(pages):
            page = _render(review, strips, config)
            pages_of = [{"key": key.removeprefix(SHEETS), "number": index + 1} for index, key in enumerate(keys)]
            files.put(
                keys[number], render_template(_TEMPLATE, sheet=sheet, strips=page, pages=pages_of, number=number + 1).encode()
            )
        counts = {"num_shown": sheet.num_shown, "num_found": sheet.num_found}
        written.append({"name": sheet.name, "title": sheet.title, **counts, "keys": keys})
    return written


def _pages(strips: Sequence[Strip], limit: int) -> Iterator[list[Strip]]:
    """Strips in pages of at most `limit` pictures; a longer strip is cut."""
    page, count = list[Strip](), 0
    for strip in strips:
        for start in range(0, max(1, len(strip.frames)), limit):
            piece = strip.frames[start : start + limit]
            if count and count + len(piece) > limit:
                yield page
                page, count = [], 0
            page.append(Strip(strip.title, piece))
            count += len(piece)
    if page:
        yield page


def _render(review: Review, strips: Sequence[Strip], config: SheetsConfig) -> list[dict[str, Any]]:
    """What the template shows of the strips of one page."""
    frames = [frame for strip in strips for frame in strip.frames]
    with ThreadPoolExecutor(_READERS) as readers:
        pictures = list(readers.map(lambda frame: _picture(review, frame, config.thumbnail_pixels), frames))
    known = iter(_describe(review, frames, pictures))
    return [{"title": strip.title, "frames": [next(known) for _ in strip.frames]} for strip in strips]


def _describe(review: Review, frames: Sequence[Frame], pictures: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """What stands with each picture."""
    own = [frame.row for frame in frames if not frame.is_reference]
    rows = iter(review.columns(np.array(own, np.int64)).to_pylist() if own else [])
    for frame, (picture, fault) in zip(frames, pictures, strict=True):
        known = {"picture": picture, "fault": fault, "note": frame.note, "is_reference": frame.is_reference}
        if frame.is_reference:
            ids = review.facts.reference_ids
            identity = "" if ids is None else bytes(ids[frame.row]).hex()
            yield known | {"id": identity, "source": "evaluation image", "size": "", "decision": "", "label": ""}
            continue
        row = next(rows)
        source = str(row["source"])
        yield known | {
            "id": bytes(review.facts.ids[frame.row]).hex(),
            "source": source if len(source) <= _SOURCE_CHARACTERS else f"{source[:_SOURCE_CHARACTERS]}...",
            "size": f"{row['width']} x {row['height']} {row['format']}",
            "decision": decision_of(review, frame.row),
            "label": row["label"] or "",
        }


def _picture(review: Review, frame: Frame, side: int) -> tuple[str, str]:
    """(base64 of a JPEG, "") or ("", why there is none)."""
    read = review.read_reference if frame.is_reference else review.read_kept if frame.is_kept else review.read_image
    data = read(frame.row)
    if data is None:
        return "", "not at hand"
    try:
        return base64.b64encode(thumbnail(data, side, is_pixelated=frame.is_pixelated or _is_nsfw(review, frame))).decode(), ""
    except ImageRejected as rejected:
        return "", rejected.reason


def _is_nsfw(review: Review, frame: Frame) -> bool:
    """What the NSFW filter dropped is coarse on every sheet."""
    return not frame.is_reference and review.decisions.causes[int(review.decisions.cause[frame.row])][0] == "nsfw"


def thumbnail(data: bytes, side: int, *, is_pixelated: bool = False) -> bytes:
    """An image as a small JPEG of ours: its pixels and nothing else of it. side: of the longer side, in pixels.

    Raises ImageRejected for what does not decode.
    """
    pixels = decode(data, DecodeConfig())
    scale = min(1.0, side / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if is_pixelated:
        coarse = [max(1, round(extent * _PIXELATED_SIDE / max(size))) for extent in size]
        small = cv2.resize(cv2.resize(small, coarse, interpolation=cv2.INTER_AREA), size, interpolation=cv2.INTER_NEAREST)
    encoded = cv2.imencode(".jpg", small[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    return bytes(encoded.tobytes())
