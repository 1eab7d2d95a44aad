"""Tars that somebody made to do harm: every member is accounted for, nothing runs, memory stays bounded."""

import hashlib
import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_tars import CASES, END, LAST, PNG, header, member, rows_in_a_child

from heliostat.data.packing import Packing, pack_container
from heliostat.data.quarantine import Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.data.shards import index_shard, make_shard_image, write_shard
from heliostat.data.sources import open_source
from heliostat.data.tar_index import TarIndex
from heliostat.data.windows import BytesInMemory, BytesOfObject
from heliostat.errors import DataError
from heliostat.storage import LocalStore


class Canary:
    """A pickle that would leave a file behind if anything loaded it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (str(self.path),)  # type: ignore[return-value]


def read(data: bytes, folder: Path) -> tuple[list[str], list[str]]:
    """Index over windows of a store, as a run does it; returns names of images and reasons, and checks the account."""
    store = LocalStore(folder)
    (folder / "hostile.tar").write_bytes(data)
    for window in (4096, 2**24):
        source = BytesOfObject(store, "hostile.tar", len(data), window)
        index = TarIndex(source, "hostile.tar", is_strict=False)
        kept, rejections = [], []
        for found in index.accept():
            if isinstance(found, Rejection):
                rejections.append(found)
            else:
                entry, view = found
                assert data[entry.offset : entry.offset + entry.length] == view
                assert entry.id == hashlib.sha256(view).hexdigest()
                kept.append(entry.source.removeprefix("hostile.tar/"))
        index.account.check("hostile.tar")
        assert (index.account.num_images, index.account.num_rejected) == (len(kept), len(rejections))
        assert all(one.offset >= 0 and one.offset + one.length <= len(data) for one in rejections)
    whole = open_source(str(folder / "hostile.tar"))
    packed = pack_container(whole, whole.files[0], 0, Packing(), lambda key, shard: None)
    assert quarantine_from_bytes(quarantine_to_bytes(packed.rejections)) == sorted(packed.rejections)
    assert packed.rows.num_rows == len(kept)
    return kept, [one.reason for one in packed.rejections]


@pytest.mark.parametrize("name", CASES)
def test_every_member_of_a_hostile_tar_is_accounted_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, images, reasons = CASES[name]
    kept, why = read(data, tmp_path)
    assert kept == images
    assert sorted(why) == sorted(reasons)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.tar"]


def test_names_of_strangers_are_not_in_what_we_write(tmp_path: Path) -> None:
    data = b"".join(member(f"../{number}/../x{number}.png", PNG + bytes([number])) for number in range(20)) + END
    (tmp_path / "a.tar").write_bytes(data)
    source, written = open_source(str(tmp_path / "a.tar")), dict[str, bytes]()
    pack_container(source, source.files[0], 7, Packing(images_per_shard=8), written.__setitem__)
    assert sorted(written) == [f"shards/000007-{number:04d}.tar" for number in range(3)]
    for shard in written.values():
        with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
            assert all(name.partition(".")[0].isdigit() for name in tar.getnames())


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    names = ["a.pkl", "a.pickle", "a.pyd", "a.pth", "a.pt", "a.npy", "a.npz", "a.json", "a.cls", "a.txt", "a.png", "a.ten"]
    kept, why = read(b"".join(member(name, poison) for name in names) + END, tmp_path)
    assert kept == ["a.png"]
    assert "bad_sidecar" in why
    assert not canary.exists()
    pickle.loads(poison)
    assert canary.exists(), "the canary itself does not sing"


def _good_tars() -> list[bytes]:
    ours = write_shard(make_shard_image(PNG + bytes([number]), "png", f"{number}.png", label="x") for number in range(3))
    tars = [ours]
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
            for number in range(3):
                for name, body in ((f"{'d' * 90}/{'e' * 60}{number}.png", PNG), (f"x{number}.json", b"{}")):
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(body), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
                    tar.addfile(info, io.BytesIO(body))
            link = tarfile.TarInfo("l" * 150)
            link.type, link.linkname = tarfile.SYMTYPE, "x" * (90 if tar_format == tarfile.USTAR_FORMAT else 200)
            tar.addfile(link) if tar_format != tarfile.USTAR_FORMAT else None
        tars.append(out.getvalue())
    return tars


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or repair a checksum after the damage, as a fuzzer would."""
    block = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(block))
        kind = rng.randrange(5)
        if kind == 0:
            block[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            block[at : at + 8] = rng.randbytes(8)
        elif kind == 2:
            del block[at : at + rng.choice((1, 512, 700))]
        elif kind == 3:
            block[at:at] = block[at : at + 512]
        else:  # a header that lies and whose checksum is right
            start = at // 512 * 512
            where, what = rng.choice(((124, b"%011o\0" % rng.randrange(2**33)), (156, bytes([rng.randrange(256)])), (0, b"..")))
            block[start + where : start + where + len(what)] = what
            head = block[start : start + 512]
            head[148:156] = b" " * 8
            block[start + 148 : start + 156] = b"%06o\0 " % sum(head)
        if not block:
            return b""
    return bytes(block)


def test_six_hundred_mutated_tars_are_errors_or_accounted_for() -> None:
    rng, tars, num_damaged = random.Random(0), _good_tars(), 0
    for number in range(600):
        data = _mutated(tars[number % len(tars)], rng)
        index = TarIndex(BytesInMemory(data), "m.tar", is_strict=False)
        found = list(index.accept())
        index.account.check("m.tar")
        num_damaged += any(isinstance(one, Rejection) and one.reason == "damaged_header" for one in found)
        try:
            strict = {entry.id for entry in index_shard(data)}
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert strict >= {one[0].id for one in found if not isinstance(one, Rejection)}
    assert num_damaged > 100


def test_what_we_see_is_what_tarfile_sees() -> None:
    for data in _good_tars():
        index = TarIndex(BytesInMemory(data), "t.tar", is_strict=False)
        ours = sorted(one[0].source for one in index.accept() if not isinstance(one, Rejection))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            theirs = [one.name for one in tar.getmembers() if one.isfile() and one.name.endswith(".png")]
            assert index.account.num_in == len(tar.getmembers())
        assert ours == theirs if data is _good_tars()[0] else len(ours) == len(theirs)
        assert data == _good_tars()[0] or ours == sorted(f"t.tar/{name}" for name in theirs)


def test_a_tar_of_twenty_gigabytes_is_walked_in_bounded_memory(tmp_path: Path) -> None:
    """The file is sparse on the disk: images, a film of 20 GB, and images again."""
    film = 20 * 2**30
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        file.write(b"".join(member(f"a{number}.png", PNG + bytes(40_000)) for number in range(200)))
        file.write(header(b"film.mp4", b"\x80" + film.to_bytes(11, "big")))
        file.seek(film, io.SEEK_CUR)
        file.write(LAST + END)
    grown, rows, rejections = rows_in_a_child(path)
    assert (rows, rejections) == (201, 1)
    assert grown < 160
