"""Every command in the README and the guides works: parsed, checked against recipes and files, and some of them run.

A guide is read from top to bottom as a person would: a YAML block that begins with `# <name>.yaml` lays that file down, and the
commands after it may use it. Blocks below `<!-- executed by tests/docs -->` are really executed.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from heliostat.artifacts import ArtifactRef
from heliostat.cli import STAGE_VERBS, parse
from heliostat.config import find_recipe, shipped_recipes, walk_fields
from heliostat.curation.forget_list import parse_target
from heliostat.curation.what_if import KEYS, parse_overrides
from heliostat.data.photographs import crops
from heliostat.errors import HeliostatError, UsageError
from heliostat.runtime.recipe import Recipe, read_recipe, scope_overrides
from heliostat.runtime.verbs import shard_recipe
from heliostat.training.schedules import check_schedules

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((DOCS / "guides").glob("*.md"))]
PAGES = [
    path
    for path in [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "jobs", "clusters", "dashboards") for path in (ROOT / folder).rglob("*.md")),
    ]
    if path.is_file()
]
OTHER_PROGRAMS = {
    ".",
    "export",
    "chmod",
    "kubectl",
    "mlflow",
    "pip",
    "ray",
}  # not ours; the files they name are still looked up
_BLOCK = re.compile(r"(?P<mark><!-- executed by tests/docs -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    executed: bool

    @property
    def file_name(self) -> str:
        """The file that a YAML block lays down, empty for others."""
        found = re.match(r"# (\S+\.yaml)\n", self.text)
        return found[1] if self.language == "yaml" and found else ""

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of a bash block as words; lines that end in a backslash go on."""
        if self.language != "bash":
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(found["language"], found["text"], bool(found["mark"])) for found in _BLOCK.finditer(text)]


def known_keys() -> set[str]:
    return {key for key, _ in walk_fields(Recipe)}


def check_heliostat(words: list[str]) -> str:
    """Parse a command line and check what it names; returns the file that it writes, if any. Raises what the command would."""
    target = words[words.index(">") + 1] if ">" in words else ""
    request = parse(words[: words.index(">")] if target else words)
    if request.verb == "lineage":
        ArtifactRef.parse(request.words[0])
    if request.verb in ("why", "what-if"):
        for artifact in request.words[:-1] if request.verb == "why" else request.words:
            assert ArtifactRef.parse(artifact).kind == "curated", words
    if request.verb == "what-if":
        asked = parse_overrides([word for word in request.overrides if not word.startswith("store=")])
        assert asked[0], words
        assert asked[0].keys() <= set(KEYS), words
        return target
    if request.verb == "forget":
        assert len(request.words) == 1, words
        parse_target(request.words[0])
    if request.verb == "shard":
        shard_recipe(request.words[0], request.overrides)
        return target
    if request.verb not in STAGE_VERBS and request.verb not in ("run", "demo"):
        assert all(word.startswith("store=") for word in request.overrides), words
        return target
    stage = request.verb if request.verb in STAGE_VERBS else ""
    for override in scope_overrides(request.overrides, stage):
        assert override.partition("=")[0] in known_keys(), f"no key {override}"
    if not request.words and request.verb != "demo":
        assert any(override.startswith("data=") for override in request.overrides), words
        return target
    name = request.words[0] if request.words else "laptop"
    check_recipe(read_recipe(name, request.overrides, stage), stage)
    return target


def check_recipe(recipe: Recipe, stage: str) -> None:
    """What a run would refuse before it starts."""
    assert not stage or getattr(recipe, stage) is not None, f"{recipe.name} has no section {stage}"
    for section in (recipe.pretrain, recipe.distill):
        if section is not None:
            check_schedules(section.optim, section.method.teacher, section.train.steps)


def check_python(words: list[str]) -> None:
    """`python FILE ...`: the file exists, and the words of a job file are those of its verb."""
    script = ROOT / words[0]
    assert script.is_file(), words
    if script.parent.name == "jobs":
        check_heliostat([script.stem, *words[1:]])


def check_make(words: list[str]) -> None:
    """Every target stands in the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        assert "=" in word or re.search(rf"^{re.escape(word)}:", text, re.M), f"no make target {word}"


def check_command(words: list[str]) -> str:
    """Check one command; returns the file that it writes, if any."""
    program, rest = words[0], words[1:]
    if program == "heliostat":
        return check_heliostat(rest)
    if program == "make":
        check_make(rest)
    elif program in ("python", "bash"):
        check_python(rest)
    elif words[:3] == ["ray", "job", "submit"]:
        separator = words.index("--")
        assert words[3:separator] == ["--address", "http://127.0.0.1:8265", "--working-dir", "."]
        assert words[separator + 1] == "python"
        check_python(words[separator + 2 :])
    else:
        assert program in OTHER_PROGRAMS, f"the tests do not know the command {program}"
        for word in rest:
            if re.fullmatch(r"(clusters|dashboards|jobs)/\S+|[\w-]+\.yaml", word):
                assert (ROOT / word).is_file(), word
    return ""


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_command_of_a_guide_is_one_that_works(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    minimal = (
        "name: birds\ningest: {pool: ./photos}\ncurate: {}\npretrain:\n"
        + find_recipe("laptop").read_text(encoding="utf-8").partition("\npretrain:\n")[2].partition("\nsweep:")[0]
    )
    web = "name: web\ncrawl: {contact: https://example.org/our-crawl, urls: [./image_urls.txt]}\ncurate: {}\n"
    for name, text in (("birds.yaml", minimal), ("photos.yaml", minimal), ("web.yaml", web)):  # as own_data.md lays them down
        (tmp_path / name).write_text(text, encoding="utf-8")
    best = tmp_path / "heliostat-store/sweep/koleo@1/best.yaml"  # as the sweep of sweeps.md leaves it
    best.parent.mkdir(parents=True)
    best.write_text(minimal, encoding="utf-8")
    for block in blocks(path):
        if block.file_name:
            (tmp_path / block.file_name).write_text(block.text, encoding="utf-8")
            check_recipe(read_recipe(block.file_name), "")
        for words in block.commands:
            check_command(words)


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_commands_in_a_recipe_s_comments_work_and_its_advice_for_fewer_gpus_keeps_the_images_per_gpu(name: str) -> None:
    text = find_recipe(name).read_text(encoding="utf-8")
    for line in re.findall(r"^#   (heliostat .*)$", text, re.M):
        check_command(shlex.split(line))
    for advice in re.findall(r"pretrain\.scaling\.num_workers=\d+ pretrain\.train\.global_batch_size=\d+", text):
        few, many = read_recipe(name, (*advice.split(), "pretrain.phases=[]")).pretrain, read_recipe(name).pretrain
        images = [one.train.global_batch_size / one.scaling.num_workers for one in (few, many)]
        assert images[0] == images[1]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("heliostat pretain laptop", UsageError),
        ("heliostat pretrain laptop optim.rl=1", AssertionError),
        ("heliostat pretrain laptop optim.lr=fast", UsageError),
        ("heliostat run nowhere.yaml", UsageError),
        ("heliostat pretrain", AssertionError),
        ("heliostat lineage demo", UsageError),
        ("heliostat why model/demo@1 crops/coffee/000001.png", AssertionError),
        ("heliostat what-if curated/demo@1", AssertionError),
        ("heliostat what-if curated/demo@1 threshold=0.7", UsageError),
        ("heliostat what-if demo dup_threshold=0.7", UsageError),
        ("heliostat forget anything", UsageError),
        ("heliostat forget example.org dup_threshold=0.7", AssertionError),
        ("heliostat artifacts demo.store=x", AssertionError),
        ("heliostat pretrain laptop train.steps=20", UsageError),
        ("make everything", AssertionError),
        ("python jobs/train.py laptop", AssertionError),
        ("ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/run.py laptop version=a/b", UsageError),
        ("ray up cluster.yaml", AssertionError),
        ("conda install heliostat", AssertionError),
    ],
)
def test_a_command_that_would_not_work_is_caught(line: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_command(shlex.split(line))


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[str]:
    """Targets of the relative links of a page, outside of comments and code."""
    text = re.sub(r"<!--.*?-->|^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_resolve(path: Path) -> None:
    for target in links(path):
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_of_the_documentation_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
    decisions = set((DOCS / "decisions").glob("*.md"))
    assert set(DOCS.rglob("*.md")) - decisions <= reached


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_compile(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            compile(block.text, path.name, "exec")


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements} - {"heliostat"}  # an extra of ours
    page = (DOCS / "decisions" / "0001-dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| ([a-z][\w-]+) \|", page, re.M)) - {"package"} == declared


def write_photographs(folder: Path) -> None:
    """Twelve crops in two folders, as own_data.md names them."""
    from PIL import Image

    for number, crop in enumerate(crops("left", count=1, seed=0)[:12]):
        file = folder / ("robin" if number % 2 == 0 else "wren") / f"{number // 2:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop.pixels).save(file)


@pytest.mark.ray
def test_the_first_commands_of_the_guide_to_own_data_run_as_they_stand(tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos")
    outputs = {}
    for block in blocks(DOCS / "guides" / "own_data.md"):
        if block.file_name and not (tmp_path / block.file_name).exists():  # the first version: without training
            (tmp_path / block.file_name).write_text(block.text, encoding="utf-8")
        for words in block.commands if block.executed else []:
            line = shlex.join(words)
            done = subprocess.run(
                [sys.executable, "-m", "heliostat", *words[1:]],
                cwd=tmp_path,
                env={**os.environ, "HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            outputs[line] = done.stdout
    assert "done in" in outputs["heliostat run birds.yaml"]
    assert "curated/birds@1" in outputs["heliostat artifacts"]
    assert "└─ raw: raw/birds@1  [12 images" in outputs["heliostat lineage curated/birds@1"]
    assert outputs["heliostat why curated/birds@1 robin/000000.png"].splitlines()[-1] == "It was kept."
    assert "reused, made" in outputs["heliostat ingest birds.yaml"]
    assert "Ray:" not in outputs["heliostat ingest birds.yaml"]
    assert outputs["heliostat curate birds.yaml --dry-run"].startswith("name: birds\n")
    assert "\nlaptop " in outputs["heliostat recipes"]


def test_a_chosen_recipe_can_be_kept_and_run_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from heliostat.cli import main

    write_photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "data=./photos", "--dry-run"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "photos.yaml").write_text(first, encoding="utf-8")
    assert main(["run", "photos.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == first
    assert {"raw/photos@1", "model/photos@1"} == {str(read_recipe("photos.yaml").ref(kind)) for kind in ("raw", "model")}


def test_what_the_guide_says_about_errors_is_what_is_printed(tmp_path: Path) -> None:
    guide = (DOCS / "guides" / "own_data.md").read_text(encoding="utf-8")
    with pytest.raises(HeliostatError) as refused:
        read_recipe("laptop", ("pretrain.optim.rl=1",))
    assert str(refused.value).removeprefix("laptop.yaml: ") in guide


def test_the_method_page_runs_from_top_to_bottom() -> None:
    """Block after block in one namespace, as a reader would paste them."""
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks(DOCS / "reference" / "method.md")):
        if block.language == "python":
            exec(compile(block.text, f"method.md, block {number}", "exec"), namespace)
    result = namespace["result"]
    assert set(result.losses) == {f"small/{name}" for name in ("dino_global", "dino_local", "ibot", "koleo")}
    assert result.not_finite == []
