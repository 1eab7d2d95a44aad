"""What --dry-run says: figures of the networks themselves, for every shipped recipe, without torch and without Ray."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.artifacts import ArtifactRef, ArtifactStore
from heliostat.cli import main
from heliostat.config import shipped_recipes
from heliostat.errors import ConfigError
from heliostat.models.flops import backbone_forward_flops, head_forward_flops
from heliostat.models.heads import ProjectionHead
from heliostat.models.vit import VisionTransformer
from heliostat.runtime.dry_run import TrainingRun, cost_lines, run_lines, training_runs
from heliostat.runtime.recipe import read_recipe
from heliostat.storage import LocalStore
from heliostat.training.memory import GIB

# (recipe, run) -> parameters of each backbone. Public counts of the released models at 518 pixels, and from them, with a
# smaller position embedding (256 or 196 places instead of 1369), those of training at 224.
GRID = 1369 - 256
PARAMETERS = {
    ("vits14", "pretrain"): [22_058_112 - GRID * 384],
    ("vitb14", "pretrain"): [86_583_552 - GRID * 768],
    ("vitl14", "pretrain"): [303_655_168 + 4 * 1024],
    ("vitl14", "pretrain, phase highres"): [303_655_168 + 4 * 1024 + GRID * 1024],
    ("vitg14", "pretrain"): [1_136_486_912 - GRID * 1536],
    ("vitg14", "pretrain, phase highres"): [1_136_486_912],
    ("vitl14_continued", "pretrain"): [304_372_736],
    ("vitl16_short", "pretrain"): [304_368_640 - (1369 - 196) * 1024 + (16**2 - 14**2) * 3 * 1024],
    ("distill_vitg14", "distill"): [22_058_112 - GRID * 384, 86_583_552 - GRID * 768, 304_372_736 - GRID * 1024],
    ("laptop", "pretrain"): [622_976],
    ("sweep_koleo", "pretrain"): [622_976],
    ("ablation", "pretrain"): [622_976 + (16**2 - 8**2) * 3 * 128 - (4**2 - 2**2) * 128],
    ("laptop", "distill"): [164_032],
    ("laptop", "distill, student from scratch"): [164_032],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def blocks(output: str) -> dict[str, str]:
    """The printed blocks by the name of their run."""
    found = re.split(r"^# (?=[a-z])", output.partition("\n# what this would cost, by formula\n")[2], flags=re.M)[1:]
    return {block.partition(":")[0]: block for block in found}


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_resolves_and_prints_the_figures_of_its_networks(name: str, capsys, tmp_path: Path) -> None:
    assert main(["run", name, "--dry-run"]) == 0
    printed, recipe = blocks(capsys.readouterr().out), read_recipe(name)
    runs = [run for stage in recipe.stages if stage != "sweep" for run in training_runs(recipe, stage)]
    assert {run.name for run in runs} == set(printed) - {"sweep", "together"}
    for run in runs:
        block, train = printed[run.name], run.config.train
        shown = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) in the backbone, ", block)]
        assert shown == PARAMETERS[name, run.name]
        assert f"{train.steps:,} steps of {train.global_batch_size:,} images on " in block
        assert f"{train.steps * train.global_batch_size:,} images seen" in block
        assert ("A100-hours" in block) == run.config.scaling.use_gpu
        assert (re.search(r"per GPU: fits (40|80) GB\n", block) is not None) == run.config.scaling.use_gpu
    assert list(tmp_path.iterdir()) == []


def test_every_training_run_of_the_shipped_recipes_has_its_figure_here() -> None:
    runs = {
        (name, run.name)
        for name in shipped_recipes()
        for stage in ("pretrain", "distill")
        if getattr(read_recipe(name), stage) is not None
        for run in training_runs(read_recipe(name), stage)
    }
    assert runs == set(PARAMETERS)


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_printed_parameters_are_those_of_the_modules(stage: str) -> None:
    recipe = read_recipe("laptop", ("pretrain.student.embed_dim=256", "distill.student.embed_dim=192"))
    run = training_runs(recipe, stage)[0]
    backbone = count(VisionTransformer(run.config.student))
    head = count(ProjectionHead(run.config.student.embed_dim, run.config.method.dino.head))
    assert run_lines(run)[0] == f"parameters  {backbone:,} in the backbone, {head:,} in the heads"


@pytest.mark.parametrize("recipe", ["vitl14", "distill_vitg14", "sweep_koleo"])
def test_a_dry_run_imports_neither_torch_nor_ray(recipe: str) -> None:
    code = (
        "import sys; from heliostat.cli import main\n"
        f"assert main(['run', '{recipe}', '--dry-run']) == 0\n"
        "print('IMPORTED', *sorted(name for name in sys.modules if '.' not in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "ray", "mlflow", "boto3"} & set(done.stdout.partition("IMPORTED")[2].split()) == set()


def hours(lines: list[str]) -> dict[str, float]:
    (line,) = (line for line in lines if line.startswith("time "))
    return {card: float(text.replace(",", "")) for text, card in re.findall(r"([\d,]+) (\w+)-hours", line)}


def test_gpu_hours_are_within_a_fifth_of_those_that_the_paper_reports() -> None:
    """22,016 A100-hours for ViT-g (arXiv 2304.07193, table 14); 96 A100 for 3.3 days and 32 for a day (its repository)."""
    reported = {"vitg14": 22_016, "vitl14": 96 * 3.3 * 24, "vitl16_short": 32 * 24}
    for name, expected in reported.items():
        run = training_runs(read_recipe(name, ("pretrain.student.num_register_tokens=0",)), "pretrain")[0]
        assert hours(run_lines(run))["A100"] == pytest.approx(expected, rel=0.2)


def test_a_distillation_costs_more_with_a_larger_teacher_and_counts_it_once() -> None:
    recipe = read_recipe("laptop")
    small, large = (
        TrainingRun("distill", recipe.distill, recipe.pretrain.student.model_copy(update={"depth": depth})) for depth in (2, 20)
    )
    assert small.flops < large.flops
    assert small.memory.total < large.memory.total


def test_a_teacher_in_the_store_is_taken_from_there() -> None:
    draft = ArtifactStore(LocalStore(Path("heliostat-store"))).begin(
        ArtifactRef("model", "vitg14", "1"), config={}, inputs={}, notify=print
    )
    backbone = read_recipe("vits14").pretrain.student
    draft.put("model.json", f'{{"backbone": {backbone.model_dump_json()}}}'.encode())
    draft.commit(counts={})
    (run,) = training_runs(read_recipe("distill_vitg14"), "distill")
    assert run.teacher == backbone
    assert run.notes == ()


def test_a_teacher_of_unknown_size_is_refused_and_public_weights_are_counted_as_said(capsys) -> None:
    assert main(["distill", "distill_vitg14", "teacher=model/nobody@1", "--dry-run"]) == 1
    assert capsys.readouterr().err == (
        "heliostat: no artifact model/nobody@1 in ./heliostat-store; make it first or give distill.teacher=model/NAME@VERSION\n"
    )
    assert main(["distill", "distill_vitg14", "teacher=./g.pth", "teacher_head_steps=500", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "teacher ./g.pth is not read here; it is counted as large as the largest student" in output
    printed = blocks(output)
    assert list(printed) == ["distill, heads on the teacher", "distill", "together"]
    assert "500 steps of 2,048 images on 256 GPUs" in printed["distill, heads on the teacher"]
    assert "memory  " not in printed["distill, heads on the teacher"]


def test_heads_on_a_teacher_cost_no_backward_pass_of_its_backbone() -> None:
    words = ("distill.teacher=./g.pth", "distill.teacher_head_steps=500", "distill.students={}")
    heads, _ = training_runs(read_recipe("distill_vitg14", words), "distill")
    teacher, method, crops = heads.config.student, heads.config.method, heads.config.crops
    assert heads.config.train.steps == heads.config.init.head_warmup_steps == 500
    forwards = 4 * backbone_forward_flops(teacher, 224) + crops.local_crops_number * backbone_forward_flops(teacher, 98)
    rows = 2 * 256 * method.ibot.mask_sample_probability * sum(method.ibot.mask_ratio_min_max) / 2
    head = head_forward_flops(teacher.embed_dim, method.dino.head), head_forward_flops(teacher.embed_dim, method.ibot.head)
    student_heads = 3 * ((2 + crops.local_crops_number) * head[0] + rows * head[1])
    assert heads.flops_per_image == pytest.approx(forwards + student_heads + 2 * head[0] + rows * head[1])
    assert heads.flops == heads.flops_per_image * 500 * 2048


def test_a_teacher_that_is_an_artifact_has_its_heads() -> None:
    runs = training_runs(read_recipe("distill_vitg14", ("distill.teacher_head_steps=500",)), "distill")
    assert [run.name for run in runs] == ["distill"]


def test_students_without_their_teacher_are_runs_of_their_own() -> None:
    recipe = read_recipe("laptop", ("distill.compare_with_scratch=true",))
    with_teacher, alone = training_runs(recipe, "distill")
    assert alone.name == "distill, student from scratch"
    assert alone.config.student == recipe.distill.student
    assert alone.teacher is None
    assert alone.flops != with_teacher.flops


def test_what_does_not_fit_says_which_knob_makes_it_fit() -> None:
    words = ("pretrain.train.global_batch_size=12288", "pretrain.phases=[]")
    (run,) = training_runs(read_recipe("vitl14", words), "pretrain")
    text = "\n".join(run_lines(run))
    assert "does not fit 80 GB" in text
    most, workers, batch = map(
        int,
        re.search(
            r"for 80 GB: at most (\d+) images each: scaling.num_workers=(\d+) or train.global_batch_size=(\d+)", text
        ).groups(),
    )
    for advice in (f"pretrain.scaling.num_workers={workers}", f"pretrain.train.global_batch_size={batch}"):
        (changed,) = training_runs(read_recipe("vitl14", (*words, advice)), "pretrain")
        assert changed.images_per_worker <= most
        assert changed.memory.total <= 79 * GIB
        assert "fits 80 GB" in "\n".join(run_lines(changed))
    assert 12288 % workers == 0


def test_a_model_that_fits_with_no_batch_says_so() -> None:
    words = (
        "pretrain.student.embed_dim=6144",
        "pretrain.student.depth=80",
        "pretrain.student.num_heads=48",
        "pretrain.phases=[]",
    )
    (run,) = training_runs(read_recipe("vitl14", words), "pretrain")
    assert "one image is too many; " in "\n".join(run_lines(run))


def test_a_recipe_without_training_has_no_costs(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("name: own\ningest: {pool: photographs}\n")
    recipe = read_recipe("own.yaml")
    assert cost_lines(recipe, recipe.stages) == []


def test_trials_count_in_the_sum_of_all_runs() -> None:
    recipe = read_recipe("laptop")
    lines = cost_lines(recipe, recipe.stages)
    assert "# sweep: 6 trials, 2 at a time" in lines
    assert "#   trials      one process each" in lines
    minutes = [int(re.search(r"about (\d+) minutes?", line)[1]) for line in lines if "minute" in line]
    assert minutes[-1] == pytest.approx(sum(minutes[:-1]), abs=2)


def test_a_sweep_that_would_be_refused_is_refused_by_the_dry_run() -> None:
    for words, message in (
        (["sweep.metric=online/knn"], r"Did you mean online/rankme\?"),
        (["sweep.asha={grace_steps: 100000}"], "sweep.asha can stop nothing"),
    ):
        recipe = read_recipe("sweep_koleo", words)
        with pytest.raises(ConfigError, match=message):
            cost_lines(recipe, ["sweep"])


def test_a_search_is_counted_by_draws_from_its_space_and_says_so() -> None:
    words = ("sweep.grid={}", "sweep.space={optim.lr: {low: 1e-4, high: 1e-2}}", "sweep.search=optuna", "sweep.num_trials=9")
    recipe = read_recipe("sweep_koleo", (*words, "sweep.asha={grace_steps: 25}"))
    lines = cost_lines(recipe, ["sweep"])
    assert "# sweep: 9 trials, 2 at a time" in lines
    assert "#   trials      1 worker each" in lines
    assert "#   note        all to their end; sweep.asha stops some from step 25 on" in lines
    assert any("Optuna draws the trials as it goes" in line for line in lines)
