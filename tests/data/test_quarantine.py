"""The side manifest of rejected images."""

import pytest

from heliostat.data.quarantine import Rejection, quarantine_from_bytes, quarantine_to_bytes
from heliostat.errors import DataError

CUT = Rejection("a.jpg", "shards/000000.tar", 512, 99, "ab" * 32, "truncated", "the JPEG header ends after 99 bytes")
LINK = Rejection("../etc/passwd", "shards/000000.tar", 1024, 0, "", "link", "links are passed over")


def test_rejections_come_back_sorted_and_each_once() -> None:
    assert quarantine_from_bytes(quarantine_to_bytes([CUT, LINK, CUT])) == [LINK, CUT]
    assert quarantine_to_bytes([CUT, LINK]) == quarantine_to_bytes([LINK, CUT, LINK])
    assert quarantine_from_bytes(quarantine_to_bytes([])) == []


def test_what_strangers_wrote_is_bounded() -> None:
    long = Rejection("n" * 10**6, "s", 0, 0, "", "not_an_image", "d" * 10**6)
    assert (len(long.source), len(long.detail)) == (1024, 300)


def test_other_bytes_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"quarantine\.parquet cannot be read"):
        quarantine_from_bytes(b"not parquet")
