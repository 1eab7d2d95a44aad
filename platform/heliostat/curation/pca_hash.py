"""PCA hash: 64 bits and 16 bytes of an image, equal or nearly so for copies that were recompressed, resized or recoloured.

1. Thumbnail: 32 x 32 by area average, grey. 2. Its mean is removed, its contrast set to one. 3. It is projected on the 64
principal components of a sample. 4. `code`: the sign of each; `coarse`: the first 16, whitened, in eight bits.
`contrast` says how much is left of the thumbnail beside a smooth gradient: skies, walls, blank pages and shapes on white have
little or none, and their codes mean nothing. docs/concepts/pca_hash.md has what it finds and what not.

Every sum is one of integers and exact, so the same thumbnail has the same hash whatever batch, thread or BLAS computes it.
"""

import functools
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: n images, P = 1024 pixels of a thumbnail, C = 64 components, F = 16 of them kept in eight bits.

SIDE_PIXELS = 32
NUM_BITS = 64
NUM_COARSE = 16
COARSE_STEPS = 32  # steps of `coarse` per standard deviation; int8 then reaches four deviations
SHIPPED = Path(__file__).parent / "pca_hash_v1.npz"

_NUM_PIXELS = SIDE_PIXELS * SIDE_PIXELS
_GREY_256 = np.array([77, 150, 29], np.int32)  # ITU-R BT.601 luma in 256ths
_PIXEL_STEPS = 256  # integer steps per contrast of a normalised thumbnail
_PIXEL_LIMIT = 8  # contrasts at which a pixel is cut off
_COMPONENT_STEPS = 2**15 - 1
_STEP_LEVELS, _MIN_BUSY_RATIO = 2.0, 0.25  # measured: photographs have 0.68 and more, shapes on white 0.19 and less
_IMAGES_AT_ONCE = 4096  # bounds the float64 copy to 32 MiB
_MIN_FIT_THUMBNAILS = 1024  # one per pixel; fewer leave the smallest components to chance


@dataclass(frozen=True)
class HashColumns:
    """What an image is known by. code: uint64 (n,); coarse: int8 (n, 16); contrast: float32 (n,), grey levels of 255."""

    code: NDArray[np.uint64]
    coarse: NDArray[np.int8]
    contrast: NDArray[np.float32]


def thumbnail_of(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(32, 32) float32 grey levels, 0 to 255 in 256ths, of an (H, W, 3) uint8 RGB image of any size.

    The image is squeezed to a square. DataError for any other array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise DataError(f"an image is (height, width, 3) uint8 RGB; this one is {image.shape} {image.dtype}")
    small = cv2.resize(image, (SIDE_PIXELS, SIDE_PIXELS), interpolation=cv2.INTER_AREA)
    return np.asarray((small.astype(np.int32) @ _GREY_256) / 256, np.float32)


def _smooth_surfaces() -> NDArray[np.float64]:
    """(6, P) orthonormal: constant, two slopes and three curvatures."""
    across = np.linspace(-1.0, 1.0, SIDE_PIXELS)
    y, x = (grid.ravel() for grid in np.meshgrid(across, across, indexing="ij"))
    return np.ascontiguousarray(np.linalg.qr(np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1))[0].T)


_SURFACES = _smooth_surfaces()


def _is_plain(thumbnails: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(n,) whether too few pixels differ from the next: a logo or a product on white is an outline, and outlines repeat."""
    down = np.abs(np.diff(thumbnails, axis=1))[:, :, :-1]
    across = np.abs(np.diff(thumbnails, axis=2))[:, :-1, :]
    return np.asarray((np.maximum(down, across) >= _STEP_LEVELS).mean(axis=(1, 2)) < _MIN_BUSY_RATIO, np.bool_)


def contrast_of(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) float32: standard deviation in grey levels of what a quadratic surface leaves of (n, 32, 32) thumbnails.

    0 for a plain picture, in which less than a quarter of the pixels differ from the next one by two grey levels.
    """
    flat = thumbnails.reshape(len(thumbnails), _NUM_PIXELS).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    energy = (flat * flat).sum(axis=1)
    for surface in _SURFACES[1:]:  # a sum for each image, not a matrix product: its rounding is the same in every batch
        energy -= (flat * surface).sum(axis=1) ** 2
    deviation = np.sqrt(np.maximum(energy, 0.0) / _NUM_PIXELS)
    return np.asarray(np.where(_is_plain(thumbnails), 0.0, deviation), np.float32)


def _normalised(thumbnails: NDArray[np.float32]) -> NDArray[np.float64]:
    """(n, P) whole numbers: mean removed, contrast set to `_PIXEL_STEPS`; zeros for a thumbnail of one colour."""
    flat = thumbnails.reshape(len(thumbnails), _NUM_PIXELS).astype(np.float64)
    mean = flat.sum(axis=1) / _NUM_PIXELS
    variance = np.maximum((flat * flat).sum(axis=1) / _NUM_PIXELS - mean * mean, 0.0)
    scale = np.where(variance > 0, _PIXEL_STEPS / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)
    limit = _PIXEL_LIMIT * _PIXEL_STEPS
    return np.asarray(np.clip(np.rint((flat - mean[:, None]) * scale[:, None]), -limit, limit), np.float64)


@dataclass(frozen=True)
class PcaHash:
    """A fitted hash. components: int16 (C, P); offset: int64 (C,), projection of the mean; deviation: float64 (F,)."""

    components: NDArray[np.int16]
    offset: NDArray[np.int64]
    deviation: NDArray[np.float64]

    @functools.cached_property
    def version(self) -> str:
        """32 hexadecimal digits of the sha256 of the fit; hashes of different versions must not be compared."""
        digest = hashlib.sha256(b"pca_hash 1")
        for array in (self.components, self.offset, self.deviation):
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:32]

    def hash(self, thumbnails: NDArray[np.float32]) -> HashColumns:
        """Hash (n, 32, 32) thumbnails; DataError for another shape."""
        if thumbnails.ndim != 3 or thumbnails.shape[1:] != (SIDE_PIXELS, SIDE_PIXELS):
            raise DataError(f"thumbnails are (n, {SIDE_PIXELS}, {SIDE_PIXELS}); these are {thumbnails.shape}; use thumbnail_of")
        code = np.empty(len(thumbnails), np.uint64)
        coarse = np.empty((len(thumbnails), NUM_COARSE), np.int8)
        contrast = np.empty(len(thumbnails), np.float32)
        matrix = self.components.T.astype(np.float64)
        for start in range(0, len(thumbnails), _IMAGES_AT_ONCE):
            some = slice(start, start + _IMAGES_AT_ONCE)
            contrast[some] = contrast_of(thumbnails[some])
            projected = _normalised(thumbnails[some]) @ matrix - self.offset  # below 2**53: exact in any order
            code[some] = np.packbits(projected > 0, axis=1, bitorder="little").view("<u8")[:, 0]
            steps = np.rint(projected[:, :NUM_COARSE] / self.deviation * COARSE_STEPS)
            coarse[some] = np.clip(steps, -127, 127).astype(np.int8)
        return HashColumns(code, coarse, contrast)

    def save(self, path: Path) -> None:
        """Write the fit as an .npz file; the same fit gives the same bytes."""
        with path.open("wb") as file:
            version = np.frombuffer(bytes.fromhex(self.version), np.uint8)
            np.savez(file, components=self.components, offset=self.offset, deviation=self.deviation, version=version)

    @classmethod
    def load(cls, path: Path | None = None) -> "PcaHash":
        """Read a fit; None is the one that comes with Heliostat. DataError when the file is damaged or of another kind."""
        path = SHIPPED if path is None else path
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                loaded = cls(arrays["components"], arrays["offset"], arrays["deviation"])
                version = arrays["version"].tobytes().hex()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a fitted PCA hash ({error}); write one with PcaHash.save") from error
        shapes = loaded.components.shape, loaded.offset.shape, loaded.deviation.shape
        kinds = [array.dtype.str for array in (loaded.components, loaded.offset, loaded.deviation)]
        if shapes != ((NUM_BITS, _NUM_PIXELS), (NUM_BITS,), (NUM_COARSE,)) or kinds != ["<i2", "<i8", "<f8"]:
            raise DataError(f"{path} is not a fitted PCA hash (arrays {shapes}); write one with PcaHash.save")
        if loaded.version != version:
            raise DataError(f"{path} is damaged: the fit in it is {loaded.version}, {version} was written; copy it again")
        if not (np.isfinite(loaded.deviation).all() and (loaded.deviation > 0).all()):
            raise DataError(f"{path}: deviations of a PCA hash are positive; fit it again")
        return loaded


def fit_pca_hash(thumbnails: NDArray[np.float32]) -> PcaHash:
    """Fit the components on (n, 32, 32) thumbnails of a sample, flat ones left out beforehand by their `contrast_of`.

    Mirror images are added, so that left and right weigh the same. Signs are fixed, so that the same sample gives the same
    fit. DataError for fewer than 1,024 thumbnails, or for a sample that has fewer than 64 directions.
    """
    if len(thumbnails) < _MIN_FIT_THUMBNAILS:
        raise DataError(f"{len(thumbnails)} thumbnails are too few to fit a PCA hash; give at least {_MIN_FIT_THUMBNAILS}")
    both = np.concatenate([thumbnails, thumbnails[:, :, ::-1]])
    pixels = _normalised(both)
    mean = pixels.sum(axis=0) / len(pixels)
    products = pixels.T @ pixels  # of whole numbers, below 2**53: exact, so the fit does not depend on the order of summing
    variances, vectors = np.linalg.eigh((products / len(pixels) - np.outer(mean, mean)) / _PIXEL_STEPS**2)
    variances, vectors = variances[::-1][:NUM_BITS], vectors[:, ::-1][:, :NUM_BITS].T
    if variances[-1] <= 1e-9 * variances[0]:
        raise DataError(
            f"the sample of {len(thumbnails)} thumbnails has fewer than {NUM_BITS} directions; give different images"
        )
    # Any fixed direction without symmetry fixes the signs; the largest entry would not, mirror images have two of them.
    signs = np.sign(vectors @ np.sin(np.arange(1.0, _NUM_PIXELS + 1) ** 2))
    components = np.rint(vectors * signs[:, None] * _COMPONENT_STEPS).astype(np.int16)
    scale = _PIXEL_STEPS * _COMPONENT_STEPS
    offset = np.rint(components.astype(np.float64) @ mean).astype(np.int64)
    deviation = np.round(np.sqrt(variances[:NUM_COARSE]), 6) * scale
    return PcaHash(components, offset, deviation)
