"""Bad requests: one line that names the fault and the fix, the right exit status, and nothing half-written."""

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from heliostat import __version__
from heliostat.artifacts import RECORD, ArtifactRef, ArtifactStore
from heliostat.cli import OTHER_VERBS, STAGE_VERBS, main, parse
from heliostat.config import load_recipe, shipped_recipes
from heliostat.data.photographs import write_crops
from heliostat.runtime.recipe import Recipe
from heliostat.storage import LocalStore

CLUSTER_SECONDS = 25  # what a person waits for the news that a cluster is not there


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every relative path of a test, the default store included, lies in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail: (exit status, its line on stderr)."""
    status = main(list(arguments))
    error = capsys.readouterr().err
    assert error.startswith("heliostat: ")
    assert error.count("\n") == 1, error
    assert not list(Path().rglob(RECORD)), "a refused request left an artifact"
    return status, error


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two real crops."""
    write_crops(tmp_path / "photos", "left", count=1, seed=0)
    return tmp_path / "photos"


@pytest.mark.parametrize("command", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from heliostat.cli import main\n"
        f"try: main({command!r})\n"
        "except SystemExit: pass\n"
        "print('IMPORTED', *sorted(name for name in sys.modules if '.' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, imported = done.stdout.partition("IMPORTED")
    assert {"torch", "ray", "mlflow", "pydantic", "numpy", "yaml", "pyarrow", "boto3"} & set(imported.split()) == set()
    if command == ["--help"]:
        assert all(verb in shown for verb in {**OTHER_VERBS, **STAGE_VERBS})
    else:
        assert shown.split() == ["heliostat", __version__]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretain", "laptop"], "unknown verb: pretain. Did you mean pretrain?"),
        (["zzz"], "unknown verb: zzz. Verbs: run, demo,"),
        ([], "the following arguments are required: VERB"),
        (["pretrain", "laptop", "--dryrun"], "unrecognized arguments: --dryrun; see heliostat --help"),
        (["run"], "heliostat run takes one recipe, got nothing"),
        (["pretrain", "laptop", "other"], "heliostat pretrain takes one recipe, got laptop other"),
        (["run", "laptpo"], "no recipe at laptpo. Did you mean laptop?"),
        (["run", "demo"], "no recipe at demo. Did you mean laptop?"),
        (["run", "./missing.yaml"], "no recipe at ./missing.yaml. Shipped recipes: ablation, distill_vitg14, laptop, "),
        (["pretrain", "laptop", "optim.rl=2e-4"], "unknown key: pretrain.optim.rl. Did you mean pretrain.optim.lr?"),
        (["run", "laptop", "pretrian.optim.lr=2e-4"], "unknown key: pretrian. Did you mean pretrain?"),
        (["pretrain", "laptop", "train.steps=many"], "pretrain.train.steps='many': input should be a valid integer"),
        (["pretrain", "laptop", "train.steps=0"], "pretrain.train.steps=0: input should be greater than or equal to 1"),
        (["pretrain", "laptop", "optim.lr=[1"], "override pretrain.optim.lr: not valid YAML"),
        (
            ["pretrain", "laptop", "train.global_batch_size=63"],
            "train.global_batch_size 63 is not divisible by 2 workers; use 62 or 64",
        ),
        (
            ["pretrain", "laptop", "crops.global_crops_size=36"],
            "crops.global_crops_size 36 is not divisible by student.patch_size 8; use 32 or 40",
        ),
        (
            ["pretrain", "vitl14", "crops.global_crops_size=225"],
            "crops.global_crops_size 225 is not divisible by student.patch_size 14; use 224 or 238",
        ),
        (
            ["pretrain", "vitl16_short", "crops.local_crops_size=98"],
            "crops.local_crops_size 98 is not divisible by student.patch_size 16; use 96 or 112",
        ),
        (
            ["pretrain", "vitl14", "train.global_batch_size=3000"],
            "train.global_batch_size 3000 is not divisible by 96 workers; use 2976 or 3072",
        ),
        (
            ["run", "vitl14", "pretrain.phases=[{name: big, steps: 10, global_crops_size: 500}]"],
            "phase big: student: img_size 500 is not divisible by patch_size 14; use 490 or 504",
        ),
        (
            ["run", "laptop", "evaluate.pca_image_size=300"],
            "evaluate.pca_image_size 300 is not divisible by the models' patch_size 8; use 296 or 304",
        ),
        (
            ["pretrain", "laptop", "method.dino.head_n_prototypes=0"],
            "pretrain.method.dino.head_n_prototypes=0: input should be greater than or equal to 2",
        ),
        (["run", "vitg41"], "no recipe at vitg41. Did you mean vitg14?"),
        (
            ["ingest", "vitl14"],
            "recipe vitl14 has no section ingest; it has embed, dedup, curate, pretrain, publish. To add it give ingest.pool=",
        ),
        (
            ["evaluate", "vitl14"],
            "has no section evaluate; it has embed, dedup, curate, pretrain, publish. To add it give evaluate={}",
        ),
        (["crawl", "laptop"], "has no section crawl; it has ingest, "),
        (["crawl", "laptop"], "To add it give crawl.contact=... crawl.urls=[...]"),
        (["pretrain", "laptop", "train.steps=5"], "warmup_steps 30 does not end within a run of 5 steps; use at most 4"),
        (["lineage", "model-demo"], "'model-demo' is not an artifact; write kind/name@version"),
        (["lineage", "modle/demo@1"], "'modle/demo@1' is not an artifact; write kind/name@version with kind one of raw,"),
        (["lineage"], "heliostat lineage takes one artifact, got nothing"),
        (["why"], "heliostat why takes an id or source, a curated artifact before it if need be; see --help"),
        (["why", "curated/demo@1", "abc", "def"], "heliostat why takes an id or source, a curated artifact before it"),
        (["why", "raw/demo@1", "abcdef12"], "raw/demo@1 is not a curated artifact; only curation keeps a ledger"),
        (["why", "demo", "abcdef12"], "'demo' is not an artifact; write kind/name@version"),
        (["why", "abcdef12", "stor=x"], "unknown key: stor. This verb takes store="),
        (
            ["what-if", "dup_threshold=high"],
            "'dup_threshold=high' is not key=number or key=low..high with numbers from -1 to 1",
        ),
        (["what-if", "dup_threshold=2"], "'dup_threshold=2' is not key=number or key=low..high with numbers from -1 to 1"),
        (["what-if", "copies/demo@1", "dup_threshold=0.7"], "copies/demo@1 is not a curated artifact; only curation keeps a"),
        (["what-if", "a", "b"], "heliostat what-if takes one curated artifact, got a b"),
        (["forget"], "heliostat forget takes one image id, URL or domain, got nothing"),
        (["forget", "abc"], "'abc' is neither an id, a URL nor a domain; write source:abc for a name"),
        (["forget", "id:xyz"], "'xyz' is no id; give 8 to 64 hexadecimal digits"),
        (["forget", "example.org", "sotre=x"], "unknown key: sotre. This verb takes store="),
        (["embed", "laptop", "copy_embeder=thumbnail"], "unknown key: embed.copy_embeder. Did you mean embed.copy_embedder?"),
        (
            ["embed", "laptop", "copy_embedder=./none.onnx"],
            "embed.copy_embedder=./none.onnx: no such file or folder; give thumb",
        ),
        (["embed", "laptop", "raw=features/demo@1"], "embed.raw=features/demo@1 is of another kind; name raw/NAME@VERSION"),
        (["dedup", "laptop", "copies.threshold=1.5"], "dedup.copies.threshold"),
        (
            ["dedup", "laptop", "features=raw/demo@1"],
            "dedup.features=raw/demo@1 is of another kind; name features/NAME@VERSION",
        ),
        (["dedup", "laptop", "previous=features/demo@1"], "dedup.previous=features/demo@1 is of another kind; name copies/"),
        (["curate", "laptop", "copies=features/demo@1"], "curate.copies=features/demo@1 is of another kind; name copies/"),
        (["curate", "laptop", "retrieval.neighbors=0"], "curate.retrieval.neighbors=0: input should be greater than 0"),
        (["artifacts", "stor=x"], "unknown key: stor. This verb takes store="),
        (["artifacts", "store=gs://bucket/x"], "store scheme gs:// is not known; use a local path or s3://bucket/prefix"),
        (["run", "laptop", "pretrain.init.weights=./none.pth"], "no weights at ./none.pth; give model/name@version, a file ("),
        (["run", "laptop", "distill.teacher=none.pth"], "no weights at none.pth; give model/name@version, a file ("),
        (["run", "laptop", "distill.teacher=s3://bucket/g.pth"], "s3://bucket/g.pth: weights are read from a local file"),
        (["pretrain", "laptop", "data=photos/1"], "'photos/1' is not an artifact; write kind/name@version"),
        (["shard", "s3://", "name=a"], "s3:// names no bucket"),
        (["shard", "", "name=a"], "ingest.pool is missing; give a folder"),
        (["shard", "~nobody-here/photos", "name=a"], "~nobody-here/photos: there is no such user here"),
        (["shard"], "heliostat shard takes one folder, list, tar or Parquet file, got nothing"),
        (["shard", "photos"], "give the artifact a name: heliostat shard photos name=photos"),
        (["shard", "photos", "name=a", "formt=tar"], "unknown key: ingest.formt. Did you mean ingest.format?"),
        (["shard", "photos", "name=a", "format=zip"], "ingest.format='zip': input should be 'tar' or 'parquet'"),
        (["shard", "photos.zip", "name=a", "store=./store"], "photos.zip is compressed"),
        (["pretrain", "data=raw/demo@1"], "data=raw/demo@1 is an artifact: name the recipe that trains on it"),
    ],
)
def test_a_wrong_request_is_refused_with_its_fix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    status, error = refused(capsys, *arguments)
    assert status == 2, error
    assert said in error
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_the_section_names_what_it_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\ningest: {pool: photographs}\n")
    status, error = refused(capsys, "sweep", "own.yaml")
    assert status == 2
    assert "recipe own.yaml has no section sweep; it has ingest" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a list\n", "a recipe is a mapping of sections, this is a list"),
        ("name: own\nname: again\n", "key 'name' is given twice"),
        ("name: [\n", "not valid YAML"),
        ("ingest: {pool: photographs}\n", "missing key: name; add it to the recipe or give name=..."),
        ("name: ../own\n", "name='../own': string should match pattern"),
    ],
)
def test_a_wrong_recipe_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    status, error = refused(capsys, "run", "own.yaml")
    assert status == 2
    assert said in error


@pytest.mark.parametrize("verb", [["pretrain"], ["ingest", "laptop"]])
def test_a_folder_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: list[str]) -> None:
    status, error = refused(capsys, *verb, "pool=./nowhere" if len(verb) == 2 else "data=./nowhere")
    assert status == 1
    assert f"no folder at {tmp_path}/nowhere; give the folder that holds your images" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images_says_how_images_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("nothing here")
    status, error = refused(capsys, "pretrain", "data=./notes")
    assert status == 1
    assert f"no images below {tmp_path}/notes; files must end in .jpg" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_folder_of_broken_images_is_refused_before_anything_starts(capsys, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for index in range(5):
        (tmp_path / f"broken/{index}.jpg").write_bytes(b"<html>404</html>" * index)
    status, error = refused(capsys, "pretrain", "data=./broken")
    assert status == 1
    assert f"none of 5 probed files of {tmp_path}/broken is a readable image" in error
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_store_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    status, error = refused(capsys, "pretrain", f"data={photos}", f"store={tmp_path}/file/store")
    assert status == 1
    assert f"cannot write to {tmp_path}/file/store/_claims/raw: Not a directory; choose another store=" in error
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_version_with_another_configuration_is_refused_with_the_changed_field(capsys, tmp_path: Path, photos: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    digest = {"source_digest": "of other files", "images_per_shard": 512, "shard_bytes": 2**30, "format": "tar"}
    draft = artifacts.begin(ArtifactRef("raw", "demo", "1"), config=digest, inputs={}, notify=print)
    before = draft.commit(counts={}).record
    assert main(["ingest", "laptop", f"pool={photos}", "store=store"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "raw/demo@1 exists with another configuration (source_digest: of other files -> " in error
    assert "give version=... or restore the settings" in error
    assert artifacts.load(before.ref).record == before
    assert not (tmp_path / "store/raw/demo@1/draft.json").exists()


@pytest.mark.parametrize(
    ("verb", "missing", "made_by"),
    [
        ("embed", "raw/demo@1", "ingest"),
        ("dedup", "features/demo@1", "embed"),
        ("curate", "copies/demo@1", "dedup"),
        ("pretrain", "curated/demo@1", "curate"),
        ("sweep", "curated/demo@1", "curate"),
        ("distill", "curated/demo@1", "curate"),
        ("evaluate", "raw/demo-labelled@1", "ingest"),
        ("publish", "model/demo-student@1", "distill"),
    ],
)
def test_a_missing_input_is_named_with_the_verb_that_makes_it(capsys, tmp_path: Path, verb, missing, made_by) -> None:
    status, error = refused(capsys, verb, "laptop", "store=store")
    assert status == 1
    assert f"no artifact {missing} in store; `heliostat {made_by}` makes it, run that first" in error
    assert not (tmp_path / "store").exists()


def test_weights_that_are_an_artifact_may_be_made_by_the_run_and_are_looked_for_when_they_are_needed(capsys) -> None:
    status, error = refused(capsys, "distill", "laptop", "store=store", "teacher=model/later@1")
    assert status == 1
    assert "no artifact curated/demo@1 in store" in error


@pytest.mark.parametrize("verb", ["lineage", "why"])
def test_an_artifact_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, error = refused(capsys, verb, "curated/demo@7", *(["x"] if verb == "why" else []), "store=store")
    assert status == 1
    assert "no artifact curated/demo@7" in error


def test_an_empty_store_lists_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["artifacts", "store=store"]) == 0
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_not_there_is_reported_soon(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    started = time.monotonic()
    status, error = refused(capsys, "ingest", "laptop", f"pool={photos}", "store=store", "cluster.address=127.0.0.1:1")
    assert time.monotonic() - started < CLUSTER_SECONDS
    assert status == 1
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused); start one with `ray start --head`" in error


def test_cpus_cannot_be_set_for_a_cluster_that_is_joined(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    where = ["cluster.address=127.0.0.1:1", "cluster.num_cpus=4"]
    status, error = refused(capsys, "ingest", "laptop", f"pool={photos}", "store=store", *where)
    assert status == 2
    assert "cluster.num_cpus=4 cannot be set for the cluster at 127.0.0.1:1; remove it" in error


@pytest.mark.s3
@pytest.mark.usefixtures("s3_bucket")
def test_a_bucket_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    bucket = f"absent-{uuid.uuid4().hex[:12]}"
    store = f"store=s3://{bucket}/runs"
    status, error = refused(capsys, "ingest", "laptop", f"pool={photos}", store, "tracking.uri=none")
    assert status == 1
    assert f"no bucket {bucket}; create it or choose another store=" in error


@pytest.mark.s3
def test_a_wrong_secret_is_refused_without_showing_it(capsys, s3_server, s3_bucket, photos, monkeypatch) -> None:
    if not s3_server.checks_signatures:
        pytest.skip("this S3 server accepts every signature")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    status, error = refused(capsys, "ingest", "laptop", f"pool={photos}", f"store={s3_bucket}/runs", "tracking.uri=none")
    assert status == 1
    assert "was refused" in error
    assert "wrong-secret-value" not in error


def test_a_path_may_hold_an_equals_sign() -> None:
    request = parse(["shard", "s3://lake/date=2024-01-01", "name=a", "data={raw/a@1: 1, raw/b@1: 2}"])
    assert request.words == ("s3://lake/date=2024-01-01",)
    assert request.overrides == ("name=a", "data={raw/a@1: 1, raw/b@1: 2}")
    assert parse(["shard", "./run=3/photos", "name=a"]).words == ("./run=3/photos",)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from heliostat.errors import ConfigError

    monkeypatch.setenv("HELIOSTAT_DEBUG", "")  # restored after the test
    with pytest.raises(ConfigError, match=r"no recipe at demmo\. Did you mean laptop"):
        main(["run", "demmo", "--debug"])


def test_a_dry_run_prints_a_recipe_that_can_be_kept_and_writes_nothing(capsys, tmp_path: Path) -> None:
    assert main(["run", "laptop", "--dry-run", "version=7", "distill.optim.lr=5e-4"]) == 0
    printed, _, costs = capsys.readouterr().out.partition("\n# what this would cost")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept.yaml").write_text(printed)
    kept = load_recipe(Recipe, "kept.yaml")
    assert (kept.version, kept.distill.optim.lr, kept.pretrain.optim.lr) == ("7", 5e-4, 1e-3)
    assert kept == load_recipe(Recipe, "laptop", ["version=7", "distill.optim.lr=5e-4"])
    assert "# pretrain: " in costs
    assert "# sweep: 6 trials, 2 at a time" in costs


def test_lineage_and_artifacts_print_what_a_store_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    raw = artifacts.begin(ArtifactRef("raw", "own", "1"), config={}, inputs={}, notify=print).commit(counts={"images": 1200})
    draft = artifacts.begin(ArtifactRef("model", "own", "1"), config={"lr": 1}, inputs={"data": raw}, notify=print)
    draft.put("model.json", json.dumps({}).encode())
    draft.commit(counts={"steps": 5})
    assert main(["artifacts", "store=store"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == ["model/own@1", "raw/own@1"]
    assert listed[1].endswith("1,200 images")
    assert main(["lineage", "model/own@1", "store=store"]) == 0
    assert capsys.readouterr().out.splitlines() == ["model/own@1  [5 steps]", "└─ data: raw/own@1  [1,200 images]"]


def test_the_shipped_recipes_are_listed_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == shipped_recipes()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)


def test_a_name_with_an_equals_sign_can_be_asked_about() -> None:
    assert parse(["why", "curated/a@1", "a=b.png", "store=x"]).words == ("curated/a@1", "a=b.png")
    assert parse(["forget", "a=b.png"]).words == ("a=b.png",)
    assert parse(["why", "x", "stroe=y"]).overrides == ("stroe=y",)  # refused later, by its name


@pytest.mark.parametrize("words", [("--html", "store=/tmp/x"), ("--html=",)])
def test_a_page_without_a_file_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    status, error = refused(capsys, "lineage", "model/x@1", *words)
    assert status == 2
    assert "--html needs a file" in error


def test_artifacts_that_hold_no_images_are_refused_as_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, error = refused(capsys, "pretrain", "laptop", "data=model/x@1", f"store={tmp_path}")
    assert status == 2
    assert error == "heliostat: data=model/x@1 holds no images to train on; name curated/NAME@VERSION or raw/NAME@VERSION\n"


def test_a_damaged_record_does_not_hide_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    artifacts = ArtifactStore(LocalStore(tmp_path))
    for name in ("a", "b"):
        artifacts.begin(ArtifactRef("raw", name, "1"), config={}, inputs={}, notify=print).commit(counts={"images": 3})
    (tmp_path / "raw/a@1/artifact.json").write_text("{")
    assert main(["artifacts", f"store={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert "raw/a@1" in said.out
    assert "damaged" in said.out.splitlines()[0]
    assert "3 images" in said.out.splitlines()[1]
    assert said.err == "heliostat: 1 records are damaged, see above; restore them, or remove their folders\n"
