"""Users, passwords and tokens of URIs never leave."""

import pytest

from heliostat.tracking import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://someone:pass@host:5000/path", "http://***@host:5000/path"),
        ("postgresql://u:p@ss@word@db/x and s3://key:secret@bucket/a", "postgresql://***@db/x and s3://***@bucket/a"),
        ("https://h/x?user=a&token=abc&X-Amz-Signature=123&size=2", "https://h/x?user=a&token=***&X-Amz-Signature=***&size=2"),
        ("mail a@b.c about http://host/p", "mail a@b.c about http://host/p"),
        ("model/demo@1 of s3://bucket/lake/model/demo@1", "model/demo@1 of s3://bucket/lake/model/demo@1"),
        ("{'uri': 'https://h/?password=x'}", "{'uri': 'https://h/?password=***'}"),
    ],
)
def test_what_is_secret_is_hidden_and_the_rest_stays(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
