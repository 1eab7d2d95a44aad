"""Bad input to embed, dedup and curate: one line that names the fault, nothing torn, and the same command goes on after."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from curation_runs import contents, finish, load, refused, write_pictures, write_recipe
from onnx import TensorProto, helper

from heliostat.artifacts import RECORD
from heliostat.data.manifest import manifest_from_bytes
from heliostat.storage import LocalStore

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray 2.60's, about its own settings
]


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused must be so before Ray starts."""

    def opened(_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("heliostat.runtime.pipelines.open_session", opened)


def write_onnx(path: Path, axes: tuple[int, ...]) -> Path:
    """Mean of 24 x 24 pixels over the given axes: vectors when those are both spatial ones."""
    nodes = [helper.make_node("ReduceMean", ["pixels"], ["vector"], axes=list(axes), keepdims=0)]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 24, 24])]
    outputs = [helper.make_tensor_value_info("vector", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "mean", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def records(store: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(store)) for path in store.rglob(RECORD))


@pytest.mark.usefixtures("no_ray")
def test_a_folder_without_images_is_refused_before_ray_starts(tmp_path: Path, capfd) -> None:
    (tmp_path / "lake").mkdir()
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "store", tmp_path / "lake")
    status, error = refused(capfd, "run", recipe)
    assert status == 1
    assert str(tmp_path / "lake") in error
    (tmp_path / "lake" / "notes.txt").write_text("no image")
    assert refused(capfd, "run", recipe)[0] == 1
    assert records(tmp_path) == []


@pytest.mark.usefixtures("local_ray")
def test_a_folder_in_which_nothing_is_an_image_is_named(tmp_path: Path, capfd) -> None:
    (tmp_path / "lake").mkdir()
    for number in range(3):
        (tmp_path / "lake" / f"{number}.png").write_text("<html>not found</html>")
    status, error = refused(capfd, "run", write_recipe(tmp_path / "r.yaml", tmp_path / "store", tmp_path / "lake"))
    assert status == 1
    assert f"{tmp_path / 'lake'} holds no image that can be packed" in error
    assert records(tmp_path) == []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("same", [[], [0]])
def test_one_image_and_its_duplicates_become_a_training_set_of_one(tmp_path: Path, capfd, same: list[int]) -> None:
    lake = write_pictures(tmp_path / "lake", [0], same=same, copies=same)
    for number in range(4 if same else 0):
        shutil.copy(lake / "0000.png", lake / f"again-{number}.png")
    finish("run", write_recipe(tmp_path / "r.yaml", tmp_path / "store", lake))
    curated = load(tmp_path / "store", "curated/r@1")
    assert curated.record.counts == {"images": 1, "images_in": len(list(lake.iterdir()))}
    manifest = manifest_from_bytes(curated.files.read("manifest.parquet"))
    assert manifest["id"].to_pylist() == [hashlib.sha256((lake / "0000.png").read_bytes()).hexdigest()]
    capfd.readouterr()
    finish("why", manifest["id"][0].as_py(), f"store={tmp_path / 'store'}")
    assert "It was kept." in capfd.readouterr().out
    if same:
        finish("why", "0000-copy.jpg", f"store={tmp_path / 'store'}")
        assert "It was dropped by stage" in capfd.readouterr().out
        finish("what-if", "dup_threshold=0.9", f"store={tmp_path / 'store'}")
        assert "curated/r@1" in capfd.readouterr().out


@pytest.mark.usefixtures("no_ray")
def test_retrieval_without_a_curated_set_is_refused_before_ray_starts(tmp_path: Path, capfd) -> None:
    lake = write_pictures(tmp_path / "lake", range(3))
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "store", lake, curate={"retrieval": {"mode": "sample"}})
    for verb in ("run", "embed"):
        status, error = refused(capfd, verb, recipe)
        assert status == 2
        assert f"there is no raw/r-curated@1 in {tmp_path / 'store'}; give ingest.curated=... or" in error
    named = {"mode": "auto", "sets": {"birds": {"artifact": "raw/birds@1"}}}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "store", lake, curate={"retrieval": named})
    status, error = refused(capfd, "run", recipe)
    assert status == 2
    assert "the recipe uses a set birds, and there is no raw/birds@1" in error
    assert records(tmp_path) == []


@pytest.mark.usefixtures("local_ray")
def test_a_curated_set_that_matches_no_cluster_is_named_and_what_was_made_before_stays(tmp_path: Path, capfd) -> None:
    lake, own = write_pictures(tmp_path / "lake", range(12)), write_pictures(tmp_path / "own", [100, 101])
    retrieval = {"mode": "cluster", "num_clusters": 3}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "store", lake, ingest={"curated": str(own)}, curate={"retrieval": retrieval}
    )
    status, error = refused(capfd, "run", recipe)
    assert status == 1
    assert "curated" in error
    assert "min_images_per_cluster" in error
    assert records(tmp_path / "store") == ["copies/r@1", "features/r-curated@1", "features/r@1", "raw/r-curated@1", "raw/r@1"]
    finish("curate", recipe, "retrieval.min_images_per_cluster=0")
    assert load(tmp_path / "store", "curated/r@1").record.counts["images"] >= 1


@pytest.mark.usefixtures("local_ray")
def test_a_set_that_joins_as_it_is_joins_once_though_it_holds_kept_images_repeats_and_broken_files(tmp_path: Path) -> None:
    lake, own = write_pictures(tmp_path / "lake", range(6)), write_pictures(tmp_path / "own", range(4, 10), same=[8])
    whole = (own / "0009.png").read_bytes()
    (own / "torn.png").write_bytes(whole[: len(whole) // 2])
    retrieval = {"mode": "auto", "sets": {"own": {"mode": "none", "as_is": True}}}
    ingest = {"curated": str(own), "images_per_shard": 3}
    finish("run", write_recipe(tmp_path / "r.yaml", tmp_path / "store", lake, ingest=ingest, curate={"retrieval": retrieval}))
    curated = load(tmp_path / "store", "curated/r@1")
    found = manifest_from_bytes(curated.files.read("manifest.parquet"))["id"].to_pylist()
    pool, joined = (
        [hashlib.sha256((folder / f"{seed:04d}.png").read_bytes()).hexdigest() for seed in seeds]
        for folder, seeds in ((lake, range(6)), (own, range(6, 10)))
    )
    assert found[:6] == pool
    assert sorted(found[6:]) == sorted(joined)


@pytest.mark.usefixtures("local_ray")
def test_a_pool_that_shows_nothing_but_evaluation_images_is_refused(tmp_path: Path, capfd) -> None:
    lake = write_pictures(tmp_path / "lake", range(3))
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "store", lake, ingest={"evaluation": str(lake)})
    status, error = refused(capfd, "run", recipe)
    assert status == 1
    assert "dedup leaves no image" in error


@pytest.fixture(scope="module")
def earlier(local_ray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store in which features and copies of a pool are, by the recipe first.yaml."""
    folder = tmp_path_factory.mktemp("earlier")
    recipe = write_recipe(folder / "first.yaml", folder / "store", write_pictures(folder / "lake", range(9)))
    for verb in ("ingest", "embed", "dedup"):
        finish(verb, recipe)
    return folder


@pytest.fixture
def later(earlier: Path, tmp_path: Path) -> Path:
    """A folder with a copy of that store, and a second lake."""
    shutil.copytree(earlier / "store", tmp_path / "store")
    write_pictures(tmp_path / "lake", range(20, 24))
    return tmp_path


@pytest.mark.usefixtures("local_ray")
def test_an_earlier_crawl_of_another_embedder_is_refused_with_both(later: Path, capfd) -> None:
    embed = {"copy_embedder": str(write_onnx(later / "mean.onnx", (2, 3)))}
    recipe = write_recipe(
        later / "second.yaml", later / "store", later / "lake", embed=embed, dedup={"previous": "copies/first@1"}
    )
    status, error = refused(capfd, "run", recipe)
    assert status == 1
    assert "features/first@1 and features/second@1 were made with another copy embedder each (thumbnail" in error
    assert "copies/second@1" not in records(later / "store")


@pytest.mark.usefixtures("no_ray")
def test_a_crawl_is_not_joined_with_itself(later: Path, capfd) -> None:
    recipe = write_recipe(later / "second.yaml", later / "store", later / "lake")
    words = ("features=features/first@1", "previous=copies/first@1")
    status, error = refused(capfd, "dedup", recipe, *words)
    assert status == 2
    assert "dedup.previous=copies/first@1 covers features/first@1 already" in error


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("verb", "override", "said"),
    [
        ("embed", "embed.raw=features/first@1", "embed.raw=features/first@1 is of another kind; name raw/NAME@VERSION"),
        ("dedup", "dedup.features=copies/first@1", "is of another kind; name features/NAME@VERSION"),
        ("dedup", "dedup.previous=features/first@1", "is of another kind; name copies/NAME@VERSION"),
        ("dedup", "dedup.evaluation={test: features/first@1}", "dedup.evaluation.test=features/first@1 is of another kind"),
        ("curate", "curate.copies=features/first@1", "is of another kind; name copies/NAME@VERSION"),
        ("curate", "curate.copies=copies/first", "'copies/first' is not an artifact; write kind/name@version"),
    ],
)
def test_an_artifact_of_another_kind_is_refused_with_the_kind_that_is_meant(later: Path, capfd, verb, override, said) -> None:
    recipe = write_recipe(later / "second.yaml", later / "store", later / "lake")
    status, error = refused(capfd, verb, recipe, override)
    assert status == 2
    assert said in error


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("override", "missing", "verb"),
    [
        ("dedup.previous=copies/none@1", "copies/none@1", "dedup"),
        ("dedup.features=features/none@1", "features/none@1", "embed"),
    ],
)
def test_an_artifact_that_is_not_there_is_named_with_what_makes_it(later: Path, capfd, override, missing, verb) -> None:
    recipe = write_recipe(later / "first.yaml", later / "store", later / "lake")
    status, error = refused(
        capfd, "dedup", recipe, override, "version=2", *([] if "features" in override else ["features=features/first@1"])
    )
    assert status == 1
    assert f"no artifact {missing} in {later / 'store'}; `heliostat {verb}` makes it, run that first" in error


@pytest.mark.usefixtures("no_ray")
def test_an_embedder_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path, capfd) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "store", write_pictures(tmp_path / "lake", range(2)))
    for key in ("copy_embedder", "semantic_embedder"):
        status, error = refused(capfd, "run", recipe, f"embed.{key}={tmp_path / 'none.onnx'}")
        assert status == 2
        assert f"embed.{key}={tmp_path / 'none.onnx'}: no such file or folder; give thumbnail, copy" in error
    assert records(tmp_path) == []


@pytest.mark.usefixtures("no_ray")
def test_a_network_that_gives_no_vector_is_refused_before_any_image_is_read(later: Path, capfd) -> None:
    path = write_onnx(later / "rows.onnx", (2,))
    recipe = write_recipe(later / "first.yaml", later / "store", later / "lake")
    status, error = refused(capfd, "embed", recipe, f"copy_embedder={path}", "raw=raw/first@1", "version=2")
    assert status == 1
    assert "rows.onnx gives (1, 3, 24) for 1 images, (images, width) is expected" in error
    assert "features/first@2" not in records(later / "store")


@pytest.mark.usefixtures("local_ray")
def test_a_raw_shard_that_is_damaged_afterwards_is_named_by_embed_and_by_curate(later: Path, capfd) -> None:
    store = LocalStore(later / "store")
    key = "raw/first@1/shards/000001.tar"
    good = store.read(key)
    store.put(key, good[:600] + bytes([good[600] ^ 1]) + good[601:])
    recipe = write_recipe(later / "first.yaml", later / "store", later / "lake")
    for words in (["embed", recipe, "raw=raw/first@1", "version=2"], ["curate", recipe, "copies=copies/first@1", "version=2"]):
        status, error = refused(capfd, *words)
        assert status == 1
        assert "0008.png in shards/000001.tar does not match its id" in error
    store.put(key, good)
    for words in (["embed", recipe, "raw=raw/first@1", "version=2"], ["curate", recipe, "copies=copies/first@1", "version=2"]):
        finish(*words)
    assert load(later / "store", "curated/first@2").record.counts["images"] == 9


@pytest.mark.usefixtures("local_ray")
def test_features_that_were_removed_are_missed_by_name(later: Path, capfd) -> None:
    shutil.rmtree(later / "store/features/first@1")
    status, error = refused(capfd, "curate", write_recipe(later / "first.yaml", later / "store", later / "lake"))
    assert status == 1
    assert "no artifact features/first@1" in error
    assert "`heliostat embed` makes it" in error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory whose size `resize` sets."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk in memory")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(folder)], check=True)


@pytest.mark.usefixtures("local_ray")
def test_a_disk_that_fills_up_tears_nothing_and_with_room_again_the_same_bytes_come(tmp_path: Path, small_disk, capfd) -> None:
    lake = write_pictures(tmp_path / "lake", range(20), copies=range(6), same=range(3))
    finish("run", write_recipe(tmp_path / "r.yaml", tmp_path / "whole", lake))
    whole = contents(tmp_path / "whole")
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "whole").rglob("*") if path.is_file())
    recipe = write_recipe(tmp_path / "r.yaml", small_disk / "store", lake)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        resize(small_disk, int(share * used))
        status, error = refused(capfd, "run", recipe)
        assert status == 1
        assert "No space left on device" in error
        assert "free some room" in error or "choose another store" in error
        found = {str(path.relative_to(small_disk / "store")): path for path in (small_disk / "store").rglob("*")}
        for name in set(found) & set(whole):
            assert hashlib.sha256(found[name].read_bytes()).hexdigest() == whole[name]
    resize(small_disk, 4 * used)
    finish("run", recipe)
    assert contents(small_disk / "store") == whole
    assert not [entry.key for entry in LocalStore(small_disk / "store").list() if "/_work/" in entry.key]
