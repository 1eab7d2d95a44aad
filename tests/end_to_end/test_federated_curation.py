"""A second crawl is joined with a first one that was embedded and compared before: the set is that of both at once."""

import hashlib
import json
from pathlib import Path

import pytest
from curation_runs import finish, load, refused, write_pictures, write_recipe

from heliostat.curation.edges import iterate_edges
from heliostat.curation.ledger_read import open_ledger
from heliostat.data.manifest import manifest_from_bytes
from heliostat.data.shard_reader import ShardReader

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]

CURATE = {"clusters": {"num_clusters": 5}, "balance": {"target_images": 20}, "retrieval": {"mode": "none"}}
DEDUP = {"hash": {"enabled": False}}  # else the copies are gone before any pair is looked for


def lakes(folder: Path) -> Path:
    """Two crawls, a and b: the second holds new pictures, and copies and files of the first."""
    write_pictures(folder / "a", range(18), copies=range(3), same=[4])
    write_pictures(folder / "b", range(30, 42), copies=[30, 31])
    write_pictures(folder / "b", [], copies=range(2, 8), same=[8, 9])
    return folder


def run_apart(folder: Path, both: Path) -> None:
    """raw, features and copies of a; then those of b with those of a before; then one training set of both."""
    first = write_recipe(folder / "a.yaml", folder / "store", both / "a", dedup=DEDUP, curate=None)
    for verb in ("ingest", "embed", "dedup"):
        finish(verb, first)
    second = {**DEDUP, "previous": "copies/a@1"}
    finish("run", write_recipe(folder / "b.yaml", folder / "store", both / "b", dedup=second, curate=CURATE))


def decisions(store: Path, name: str) -> dict[str, list[tuple[str, str | None, str | None]]]:
    """What was decided about the files of every id."""
    found: dict[str, list[tuple[str, str | None, str | None]]] = {}
    for table in open_ledger(load(store, name).files).rows(["id", "decision", "stage", "reason", "row"]):
        for row in table.sort_by("row").to_pylist():
            found.setdefault(row["id"], []).append((row["decision"], row["stage"], row["reason"]))
    return found


def test_a_chain_of_two_crawls_gives_the_set_of_one_crawl_over_both(tmp_path: Path) -> None:
    both = lakes(tmp_path / "both")
    run_apart(tmp_path, both)
    finish("run", write_recipe(tmp_path / "w.yaml", tmp_path / "store", both, dedup=DEDUP, curate=CURATE))
    joined, whole = (load(tmp_path / "store", f"curated/{name}@1") for name in ("b", "w"))
    assert joined.record.counts == whole.record.counts == {"images": 20, "images_in": 44}
    manifests = [manifest_from_bytes(one.files.read("manifest.parquet")) for one in (joined, whole)]
    assert manifests[0]["id"].to_pylist() == manifests[1]["id"].to_pylist()
    assert decisions(tmp_path / "store", "curated/b@1") == decisions(tmp_path / "store", "curated/w@1")
    funnels = [json.loads(one.files.read("funnel.json")) for one in (joined, whole)]
    assert funnels[0] == funnels[1]
    # Images of both crawls are in it, with their own bytes.
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in both.rglob("*") if path.is_file()}
    read = ShardReader(joined.files)
    folders = set()
    for row in manifests[0].to_pylist():
        path = files[row["id"]]
        folders.add(path.parent.name)
        assert read(row["shard"], row["offset"], row["length"]) == path.read_bytes()
    assert folders == {"a", "b"}


def test_the_edges_of_the_first_crawl_are_not_looked_for_again(tmp_path: Path, capfd) -> None:
    both = lakes(tmp_path / "both")
    run_apart(tmp_path, both)
    first, second = (load(tmp_path / "store", f"copies/{name}@1") for name in ("a", "b"))
    assert second.record.inputs == {"features": "features/b@1", "previous": "copies/a@1"}
    join = second.read_json("copies.json")["statistics"]["join"]
    assert join["first_new_row"] == first.record.counts["images"] == 22
    pairs = [
        {(int(one), int(two)) for edges in iterate_edges(one_of.files, "edges/") for one, two in zip(*edges[:2], strict=True)}
        for one_of in (first, second)
    ]
    old, new = pairs
    assert join["num_edges"] == len({pair for pair in new if max(pair) >= 22}) > 0
    assert {pair for pair in new if max(pair) < 22} <= old
    assert old
    assert max(max(pair) for pair in old) < 22
    # A picture of the first crawl has its story in the curation of the second.
    capfd.readouterr()
    finish("why", "curated/b@1", "0002.png", f"store={tmp_path / 'store'}")
    assert "component" in capfd.readouterr().out
    finish("what-if", "dup_threshold=0.95", f"store={tmp_path / 'store'}")
    # The chain is as complete as its first link.
    third = write_recipe(tmp_path / "c.yaml", tmp_path / "store", both / "b", dedup={"previous": "copies/b@1"})
    status, error = refused(capfd, "dedup", third, "features=features/a@1")
    assert status == 2
    assert "dedup.previous=copies/b@1 covers features/a@1 already" in error
