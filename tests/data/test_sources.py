"""Sources: what is taken, what is passed over, and clear words for what cannot be meant."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.data.sources import expand_range, open_source
from heliostat.errors import DataError, HeliostatError, UsageError


def fill(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_a_folder_is_its_images_sorted_and_the_rest_is_counted(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "b/2.PNG",
        "a/1.jpeg",
        "c.webp",
        "a/notes.txt",
        "a/more.txt",
        "README",
        "meta.parquet",
        "x.thisisnosuffixatall",
    )
    source = open_source(str(tmp_path))
    assert [(file.key, file.num_bytes, file.label) for file in source.files] == [
        ("a/1.jpeg", 1, "a"), ("b/2.PNG", 1, "b"), ("c.webp", 1, None),
    ]  # fmt: skip
    assert source.describe_passed_over() == "5 files passed over: 2 .txt, 2 without a suffix, 1 .parquet"


def test_the_digest_follows_names_and_sizes_and_not_the_place(tmp_path: Path) -> None:
    digests = []
    for number, (place, data) in enumerate((("one", b"x"), ("two", b"x"), ("three", b"xx"))):
        fill(tmp_path / place, "a/1.jpg", data=data)
        digests.append(open_source(str(tmp_path / place)).digest)
        assert number == 0 or (digests[number] == digests[0]) is (number == 1)


def test_links_and_odd_names_are_counted_and_never_followed_round(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    (tmp_path / "round.jpg").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "absent")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "back\\slash.jpg").write_bytes(b"x")
    with open(os.fsencode(str(tmp_path)) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = open_source(str(tmp_path))
    assert list(source.keys) == ["a.jpg", "linked.jpg"]
    assert dict(source.passed_over) == {"links to folders or to nothing": 4, "with a name that is no key": 2}


def test_tars_and_parquet_files_are_found_by_what_lies_there(tmp_path: Path) -> None:
    fill(tmp_path / "wds", "00.tar", "01.tar", "00.parquet", "00_stats.json")
    fill(tmp_path / "tables", "a.parquet", "README.md")
    tars, tables = open_source(str(tmp_path / "wds")), open_source(str(tmp_path / "tables"))
    assert (tars.kind, list(tars.keys)) == ("tars", ["00.tar", "01.tar"])
    assert tars.describe_passed_over() == "2 files passed over: 1 .json, 1 .parquet"
    assert (tables.kind, list(tables.keys)) == ("parquet", ["a.parquet"])
    assert list(open_source(str(tmp_path / "wds/01.tar")).keys) == ["01.tar"]
    assert list(open_source(str(tmp_path / "wds/*.tar")).keys) == ["00.tar", "01.tar"]
    assert list(open_source(str(tmp_path / "wds/{00..01}.tar")).keys) == ["00.tar", "01.tar"]


def test_ranges_keep_their_zeros() -> None:
    assert list(expand_range("a-{008..011}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]


WRONG = {
    "absent": "no folder at",
    "empty": "no images below",
    "mixed": "say which",
    "wds/{00..04}.tar": "3 of the 5 files .* are missing, the first is 02.tar",
    "wds/{04..00}.tar": "go up",
    "wds/{0..99999999}.tar": "less than",
    "wds/{a,b}.tar": "ranges",
    "wds/{0..1}-{0..1}.tar": "exactly one range",
    "wds/*.jpg": "match",
    "wds/absent.tar": "no file at",
    "photos.tar.gz": "compressed",
    "photos.zip": "compressed",
    "web.txt": "only paths and s3://",
    "latin.txt": "UTF-8",
    "nothing.txt": "lists no file",
    "pathless.csv": "has no path",
    "broken.jsonl": "not JSON",
    "lists.jsonl": "expected a mapping",
    "gs://bucket/x": "scheme gs",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_source_that_cannot_be_meant_is_answered_in_one_line(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "wds", "00.tar", "01.tar")
    fill(tmp_path / "mixed", "a.tar", "b.jpg")
    fill(tmp_path, "empty/notes.md", "nothing.txt", data=b"# only a comment\n")
    fill(tmp_path, "web.txt", data=b"https://example.org/a.jpg\n")
    fill(tmp_path, "latin.txt", data=b"\xe9.jpg\n")
    fill(tmp_path, "pathless.csv", data=b"a,b\n1,2\n")
    fill(tmp_path, "broken.jsonl", data=b"{\n")
    fill(tmp_path, "lists.jsonl", data=b"[1]\n")
    with pytest.raises(HeliostatError, match=WRONG[name]) as caught:
        open_source(name if "://" in name else str(tmp_path / name))
    assert isinstance(caught.value, (DataError, UsageError))
    assert "\n" not in str(caught.value)


def _lists(folder: Path, entries: list[tuple[str, str]]) -> dict[str, Path]:
    """The same list in every form."""
    paths = {suffix: folder / f"list.{suffix}" for suffix in ("csv", "tsv", "jsonl", "parquet")}
    for suffix, sign in (("csv", ","), ("tsv", "\t")):
        paths[suffix].write_text(f"label{sign}path\n" + "".join(f"{label}{sign}{path}\n" for path, label in entries))
    paths["jsonl"].write_text("".join(json.dumps({"file_name": path, "label": label}) + "\n" for path, label in entries))
    pq.write_table(pa.table({"url": [path for path, _ in entries], "label": [label for _, label in entries]}), paths["parquet"])
    return paths


def test_a_list_says_the_same_in_every_form(tmp_path: Path) -> None:
    fill(tmp_path, "in/a.jpg", "in/sub/b.jpg", "out/c.jpg")
    outside = str(tmp_path / "out/c.jpg")
    entries = [("a.jpg", "x"), ("./sub/b.jpg", "y"), ("../out/c.jpg", "z"), ("s3://bucket/d.jpg", "w"), ("gone.jpg", "v")]
    for path in _lists(tmp_path / "in", [*entries, ("sub/../a.jpg", "twice"), ("back\\slash.jpg", "u")]).values():
        source = open_source(str(path))
        assert list(source.keys) == ["a.jpg", "sub/b.jpg", outside, "s3://bucket/d.jpg", "gone.jpg"]
        assert list(source.sizes) == [1, 1, 1, -1, -1]
        assert list(source.labels or ()) == ["x", "y", "z", "w", "v"]
        assert [rejection.reason for rejection in source.rejected] == ["duplicate_name", "bad_entry"]
    plain = tmp_path / "in/list.txt"
    plain.write_text("﻿a.jpg\n\n# a comment\n/dev/zero\nsub/b.jpg\n", encoding="utf-8")
    source = open_source(str(plain))
    assert [(file.key, file.num_bytes, file.label) for file in source.files] == [
        ("a.jpg", 1, None), ("/dev/zero", -1, "dev"), ("sub/b.jpg", 1, "sub"),
    ]  # fmt: skip


def test_a_list_may_hold_any_name_and_its_lines_are_those_of_the_file(tmp_path: Path) -> None:
    fill(tmp_path, "a\u2028b.jpg", "c\x0cd.jpg", "e.jpg")
    (tmp_path / "names.txt").write_bytes("a\u2028b.jpg\r\nc\x0cd.jpg\n~nobody-here/x.jpg\n".encode())
    rows = [{"path": "e.jpg", "caption": "one\u2028two"}, {"path": "a\u2028b.jpg", "label": "\x85"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    names = open_source(str(tmp_path / "names.txt"))
    assert list(names.keys) == ["a\u2028b.jpg", "c\x0cd.jpg"]
    assert [(one.source, one.reason) for one in names.rejected] == [("names.txt#3", "bad_entry")]
    assert [(file.key, file.label) for file in open_source(str(tmp_path / "rows.jsonl")).files] == [
        ("e.jpg", None), ("a\u2028b.jpg", "\x85"),
    ]  # fmt: skip


def test_half_a_surrogate_pair_in_a_list_is_a_bad_entry(tmp_path: Path) -> None:
    fill(tmp_path, "e.jpg")
    (tmp_path / "rows.jsonl").write_text('{"path": "\\ud800.jpg"}\n{"path": "e.jpg", "label": "\\ud800"}\n')
    source = open_source(str(tmp_path / "rows.jsonl"))
    assert [(file.key, file.label) for file in source.files] == [("e.jpg", "?")]
    assert [one.reason for one in source.rejected] == ["bad_entry"]
    assert len(source.digest) == 64


@pytest.mark.parametrize("uri", ["", "  ", "~nobody-here/photos", "~nobody-here/photos.csv"])
def test_an_empty_source_is_not_this_folder_and_an_unknown_home_is_named(uri: str) -> None:
    with pytest.raises(UsageError, match=r"empty|no such user"):
        open_source(uri)


def test_an_address_in_a_list_that_names_no_object_is_a_bad_entry_and_a_password_is_not_repeated(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("s3://bucket/a.jpg\ns3:///x.jpg\ns3://bucket\ns3://bucket/../y.jpg\ns3://bucket/a//b.jpg\n")
    source = open_source(str(listed))
    assert list(source.keys) == ["s3://bucket/a.jpg"]
    assert [one.reason for one in source.rejected] == ["bad_entry"] * 4
    listed.write_text("s3://user:canary@bucket/a.jpg\n")
    with pytest.raises(UsageError, match=r"entry 1 of the list list.txt holds a user") as refused:
        open_source(str(listed))
    assert "canary" not in str(refused.value)


def test_a_slash_tells_a_folder_that_is_called_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    monkeypatch.setattr("heliostat.data.sources._folder", stores.append)
    open_source("s3://bucket/train.parquet/")
    assert stores == ["s3://bucket/train.parquet/"]
