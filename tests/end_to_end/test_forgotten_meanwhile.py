"""Images that are forgotten between two stages, or while one of them is interrupted, are in nothing that is made later."""

import hashlib
from pathlib import Path

import pytest
from curation_runs import finish, load, refused, write_pictures, write_recipe

from heliostat.data.manifest import manifest_from_bytes
from heliostat.errors import DataError
from heliostat.runtime import stage_curate

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


@pytest.mark.usefixtures("local_ray")
def test_an_image_forgotten_after_the_dedup_is_in_no_later_curation(tmp_path, capfd, monkeypatch) -> None:
    lake, store = write_pictures(tmp_path / "lake", range(12), copies=[1]), tmp_path / "store"
    recipe = write_recipe(tmp_path / "web.yaml", store, lake)
    for verb in ("ingest", "embed", "dedup"):
        finish(verb, recipe)
    of_old_copies = ("curate", recipe, "curate.copies=copies/web@1")
    with monkeypatch.context() as patched:

        def interrupted(*arguments: object) -> int:
            raise DataError("the power went")

        patched.setattr(stage_curate, "write_review", interrupted)
        refused(capfd, *of_old_copies)
    gone = (lake / "0003.png").read_bytes()
    assert holds(store / "curated/web@1", gone), "the interrupted curation had packed it"
    finish("forget", "source:0003.png", f"store={store}")
    capfd.readouterr()
    finish(*of_old_copies)
    assert "images were forgotten meanwhile: this curation starts again" in capfd.readouterr().out
    expected = [f"{number:04d}.png" for number in range(12) if number != 3]
    assert sources(store, "curated/web@1") == expected
    assert not holds(store, gone)
    (step,) = [one for one in load(store, "curated/web@1").read_json("funnel.json") if one["stage"] == "forgotten_since"]
    assert (step["rows_in"], step["dropped_by_reason"]) == (12, {"asked_to_forget": 1})
    finish("forget", "source:0004.png", f"store={store}")
    finish(*of_old_copies, "version=2")
    assert sources(store, "curated/web@2") == [name for name in expected if name != "0004.png"]
    finish("dedup", recipe, "dedup.features=features/web@1", "version=3")
    finish("curate", recipe, "version=3")
    assert sources(store, "curated/web@3") == sources(store, "curated/web@2")
    stages = {one["stage"]: one["dropped_by_reason"] for one in load(store, "curated/web@3").read_json("funnel.json")}
    assert stages["forgotten"] == {"asked_to_forget": 2}
    assert stages["decode"] == {}
    capfd.readouterr()
    identity = hashlib.sha256(gone).hexdigest()
    finish("why", "curated/web@3", identity, f"store={store}")
    story = f"Image {identity[:12]} was forgotten: somebody asked for it, and nothing but its id is left."
    assert story in capfd.readouterr().out
