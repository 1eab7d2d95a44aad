"""What a training loop asks of a loader, and everything that says which batches it hands out, as one thing that can be sent."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from heliostat.data.batch import Batch
from heliostat.data.config import CropsConfig, DecodeConfig, LoaderConfig, ShuffleConfig
from heliostat.data.image_source import ImageSource
from heliostat.data.loader import ImageLoader
from heliostat.data.loader_counts import LoaderStatistics
from heliostat.data.masking import MaskSettings
from heliostat.data.quarantine import Rejection
from heliostat.data.raw_batch import RawBatch


class BatchLoader(Protocol):
    """The batches of one rank, in order, from any step on; where they are computed is the loader's own affair."""

    def batches(self, num_steps: int) -> Generator[Batch | RawBatch, None, None]:
        """The next `num_steps` batches; closing the iterator ends all work on them."""

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence stands after the last batch that was handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader stood."""

    def statistics(self) -> LoaderStatistics:
        """What was done so far; callable at any time from any thread."""

    def take_rejections(self) -> list[Rejection]:
        """What was turned away in the batches that were handed out since the last call."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which batches a run sees, for ranks of any world size; can be pickled."""

    sources: tuple[ImageSource, ...]
    crops: CropsConfig
    loader: LoaderConfig
    masks: MaskSettings
    global_batch_size: int
    seed: int
    shuffle: ShuffleConfig
    decoding: DecodeConfig

    def image_loader(self, rank: int, world_size: int, *, pinned: bool | None = None) -> ImageLoader:
        """The loader of one rank in threads of this process."""
        return ImageLoader(
            self.sources,
            crops=self.crops,
            loader=self.loader,
            masks=self.masks,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            rank=rank,
            world_size=world_size,
            decoding=self.decoding,
            pinned=pinned,
        )
