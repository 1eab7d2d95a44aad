"""The sample behind the shipped PCA hash, and the command that fits it: python -m heliostat.curation.pca_hash_fit OUTPUT.npz

Crops of any size from the left halves of the demo photographs, whole frames of two films, and as many random fields whose
spectrum falls like that of photographs: 17 photographs alone would give components that know these 17.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heliostat.curation.pca_hash import SIDE_PIXELS, contrast_of, fit_pca_hash, thumbnail_of
from heliostat.data.photographs import REGIONS, photographs, video_frames
from heliostat.errors import UsageError

MIN_FIT_CONTRAST = 6.0  # grey levels; flatter ones show noise and would teach it

_CROPS_PER_PHOTOGRAPH = 300
_SMALLEST_CROP = 40
_FRAMES, _FRAMES_APART = 264, 8
_SPECTRUM = (0.8, 2.2)  # amplitude falls as frequency to this power; about 1 to 1.5 in photographs


def _photograph_thumbnails(rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Crops of all sizes and of sides 1 to 1.65 apart, from the left halves."""
    found = []
    for photograph in photographs().values():
        height = photograph.shape[0]
        widest = round(REGIONS["left"][1] * photograph.shape[1])
        for _ in range(_CROPS_PER_PHOTOGRAPH):
            across = int(rng.integers(_SMALLEST_CROP, widest + 1))
            down = int(np.clip(across * np.exp(rng.uniform(-0.5, 0.5)), _SMALLEST_CROP, height))
            left, top = int(rng.integers(0, widest - across + 1)), int(rng.integers(0, height - down + 1))
            found.append(thumbnail_of(photograph[top : top + down, left : left + across]))
    return found


def random_thumbnails(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(count, 32, 32) random fields of spectra between `_SPECTRUM`, in 256ths of a grey level as thumbnails are."""
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE_PIXELS), np.fft.fftfreq(SIDE_PIXELS)))
    frequencies[0, 0] = 1.0
    powers = rng.uniform(*_SPECTRUM, size=(count, 1, 1))
    noise = rng.standard_normal((count, SIDE_PIXELS, SIDE_PIXELS))
    fields = np.fft.ifft2(np.fft.fft2(noise) / frequencies**powers).real
    fields = fields / fields.std(axis=(1, 2), keepdims=True)
    return np.asarray(np.clip(np.rint((128 + 40 * fields) * 256) / 256, 0, 255), np.float32)


def demo_thumbnails(seed: int = 0) -> NDArray[np.float32]:
    """(n, 32, 32) float32: the sample; DataError when the extra `demo` is not installed."""
    rng = np.random.default_rng((seed, 0x70636168))
    thumbnails = _photograph_thumbnails(rng)
    thumbnails += [thumbnail_of(frame) for _, frame in video_frames(_FRAMES)[::_FRAMES_APART]]
    real = np.stack(thumbnails)
    real = real[contrast_of(real) >= MIN_FIT_CONTRAST]
    return np.concatenate([real, random_thumbnails(len(real), rng)])


def main(arguments: list[str]) -> None:
    """Fit and write."""
    if len(arguments) != 1:
        raise UsageError(f"{len(arguments)} arguments; run: python -m heliostat.curation.pca_hash_fit OUTPUT.npz")
    fitted = fit_pca_hash(demo_thumbnails())
    fitted.save(Path(arguments[0]))
    print(f"PCA hash {fitted.version} written to {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
