"""Images that are forgotten between two stages, or while one of them is interrupted, are in nothing that is made later."""

import hashlib
from pathlib import Path

import pytest
from curation_runs import finish, load, refused, write_pictures, write_recipe

from heliostat.data.manifest import manifest_from_bytes
from heliostat.errors import DataError
from heliostat.runtime import stage_curate, stage_dedup, stage_embed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]


def sources(store: Path, name: str) -> list[str]:
    """The images of a curation, each read and checked against its id."""
    artifact = load(store, name)
    rows = manifest_from_bytes(artifact.files.read("manifest.parquet")).to_pylist()
    return sorted(row["source"] for row in rows)


def holds(folder: Path, data: bytes) -> bool:
    """Whether any file below holds these bytes."""
    return any(data in path.read_bytes() for path in folder.rglob("*") if path.is_file())


VERBS = ("embed", "dedup", "curate")


def interrupted(*arguments: object) -> int:
    raise DataError("the power went")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("verb", "last"),
    [("embed", (stage_embed, "_undecodable")), ("dedup", (stage_dedup, "_say")), ("curate", (stage_curate, "write_review"))],
)
def test_a_stage_that_was_interrupted_starts_again_without_what_was_forgotten_since(
    tmp_path, capfd, monkeypatch, verb: str, last: tuple[object, str]
) -> None:
    lake, store = write_pictures(tmp_path / "lake", range(12), copies=[1]), tmp_path / "store"
    recipe, gone = write_recipe(tmp_path / "web.yaml", store, lake), (lake / "0003.png").read_bytes()
    (lake / "0003.png").rename(lake / "private.png")
    at = VERBS.index(verb)
    for earlier in ("ingest", *VERBS[:at]):
        finish(earlier, recipe)
    with monkeypatch.context() as patched:
        patched.setattr(*last, interrupted)
        refused(capfd, verb, recipe)
    finish("forget", "source:private.png", f"store={store}")
    for later in VERBS[at:]:
        capfd.readouterr()
        finish(later, recipe)
        assert ("images were forgotten meanwhile: this stage starts again" in capfd.readouterr().out) == (later == verb)
    assert sources(store, "curated/web@1") == [f"{number:04d}.png" for number in range(12) if number != 3]
    assert not holds(store, gone)
    assert not holds(store, b"private.png")


@pytest.mark.usefixtures("local_ray")
def test_an_image_forgotten_after_the_dedup_is_in_no_later_curation(tmp_path, capfd) -> None:
    lake, store = write_pictures(tmp_path / "lake", range(12), copies=[1]), tmp_path / "store"
    recipe = write_recipe(tmp_path / "web.yaml", store, lake)
    for verb in ("ingest", "embed", "dedup"):
        finish(verb, recipe)
    gone = (lake / "0003.png").read_bytes()
    finish("forget", "source:0003.png", f"store={store}")
    finish("curate", recipe)
    expected = [f"{number:04d}.png" for number in range(12) if number != 3]
    assert sources(store, "curated/web@1") == expected
    (step,) = [one for one in load(store, "curated/web@1").read_json("funnel.json") if one["stage"] == "forgotten_since"]
    assert (step["rows_in"], step["dropped_by_reason"]) == (12, {"asked_to_forget": 1})
    finish("dedup", recipe, "dedup.features=features/web@1", "version=2")
    finish("curate", recipe, "version=2")
    assert sources(store, "curated/web@2") == expected
    stages = {one["stage"]: one["dropped_by_reason"] for one in load(store, "curated/web@2").read_json("funnel.json")}
    assert stages["forgotten"] == {"asked_to_forget": 1}
    assert stages["decode"] == {}
    capfd.readouterr()
    identity = hashlib.sha256(gone).hexdigest()
    finish("why", "curated/web@2", identity, f"store={store}")
    story = f"Image {identity[:12]} was forgotten: somebody asked for it, and nothing but its id is left."
    assert story in capfd.readouterr().out
