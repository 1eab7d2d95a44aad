"""Every engine trains the same model: DDP and ZeRO-1, 2, 3 on two processes against plain torch on one."""

import json
from pathlib import Path

import pytest
from ranks import SAME, furthest, run_ranks
from safetensors.torch import load_file

COMMON = """
import json, os
from safetensors.torch import save_file
from tiny_training import Log, job, settings, shard
from heliostat.training.loop import one_step
from heliostat.training.resume import restore
from heliostat.training.trainer import LoopState
from heliostat.training.run import build_trainer
from heliostat.training.world import World

def make(name, *words, parallel, log=None, teacher=None):
    config = settings(f"scaling.num_workers={size}", f"scaling.parallel={parallel}", *SAME, *words)
    log = log or Log()
    return build_trainer(job(folder / name, config, shard()), World(rank, size), log.report, log.said.append), log

def go(made, first, last):
    state = LoopState(step=first)
    for step in range(first, last):
        one_step(made, state, made.loader.batch(step))
    return state

def held(made):
    return {(piece.name, piece.start): piece.values.tolist() for piece in made.engine.pieces()}

def keep(made, name, log):
    whole = {}
    for part in ("student", "teacher"):
        whole |= {f"{part}.{key}": value.contiguous() for key, value in
                  made.engine.whole_state(getattr(made.method, part)).items()}
    if rank == 0:
        save_file(whole, folder / f"{name}.safetensors")
        losses = {key: [metrics[key] for _, metrics in log.metrics] for key in ("train/loss", "train/grad_norm_backbone")}
        (folder / f"{name}.json").write_text(json.dumps(losses))
"""

TEN_STEPS = """
for parallel in sys.argv[5:]:
    made, log = make(parallel, parallel=parallel)
    go(made, 0, 10)
    keep(made, parallel, log)
"""

SCENARIOS = """
# A momentum of 0.9999: shards of the teacher in float32 move where bfloat16 copies would stand still.
made, log = make("momentum", "method.teacher.momentum_teacher=0.9999", "method.teacher.final_momentum_teacher=0.9999",
                 parallel="zero3")
before = [parameter.ds_tensor.data.clone() for parameter in made.method.teacher.parameters()]
go(made, 0, 3)
after, sources = (
    [parameter.ds_tensor.data for parameter in network.parameters()] for network in (made.method.teacher, made.method.student)
)
moved = sum(int((one != other).sum()) for one, other in zip(before, after))
coarse = sum(
    int((one.bfloat16().lerp(source.bfloat16(), 1e-4) != one.bfloat16()).sum()) for one, source in zip(before, sources)
)
dtypes = {str(one.dtype) for one in after}
shapes = [tuple(one.shape) for one in after] == [tuple(one.shape) for one in sources]
from deepspeed.utils import safe_get_local_fp32_param
owned = all(torch.equal(safe_get_local_fp32_param(one), one.ds_tensor.data) for one in made.method.student.parameters())
flat = torch.cat([one.reshape(-1) for one in after])
print("momentum", json.dumps([moved, coarse, flat.numel(), sorted(dtypes), shapes, owned]))

# A value that is not finite on one rank: nothing moves on any, and the next step is a step again.
for parallel in ("ddp", "zero1", "zero2", "zero3"):
    made, log = make("nan-" + parallel, parallel=parallel)
    state = go(made, 0, 2)
    before = held(made)
    def poison(module, arguments, output):
        return output * float("nan") if rank == 1 else None
    handle = made.method.student.dino_head.register_forward_hook(poison)
    one_step(made, state, made.loader.batch(2))
    handle.remove()
    same = held(made) == before
    def scale(module, arguments, output):
        output.register_hook(lambda gradient: gradient * float("inf")) if rank == 1 and output.requires_grad else None
    handle = made.method.student.dino_head.register_forward_hook(scale)
    one_step(made, state, made.loader.batch(3))
    handle.remove()
    same_after_gradient = held(made) == before
    one_step(made, state, made.loader.batch(4))
    moves = held(made) != before
    said = [line for line in log.said if "not finite" in line]
    print("nan", parallel, json.dumps([same, same_after_gradient, moves, state.skipped_steps, said]))

# Passes: the same step in halves.
for parallel in ("ddp", "zero1", "zero2", "zero3"):
    made, log = make("passes-" + parallel, "scaling.images_per_pass=2", "method.dino.koleo_loss_weight=0", parallel=parallel)
    go(made, 0, 10)
    keep(made, "passes-" + parallel, log)
made, log = make("whole", "method.dino.koleo_loss_weight=0", parallel="ddp")
go(made, 0, 10)
keep(made, "whole", log)

# Recomputed activations and bfloat16 compute under ZeRO-3.
made, log = make("recomputed", "scaling.activation_checkpointing=true", parallel="zero3")
go(made, 0, 10)
keep(made, "recomputed", log)
made, log = make("bfloat16", "train.compute_dtype=bfloat16", parallel="zero3")
go(made, 0, 10)
keep(made, "bfloat16", log)
weights = {str(parameter.ds_tensor.dtype) for parameter in made.method.student.parameters()}
named = made.method.student.named_parameters()
travels = {name: str(getattr(parameter, "comm_dtype", torch.float32)) for name, parameter in named}
print("bfloat16", json.dumps([sorted(weights), travels["backbone.blocks.0.attn.qkv.weight"], travels["dino_head.mlp.0.weight"],
                              travels["backbone.blocks.0.norm1.weight"]]))
"""


def code(body: str) -> str:
    return f"SAME = {SAME!r}\n{COMMON}\n{body}"


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(code(TEN_STEPS), folder, 2, "ddp", "zero1", "zero2", "zero3")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(code(TEN_STEPS), folder, 1, "none")
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "zero2", "zero3"])
def test_ten_steps_on_two_processes_are_those_of_one(one: Path, two: Path, parallel: str) -> None:
    plain, ours = losses(one, "none"), losses(two, parallel)
    assert len(plain["train/loss"]) == 10
    assert ours["train/loss"] == pytest.approx(plain["train/loss"], abs=1e-5)
    assert ours["train/grad_norm_backbone"] == pytest.approx(plain["train/grad_norm_backbone"], rel=1e-5)
    weights = load_file(one / "none.safetensors")
    assert furthest(load_file(two / f"{parallel}.safetensors"), weights) < 1e-5
    start = load_file(one / "none.safetensors")
    assert any(name.startswith("teacher.") for name in start)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("scenarios")
    printed = run_ranks(code(SCENARIOS), folder, 2, timeout_seconds=500)
    return folder, [
        [line for line in text.splitlines() if line.split(" ")[0] in ("momentum", "nan", "bfloat16")] for text in printed
    ]


def test_shards_of_the_teacher_move_at_a_momentum_that_bfloat16_would_round_away(scenarios) -> None:
    _, printed = scenarios
    for lines in printed:
        (line,) = [line for line in lines if line.startswith("momentum ")]
        moved, coarse, total, dtypes, same_shapes, owned = json.loads(line.removeprefix("momentum "))
        assert dtypes == ["torch.float32"]
        assert same_shapes
        assert owned  # the student's shards are what the optimizer's float32 partitions hold
        assert moved > 0.5 * total
        assert coarse < 0.05 * moved


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "zero2", "zero3"])
def test_what_is_not_finite_on_one_rank_moves_nothing_on_any(scenarios, parallel: str) -> None:
    _, printed = scenarios
    for rank, lines in enumerate(printed):
        (line,) = [line for line in lines if line.startswith(f"nan {parallel} ")]
        same, same_after_gradient, moves, skipped, said = json.loads(line.removeprefix(f"nan {parallel} "))
        assert same
        assert same_after_gradient
        assert moves
        assert skipped == 2
        assert "rank 1" in said[0], rank


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "zero2", "zero3"])
def test_passes_make_the_step_of_the_whole_batch_in_every_engine(scenarios, parallel: str) -> None:
    folder, _ = scenarios
    assert losses(folder, f"passes-{parallel}")["train/loss"] == pytest.approx(losses(folder, "whole")["train/loss"], abs=1e-5)
    assert furthest(load_file(folder / f"passes-{parallel}.safetensors"), load_file(folder / "whole.safetensors")) < 1e-5


def test_recomputed_activations_change_nothing_under_zero3(scenarios, two: Path) -> None:
    folder, _ = scenarios
    assert losses(folder, "recomputed")["train/loss"] == pytest.approx(losses(two, "zero3")["train/loss"], abs=1e-5)
    assert furthest(load_file(folder / "recomputed.safetensors"), load_file(two / "zero3.safetensors")) < 1e-5


def test_bfloat16_computes_on_float32_shards_and_heads_travel_in_float32(scenarios, two: Path) -> None:
    folder, printed = scenarios
    (line,) = [line for line in printed[0] if line.startswith("bfloat16 ")]
    weights, linear, head, norm = json.loads(line.removeprefix("bfloat16 "))
    assert weights == ["torch.float32"]
    assert (linear, head, norm) == ("torch.bfloat16", "torch.float32", "torch.float32")
    ours, exact = losses(folder, "bfloat16")["train/loss"], losses(two, "zero3")["train/loss"]
    assert ours == pytest.approx(exact, abs=0.05)
    assert ours != exact
