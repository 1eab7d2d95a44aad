"""Contact sheets and the report: what they show, and that no text of a stranger becomes anything but text."""

import base64
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pyarrow as pa
import pytest

from heliostat.curation.clusters import size_statistics
from heliostat.curation.curation_report import ReportData, render_report, report_json, write_report
from heliostat.curation.image_statistics import ImageStatistics
from heliostat.curation.ledger import Decisions, FunnelStep, Verdicts, same_reason
from heliostat.curation.ledger_facts import LedgerFacts
from heliostat.curation.pages import duration, number, size
from heliostat.curation.planted_score import share
from heliostat.curation.sheet_choice import choose_sheets
from heliostat.curation.sheets import Pairs, Review, Sheet, SheetsConfig, Strip, thumbnail, write_sheets
from heliostat.data.decode import ImageRejected
from heliostat.errors import HeliostatError
from heliostat.storage import LocalStore

_SEEDS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "javascript:alert(1)",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "]]><x onclick=a>",
    "<iframe src=https://evil.example>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<base href=https://evil.example>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<object data=https://evil.example>",
    "&lt;script&gt;",
    "<style>@import 'https://evil.example'</style>",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "{# #}",
    "<a href='//evil.example'>x</a>",
    '" style="background:url(https://evil.example)',
    "\0<script>",
    "\u202e<script>",
    "\ud7ff<b>",
    "<svg><a xlink:href=x>",
    "<img src='https://evil.example/p.gif'>",
    "<form action=https://evil.example><input>",
    "` onmouseover=alert(1)",
    "<!--",
    "<math><mtext></mtext><mglyph><style>",
    "<template><script>alert(1)</script></template>",
    "x" * 5000,
    "<plaintext>",
    "\n<b>\n",
    "<video src=https://evil.example autoplay onplay=alert(1)>",
    "%3Cscript%3E",
    "<details open ontoggle=alert(1)>",
]
HOSTILE = [
    f"{before}{text}{after}" for text in _SEEDS for before, after in (("", ""), ('"', ">"), ("https://h.example/", "'/>"))
]


STYLE = re.compile(r"width:[\d.]+%|width:8rem|background:#[0-9a-f]{6}|overflow-wrap:anywhere")


class Reader(HTMLParser):
    """Notes everything in a page that could run or load something."""

    def __init__(self):
        super().__init__()
        self.tags, self.bad, self.text = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            text = value or ""
            is_ours = tag == "a" and re.fullmatch(r"(sheets/)?[a-z]+-\d{3}\.html", text)
            is_picture = tag == "img" and name == "src" and re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", text)
            loads = name in ("src", "href", "action", "data", "srcset") and not is_ours and not is_picture
            if name.startswith("on") or loads or (name == "style" and not STYLE.fullmatch(text)):
                self.bad.append((tag, name, text))

    def handle_data(self, data):
        self.text.append(data)


ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "nav", "a", "b", "div", "section", "figure",
    "img", "figcaption", "br", "code", "table", "tr", "th", "td", "i", "small", "svg", "polyline",
}  # fmt: skip


def check_page(page: str) -> str:
    """The text of a page, after making sure that it cannot run or load anything."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.tags <= ALLOWED
    assert reader.bad == []
    assert page.count("default-src 'none'; img-src data:; style-src 'unsafe-inline'") == 1
    return "".join(reader.text)


def picture(seed: int, side: int = 90) -> bytes:
    draw = np.random.default_rng(seed)
    pixels = cv2.resize(draw.integers(0, 256, (5, 5, 3)).astype(np.uint8), (side, side + 30), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".png", pixels)[1].tobytes()


def make_review(count=60, texts=None):
    draw = np.random.default_rng(0)
    decisions = Decisions.of(count)
    nsfw = draw.random(count).astype(np.float32)
    decisions.judge(same_reason("nsfw", decisions.rows, nsfw > 0.8, "above_nsfw_threshold"))
    rows = decisions.rows
    decisions.judge(same_reason("copies", rows, rows % 3 > 0, "copy"))
    rows = decisions.rows
    codes = draw.integers(0, 2, len(rows)).astype(np.uint8)
    decisions.judge(Verdicts("retrieval", rows, draw.random(len(rows)) < 0.3, ("not_retrieved", "cluster_not_matched"), codes))
    facts = LedgerFacts(
        draw.integers(0, 256, (count, 32)).astype(np.uint8),
        component=np.arange(count) // 3,
        representative=np.arange(count) // 3 * 3,
        similarity_to_representative=draw.uniform(0.5, 1, count).astype(np.float32),
        reference=np.where(np.arange(count) % 7 == 0, 1, -1),
        similarity_to_reference=draw.uniform(0.3, 0.9, count).astype(np.float32),
        reference_ids=draw.integers(0, 256, (2, 32)).astype(np.uint8),
        evaluation_set=np.array([0, 1], np.uint8),
        evaluation_sets=("val", texts[0] if texts else "test"),
    )

    def columns(rows):
        names = [texts[row % len(texts)] if texts else f"https://h.example/{row}.png" for row in rows]
        sizes = {"width": [90] * len(rows), "height": [120] * len(rows)}
        return pa.table({"source": names, "label": names, "format": names if texts else ["png"] * len(rows), **sizes})

    first = np.arange(count - 1)
    return Review(
        facts,
        decisions,
        columns,
        picture,
        lambda row: picture(row, 70),
        lambda row: picture(1000 + row),
        settings={"dup_threshold": 0.6, "decontamination_threshold": 0.45, "max_nsfw_score": 0.8},
        pairs=Pairs(first, first + 1, draw.uniform(0.5, 0.7, count - 1).astype(np.float32)),
        nsfw=nsfw,
        num_faces=(np.arange(count) % 5 == 0).astype(np.int32),
        matched=np.where(np.arange(count) % 2 == 0, np.arange(count) % 6, -1).astype(np.int32),
    )


def by_name(sheets: list[Sheet]) -> dict[str, Sheet]:
    return {sheet.name: sheet for sheet in sheets}


def test_the_margin_shows_pairs_of_both_sides_nearest_to_the_threshold_first():
    review = make_review()
    sheet = by_name(choose_sheets(review, SheetsConfig(pairs=10)))["margin"]
    similarity = review.pairs.similarity
    near = sorted(abs(value - 0.6) for value in similarity.tolist() if abs(value - 0.6) <= 0.05)
    assert sheet.num_found == len(near)
    shown = [float(strip.title.split()[1].rstrip(":")) for strip in sheet.strips]
    assert len(shown) == 10
    assert sum(value > 0.6 for value in shown) == 5
    assert [abs(value - 0.6) for value in shown] == sorted(abs(value - 0.6) for value in shown)
    assert [strip.title.endswith("a copy") for strip in sheet.strips] == [value > 0.6 for value in shown]
    pairs = {(one, one + 1) for one in range(59)}
    assert all(tuple(frame.row for frame in strip.frames) in pairs for strip in sheet.strips)


def test_components_begin_with_the_representative_and_go_on_with_the_least_similar():
    review = make_review()
    sizes = np.concatenate([np.zeros(20, np.int64), np.arange(40) // 2 + 1])
    best = np.array([int(np.flatnonzero(sizes == number)[-1]) for number in sizes])
    review = replace(review, facts=replace(review.facts, component=sizes, representative=best))
    sheet = by_name(choose_sheets(review, SheetsConfig(components=3, images_per_component=4)))["components"]
    assert [len(strip.frames) for strip in sheet.strips] == [4, 2, 2]
    assert sheet.num_found == 21
    first = [frame.row for frame in sheet.strips[0].frames]
    assert first[0] == 19
    similarity = review.facts.similarity_to_representative
    assert first[1:] == sorted(range(19), key=lambda row: similarity[row])[:3]


def test_every_hit_stands_beside_its_evaluation_image():
    review = make_review()
    sheet = by_name(choose_sheets(review, SheetsConfig()))["evaluation"]
    facts = review.facts
    hits = {row for row in range(60) if facts.reference[row] >= 0 and facts.similarity_to_reference[row] > 0.45}
    assert {strip.frames[0].row for strip in sheet.strips} == hits
    assert all(strip.frames[1].is_reference and strip.frames[1].row == 1 for strip in sheet.strips)
    assert by_name(choose_sheets(review, SheetsConfig(evaluation_hits=2)))["evaluation"].num_found == len(hits)


def test_clusters_reasons_scores_and_faces_show_only_what_belongs_there():
    review = make_review()
    sheets = by_name(choose_sheets(review, SheetsConfig(images_per_cluster=3, images_per_reason=4)))
    for strip in sheets["clusters"].strips:
        cluster = int(re.match(r"cluster (\d+)", strip.title)[1])
        assert {int(review.matched[frame.row]) for frame in strip.frames} == {cluster}
        assert len(strip.frames) == 3
    for strip in sheets["reasons"].strips:
        stage, reason = re.match(r"(\w+), (\w+):", strip.title).groups()
        causes = {review.decisions.causes[review.decisions.cause[frame.row]] for frame in strip.frames}
        assert causes == {(stage, reason)}
    assert all(frame.is_pixelated for frame in sheets["nsfw"].strips[0].frames)
    for frame in sheets["faces"].strips[0].frames:
        assert frame.is_kept
        assert review.num_faces[frame.row] > 0
        assert review.decisions.cause[frame.row] == 0


def test_pages_hold_every_picture_once_and_the_same_bytes_each_time(tmp_path):
    review, config = make_review(), SheetsConfig(pictures_per_page=20, thumbnail_pixels=32)
    sheets = choose_sheets(review, config)
    one, two = LocalStore(tmp_path / "1"), LocalStore(tmp_path / "2")
    told = write_sheets(one, review, sheets, config)
    assert told == write_sheets(two, review, sheets, config)
    for sheet, known in zip(sheets, told, strict=True):
        pages = [one.read(key).decode() for key in known["keys"]]
        assert pages == [two.read(key).decode() for key in known["keys"]]
        assert sum(page.count("<figure") for page in pages) == sum(len(strip.frames) for strip in sheet.strips)
        assert all(page.count("<figure") <= 20 for page in pages)
        for page in pages:
            check_page(page)
    ids = {bytes(row).hex() for row in review.facts.ids}
    margin = one.read(told[0]["keys"][0]).decode()
    assert set(re.findall(r'<figure class="\w+" title="(\w+)"', margin)) <= ids


def test_a_thumbnail_is_small_ours_and_coarse_where_it_must_be():
    data = picture(3, side=400)
    plain = cv2.imdecode(np.frombuffer(thumbnail(data, 100), np.uint8), cv2.IMREAD_COLOR)
    coarse = cv2.imdecode(np.frombuffer(thumbnail(data, 100, is_pixelated=True), np.uint8), cv2.IMREAD_COLOR)
    assert max(plain.shape) == max(coarse.shape) == 100
    assert thumbnail(data, 100)[:3] == b"\xff\xd8\xff"
    block = coarse[32:38, 32:38].reshape(-1, 3).astype(int)
    assert np.ptp(block, axis=0).max() < 30
    with pytest.raises(ImageRejected):
        thumbnail(b"no image", 100)


def test_images_that_the_nsfw_filter_dropped_are_coarse_on_every_sheet(tmp_path):
    review = make_review()
    row = int(np.flatnonzero(review.nsfw > 0.8)[0])
    pairs = Pairs(np.array([row - 1]), np.array([row]), np.array([0.6], np.float32))
    config = SheetsConfig(thumbnail_pixels=64)
    sheets = choose_sheets(replace(review, pairs=pairs), config)[:1]
    key = write_sheets(LocalStore(tmp_path), review, sheets, config)[0]["keys"][0]
    pictures = re.findall(r"base64,([^\"]+)\"", LocalStore(tmp_path).read(key).decode())
    assert base64.b64decode(pictures[1]) == thumbnail(picture(row), 64, is_pixelated=True)
    assert base64.b64decode(pictures[0]) == thumbnail(picture(row - 1), 64)


def test_a_picture_that_is_missing_or_broken_is_said_to_be(tmp_path):
    review = replace(make_review(), read_image=lambda row: None if row % 2 else b"broken")
    config = SheetsConfig(pairs=4)
    key = write_sheets(LocalStore(tmp_path), review, choose_sheets(review, config)[:1], config)[0]["keys"][0]
    text = check_page(LocalStore(tmp_path).read(key).decode())
    assert "not at hand" in text
    assert "unknown_format" in text


def test_sheets_without_anything_to_show_are_left_out(tmp_path):
    empty = Review(
        LedgerFacts(np.empty((0, 32), np.uint8)), Decisions.of(0), lambda rows: pa.table({}),
        lambda row: None, lambda row: None, lambda row: None,
    )  # fmt: skip
    assert choose_sheets(empty, SheetsConfig()) == []
    assert write_sheets(LocalStore(tmp_path), empty, [Sheet("x", "x", "", (), 0)], SheetsConfig())[0]["keys"] == []


def hostile_report(texts: list[str]) -> ReportData:
    """A report with strangers' words wherever a text can stand."""
    some = iter(texts * 3)

    def text() -> str:
        return next(some)

    statistics = ImageStatistics()
    rows = pa.table({"source": [f"https://{one}/x" for one in texts], "format": texts, "length": [5] * len(texts)})
    rows = rows.append_column("width", pa.array([9] * len(texts))).append_column("height", pa.array([9] * len(texts)))
    statistics.add(rows, np.ones(len(texts), bool))
    score = {name: asdict(share(10, 9)) for name in ("recall", "easy_recall", "precision", "decontamination", "innocent")}
    sizes = size_statistics(np.array([5, 3, 0]))
    return ReportData(
        text(),
        [FunnelStep(text(), 10, 7, {text(): 2, text(): 1}), FunnelStep(text(), 7, 7, {})],
        {text(): statistics.as_dict()},
        {text(): {**score, "recall_by_kind": {text(): asdict(share(0, 0))}}, text(): {"recall_by_kind": {}}},
        [{"low": 0.45, "high": 0.6, "num_true": 10, "num_found": 9}],
        {text(): text(), "largest": [7, 5], "none": None, "size_histogram": {text(): 3}},
        [{"level": text(), "num_clusters": 3, "before": sizes, "after": sizes}],
        [{"dataset": text(), "images": 5, "mode": text(), "retrieved": None, "final": 5, "added": 5}],
        [{"set": text(), "num_images": 0, "num_that_retrieved": 0}],
        [
            {"stage": text(), "seconds": 3.0, "cpu_seconds": 2.0, "images": 10},
            {"stage": text(), "seconds": 9.0, "cpu_seconds": 0.0, "images": 0},
        ],
        0.05,
        text(),
        [{"name": "margin", "title": text(), "num_shown": 1, "num_found": 2, "keys": ["sheets/margin-000.html"]}],
        {text(): text()},
        [text(), text()],
    )


def test_hostile_text_stays_text_in_every_field_of_sheets_and_report(tmp_path):
    assert len(HOSTILE) >= 100
    config = SheetsConfig(thumbnail_pixels=16, pictures_per_page=1000)
    for start in range(0, len(HOSTILE), 36):
        texts = HOSTILE[start : start + 36]
        review = make_review(texts=texts)
        sheets = [
            replace(one, title=texts[0], note=texts[1], strips=(Strip(texts[2], one.strips[0].frames), *one.strips))
            for one in choose_sheets(review, config)
        ]
        for known in write_sheets(LocalStore(tmp_path), review, sheets, config):
            for key in known["keys"]:
                text = check_page(LocalStore(tmp_path).read(key).decode())
                assert all(one.strip()[:50].replace("\0", "\ufffd") in text.replace("\0", "\ufffd") for one in texts[:2])
        page = render_report(hostile_report(texts))
        check_page(page)


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path):
    review, config = make_review(texts=HOSTILE[:36]), SheetsConfig(thumbnail_pixels=16, pairs=40)
    store = LocalStore(tmp_path)
    keys = write_sheets(store, review, choose_sheets(review, config)[:1], config)[0]["keys"]
    keys += write_report(store, hostile_report(HOSTILE))[1:]
    for key in keys:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        log = [
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={tmp_path / 'net.json'}",
        ]
        done = subprocess.run([*command, *log, f"file://{tmp_path / key}"], capture_output=True, text=True, timeout=120)
        assert "<figure" in done.stdout or "<table" in done.stdout
        assert "evil.example" not in (tmp_path / "net.json").read_text(errors="replace")
        assert "CONSOLE" not in done.stderr  # neither a script's words nor a refusal of the policy: there is nothing to refuse


def test_the_report_holds_the_same_numbers_as_its_json(tmp_path):
    data = hostile_report([f"word{position}" for position in range(60)])
    keys = write_report(LocalStore(tmp_path), data)
    first = [LocalStore(tmp_path).read(key) for key in keys]
    write_report(LocalStore(tmp_path), data)
    assert first == [LocalStore(tmp_path).read(key) for key in keys]
    known, text = report_json(data), check_page(first[1].decode())
    assert known["summary"]["rows_kept"] == 7
    assert known["summary"]["kept_ratio"] == 0.7
    assert known["summary"]["bottleneck"] == data.times[1]["stage"]
    assert known["times"][0]["cost"] == pytest.approx(2.0 / 3600 * 0.05)
    assert known["times"][0]["cpu_seconds_per_1000_images"] == 200.0
    assert known["times"][1]["images_per_second"] == 0.0
    assert known["edge_recall"] == 0.9
    for shown in ("70.0 %", "7, 5", "90.0 %", "of 10, 59.6-98.2", data.times[1]["stage"], "75.0 %", "none planted"):
        assert shown in text


def test_a_report_of_nothing_is_a_page_too():
    text = check_page(render_report(ReportData("nothing", [])))
    assert "nothing" in text
    with pytest.raises(TypeError, match="cannot stand in a report"):
        report_json(ReportData("x", [], settings={"store": LocalStore("/")}))
    assert issubclass(HeliostatError, Exception)


def test_balance_figures_are_those_of_their_definitions():
    sizes = np.array([10, 0, 30, 20])
    found = size_statistics(sizes)
    gini = sum(abs(a - b) for a in sizes for b in sizes) / (2 * len(sizes) ** 2 * sizes.mean())
    assert found["gini"] == pytest.approx(gini)
    shares = sizes[sizes > 0] / sizes.sum()
    assert found["entropy_nats"] == pytest.approx(-sum(one * np.log(one) for one in shares))
    assert found["evenness"] == pytest.approx(found["entropy_nats"] / np.log(4))
    assert (found["num_empty"], found["largest"], found["smallest"], found["num_images"]) == (1, 30, 0, 60)
    assert found["curve"] == [30, 20, 10, 0]
    assert size_statistics(np.full(5, 7))["gini"] == pytest.approx(0)
    assert size_statistics(np.array([], int))["num_images"] == 0
    assert len(size_statistics(np.arange(10_000))["curve"]) == 200


def test_statistics_are_those_of_a_loop_over_single_images():
    draw = np.random.default_rng(0)
    count = 500
    rows = pa.table(
        {
            "source": [
                f"https://host{draw.integers(0, 40)}.example/{row}" if row % 5 else f"{row}.png" for row in range(count)
            ],
            "length": draw.integers(1, 10_000, count),
            "width": pa.array(draw.integers(1, 20_000, count), pa.int32()),
            "height": pa.array(draw.integers(1, 3000, count), pa.int32()),
            "format": [("jpeg", "png", "webp")[number] for number in draw.integers(0, 3, count)],
        }
    )
    chosen = draw.random(count) < 0.5
    statistics = ImageStatistics()
    for start in range(0, count, 130):
        statistics.add(rows.slice(start, 130), chosen[start : start + 130])
    found, kept = statistics.as_dict(), [row for row, yes in zip(rows.to_pylist(), chosen, strict=True) if yes]
    assert found["num_images"] == len(kept)
    assert found["num_bytes"] == sum(row["length"] for row in kept)
    assert found["mean_megapixels"] == pytest.approx(np.mean([row["width"] * row["height"] for row in kept]) / 1e6)
    sides = sorted(min(row["width"], row["height"]) for row in kept)
    assert found["short_side_pixels"]["50%"] == sides[int(np.ceil(0.5 * len(sides))) - 1]
    assert found["formats"] == {name: sum(row["format"] == name for row in kept) for name in found["formats"]}
    hosts = [row["source"].split("/")[2] for row in kept if "://" in row["source"]]
    assert found["hosts"] == {host: hosts.count(host) for host in found["hosts"]}
    assert found["num_hosts"] == len(set(hosts))
    assert ImageStatistics().as_dict()["short_side_pixels"] == {}


def test_numbers_are_written_for_people():
    assert [duration(value) for value in (4.25, 200, 5 * 3600 + 400, 52 * 3600)] == [
        "4.2 s",
        "3 min 20 s",
        "5 h 06 min",
        "2 d 04 h",
    ]
    assert [size(value) for value in (812, 34_100, 1.2e9, 3e15, 5e18)] == ["812 B", "34.1 kB", "1.2 GB", "3.0 PB", "5,000.0 PB"]
    assert [number(value) for value in (1234567, 0.123456, True, "x", [1, 2000])] == [
        "1,234,567",
        "0.1235",
        "True",
        "x",
        "1, 2,000",
    ]
    assert number(list(range(11))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."
