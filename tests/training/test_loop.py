"""A run that was stopped anywhere ends as the uninterrupted one, bit for bit; a loss that is not finite changes nothing."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tars import Tars
from tiny_training import SHARD, Log, Stop, StopAfter, final_files, job, settings, shard, state_bytes, train, trainer

from heliostat.data.image_source import ImageSource
from heliostat.data.image_table import image_table
from heliostat.data.shards import manifest_rows
from heliostat.errors import ArtifactConflictError, CheckpointError, DataError, NonFiniteLossError, StorageError
from heliostat.metrics import METRICS
from heliostat.storage import LocalStore, Store
from heliostat.training.checkpoint import complete_steps, read_rejections
from heliostat.training.loop import fit, one_step, seed_step
from heliostat.training.run import Watch, build_trainer
from heliostat.training.trainer import DATA_REVISIONS, LoopState
from heliostat.training.world import World

CENTERINGS = ["centering", "sinkhorn_knopp"]


@pytest.fixture(scope="module")
def tar() -> bytes:
    return shard()


@pytest.fixture(scope="module", params=CENTERINGS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tar: bytes) -> tuple[Path, str]:
    """An uninterrupted run of eight steps, and its centering."""
    folder = tmp_path_factory.mktemp("whole")
    train(job(folder, settings(f"method.centering={request.param}"), tar))
    return folder, f"method.centering={request.param}"


@pytest.mark.parametrize("stop", [2, 4, 6, 8])
def test_a_stopped_run_resumes_to_the_same_files(whole: tuple[Path, str], tmp_path: Path, tar: bytes, stop: int) -> None:
    before, centering = whole
    work = job(tmp_path, settings(centering), tar)
    with pytest.raises(Stop):
        train(work, StopAfter(step=stop))
    assert complete_steps(work.files) == [step for step in (2, 4, 6) if step < stop][-2:]
    log = Log()
    train(work, log)
    assert log.said == ([f"resuming at step {stop - 2} of 8"] if stop > 2 else [])
    assert [step for step, _ in log.metrics] == list(range(stop, 9, 2))
    assert final_files(tmp_path) == final_files(before)


def test_a_run_that_goes_on_in_another_way_says_how_its_checkpoint_was_computed(tmp_path: Path, tar: bytes) -> None:
    other = ("train.compute_dtype=bfloat16", "scaling.images_per_pass=2")
    with pytest.raises(Stop):
        train(job(tmp_path, settings(*other), tar), StopAfter(step=4))
    log = Log()
    train(job(tmp_path, settings(), tar), log)
    assert log.said == ["resuming at step 2 of 8, written with compute_dtype bfloat16, scaling.images_per_pass 2"]


def test_a_run_stopped_many_times_ends_the_same(whole: tuple[Path, str], tmp_path: Path, tar: bytes) -> None:
    before, centering = whole
    for stop in (2, 4, 4, 6, 8):
        with pytest.raises(Stop):
            train(job(tmp_path, settings(centering), tar), StopAfter(step=stop))
    train(job(tmp_path, settings(centering), tar))
    assert final_files(tmp_path) == final_files(before)


def test_how_often_checkpoints_are_written_and_loader_threads_do_not_change_the_result(whole, tmp_path: Path, tar) -> None:
    before, centering = whole
    train(job(tmp_path, settings(centering, "train.checkpoint_every_steps=5", "online.every_steps=2", "loader.workers=2"), tar))
    assert final_files(tmp_path) == final_files(before)


def test_a_run_that_finished_training_but_not_its_files_only_writes_them(whole, tmp_path: Path, tar: bytes) -> None:
    before, centering = whole
    work = job(tmp_path, settings(centering), tar)
    fit(trainer(work))
    log = Log()
    train(work, log)
    assert log.said == ["resuming at step 8 of 8"]
    assert log.metrics == []
    assert final_files(tmp_path) == final_files(before)


def test_a_run_that_wakes_up_after_another_has_finished_leaves_its_files_alone(tmp_path: Path, tar: bytes) -> None:
    work = job(tmp_path, settings(), tar)
    work.files.put("artifact.json", b"the other's")
    work.files.put("history.jsonl", b"the other's")
    with pytest.raises(ArtifactConflictError, match="was finished by another run meanwhile; its files are left as they are"):
        train(work)
    assert work.files.read("history.jsonl") == b"the other's"
    assert work.files.size("backbone.safetensors") is None


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_result(whole, tmp_path: Path, tar: bytes) -> None:
    before, centering = whole
    work = job(tmp_path, settings(centering), tar)
    with pytest.raises(Stop):
        train(work, StopAfter(step=8))
    key = "_work/checkpoints/step-00000006/rank-00000.safetensors"
    work.files.put(key, work.files.read(key)[:-7])
    log = Log()
    train(work, log)
    assert "passing over a damaged checkpoint" in log.said[0]
    assert log.said[1] == "resuming at step 4 of 8"
    assert final_files(tmp_path) == final_files(before)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, tar: bytes) -> None:
    with pytest.raises(Stop):
        train(job(tmp_path, settings(), tar), StopAfter(step=4))
    with pytest.raises(CheckpointError, match="checkpoint of step 2"):
        train(job(tmp_path, settings("student.depth=3"), tar))


def test_another_seed_gives_other_weights(whole: tuple[Path, str], tmp_path: Path, tar: bytes) -> None:
    before, centering = whole
    train(job(tmp_path, settings(centering, "train.seed=1"), tar))
    assert final_files(tmp_path)["backbone.safetensors"] != final_files(before)["backbone.safetensors"]


def pieces_of(made: Any) -> dict[str, list[float]]:
    """Weights, averages, centres and moments."""
    return {piece.name: piece.values.tolist() for piece in made.engine.pieces()}


def poison(method: torch.nn.Module, *, batches: int) -> None:
    """Make the next `batches` student forwards return NaN in one logit, as an overflow would."""
    left = [batches]

    def hook(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor | None:
        if left[0] == 0:
            return None
        left[0] -= 1
        return output.masked_fill(torch.arange(output.numel()).view_as(output) == 0, torch.nan)

    method.student.dino_head.register_forward_hook(hook)


@pytest.mark.parametrize("centering", CENTERINGS)
def test_a_loss_that_is_not_finite_leaves_weights_moments_centres_and_teacher_alone(tmp_path, tar, centering) -> None:
    log = Log()
    made = trainer(job(tmp_path, settings(f"method.centering={centering}"), tar), log)
    state = LoopState()
    for step in range(2):
        one_step(made, state, made.loader.batch(step))
    weights, held = state_bytes(made.method), pieces_of(made)
    poison(made.method, batches=1)
    one_step(made, state, made.loader.batch(2))
    assert state_bytes(made.method) == weights
    assert pieces_of(made) == held
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (3, 1, 1)
    assert "step 2: not finite: dino_" in log.said[0]
    assert log.said[0].endswith("the step is skipped, student and teacher are untouched")
    one_step(made, state, made.loader.batch(3))
    assert state_bytes(made.method) != weights
    assert (state.skipped_steps, state.skipped_in_a_row) == (1, 0)
    assert log.metrics[-1][1]["train/skipped_steps"] == 1


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path: Path, tar: bytes) -> None:
    log = Log()
    made = trainer(job(tmp_path, settings(), tar), log)
    state = LoopState()
    one_step(made, state, made.loader.batch(0))
    weights = state_bytes(made.method)
    handle = made.method.student.backbone.cls_token.register_hook(lambda gradient: gradient * torch.inf)
    one_step(made, state, made.loader.batch(1))
    handle.remove()
    assert state_bytes(made.method) == weights
    assert state.skipped_steps == 1
    assert "step 1: not finite: gradient of backbone" in log.said[0]
    one_step(made, state, made.loader.batch(2))
    assert state_bytes(made.method) != weights
    assert all(value.isfinite().all() for value in made.method.state_dict().values())


def test_features_that_are_not_finite_at_a_recorded_step_are_recorded_as_such(tmp_path: Path, tar: bytes) -> None:
    log = Log()
    made = trainer(job(tmp_path, settings("train.log_every_steps=1"), tar), log)
    state = LoopState()
    token = made.method.student.backbone.cls_token
    before = token.detach().clone()
    token.data.fill_(torch.nan)
    one_step(made, state, made.loader.batch(0))
    token.data.copy_(before)
    assert state.skipped_steps == 1
    assert math.isnan(log.metrics[-1][1]["train/rankme"])
    one_step(made, state, made.loader.batch(1))
    assert math.isfinite(log.metrics[-1][1]["train/rankme"])


def test_losses_that_stay_not_finite_abort_the_run_after_the_limit(tmp_path: Path, tar: bytes) -> None:
    log = Log()
    made = trainer(job(tmp_path, settings("train.max_nonfinite_steps=2"), tar), log)
    poison(made.method, batches=100)
    with pytest.raises(NonFiniteLossError, match=r"step 2: not finite: .*; 3 steps in a row, train\.max_nonfinite_steps is 2"):
        fit(made)
    assert len(log.said) == 2
    assert [entry.key for entry in LocalStore(tmp_path).list() if entry.key == "backbone.safetensors"] == []


def test_the_policy_abort_ends_the_run_at_the_first_value_that_is_not_finite(tmp_path: Path, tar: bytes) -> None:
    made = trainer(job(tmp_path, settings("train.nonfinite_policy=abort"), tar))
    state = LoopState()
    one_step(made, state, made.loader.batch(0))
    before = state_bytes(made.method)
    poison(made.method, batches=1)
    with pytest.raises(NonFiniteLossError, match=r"step 1: not finite: dino_.*nonfinite_policy is abort"):
        one_step(made, state, made.loader.batch(1))
    assert state_bytes(made.method) == before


class FullForTeachers(LocalStore):
    """A store that takes everything but the teachers of evaluation points, while `is_full`."""

    is_full = True

    def put(self, key: str, data: bytes, *, overwrite: bool = True) -> None:
        if self.is_full and "/teacher/" in f"{self.uri}/{key}":
            raise StorageError(f"{key}: no space left on device")
        super().put(key, data, overwrite=overwrite)

    def child(self, prefix: str) -> Store:
        child = FullForTeachers(self._root / prefix)
        child.is_full = self.is_full
        return child


def test_a_store_without_room_for_a_teacher_costs_its_evaluation_and_a_resumed_run_keeps_the_last(tmp_path, tar) -> None:
    log, files = Log(), FullForTeachers(tmp_path)
    seen: list[int] = []

    def evaluate(model: str, step: int, folder: Store) -> None:
        seen.append(step)

    work = job(files, settings("online.every_steps=4"), tar)

    def run() -> None:
        fit(build_trainer(work, World(), log.report, log.said.append, watch=Watch(evaluate)))

    run()
    assert seen == []
    assert [line.partition(" could")[0] for line in log.said if "no space" in line] == [
        "the teacher of step 4",
        "the teacher of step 8",
    ]
    assert complete_steps(files)[-1] == 8
    files.is_full = False
    run()
    assert seen == [8]
    run()
    assert seen == [8], "it is there"


def test_every_loss_is_recorded_beside_its_value_at_uniform_output(tmp_path: Path, tar: bytes) -> None:
    log = Log()
    made = trainer(job(tmp_path, settings("train.log_every_steps=1"), tar), log)
    with torch.no_grad():  # gains of 0 make all logits 0
        for head in (made.method.student.dino_head, made.method.student.ibot_head):
            head.last_layer.parametrizations.weight.original0.zero_()
    batch = made.loader.batch(0)
    one_step(made, LoopState(), batch)
    ((_, numbers),) = log.metrics
    # On a grid of 4 x 4 a small block may fit nowhere; the announced value is that of half the crops being masked.
    shares = {"dino_global": 1.0, "dino_local": 1.0, "ibot": float(batch.masks.any(1).float().mean()) / 0.5}
    for name, share in shares.items():
        assert numbers[f"train/{name}"] == pytest.approx(share * numbers[f"train/{name}_at_uniform"], rel=1e-5), name
    entropy = numbers["train/teacher_entropy"]
    assert numbers["train/kl_to_teacher"] == pytest.approx(math.log(24) - entropy, rel=1e-4)
    assert numbers["train/teacher_entropy_at_uniform"] == pytest.approx(math.log(24))
    parts = [numbers[f"train/grad_norm_{name}"] for name in ("backbone", "dino_head", "ibot_head")]
    assert numbers["train/grad_norm"] == max(parts) > 0


def test_every_recorded_metric_is_in_the_table(tmp_path: Path, tar: bytes) -> None:
    log = Log()
    train(job(tmp_path, settings(), tar), log)
    assert {name for _, metrics in log.metrics for name in metrics} <= METRICS.keys()


def test_a_run_goes_on_with_the_images_that_are_left_when_others_were_forgotten(tmp_path: Path, tar: bytes) -> None:
    rows = manifest_rows(SHARD, tar)
    left = (ImageSource(image_table(rows.slice(0, rows.num_rows - 1)), Tars({SHARD: tar})),)
    whole = job(tmp_path, settings(), tar)
    with pytest.raises(Stop):
        train(whole, StopAfter(step=4))
    with pytest.raises(DataError, match="another sequence of images"):
        train(replace(whole, sources=left))
    log = Log()
    train(replace(whole, sources=left, labels={DATA_REVISIONS: "one request"}), log)
    assert "images were forgotten since the checkpoint of step 2" in log.said[0]
    assert "resuming at step 2 of 8" in log.said[1]
    assert [step for step, metrics in log.metrics if "train/loss" in metrics] == [4, 6, 8]
    assert final_files(tmp_path).keys() >= {"backbone.safetensors", "model.json"}


def test_skipped_steps_are_counted_across_a_resume(tmp_path: Path, tar: bytes) -> None:
    work = job(tmp_path, settings(), tar)
    first = StopAfter(step=4)
    made = trainer(work, first)
    poison(made.method, batches=1)
    with pytest.raises(Stop):
        fit(made)
    log = Log()
    train(work, log)
    assert log.metrics[-1][1]["train/skipped_steps"] == 1


def test_broken_images_are_counted_and_replaced(tmp_path: Path) -> None:
    log = Log()
    work = job(tmp_path, settings(), shard(broken=3))
    train(work, log)
    turned_away = read_rejections(work.files)
    assert {rejection.reason for rejection in turned_away} == {"unknown_format"}
    assert log.metrics[-1][1]["train/decode_failures"] >= len(turned_away) > 0


def test_an_interrupted_run_turns_away_the_same_images(tmp_path: Path) -> None:
    tar = shard(broken=6)
    whole, stopped = (job(tmp_path / name, settings("train.steps=10"), tar) for name in ("whole", "stopped"))
    train(whole, Log())
    with pytest.raises(Stop):
        train(stopped, StopAfter(step=6))
    train(stopped, Log())
    assert read_rejections(stopped.files) == read_rejections(whole.files) != []


def test_every_step_and_rank_draws_its_own_random_numbers() -> None:
    drawn = set()
    for seed in range(3):
        for step in range(5):
            for rank in range(4):
                seed_step(seed, step, rank)
                drawn.add(float(torch.rand(())))
    assert len(drawn) == 3 * 5 * 4


RANK = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from tiny_training import Log, StopAfter, Stop, job, settings, shard, state_bytes, trainer
from heliostat.training.world import World
from heliostat.training.loop import fit
from heliostat.training.run import build_trainer, run_training

rank, folder, stop = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{stop}", rank=rank, world_size=2)
log = StopAfter(step=stop) if stop else Log()
work = job(folder / "run", settings("method.centering=centering", "scaling.num_workers=2"), shard())
made = build_trainer(work, World(rank, 2), log.report, log.said.append)
try:
    fit(made)
    dist.barrier()
    run_training(work, World(rank, 2), log.report, log.said.append)
except Stop:
    pass
torch.save(state_bytes(made.method), folder / f"{stop}-{rank}.pt")
if not stop:
    dist.barrier()
    dist.destroy_process_group()
"""


def run_ranks(folder: Path, stop: int) -> None:
    fixtures = str(Path(__file__).parents[1] / "fixtures")
    code = f"import sys; sys.path.insert(0, {fixtures!r})\n{RANK}"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder), str(stop)]) for rank in range(2)]
    try:
        codes = [rank.wait(timeout=120) for rank in ranks[: 1 if stop else 2]]
        assert codes == [0] * len(codes)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()


def test_two_ranks_stay_identical_and_resume_to_the_same_files(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run_ranks(tmp_path / "whole", 0)
    first, second = (torch.load(tmp_path / f"whole/0-{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    run_ranks(tmp_path / "stopped", 4)  # the main rank dies with the record of step 4, the other one is killed
    assert complete_steps(LocalStore(tmp_path / "stopped/run")) == [2]
    run_ranks(tmp_path / "stopped", 0)
    assert final_files(tmp_path / "stopped/run") == final_files(tmp_path / "whole/run")


def test_a_run_that_cuts_its_crops_on_the_device_resumes_to_the_same_files(tmp_path: Path, tar: bytes) -> None:
    whole, stopped = (job(tmp_path / name, settings("crops.cut_on=device"), tar) for name in ("whole", "stopped"))
    train(whole, Log())
    with pytest.raises(Stop):
        train(stopped, StopAfter(step=4))
    train(stopped, Log())
    assert final_files(tmp_path / "stopped") == final_files(tmp_path / "whole")
