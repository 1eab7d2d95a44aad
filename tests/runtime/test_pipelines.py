"""`make`: an artifact is made once, taken up again after a failure, and refused under changed settings."""

import io
import json
from pathlib import Path

import pytest

from heliostat.artifacts import Artifact, ArtifactRef, Draft
from heliostat.errors import ArtifactConflictError, ArtifactNotFoundError, DataError
from heliostat.runtime import pipelines
from heliostat.runtime.pipelines import Context, Summary, code_version, config_of, make
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe, read_recipe
from heliostat.runtime.stage_train import NOT_IN_FINGERPRINT
from heliostat.tracking import Run
from heliostat.tracking.mlflow_client import open_client

REF = ArtifactRef("raw", "numbers", "1")


@pytest.fixture
def stream() -> io.StringIO:
    """What a person sees."""
    return io.StringIO()


@pytest.fixture
def context(tmp_path: Path, stream: io.StringIO) -> Context:
    recipe = Recipe.model_validate({"name": "numbers", "store": str(tmp_path / "store"), "tracking": {"uri": "none"}})
    return Context(recipe, Progress(stream))


class Counting:
    """A stage of three shards: counts how many it writes, and fails before the one it is told."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.written = fail_at, 0

    def __call__(self, draft: Draft, run: Run) -> Summary:
        for shard in range(3):
            key = f"_work/done-{shard}"
            if draft.files.size(key) is not None:
                continue
            if shard == self.fail_at:
                raise DataError(f"shard {shard} is damaged")
            draft.put(f"{shard}.bin", bytes([shard]))
            draft.put(key, b"")
            self.written += 1
        return Summary({"shards": 3}, {"mean": 1.5})


def run(context: Context, work, inputs: dict[str, Artifact] | None = None, **config) -> Artifact:
    return make(context, REF, stage="ingest", config=config, inputs=inputs or {}, work=work)


def test_an_artifact_is_made_once_and_then_reused(context: Context, stream: io.StringIO) -> None:
    first, second = Counting(), Counting()
    made = run(context, first, size=1)
    assert run(context, second, size=1).record == made.record
    assert (first.written, second.written) == (3, 0)
    assert made.record.counts == {"shards": 3}
    assert made.record.metrics == {"mean": 1.5}
    assert sorted(made.record.files) == ["0.bin", "1.bin", "2.bin"]
    assert not [entry.key for entry in made.files.list() if "_work" in entry.key]
    output = stream.getvalue().splitlines()
    assert output[0] == "ingest    raw/numbers@1"
    assert output[2] == f"ingest    raw/numbers@1: reused, made {made.record.created}"


def test_a_failed_stage_leaves_no_artifact_and_the_next_run_does_only_the_rest(context: Context, stream: io.StringIO) -> None:
    with pytest.raises(DataError, match="shard 2 is damaged"):
        run(context, Counting(fail_at=2), size=1)
    assert context.artifacts.find(REF) is None
    again = Counting()
    made = run(context, again, size=1)
    assert again.written == 1
    assert sorted(made.record.files) == ["0.bin", "1.bin", "2.bin"]
    assert "raw/numbers@1: resuming" in stream.getvalue()


def test_an_interrupt_is_a_failure_of_the_same_kind(context: Context) -> None:
    def work(draft: Draft, run: Run) -> Summary:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(context, work, size=1)
    assert context.artifacts.find(REF) is None
    assert run(context, Counting(), size=1).record.counts == {"shards": 3}


def test_a_second_run_of_one_version_is_refused_while_the_first_lives_and_no_file_changes(context: Context) -> None:
    rival = Counting()

    def busy(draft: Draft, run_of_it: Run) -> Summary:
        for size in (1, 2):
            with pytest.raises(
                ArtifactConflictError, match=r"raw/numbers@1 is being made by process \d+ on .*, which is alive"
            ):
                run(context, rival, size=size)
        return Counting()(draft, run_of_it)

    made = run(context, busy, size=1)
    assert rival.written == 0
    assert {entry.key for entry in made.files.list()} == {"0.bin", "1.bin", "2.bin", "artifact.json"}
    assert not list(context.artifacts.store.list("_claims/"))


def lose_claim(context: Context) -> None:
    """Another run has taken over."""
    owner = {"token": "t", "host": "far", "machine": "far 1", "pid": 7, "started": "1"}
    context.artifacts.store.put("_claims/raw/numbers@1.json", json.dumps(owner).encode())


def test_a_run_that_seemed_dead_takes_the_result_of_the_one_that_took_over(context: Context, stream: io.StringIO) -> None:
    """It wakes up late: its claim was taken and its version committed."""

    def overtaken(draft: Draft, run_of_it: Run) -> Summary:
        context.artifacts.store.delete("_claims/raw/numbers@1.json")
        run(context, Counting(), size=1)
        return Summary({"shards": 0})

    made = run(context, overtaken, size=1)
    assert made.record.counts == {"shards": 3}
    assert "raw/numbers@1 was finished by another run meanwhile; its result is used" in stream.getvalue()
    assert {entry.key for entry in made.files.list()} == {"0.bin", "1.bin", "2.bin", "artifact.json"}


def test_a_run_that_lost_its_claim_commits_nothing(context: Context) -> None:
    def overtaken(draft: Draft, run_of_it: Run) -> Summary:
        lose_claim(context)
        return Counting()(draft, run_of_it)

    with pytest.raises(ArtifactConflictError, match="by process 7 on far, because this run seemed dead for a while"):
        run(context, overtaken, size=1)
    assert context.artifacts.find(REF) is None


def test_an_unfinished_run_with_other_settings_is_discarded_aloud(context: Context, stream: io.StringIO) -> None:
    with pytest.raises(DataError):
        run(context, Counting(fail_at=1), size=1)
    other = Counting()
    run(context, other, size=2)
    assert other.written == 3
    assert "files of an unfinished run with other settings" in stream.getvalue()


def test_changed_settings_under_a_finished_version_are_refused_before_any_work(context: Context) -> None:
    made = run(context, Counting(), size=1, seed=0)
    with pytest.raises(ArtifactConflictError, match=r"\(size: 1 -> 2\)"):
        run(context, Counting(fail_at=0), size=2, seed=0)
    assert context.artifacts.load(REF).record == made.record


def test_changed_inputs_under_a_finished_version_are_refused(context: Context) -> None:
    first = run(context, Counting(), size=1)
    second = make(context, ArtifactRef("raw", "b", "1"), stage="ingest", config={"size": 9}, inputs={}, work=Counting())
    target = ArtifactRef("curated", "numbers", "1")
    make(context, target, stage="curate", config={}, inputs={"raw": first}, work=Counting())
    with pytest.raises(ArtifactConflictError, match=r"inputs\.raw: \S+ \(\w+\) -> raw/b@1"):
        make(context, target, stage="curate", config={}, inputs={"raw": second}, work=Counting())


def test_a_missing_input_names_the_verb_that_makes_it(context: Context) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"no artifact report/x@1 .*`heliostat evaluate` makes it"):
        context.load(ArtifactRef("report", "x", "1"))
    with pytest.raises(ArtifactNotFoundError, match="`heliostat pretrain` makes it"):
        context.load(ArtifactRef("model", "another", "1"))
    distill = {"students": {"small": {"arch": "vit_tiny"}}, "train": {"steps": 625_000}, "compare_with_scratch": True}
    context.recipe = Recipe.model_validate({"name": "numbers", "distill": distill})
    for name in ("numbers-small", "numbers-small-scratch"):
        with pytest.raises(ArtifactNotFoundError, match="`heliostat distill` makes it"):
            context.load(ArtifactRef("model", name, "1"))


@pytest.mark.parametrize(
    "override",
    [
        "pretrain.scaling.num_workers=1",
        "pretrain.scaling.threads_per_worker=2",
        "pretrain.loader.workers=7",
        "pretrain.loader.cache_bytes=0",
        "pretrain.train.checkpoint_every_steps=3",
        "pretrain.train.keep_last=9",
        "pretrain.train.log_every_steps=3",
        "pretrain.train.nonfinite_policy=abort",
        "pretrain.train.max_nonfinite_steps=50",
        "store=/somewhere/else",
        "cluster.address=10.0.0.1:6379",
        "tracking.uri=none",
    ],
)
def test_hosts_paths_and_speed_are_not_in_the_fingerprint(override: str) -> None:
    plain, changed = (read_recipe("laptop", words).pretrain for words in ((), (override,)))
    assert config_of(plain, without=NOT_IN_FINGERPRINT) == config_of(changed, without=NOT_IN_FINGERPRINT)


@pytest.mark.parametrize(
    "override", ["train.steps=190", "train.seed=1", "train.global_batch_size=32", "decode.min_side_pixels=9"]
)
def test_what_changes_the_weights_is_in_the_fingerprint(override: str) -> None:
    plain, changed = (read_recipe("laptop", words, "pretrain").pretrain for words in ((), (override,)))
    assert config_of(plain, without=NOT_IN_FINGERPRINT) != config_of(changed, without=NOT_IN_FINGERPRINT)


def test_the_code_version_of_a_checkout_names_its_commit() -> None:
    version, _, commit = code_version().partition("+")
    assert version.count(".") == 2
    assert commit == "" or len(commit) == 12


def test_a_run_that_was_left_open_by_a_kill_after_the_commit_is_closed_by_the_next(
    tmp_path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(Recipe.model_validate({"name": "numbers", "store": str(tmp_path)}), Progress(stream))

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "describe_lineage", die)
        with pytest.raises(Killed):
            run(context, Counting(), size=1)
    made = context.artifacts.find(REF)
    assert made is not None
    client = open_client(context.tracker.uri)
    [found] = client.search_runs([client.get_experiment_by_name("heliostat").experiment_id])
    assert found.info.status == "FAILED"
    again = Counting()
    run(context, again, size=1)
    assert again.written == 0
    found = client.get_run(found.info.run_id)
    assert found.info.status == "FINISHED"
    assert "raw/numbers@1" in found.data.tags["mlflow.note.content"]
    assert "lineage.html" in {file.path for file in client.list_artifacts(found.info.run_id)}
    assert made.files.size("draft.json") is None
