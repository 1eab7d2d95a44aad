"""Weights that a recipe names: a model artifact, or a file or folder of public weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heliostat.artifacts import Artifact, ArtifactRef
from heliostat.errors import UsageError
from heliostat.models.config import BackboneConfig
from heliostat.models.public import read_public_weights
from heliostat.models.stored import read_info, read_states
from heliostat.runtime.pipelines import Context
from heliostat.runtime.weight_names import names_artifact, weights_path
from heliostat.training.start import StartingWeights


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from. Either `artifact`, an input of what is made from them, or `sha256` of the file's content."""

    what: str
    config: BackboneConfig
    read: Callable[[], StartingWeights]
    artifact: Artifact | None = None
    sha256: str = ""

    @staticmethod
    def of_artifact(model: Artifact) -> "WeightSource":
        """A model artifact; only its description is read yet."""
        config = read_info(model).backbone

        def read() -> StartingWeights:
            return StartingWeights(str(model.ref), config, *read_states(model))

        return WeightSource(str(model.ref), config, read, artifact=model)

    @staticmethod
    def of_file(path: Path, notify: Callable[[str], None], *, num_heads: int | None = None) -> "WeightSource":
        """Public weights, read now: their content is their identity. Raises CheckpointError."""
        public = read_public_weights(path, num_heads=num_heads)
        for note in public.notes:
            notify(f"{path}: {note}")
        start = StartingWeights(str(path), public.config, public.backbone, public.heads)
        return WeightSource(str(path), public.config, lambda: start, sha256=public.sha256)


def open_weights(context: Context, text: str, *, num_heads: int | None = None) -> WeightSource:
    """The weights that a recipe's value names; num_heads is for files that do not tell their attention heads.

    Raises UsageError, ArtifactNotFoundError or CheckpointError.
    """
    if names_artifact(text):
        ref = ArtifactRef.parse(text)
        if ref.kind != "model":
            raise UsageError(f"{text} holds no weights; name a model/name@version, a file or a folder")
        return WeightSource.of_artifact(context.load(ref))
    return WeightSource.of_file(weights_path(text), lambda line: context.progress.say(f"  {line}"), num_heads=num_heads)
