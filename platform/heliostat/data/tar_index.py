"""Which members of a tar are images, and what becomes of every other one.

Neighbouring members whose names agree up to the first dot of the file name belong together (WebDataset's rule). Of such a
sample every image is an entry; `.json`, `.cls` and `.txt` are its sidecars; anything else is a Rejection with its reason.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

from heliostat.config import canonical_json
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_SIDECAR_BYTES,
    ShardEntry,
    image_id,
    is_image_id,
)
from heliostat.data.tar_walk import DAMAGED, END, PLAIN, SPARSE, Member, TarDamage, walk
from heliostat.data.windows import Bytes
from heliostat.errors import DataError

_SIDECARS = ("json", "cls", "txt")
_MAX_MEMBERS_OF_A_SAMPLE = 64
_MAX_NAME_CHARACTERS = 4096  # PATH_MAX of Linux; a pax header could hold a million
_MAX_TEXT_BYTES = 2**14  # of a `.cls` or `.txt`: a label or a caption
_MAX_SIDECAR_DEPTH = 64  # of nested JSON; deeper ones end in Python's recursion limit, here or when they are written again
_ADJACENT_END_BYTES = 2**20  # end marks are padded to the blocking factor, 10 KiB by habit
_REASON_OF_KIND = {
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    SPARSE: "sparse",
    DAMAGED: "damaged_header",
}


@dataclass
class Account:
    """The conservation law of one source: everything that came in is an image, a sidecar that was used, or turned away."""

    num_in: int = 0
    num_images: int = 0
    num_sidecars: int = 0
    num_rejected: int = 0

    def __add__(self, other: "Account") -> "Account":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Account(*(mine + theirs for mine, theirs in pairs))

    def check(self, where: str) -> None:
        """DataError when something vanished: that would be our fault, and the artifact would lie."""
        kept = self.num_images + self.num_sidecars + self.num_rejected
        if self.num_in != kept:
            raise DataError(f"{where}: {self.num_in} came in and {kept} are accounted for; please report this defect")


class TarIndex:
    """Reads one tar, strictly (our own: damage is an error) or as what a stranger wrote (damage is a Rejection).

    `accept` yields entries with a view of their bytes, valid until the next one, and Rejections, in the order of the tar.
    """

    def __init__(self, tar: Bytes, shard: str, *, is_strict: bool) -> None:
        self.account = Account()
        self._tar, self._shard, self._is_strict = tar, shard, is_strict
        self._names: set[int] = set()

    def accept(self) -> Iterator[tuple[ShardEntry, memoryview] | Rejection]:
        """Raises DataError for damage when strict. Afterwards `account` holds the counts."""
        key, sample = "", list[tuple[str, Member]]()
        members = walk(self._tar)
        while True:
            try:
                member = next(members, None)
            except TarDamage as damage:
                if self._is_strict:
                    raise
                yield from self._sample(key, sample)
                yield self._rest(damage)
                return
            if member is None:
                yield from self._sample(key, sample)
                return
            if member.kind != PLAIN:
                yield from self._other(member)
                continue
            folder, _, file_name = member.name.rpartition("/")
            stem, _, extension = file_name.partition(".")
            member_key = f"{folder}/{stem}"
            if member_key != key:
                yield from self._sample(key, sample)
                key, sample = member_key, []
            self.account.num_in += 1
            fault = self._fault(member, len(sample))
            if fault:
                yield self._reject(member, *fault)
            else:
                sample.append((extension.lower(), member))

    def _fault(self, member: Member, num_before: int) -> tuple[str, str] | None:
        """Why a plain member is turned away before anything is read of it."""
        if len(member.name) > _MAX_NAME_CHARACTERS:
            return "too_long_name", f"{len(member.name)} characters, the limit is {_MAX_NAME_CHARACTERS}"
        name = hash(member.name)  # 8 bytes a name: four million names in bounded memory
        if name in self._names and not self._is_strict:
            return "duplicate_name", "an earlier member has this name; that one was taken"
        self._names.add(name)
        if num_before >= _MAX_MEMBERS_OF_A_SAMPLE:
            return "too_many_members", f"more than {_MAX_MEMBERS_OF_A_SAMPLE} members share this name up to the dot"
        return None

    def _rest(self, damage: TarDamage) -> Rejection:
        self.account.num_in += 1
        self.account.num_rejected += 1
        length = self._tar.num_bytes - damage.position
        return Rejection(self._shard, self._shard, damage.position, length, "", damage.reason, str(damage))

    def _other(self, member: Member) -> Iterator[Rejection]:
        """What is not a plain file, or the end mark with something behind it."""
        if member.kind == END:
            if self._has_more(member):
                self.account.num_in += 1
                yield self._reject(member, "after_end_mark", f"{member.length} bytes lie behind the end mark")
            return
        if self._is_strict and member.kind not in b"123456!":
            raise DataError(f"shard has a member of kind {member.kind!r} at byte {member.offset}; only plain files are read")
        self.account.num_in += 1
        reason = _REASON_OF_KIND.get(member.kind, "unknown_kind")
        yield self._reject(member, reason, f"member of kind {member.kind.decode('latin-1')!r}")

    def _has_more(self, end: Member) -> bool:
        if self._is_strict or end.length > _ADJACENT_END_BYTES:
            return not self._is_strict
        return any(bytes(self._tar.view(end.offset, end.length)).strip(b"\0"))

    def _reject(self, member: Member, reason: str, detail: str) -> Rejection:
        self.account.num_rejected += 1
        source = f"{self._shard}/{member.name}" if member.name else self._shard
        return Rejection(source, self._shard, member.offset, member.length, "", reason, detail)

    def _sample(self, key: str, sample: list[tuple[str, Member]]) -> Iterator[tuple[ShardEntry, memoryview] | Rejection]:
        images = [(extension, member) for extension, member in sample if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        sidecars: dict[str, bytes] = {}
        for extension, member in sample:
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                continue
            if extension not in _SIDECARS:
                yield self._reject(
                    member, "not_an_image", f"a .{extension[:20]} is neither an image nor a sidecar that is read"
                )
            elif not images:
                yield self._reject(member, "no_image", "a sidecar without an image")
            elif member.length > (limit := MAX_SIDECAR_BYTES if extension == "json" else _MAX_TEXT_BYTES):
                if self._is_strict:
                    raise DataError(f"sidecar of {key[:80]!r} has {member.length} bytes, the limit is {limit}")
                yield self._reject(member, "too_large", f"a sidecar of {member.length} bytes, the limit is {limit}")
            else:
                sidecars[extension] = bytes(self._tar.view(member.offset, member.length))
                self.account.num_sidecars += 1
        known: dict[str, Any] = {}
        if "json" in sidecars:
            try:
                known = parse_sidecar(sidecars["json"], key)
            except DataError as error:
                if self._is_strict:
                    raise
                self.account.num_sidecars -= 1
                yield self._reject(next(member for name, member in sample if name == "json"), "bad_sidecar", str(error))
        for extension, member in images:
            yield self._image(key, extension, member, known, sidecars)

    def _image(
        self, key: str, extension: str, member: Member, known: dict[str, Any], sidecars: dict[str, bytes]
    ) -> tuple[ShardEntry, memoryview] | Rejection:
        if member.length > MAX_IMAGE_BYTES:
            if self._is_strict:
                raise DataError(f"image {key[:80]!r} has {member.length} bytes, the limit is {MAX_IMAGE_BYTES}")
            return self._reject(member, "too_large", f"an image of {member.length} bytes, the limit is {MAX_IMAGE_BYTES}")
        view = self._tar.view(member.offset, member.length)
        identity, claimed = image_id(view), known.get("id")
        if claimed is not None and claimed != identity and (self._is_strict or is_image_id(claimed)):
            message = f"image {key[:80]!r} does not match its id {str(claimed)[:12]}; the shard is damaged"
            if self._is_strict:
                raise DataError(message)
            return self._reject(member, "id_mismatch", message)
        self.account.num_images += 1
        source = member.name if self._is_strict else f"{self._shard}/{member.name}"
        if self._is_strict or is_image_id(claimed):
            source = str(known.get("source", source))
        label, metadata = label_and_metadata(known, sidecars)
        extension = extension.rpartition(".")[2]
        return ShardEntry(identity, extension, member.offset, member.length, source, label, metadata), view


def parse_sidecar(text: bytes, key: str) -> dict[str, Any]:
    """A JSON sidecar. Raises DataError when it is not a mapping."""
    try:
        sidecar = _LENIENT_JSON.decode(text.decode("utf-8"))
        is_shallow = _is_shallow(sidecar, _MAX_SIDECAR_DEPTH)
        is_small = 6 * len(text) <= MAX_SIDECAR_BYTES  # what JSON escapes grows six times at most
        num_bytes = len(canonical_json(sidecar)) if is_shallow and not is_small else 0
    except (ValueError, RecursionError) as error:
        raise DataError(f"sidecar of {key[:80]!r} is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(sidecar, dict):
        raise DataError(f"sidecar of {key[:80]!r} is a {type(sidecar).__name__}, expected a mapping")
    if not is_shallow:
        raise DataError(f"sidecar of {key[:80]!r} is nested more than {_MAX_SIDECAR_DEPTH} deep")
    if num_bytes > MAX_SIDECAR_BYTES:
        raise DataError(f"sidecar of {key[:80]!r} has {num_bytes} bytes, the limit is {MAX_SIDECAR_BYTES}")
    return sidecar


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not finite")
    return number


_LENIENT_JSON = json.JSONDecoder(parse_constant=lambda name: None, parse_float=_finite)  # NaN is what pandas writes


def _is_shallow(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list) or (depth > 0 and all(_is_shallow(inner, depth - 1) for inner in value))


def label_and_metadata(known: dict[str, Any], sidecars: dict[str, bytes]) -> tuple[str | None, dict[str, Any]]:
    """The label: the sidecar's, else the `.cls`, else the `.txt`. The metadata: ours, else the whole foreign sidecar."""
    texts = {name: data.decode("utf-8", "replace").strip() for name, data in sidecars.items() if name != "json"}
    is_ours = "source" in known and "metadata" in known
    metadata = known.get("metadata", {}) if is_ours else {name: value for name, value in known.items() if name != "id"}
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    label = known.get("label")
    for text in (texts.get("cls"), texts.get("txt")):
        if label is None:
            label = text
        elif text is not None and text != label:
            metadata["caption"] = text
    return None if label is None else str(label)[:_MAX_TEXT_BYTES], metadata
