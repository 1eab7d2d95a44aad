"""The edge to boto3: which answers are worth another attempt, what is verified, and that messages hold no credentials."""

import logging
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from faulty_proxy import FAULTS, faulty_proxy
from s3_server import S3Server, free_ports

from heliostat.errors import HeliostatError, StorageError, TransientStorageError, UsageError
from heliostat.retries import Budget
from heliostat.storage import S3Limits, S3Store, check_writable, open_store
from heliostat.storage.boto import BotoBucket, _refusal

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYACCESSKEY0",
    "AWS_SECRET_ACCESS_KEY": "canary-secret/key+00000000",
    "AWS_SESSION_TOKEN": "canary-session-token",
}
USER, PASSWORD = "canary-user", "canary-password"
QUICK = Budget(attempts=2, seconds=3.0, first_pause_seconds=0.01)
LIMITS = S3Limits(patient=QUICK, hasty=QUICK)


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**CANARIES, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return [*CANARIES.values(), USER, PASSWORD]


def everything_said_by(store: S3Store, logs: pytest.LogCaptureFixture, *, first: int = 9) -> str:
    """Messages, representations and tracebacks of what every operation raises, and what was logged."""
    calls: list[Callable[[], object]] = [
        lambda: store.read("key"),
        lambda: store.read_range("key", 0, 10),
        lambda: store.size("key"),
        lambda: list(store.list()),
        lambda: store.put("key", b"1"),
        lambda: store.put("key", b"1", overwrite=False),
        lambda: store.put("large", b"1" * 100),
        lambda: store.delete("key"),
        lambda: check_writable(store),
    ]
    words = [repr(store.__dict__), store.uri]
    for call in calls[:first]:
        with pytest.raises(HeliostatError) as caught:
            call()
        assert "\n" not in str(caught.value)
        words += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    return "\n".join([*words, logs.text])


@contextmanager
def answering(status: int, body: bytes, headers: dict[str, str]) -> Iterator[str]:
    """A server on loopback that answers everything alike; yields host:port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, b"<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIACANARYACCESSKEY0</AWSAccessKeyId></Error>"),
        (
            400,
            b"<Error><Code>canary-secret/key+00000000\nAKIACANARYACCESSKEY0</Code><Message>canary-session-token</Message></Error>",
        ),
        (500, b"<html>canary-secret/key+00000000</html>"),
        (503, b"<Error><Code>SlowDown</Code><Message>canary-session-token</Message></Error>"),
        (200, b"<ListBucketResult><broken canary-password"),
    ],
)
def test_no_answer_of_a_server_brings_a_credential_into_a_message(
    canaries: list[str], status: int, body: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(status, body, {}) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{USER}:{PASSWORD}@{address}")
        store = S3Store("bucket", "prefix", limits=LIMITS)
        if status == 200:  # most requests succeed on any 200
            with pytest.raises(HeliostatError) as caught:
                list(store.list())
            said = "".join(traceback.format_exception(caught.value)) + caplog.text
        else:
            said = everything_said_by(store, caplog)
    assert [canary for canary in canaries if canary in said] == []


@pytest.mark.parametrize("endpoint", ["http://{}:{}@127.0.0.1:{}", "{}:{}@nowhere:{}", "http://{}:{}@host with spaces:{}"])
def test_no_endpoint_brings_its_user_and_password_into_a_message(
    canaries: list[str], endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.format(USER, PASSWORD, free_ports(1)[0]))
    first = 9 if endpoint.startswith("http://{}:{}@127") else 1  # a client that cannot be built costs a second each time
    said = everything_said_by(S3Store("bucket", limits=LIMITS), caplog, first=first)
    assert [canary for canary in canaries if canary in said] == []


def test_broken_settings_of_aws_are_one_line_without_what_they_hold(
    canaries: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    for name in CANARIES:
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[default]\naws_access_key_id = {CANARIES['AWS_ACCESS_KEY_ID']}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "config"))
    for profile in ("default", "canary-user"):
        monkeypatch.setenv("AWS_PROFILE", profile)
        said = everything_said_by(S3Store("bucket", limits=LIMITS), caplog, first=2)
        assert CANARIES["AWS_ACCESS_KEY_ID"] not in said
    assert logging.getLogger("botocore").level == logging.NOTSET  # nobody made it talk


def test_a_uri_that_holds_credentials_is_refused_and_not_repeated() -> None:
    for uri in (f"s3://{USER}:{PASSWORD}@bucket/prefix", f"s3://{PASSWORD}@bucket", f"http://{USER}:{PASSWORD}@host/bucket"):
        with pytest.raises(UsageError) as caught:
            open_store(uri)
        assert USER not in str(caught.value)
        assert PASSWORD not in str(caught.value)


@pytest.mark.s3
def test_no_broken_request_to_a_real_server_brings_a_credential_into_a_message(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for fault in FAULTS:
        with faulty_proxy(s3_server.endpoint, 1.0, faults=(fault,), stall_seconds=0.3) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint.replace("://", f"://{USER}:{PASSWORD}@"))
            bucket = BotoBucket(s3_bucket[5:], read_timeout_seconds=0.2)
            with pytest.raises(HeliostatError) as caught:
                S3Store(bucket, limits=LIMITS).read("key")
            said = "".join(traceback.format_exception(caught.value)) + caplog.text
            assert [canary for canary in (s3_server.secret_key, USER, PASSWORD) if canary in said] == [], fault


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [
        (503, "SlowDown", True),
        (503, "503", True),
        (429, "TooManyRequests", True),
        (500, "InternalError", True),
        (502, "502", True),
        (504, "504", True),
        (409, "ConditionalRequestConflict", True),
        (400, "RequestTimeout", True),
        (400, "BadDigest", True),
        (403, "AccessDenied", False),
        (404, "NoSuchKey", False),
        (412, "PreconditionFailed", False),
        (416, "InvalidRange", False),
        (400, "InvalidRequest", False),
        (501, "NotImplemented", False),
    ],
)
def test_what_is_tried_again_is_decided_by_status_and_code(status: int, code: str, transient: bool) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert isinstance(_refusal(response, "get", "s3://bucket/key", replaced=False), TransientStorageError) is transient


@pytest.fixture
def fixed_answer(monkeypatch: pytest.MonkeyPatch, canaries: list[str]) -> Callable[..., StorageError | bytes]:
    def read(headers: dict[str, str], body: bytes = b"123456789") -> StorageError | bytes:
        with answering(200, body, headers) as address:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            try:
                return S3Store("bucket", limits=LIMITS).read("key")
            except StorageError as error:
                return error

    return read


MD5 = "25f9e794323b453885f5181f1b624d0b"  # of 123456789
WRONG = "0" * 32


@pytest.mark.parametrize(
    ("headers", "agrees"),
    [
        ({"ETag": f'"{MD5}"'}, True),
        ({"ETag": f'"{WRONG}"'}, False),
        ({"ETag": f'"{WRONG}-2"'}, True),  # written in pieces: no MD5 of the whole
        ({"ETag": f'"{WRONG}"', "x-amz-server-side-encryption": "aws:kms"}, True),  # the MD5 of nobody knows what
        ({"ETag": f'"{WRONG}"', "x-amz-server-side-encryption": "AES256"}, False),
        ({"ETag": f'"{WRONG}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"}, True),
        ({"ETag": f'"{WRONG}"', "x-amz-checksum-crc32": "y/Q5Jg=="}, True),  # cbf43926, which is looked at instead
        ({"ETag": f'"{MD5}"', "x-amz-checksum-crc32": "AAAAAA=="}, False),
        ({"ETag": f'"{WRONG}"', "x-amz-meta-heliostat-crc32": "cbf43926"}, True),
        ({"ETag": f'"{WRONG}-2"', "x-amz-meta-heliostat-crc32": "00000000"}, False),
        ({"ETag": f'"{MD5}"', "x-amz-meta-heliostat-crc32": "not hex"}, True),
        ({"ETag": '"not an md5"'}, True),
    ],
)
def test_a_whole_object_is_compared_with_what_its_store_says(
    headers: dict[str, str], agrees: bool, fixed_answer: Callable[..., StorageError | bytes]
) -> None:
    result = fixed_answer(headers)
    if agrees:
        assert result == b"123456789"
    else:
        assert isinstance(result, StorageError)
        assert "tried 2 times in " in str(result)
        assert str(result).endswith("then set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required")


def test_the_standard_setting_turns_the_comparison_off(
    fixed_answer: Callable[..., StorageError | bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    assert fixed_answer({"ETag": f'"{WRONG}"'}) == b"123456789"


@pytest.mark.s3
def test_a_server_refuses_an_upload_that_was_garbled_on_its_way(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests are those of other bytes, as if the body had changed after they were computed; the signature is right."""
    from heliostat.storage import boto

    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.description}: it verifies no digest, the real server does")
    digests = boto._digests
    monkeypatch.setattr(boto, "_digests", lambda client, data, _: digests(client, data + b"?", zlib.crc32(data + b"?")))
    store = S3Store(s3_bucket[5:], limits=LIMITS)
    with pytest.raises(StorageError, match=r"failed: BadDigest, tried 2 times"):
        store.put("key", b"1")
    assert store.size("key") is None
    monkeypatch.setattr(boto, "_digests", lambda client, data, _: {"ContentMD5": digests(client, data + b"?", 0)["ContentMD5"]})
    with pytest.raises(StorageError, match=r"failed: BadDigest"):
        store.put("key", b"1")


@pytest.mark.s3
def test_stores_that_know_no_new_checksums_can_be_written(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    store = open_store(s3_bucket)
    store.put("key", b"value")
    assert store.read("key") == b"value"
