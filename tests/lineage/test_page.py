"""The page is complete, escapes everything, asks for nothing, and no arrow runs through a box."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import find_browser, look

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore, Draft
from heliostat.cli import main
from heliostat.lineage import lineage, render_lineage, render_page, total_costs
from heliostat.lineage.drawing import BOX_WIDTH, draw
from heliostat.storage import LocalStore

COSTS = {
    "cost/gpu_hours": 10.0,
    "cost/worker_hours": 10.0,
    "cost/wasted_worker_hours": 0.5,
    "cost/energy_kwh": 4.4,
    "cost/energy_measured_ratio": 0.0,
    "cost/co2_kg": 1.7,
    "cost/dollars": 35.0,
}


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(LocalStore(tmp_path))


def make(artifacts: ArtifactStore, ref: str, inputs: dict[str, Artifact] | None = None, **record) -> Artifact:
    draft = artifacts.begin(ArtifactRef.parse(ref), config={"of": ref}, inputs=inputs or {}, notify=print)
    assert isinstance(draft, Draft)
    return draft.commit(**({"counts": {"images": 12_345}} | record))


@pytest.fixture
def student(artifacts: ArtifactStore) -> Artifact:
    """raw -> curated -> teacher -> phase -> student, which all use the same images."""
    raw = make(artifacts, "raw/web@1")
    data = make(artifacts, "curated/web@1", {"raw": raw})
    teacher = make(artifacts, "model/large@1", {"data": data}, metrics={"train/loss": 2.5}, costs=COSTS)
    phase = make(artifacts, "model/large-high@1", {"data": data, "init": teacher}, costs=COSTS)
    return make(artifacts, "model/small@1", {"data": data, "teacher": phase}, metrics={"evaluate/knn_accuracy": 0.75})


def test_every_artifact_edge_count_metric_and_cost_is_drawn(artifacts: ArtifactStore, student: Artifact) -> None:
    page = render_page(lineage(artifacts, student.ref))
    for shown in ("model/small@1", "model/large-high@1", "raw/web@1", "12,345 images", "knn_accuracy: 0.75", "loss: 2.5"):
        assert shown in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("data") == 3
    assert {"init", "teacher", "raw", "4.4 kWh (modelled)", "35 dollars"} <= set(texts)
    boxes = list(svg.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(boxes) == 5
    assert "All training shown here together: 20 GPU-hours (1.0 of them for steps done twice), 8.8 kWh" in page
    assert total_costs(lineage(artifacts, student.ref))["cost/dollars"] == 70


def test_no_box_covers_another_and_no_arrow_runs_behind_one(artifacts: ArtifactStore, student: Artifact) -> None:
    drawing = draw(lineage(artifacts, student.ref))
    for one in drawing.boxes:
        for other in drawing.boxes:
            apart = one.x + BOX_WIDTH <= other.x or other.x + BOX_WIDTH <= one.x
            assert one is other or apart or one.y + one.height <= other.y or other.y + other.height <= one.y
    assert len(drawing.arrows) == 6
    lanes = 0
    for arrow in drawing.arrows:
        for x, y, end_x in re.findall(r"([\d.]+) ([\d.]+) L ([\d.]+)", arrow.path):
            lanes += 1
            for box in drawing.boxes:
                assert not (box.x < float(end_x) and float(x) < box.x + BOX_WIDTH and box.y < float(y) < box.y + box.height)
    assert lanes == 3, "the data of phase and student pass one column and two"


def test_hostile_texts_are_shown_and_not_obeyed(artifacts: ArtifactStore, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=http://127.0.0.1:9/x>'
    made = make(artifacts, "model/odd@1", counts={evil: 3}, metrics={evil: 1.0}, code_version=evil)
    page = render_page(lineage(artifacts, made.ref))
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 2
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_what_is_not_in_the_store_is_drawn_as_missing(artifacts: ArtifactStore, student: Artifact) -> None:
    artifacts.files(ArtifactRef.parse("model/large-high@1")).delete("artifact.json")
    page = render_page(lineage(artifacts, student.ref))
    assert "not in this store" in page
    assert 'class="missing"' in page


def test_thirty_generations_that_all_descend_twice_from_the_one_before_are_walked_once_each(artifacts: ArtifactStore) -> None:
    made = make(artifacts, "model/g000@1")
    for number in range(1, 31):
        made = make(artifacts, f"model/g{number:03d}@1", {"init": made, "teacher": made}, costs=COSTS)
    whole = lineage(artifacts, made.ref)
    assert len(whole.nodes) == 31
    assert whole.depths()[ArtifactRef.parse("model/g000@1")] == 30
    assert total_costs(whole)["cost/gpu_hours"] == 300
    lines = render_lineage(whole)
    assert len(lines) == 1 + 2 * 30
    assert sum("(see above)" in line for line in lines) == 29, "the first one has no inputs to unfold"
    assert len(draw(whole).boxes) == 31


def test_a_chain_longer_than_the_stack_is_walked(artifacts: ArtifactStore) -> None:
    made = make(artifacts, "model/g0@1")
    for number in range(1, 1200):
        made = make(artifacts, f"model/g{number}@1", {"init": made})
    whole = lineage(artifacts, made.ref)
    assert len(render_lineage(whole)) == len(draw(whole).boxes) == 1200


def test_records_that_name_each_other_are_refused(
    artifacts: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(artifacts, "model/a@1")
    second = make(artifacts, "model/b@1", {"init": first})
    record = first.record.model_copy(update={"inputs": {"teacher": str(second.ref)}})
    first.files.put("artifact.json", record.model_dump_json().encode())
    assert main(["lineage", "model/b@1", f"store={tmp_path}"]) == 1
    assert "name each other as inputs: model/b@1 -> model/a@1 -> model/b@1" in capsys.readouterr().err


def test_the_command_writes_the_page_and_refuses_a_folder_that_is_not_there(
    student: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lineage", "model/small@1", f"store={tmp_path}", "--html"]
    assert main([*words, str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model/small@1  [12,345 images]"
    assert lines[-2].startswith("training:  20 GPU-hours")
    assert lines[-1] == f"page:      {tmp_path}/page.html"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main([*words, str(tmp_path / "missing" / "page.html")]) == 2
    assert "cannot be written (No such file or directory); name a file in a folder that exists" in capsys.readouterr().err
    assert main(["artifacts", f"store={tmp_path}", "--html", "x"]) == 2
    assert "--html belongs to heliostat lineage, not to artifacts" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(not find_browser(), reason="no Chromium is installed: python tests/fixtures/install_browser.py says how")
def test_a_browser_shows_the_page_and_asks_for_nothing_else(
    artifacts: ArtifactStore, student: Artifact, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(lineage(artifacts, student.ref)))
    seen = look(page.as_uri(), ("Lineage of model/small@1", "model/large-high@1", "Artifacts"))
    assert [url for url in seen.requests if url != page.as_uri()] == []
    assert seen.png.startswith(b"\x89PNG")
