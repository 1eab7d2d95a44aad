"""Shards are ordinary tars in both directions, identical for identical images, and harmless whatever they hold."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from heliostat.data.photographs import crops
from heliostat.data.shards import (
    MANIFEST_SCHEMA,
    ShardImage,
    index_shard,
    make_shard_image,
    manifest_from_bytes,
    manifest_rows,
    manifest_to_bytes,
    read_shard,
    write_shard,
)
from heliostat.data.sources import open_source
from heliostat.errors import DataError


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def images() -> list[ShardImage]:
    cut = crops("left", count=1, seed=0)
    return [
        make_shard_image(
            _png(crop.pixels),
            ".PNG",
            f"pool/ünï/{crop.name}.png",
            label=crop.name if index % 2 else None,
            metadata={"top": crop.top},
        )
        for index, crop in enumerate(cut)
    ]


def test_a_shard_gives_back_what_was_written(images: list[ShardImage]) -> None:
    assert list(read_shard(write_shard(images))) == images


def test_the_same_images_give_the_same_bytes(images: list[ShardImage]) -> None:
    assert write_shard(images) == write_shard(iter(images))


def test_tarfile_reads_what_we_write(images: list[ShardImage]) -> None:
    with tarfile.open(fileobj=io.BytesIO(write_shard(images))) as tar:
        members = tar.getmembers()
        assert [member.name for member in members[:3]] == ["000000000.png", "000000000.json", "000000001.png"]
        assert all(member.mtime == 0 and member.isfile() for member in members)
        bodies = [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert bodies[::2] == [image.data for image in images]
    assert json.loads(bodies[1])["id"] == images[0].id


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_we_read_what_tarfile_writes(images: list[ShardImage], tar_format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for index, image in enumerate(images):
            folder = "f" * 90 if tar_format == tarfile.USTAR_FORMAT else "f" * 150
            for extension, body in (("png", image.data), ("cls", str(index).encode())):
                member = tarfile.TarInfo(f"{folder}/{index}.{extension}")
                member.size, member.mtime = len(body), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
                tar.addfile(member, io.BytesIO(body))
    found = list(read_shard(out.getvalue()))
    assert [image.data for image in found] == [image.data for image in images]
    assert [image.label for image in found] == [str(index) for index in range(len(images))]
    assert found[3].source.endswith("f/3.png")


def test_the_index_points_at_the_bytes(images: list[ShardImage]) -> None:
    data = write_shard(images)
    for entry, image in zip(index_shard(data), images, strict=True):
        assert data[entry.offset : entry.offset + entry.length] == image.data


def test_an_empty_shard_is_a_shard() -> None:
    assert list(read_shard(write_shard([]))) == []


def test_images_that_lie_about_themselves_are_refused(images: list[ShardImage]) -> None:
    with pytest.raises(DataError, match="extension"):
        write_shard([make_shard_image(b"x", "exe", "x.exe")])
    with pytest.raises(DataError, match="sha256"):
        write_shard([ShardImage("0" * 64, images[0].data, "png", "x")])
    with pytest.raises(DataError, match="shorten metadata"):
        write_shard([make_shard_image(b"x", "png", "x", metadata={"text": "x" * 2**21})])


def test_a_shard_cut_anywhere_is_a_readable_error(images: list[ShardImage]) -> None:
    data = write_shard(images[:2])
    for length in sorted({0, 1, 511, 512, 513, *np.linspace(514, len(data) - 1025, 40).astype(int).tolist()}):
        with pytest.raises(DataError, match="truncated"):
            index_shard(data[:length])


def test_flipped_bits_are_found_or_harmless(images: list[ShardImage]) -> None:
    data, known = write_shard(images[:3]), {image.id for image in images}
    rng = np.random.default_rng(0)
    num_found = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data) - 1024))] ^= 1 << int(rng.integers(8))
        try:
            assert {image.id for image in read_shard(bytes(damaged))} <= known
        except DataError as error:
            num_found += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert num_found > 50


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member, body in members:
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.png", "/etc/passwd.png", "C:\\x.png", "pipe:rm -rf x.png", "a" * 3000 + ".png", ".png"]
)
def test_hostile_names_stay_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (image,) = read_shard(_tar((_member(name), b"bytes")))
    assert (image.data, image.source) == (b"bytes", name)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_text_are_replaced() -> None:
    (image,) = read_shard(_with_header(_tar((_member("ab.png"), b"bytes")), 0, b"\xff\xfe.png"))
    assert image.source == "\ufffd\ufffd.png"


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_devices_and_folders_are_passed_over(kind: bytes) -> None:
    data = _tar((_member("a.png", kind, "/etc/passwd"), b""), (_member("b.png"), b"bytes"))
    assert [image.data for image in read_shard(data)] == [b"bytes"]


def _with_header(data: bytes, position: int, value: bytes) -> bytes:
    """Change bytes of the first header and repair its checksum."""
    header = bytearray(data[:512])
    header[position : position + len(value)] = value
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


HOSTILE = {
    "a size of 8 GB": (124, b"77777777777\0", "truncated"),
    "a size in base 256": (124, b"\x80" + b"\xff" * 11, "limit"),
    "a negative size": (124, b"-0000000001\0", "octal"),
    "a size just past the end": (124, b"00000100000\0", "truncated"),
    "a sparse file": (156, b"S", "kind"),
    "an unknown kind": (156, b"Z", "kind"),
    "a pax header that swallows the shard": (156, b"x", None),
    "a long name that swallows the shard": (156, b"L", None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_readable_errors(name: str, images: list[ShardImage]) -> None:
    position, value, message = HOSTILE[name]
    data = _with_header(write_shard(images[:1]), position, value)
    if message is None:
        assert list(read_shard(data)) == []
    else:
        with pytest.raises(DataError, match=message):
            list(read_shard(data))


@pytest.mark.parametrize("data", [b"x" * 2048, b"PK\x03\x04" + bytes(1020), b"\x1f\x8b" + bytes(range(256)) * 8])
def test_other_files_are_not_shards(data: bytes) -> None:
    with pytest.raises(DataError, match="shard"):
        index_shard(data)


@pytest.mark.parametrize("sidecar", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"id": "0000"}'])
def test_broken_sidecars_are_readable_errors(sidecar: bytes) -> None:
    data = _tar((_member("0.png"), b"bytes"), (_member("0.json"), sidecar))
    with pytest.raises(DataError, match=r"sidecar|id"):
        index_shard(data)


def test_odd_sidecars_do_not_matter() -> None:
    sidecar = json.dumps({"source": 5, "label": 7, "metadata": "none"}).encode()
    (image,) = read_shard(_tar((_member("0.png"), b"bytes"), (_member("0.json"), sidecar)))
    assert (image.source, image.label, image.metadata) == ("5", "7", {})


def test_a_manifest_survives_its_bytes(images: list[ShardImage]) -> None:
    broken = make_shard_image(b"not an image", "jpg", "broken.jpg")
    data = write_shard([*images, broken])
    table = manifest_from_bytes(manifest_to_bytes(manifest_rows("shards/0.tar", data)))
    assert table.schema == MANIFEST_SCHEMA
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == [*(image.id for image in images), broken.id]
    assert [row["label"] for row in rows[:2]] == [None, images[1].label]
    assert (rows[0]["format"], rows[0]["width"], rows[0]["shard"]) == ("png", rows[0]["height"], "shards/0.tar")
    assert (rows[-1]["format"], rows[-1]["width"], rows[-1]["height"]) == ("unknown", 0, 0)
    assert manifest_to_bytes(table) == manifest_to_bytes(table)


def test_other_tables_are_no_manifests() -> None:
    with pytest.raises(DataError, match="Parquet"):
        manifest_from_bytes(b"not parquet")
    with pytest.raises(DataError, match="columns"):
        manifest_to_bytes(pa.table({"id": ["a"]}))
    with pytest.raises(DataError, match="other types"):
        manifest_to_bytes(pa.table({name: ["a"] for name in MANIFEST_SCHEMA.names}))


def test_images_of_a_folder_are_listed_sorted_and_recursive(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpeg", "a/notes.txt", "c.webp", "truth.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(open_source(str(tmp_path)).keys) == ["a/1.jpeg", "b/2.PNG", "c.webp"]


def test_a_folder_without_images_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images below .*must end in \.jpg"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no folder at"):
        open_source(str(tmp_path / "absent"))
