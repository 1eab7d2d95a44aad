"""EDGE to S3: the only file that knows boto3. One method is one request and one attempt; botocore's own retries are off.

Credentials, region and endpoint come from the standard AWS chain only (environment, profile, instance role; `AWS_ENDPOINT_URL`
for other stores). Messages hold error codes and exception names, never the text of an exception: that may hold the endpoint.
"""

import base64
import hashlib
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from heliostat.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectReplacedError,
    StorageError,
    TransientStorageError,
)
from heliostat.storage.bucket import DAMAGED, Answer, Checksum, ObjectHead, Page
from heliostat.storage.statistics import count
from heliostat.storage.store import ObjectInfo

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 60.0
"""Silence of a store for so long counts as a fault; it is not the time of a whole request."""
_WRITER, _CRC32 = "heliostat-writer", "heliostat-crc32"  # user metadata of what we write; lower-case hex
_MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchUpload"})
_PRECONDITION_CODES = frozenset({"412", "PreconditionFailed"})
# 409: two conditional writes collided, "try again" says the S3 documentation; then one of them finds the other's object.
_TRANSIENT_STATUS = frozenset({409, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BadDigest", "IncompleteBody"}
    | {"XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
)
_BUSY = "the store is overloaded or failing; run again later"
_UNREACHABLE = "is AWS_ENDPOINT_URL right and up?"

_clients: dict[tuple[object, ...], Any] = {}
_clients_lock = threading.Lock()
_answered: set[tuple[object, ...]] = set()


def _surroundings() -> tuple[object, ...]:
    """What a client depends on: the process (a fork must not share sockets) and the AWS environment."""
    return (os.getpid(), *sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_")))


def _client(read_timeout_seconds: float) -> Any:
    """The boto3 client of this process; clients may be used by many threads, and each costs about 0.3 CPU seconds to build."""
    key = (read_timeout_seconds, *_surroundings())
    with _clients_lock:
        client = _clients.get(key)
        if client is None:
            import boto3
            from botocore.config import Config

            addressing = "path" if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") else "auto"
            config = Config(
                retries={"total_max_attempts": 1, "mode": "standard"},
                connect_timeout=CONNECT_TIMEOUT_SECONDS,
                read_timeout=read_timeout_seconds,
                max_pool_connections=64,
                s3={"addressing_style": addressing},
            )
            try:
                client = boto3.session.Session().client("s3", config=config)
            except ValueError:
                raise StorageError("AWS_ENDPOINT_URL is not a URL; write http://host:port") from None
            _clients.clear()  # one at a time: another environment replaces it
            _clients[key] = client
    return client


@dataclass(frozen=True)
class BotoBucket:
    """A bucket that boto3 reaches."""

    name: str
    read_timeout_seconds: float = READ_TIMEOUT_SECONDS
    page_size: int = 1000
    """Keys in one page of a listing; 1000 is the most that S3 gives."""

    def has_answered(self) -> bool:
        return _surroundings() in _answered

    def get(self, key: str, *, whole: int, beginning: int) -> Answer:
        with self._request("get", key) as client:
            response = client.get_object(Bucket=self.name, Key=key)
            num_bytes, body = int(response["ContentLength"]), response["Body"]
            data: bytes = body.read() if num_bytes <= whole else _read_exactly(body, beginning)
            body.close()  # what was not read is not waited for
            checksum = _checksum(client, response)
            compared = "ChecksumCRC32" in response  # by botocore, when it read the body to its end
            if len(data) == num_bytes and checksum and not compared and not checksum.agrees_with(data):
                raise TransientStorageError(f"content does not match its {checksum.kind}", DAMAGED)
        count(bytes_read=len(data))
        return Answer(data, num_bytes, response["ETag"], checksum)

    def get_range(self, key: str, start: int, num_bytes: int, version: str = "") -> bytes:
        condition = {"IfMatch": version} if version else {}
        with self._request("get", key, replaced=bool(version)) as client:
            wanted = f"bytes={start}-{start + num_bytes - 1}"
            data: bytes = client.get_object(Bucket=self.name, Key=key, Range=wanted, **condition)["Body"].read()
        count(bytes_read=len(data))
        return data

    def head(self, key: str) -> ObjectHead:
        with self._request("head", key) as client:
            response = client.head_object(Bucket=self.name, Key=key)
        return ObjectHead(int(response["ContentLength"]), response.get("Metadata", {}).get(_WRITER, ""))

    def list_page(self, prefix: str, token: str) -> Page:
        where = {"ContinuationToken": token} if token else {}
        with self._request("list", prefix) as client:
            page = client.list_objects_v2(Bucket=self.name, Prefix=prefix, MaxKeys=self.page_size, **where)
        entries = tuple(ObjectInfo(entry["Key"], int(entry["Size"])) for entry in page.get("Contents", []))
        return Page(entries, page["NextContinuationToken"] if page.get("IsTruncated") else "")

    def put(self, key: str, data: bytes, *, create: bool, writer: str) -> None:
        condition = {"IfNoneMatch": "*"} if create else {}
        with self._request("put", key, num_bytes=len(data)) as client:
            crc32 = zlib.crc32(data)
            known = {"Metadata": {_WRITER: writer, _CRC32: f"{crc32:08x}"}, **_digests(client, data, crc32)}
            client.put_object(Bucket=self.name, Key=key, Body=data, **known, **condition)

    def delete(self, key: str) -> None:
        try:
            with self._request("delete", key) as client:
                client.delete_object(Bucket=self.name, Key=key)
        except ObjectNotFoundError:  # some stores tell; S3 itself does not
            return

    def start_upload(self, key: str, *, writer: str, crc32: str) -> str:
        with self._request("put", key) as client:
            known = {_WRITER: writer, _CRC32: crc32}
            return str(client.create_multipart_upload(Bucket=self.name, Key=key, Metadata=known)["UploadId"])

    def put_piece(self, key: str, upload: str, number: int, data: bytes) -> str:
        with self._request("put", key, num_bytes=len(data)) as client:
            digest = {"ContentMD5": _base64(hashlib.md5(data, usedforsecurity=False).digest())}
            where = {"Bucket": self.name, "Key": key, "UploadId": upload, "PartNumber": number}
            return str(client.upload_part(Body=data, **where, **digest)["ETag"])

    def finish_upload(self, key: str, upload: str, tags: list[str], *, create: bool) -> None:
        condition = {"IfNoneMatch": "*"} if create else {}
        pieces = [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(tags, 1)]
        with self._request("put", key) as client:
            client.complete_multipart_upload(
                Bucket=self.name, Key=key, UploadId=upload, MultipartUpload={"Parts": pieces}, **condition
            )

    def abort_upload(self, key: str, upload: str) -> None:
        with self._request("abort", key) as client:
            client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)

    @contextmanager
    def _request(self, operation: str, key: str, *, replaced: bool = False, num_bytes: int = 0) -> Iterator[Any]:
        """A client to make one request with; turns every failure of botocore, body included, into one of ours."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        where = f"s3://{self.name}/{key}"
        try:
            client = _client(self.read_timeout_seconds)
            count(requests=1, bytes_written=num_bytes)
            yield client
        except ClientError as error:
            _answered.add(_surroundings())
            raise _refusal(error.response, operation, where, replaced=replaced) from None
        except NoCredentialsError:
            raise StorageError(
                f"no AWS credentials for {where}; set a profile, an instance role or AWS_ACCESS_KEY_ID"
            ) from None
        except _transient_exceptions() as error:
            name = type(error).__name__
            raise TransientStorageError(name, DAMAGED if name == "FlexibleChecksumError" else _UNREACHABLE) from None
        except BotoCoreError as error:
            raise StorageError(
                f"{operation} {where} failed: {type(error).__name__}; check the AWS variables and ~/.aws/config"
            ) from None
        _answered.add(_surroundings())


def _transient_exceptions() -> tuple[type[Exception], ...]:
    """What another attempt may not meet: lost connections, silence, bodies that break off, a busy metadata service."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    connections = (exceptions.ConnectionError, exceptions.HTTPClientError, HTTPError, OSError)
    bodies = (exceptions.IncompleteReadError, exceptions.FlexibleChecksumError, ResponseParserError)
    credentials = (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)
    return (*connections, *bodies, *credentials)


def _refusal(response: Any, operation: str, where: str, *, replaced: bool) -> StorageError:
    """Our error for an answer of the store that is not a success. `replaced`: a failed condition was about the version."""
    code = str(response.get("Error", {}).get("Code", "unknown"))
    code = code if re.fullmatch(r"[\w.-]{1,80}", code) else "unknown"
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return StorageError(f"no bucket {where[5:].partition('/')[0]}; create it or choose another store=")
    if code == "InvalidRange":
        return StorageError(f"short read of {where}: it ends before the range asked for; the object is truncated")
    if code in _MISSING_CODES:
        return ObjectNotFoundError(f"no object {where} ({code})")
    if code in _PRECONDITION_CODES:
        return ObjectReplacedError(f"{where} was replaced") if replaced else ObjectExistsError(f"{where} exists already")
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS:
        return TransientStorageError(code if code != "unknown" else f"HTTP status {status}", _BUSY)
    return StorageError(f"{operation} {where} was refused: {code}; check the credentials, the region and the permissions")


def _read_exactly(body: Any, num_bytes: int) -> bytes:
    """The first bytes of a body that is longer. Raises TransientStorageError when it breaks off before."""
    pieces, missing = [], num_bytes
    while missing and (piece := body.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    if missing:
        raise TransientStorageError(f"body ended {missing} bytes early", _UNREACHABLE)
    return b"".join(pieces)


def _checksum(client: Any, response: Any) -> Checksum | None:
    """What the store says about a whole object; None when it says nothing that we can compute, or when we are told not to look.

    First what the store computed, then what we wrote beside the object (for stores that keep no crc32, and for objects in
    pieces), then the ETag, which costs most: it is the MD5 of an object that was written in one piece, unless KMS or a
    customer's key encrypts it.
    """
    if client.meta.config.response_checksum_validation != "when_supported":
        return None
    crc32 = response.get("ChecksumCRC32", "")
    if crc32 and "-" not in crc32:
        return Checksum("crc32", base64.b64decode(crc32).hex())
    ours = response.get("Metadata", {}).get(_CRC32, "")
    if re.fullmatch(r"[0-9a-f]{8}", ours):
        return Checksum("crc32", ours)
    encrypted = response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
    tag = re.fullmatch(r'"([0-9a-f]{32})"', response["ETag"])
    return Checksum("md5", tag[1]) if tag and not encrypted else None


def _digests(client: Any, data: bytes, crc32: int) -> dict[str, str]:
    """Content-MD5, which every S3 server verifies, and the CRC32 that newer ones keep beside the object, for cheap reads."""
    digests = {"ContentMD5": _base64(hashlib.md5(data, usedforsecurity=False).digest())}
    if client.meta.config.request_checksum_calculation == "when_supported":
        digests |= {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": _base64(crc32.to_bytes(4, "big"))}
    return digests


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
