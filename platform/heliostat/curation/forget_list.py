"""The forget list of a store: what somebody asked to have removed, so that no later stage takes it in again.

One object per request below `forgotten/`, named by its digest. Ids are kept as they are, for an id is a hash already. URLs and
domains are kept as their sha256 only: the list can tell whether it holds a given one, and cannot be read backwards (somebody
who guesses a URL can confirm the guess; a list that must recognise URLs can do no better).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from heliostat.curation.ledger import MIN_ID_PREFIX, is_id
from heliostat.curation.ledger_facts import hex_to_ids
from heliostat.curation.ledger_keys import hash_strings, id_heads
from heliostat.data.shard_image import IMAGE_EXTENSIONS, ShardImage
from heliostat.errors import DataError, UsageError
from heliostat.storage import Store

# Shapes: n images, F forgotten ids.

FORGOTTEN_LIST = "forgotten/"
Kind = Literal["id", "source", "domain"]
_NEITHER = "{0!r} is neither an id, a URL nor a domain; write source:{0} for a name, domain:{0} for a host"
_KINDS: tuple[Kind, ...] = ("id", "source", "domain")
_DOMAIN = re.compile(r"(?=.{1,253}$)(?!-)[\w-]{1,63}(?<!-)(\.(?!-)[\w-]{1,63}(?<!-))*")
_LITERAL = re.compile(r"\[[0-9a-f:.]{2,45}\]|[0-9]{1,3}(\.[0-9]{1,3}){3}")
_HOST = r"^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/?#:]*)"


@dataclass(frozen=True)
class Target:
    """What is to be forgotten. text: an id or its first digits, a URL or another source, or a domain in lower case."""

    kind: Kind
    text: str

    @property
    def digest(self) -> str:
        """Names the request: sha256 of kind and text, hex."""
        return digest_of(self.kind, self.text)


def digest_of(kind: Kind, text: str) -> str:
    """sha256 of kind and text, hex."""
    return hashlib.sha256(f"{kind}:{text}".encode()).hexdigest()


def parse_target(text: str) -> Target:
    """What a person wrote: `id:`, `source:` or `domain:` and the rest, or the rest alone where it is plain which one is meant.

    Hexadecimal digits, 8 to 64 of them, are an id; what holds `://` or `/` or ends as an image file does is a source; a name
    with dots is a domain, and so is an address. Raises UsageError for anything else. Nothing is spelled anew but the case of
    ids and domains: `runtime.review_verbs.spellings` knows how a crawl writes URLs.
    """
    kind, colon, rest = text.partition(":")
    for known in _KINDS:
        if colon and kind == known and rest:
            return _checked(Target(known, rest))
    if is_id(text):
        return Target("id", text.lower())
    if "/" in text or text.rpartition(".")[2].lower() in IMAGE_EXTENSIONS or "#" in text:
        return _checked(Target("source", text))
    if "." in text or text.startswith("["):
        return _checked(Target("domain", text))
    raise UsageError(_NEITHER.format(text[:80]))


def _checked(target: Target) -> Target:
    if target.kind == "id":
        if not is_id(target.text):
            raise UsageError(f"{target.text[:80]!r} is no id; give {MIN_ID_PREFIX} to 64 hexadecimal digits")
        return Target("id", target.text.lower())
    if target.kind == "domain":
        name = target.text.lower().rstrip(".")
        is_name = _DOMAIN.fullmatch(name) and not name.rpartition(".")[2].isdecimal()
        if not is_name and not _LITERAL.fullmatch(name):
            raise UsageError(_NEITHER.format(target.text[:80]))
        return Target("domain", name)
    if not target.text:
        raise UsageError("nothing to forget was given; give an id, a URL or a domain")
    return target


def hosts_of(sources: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The host of each URL in lower case without a last dot; "" for what is no URL."""
    column = sources.combine_chunks() if isinstance(sources, pa.ChunkedArray) else sources
    found = pc.struct_field(pc.extract_regex(column.cast(pa.string()), _HOST), "host")
    return pc.utf8_rtrim(pc.utf8_lower(pc.fill_null(found, "")), ".")


def in_domain(hosts: pa.Array, domain: str) -> NDArray[np.bool_]:
    """Whether hosts are the domain or lie below it."""
    same = pc.or_(pc.equal(hosts, domain), pc.ends_with(hosts, f".{domain}"))
    return np.asarray(same.to_numpy(zero_copy_only=False), np.bool_)


@dataclass(frozen=True)
class ForgetList:
    """What nobody may use any more. ids: (F, 32) uint8. source_hashes: uint64, a sieve in front of source_digests."""

    ids: NDArray[np.uint8]
    source_hashes: NDArray[np.uint64]
    source_digests: frozenset[str]
    domain_digests: frozenset[str]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever asked for."""
        return not (len(self.ids) or self.source_digests or self.domain_digests)

    def matches(self, ids: NDArray[np.uint8] | None, sources: pa.Array | pa.ChunkedArray | None) -> NDArray[np.bool_]:
        """bool (n,): True for what was forgotten. ids: (n, 32) uint8; sources: n texts; either may be None."""
        count = len(ids) if ids is not None else 0 if sources is None else len(sources)
        found = np.zeros(count, np.bool_)
        if ids is not None and len(self.ids):
            near = np.flatnonzero(np.isin(id_heads(ids), id_heads(self.ids)))
            known = {bytes(row) for row in self.ids}
            found[near] = [bytes(row) in known for row in ids[near]]
        if sources is not None and count:
            found |= self._of_sources(sources)
        return found

    def of_sources(self, sources: Sequence[str]) -> list[bool]:
        """For each source, whether it was forgotten (`data.packing.Refusal`)."""
        return [bool(hit) for hit in self.matches(None, pa.array(list(sources), pa.string()))]

    def of_image(self, image: ShardImage) -> bool:
        """Whether an image was forgotten, by its bytes or by its source (`data.packing.Refusal`)."""
        return bool(self.matches(hex_to_ids(pa.array([image.id])), pa.array([image.source]))[0])

    def _of_sources(self, sources: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
        found = np.zeros(len(sources), np.bool_)
        if self.source_digests:
            near = np.flatnonzero(np.isin(hash_strings(sources), self.source_hashes))
            texts = sources.take(pa.array(near)).to_pylist()
            found[near] = [text is not None and digest_of("source", text) in self.source_digests for text in texts]
        if self.domain_digests:
            hosts = hosts_of(sources).dictionary_encode()
            bad = np.array([self._is_bad_host(host) for host in hosts.dictionary.to_pylist()], np.bool_)
            found |= bad[hosts.indices.to_numpy()]
        return found

    def _is_bad_host(self, host: str) -> bool:
        """Whether the host, or a domain above it, is on the list."""
        labels = host.split(".")
        return any(digest_of("domain", ".".join(labels[start:])) in self.domain_digests for start in range(len(labels)))


def request_key(target: Target) -> str:
    """Where a request lies in its store."""
    return f"{FORGOTTEN_LIST}{target.digest}.json"


def request_bytes(target: Target, ids: Sequence[str]) -> bytes:
    """A request as an object of the list. ids: of the images that it was found to mean."""
    known: dict[str, Any] = {"kind": target.kind, "digest": target.digest, "ids": sorted(set(ids))}
    if target.kind == "source":
        known["source_hash"] = int(hash_strings(pa.array([target.text]))[0])
    return (json.dumps(known, indent=1) + "\n").encode()


def read_forget_list(store: Store) -> ForgetList:
    """The list of a whole store (`ArtifactStore.store`). Raises DataError for a request that cannot be read."""
    ids, hashes, digests = set[str](), list[int](), dict[str, set[str]]({"source": set(), "domain": set()})
    for entry in store.list(FORGOTTEN_LIST):
        if entry.key.count("/") > 1 or not entry.key.endswith(".json"):
            continue
        try:
            request = json.loads(store.read(entry.key))
            ids.update(request["ids"])
            if request["kind"] != "id":
                digests[request["kind"]].add(request["digest"])
            if request["kind"] == "source":
                hashes.append(request["source_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{store.uri}/{entry.key} is not a request to forget: {error}; restore it or ask again") from error
    return ForgetList(
        hex_to_ids(pa.array(sorted(ids), pa.string())),
        np.array(hashes, np.uint64),
        frozenset(digests["source"]),
        frozenset(digests["domain"]),
    )
