"""What `truth.json` of a planted pool says about its images: who is a copy of whom, and who must not be merged.

Two images are SAME when both show one original, NEUTRAL when they share pixels without being planted (crops that overlap) or
are near frames of one film, and DIFFERENT otherwise. Only DIFFERENT pairs can be merged wrongly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heliostat.errors import DataError

# Shapes: N images, P pairs of images, M planted copies, Q copies of evaluation images, R evaluation images.

SAME, NEUTRAL, DIFFERENT = 1, 0, -1
FILM_FRAME = "film_frame"
SAME_PHOTOGRAPH = "same_photograph"
UNRELATED = "unrelated"


@dataclass(frozen=True)
class PlantedTruth:
    """The truth about N images. -1 stands for none.

    sources: their names. root_N: the row of the original that each shows, itself for originals and all that was not planted;
    N + r for a copy of evaluation image r. box_N4: photograph, left, top, side in pixels of what is shown. film_N, frame_N:
    film and position in it. group_N: hard-negative group, group_kinds: kind of each. copy_M, original_M, kind_M: planted
    copies and their originals (rows). evaluation_Q, evaluation_kind_Q: copies of evaluation images. innocent_N: shows no pixel
    of an evaluation image and is not broken. frames_apart: frames of one film that must not be merged lie this far apart or
    further.
    """

    sources: Sequence[str]
    root_N: NDArray[np.int64]
    box_N4: NDArray[np.int64]
    film_N: NDArray[np.int64]
    frame_N: NDArray[np.int64]
    group_N: NDArray[np.int64]
    group_kinds: Sequence[str]
    copy_M: NDArray[np.int64]
    original_M: NDArray[np.int64]
    kind_M: NDArray[np.str_]
    evaluation_Q: NDArray[np.int64]
    evaluation_kind_Q: NDArray[np.str_]
    innocent_N: NDArray[np.bool_]
    frames_apart: int

    def relation(self, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.int8]:
        """(P,) int8: SAME, NEUTRAL or DIFFERENT for each pair of rows."""
        same_P = self.root_N[first_P] == self.root_N[second_P]
        neutral_P = boxes_overlap(self.box_N4[first_P], self.box_N4[second_P])
        near_P = np.abs(self.frame_N[first_P] - self.frame_N[second_P]) < self.frames_apart
        neutral_P |= (self.film_N[first_P] >= 0) & (self.film_N[first_P] == self.film_N[second_P]) & near_P
        return np.where(same_P, SAME, np.where(neutral_P, NEUTRAL, DIFFERENT)).astype(np.int8)

    def kinds_of_pairs(self, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.str_]:
        """(P,) what merging each DIFFERENT pair confuses.

        The kind of their common hard-negative group, film_frame, same_photograph (other places of one), or unrelated.
        """
        kinds = np.array([*self.group_kinds, FILM_FRAME, SAME_PHOTOGRAPH, UNRELATED], np.str_)
        group_P = np.where(self.group_N[first_P] == self.group_N[second_P], self.group_N[first_P], -1)
        is_film_P = (self.film_N[first_P] >= 0) & (self.film_N[first_P] == self.film_N[second_P])
        photograph_P = self.box_N4[first_P, 0]
        is_photograph_P = (photograph_P >= 0) & (photograph_P == self.box_N4[second_P, 0])
        other_P = np.select([is_film_P, is_photograph_P], [len(kinds) - 3, len(kinds) - 2], len(kinds) - 1)
        number_P = np.where(group_P >= 0, group_P, other_P)
        return np.asarray(kinds[number_P], np.str_)

    def transforms_of_pairs(self, first_P: NDArray[np.int64], second_P: NDArray[np.int64]) -> NDArray[np.str_]:
        """(P,) how the two images of each pair were altered, such as "none + pad": names in alphabetical order."""
        name_N = np.full(len(self.sources), "none", dtype="<U64")
        name_N[self.copy_M], name_N[self.evaluation_Q] = self.kind_M, self.evaluation_kind_Q
        first, second = name_N[first_P], name_N[second_P]
        in_order = first <= second
        ordered = np.where(in_order, first, second), np.where(in_order, second, first)
        return np.asarray(np.char.add(np.char.add(ordered[0], " + "), ordered[1]), np.str_)

    def sizes_of_negatives(self) -> dict[str, int]:
        """Kind of hard negative -> images that belong to it, their planted copies included; sorted."""
        sizes = dict.fromkeys(sorted({*self.group_kinds, FILM_FRAME}), 0)
        for number, kind in enumerate(self.group_kinds):
            sizes[kind] += int((self.group_N == number).sum())
        sizes[FILM_FRAME] = int((self.film_N >= 0).sum())
        return {kind: size for kind, size in sizes.items() if size}


def boxes_overlap(first_P4: NDArray[np.int64], second_P4: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(P,) whether squares (photograph, left, top, side) share a pixel; touching ones do not, photograph -1 never does."""
    same_photograph = (first_P4[..., 0] >= 0) & (first_P4[..., 0] == second_P4[..., 0])
    across, down = (
        np.minimum(first_P4[..., axis] + first_P4[..., 3], second_P4[..., axis] + second_P4[..., 3])
        > np.maximum(first_P4[..., axis], second_P4[..., axis])
        for axis in (1, 2)
    )
    return np.asarray(same_photograph & across & down, np.bool_)


def read_truth(truth: Mapping[str, Any], sources: Sequence[str]) -> PlantedTruth:
    """Line the truth up with the images: `truth` as `write_pool` returns it, sources: the name of each row, all different.

    Broken files may be missing from the sources. Raises DataError when another file of the truth is, or when names repeat.
    """
    row_of = {source: row for row, source in enumerate(sources)}
    num_images = len(sources)
    if len(row_of) != num_images:
        raise DataError(f"{num_images} images have {len(row_of)} different names; name each image once")
    broken = set(truth["broken"])
    _check_files(truth, row_of.keys())
    copy_M = _rows(row_of, (copy["file"] for copy in truth["planted"]))
    original_M = _rows(row_of, (copy["original"] for copy in truth["planted"]))
    evaluation_Q = _rows(row_of, (copy["file"] for copy in truth["evaluation"]))
    reference_numbers = {file: number for number, file in enumerate(truth["evaluation_boxes"])}
    reference_Q = _rows(reference_numbers, (copy["reference"] for copy in truth["evaluation"]))
    root_N = np.arange(num_images)
    root_N[copy_M] = original_M
    root_N[evaluation_Q] = num_images + reference_Q
    box_N4 = np.full((num_images, 4), -1, np.int64)
    if truth["boxes"]:
        box_N4[_rows(row_of, truth["boxes"])] = np.array(list(truth["boxes"].values()), np.int64)
    reference_boxes_R4 = np.array(list(truth["evaluation_boxes"].values()), np.int64).reshape(-1, 4)
    box_N4[copy_M] = box_N4[original_M]
    box_N4[evaluation_Q] = reference_boxes_R4[reference_Q]
    film_N, frame_N, group_N = (np.full(num_images, -1, np.int64) for _ in range(3))
    for number, files in enumerate(truth["video"].values()):
        film_N[_rows(row_of, files)], frame_N[_rows(row_of, files)] = number, np.arange(len(files))
    for number, group in enumerate(truth["hard_negatives"]):
        group_N[_rows(row_of, group["files"])] = number
    group_N[copy_M] = group_N[original_M]
    innocent_N = np.array([source not in broken for source in sources], np.bool_)
    innocent_N[evaluation_Q] = False
    for box_4 in reference_boxes_R4:
        innocent_N &= ~boxes_overlap(box_N4, box_4)
    return PlantedTruth(
        sources=sources,
        root_N=root_N,
        box_N4=box_N4,
        film_N=film_N,
        frame_N=frame_N,
        group_N=group_N,
        group_kinds=tuple(group["kind"] for group in truth["hard_negatives"]),
        copy_M=copy_M,
        original_M=original_M,
        kind_M=np.array([copy["kind"] for copy in truth["planted"]], np.str_),
        evaluation_Q=evaluation_Q,
        evaluation_kind_Q=np.array([copy["kind"] for copy in truth["evaluation"]], np.str_),
        innocent_N=innocent_N,
        frames_apart=int(truth["frames_apart"]),
    )


def _rows(row_of: Mapping[str, int], files: Any) -> NDArray[np.int64]:
    return np.array([row_of[file] for file in files], np.int64)


def _check_files(truth: Mapping[str, Any], known: Any) -> None:
    named = {copy["file"] for copy in (*truth["planted"], *truth["evaluation"])}
    named |= {copy["original"] for copy in truth["planted"]} | set(truth["boxes"])
    named |= {file for group in truth["hard_negatives"] for file in group["files"]}
    named |= {file for files in truth["video"].values() for file in files}
    if missing := sorted(named - known):
        raise DataError(f"{missing[0]!r} of the truth is not among the images ({len(missing)} such); it scores another pool")
