"""Where images come from: a folder or bucket prefix of files, a list of files, tars, Parquet files.

Nothing is opened here but lists; names and sizes are enough to plan the work. What is not taken is counted by its suffix.
"""

import errno
import fnmatch
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, overload

from heliostat.data.file_lists import LIST_SUFFIXES, read_list
from heliostat.data.quarantine import Rejection
from heliostat.data.shard_image import IMAGE_EXTENSIONS
from heliostat.errors import DataError, UsageError
from heliostat.storage import LocalStore, ObjectInfo, Store, check_key, open_store

Kind = Literal["images", "tars", "parquet"]

_KINDS: tuple[Kind, ...] = ("images", "tars", "parquet")
_KIND_OF_SUFFIX: dict[str, Kind] = dict.fromkeys(IMAGE_EXTENSIONS, "images")
_KIND_OF_SUFFIX |= {"tar": "tars", "parquet": "parquet"}
_SUFFIXES = ", ".join(f".{name}" for name in IMAGE_EXTENSIONS)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_EXPANDED = 1_000_000
_MAX_SUFFIX_CHARACTERS = 12


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: its key relative to the source, or a URI; its size in bytes, -1 when unknown; its label."""

    key: str
    num_bytes: int
    label: str | None = None


class _Files(Sequence[SourceFile]):
    """The files of a source, made when they are looked at: a million of them are columns, not objects."""

    def __init__(self, source: "Source") -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.keys)

    @overload
    def __getitem__(self, index: int) -> SourceFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceFile]: ...
    def __getitem__(self, index: int | slice) -> SourceFile | list[SourceFile]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        source = self._source
        key = source.keys[index]
        label = source.labels[index] if source.labels else PurePosixPath(key).parent.name or None
        return SourceFile(key, source.sizes[index], label)


@dataclass(frozen=True)
class Source:
    """Files of one kind. Images lie one a file, in the order of their keys; tars and Parquet files hold many each.

    labels: as a list gives them; without them a file's label is the name of its folder, None at the top.
    passed_over: suffix -> number of files that were seen and not taken. rejected: entries of a list that name no file.
    """

    store: Store
    kind: Kind
    keys: Sequence[str]
    sizes: Sequence[int]
    labels: Sequence[str | None] | None = None
    passed_over: Mapping[str, int] = field(default_factory=dict)
    rejected: Sequence[Rejection] = ()

    @property
    def files(self) -> Sequence[SourceFile]:
        """Every file, in order."""
        return _Files(self)

    @property
    def digest(self) -> str:
        """sha256 over names and sizes: changes when files come, go or change their size. Places are not in it."""
        digest = hashlib.sha256("\n".join(f"{key}\t{size}" for key, size in zip(self.keys, self.sizes, strict=True)).encode())
        for label in self.labels or ():
            digest.update(f"\n{label}".encode())
        for rejection in self.rejected:
            digest.update(f"\n{rejection.source}".encode())
        return digest.hexdigest()

    def describe_passed_over(self) -> str:
        """`7 files passed over: 4 .json, 3 .txt`, or "" when there were none."""
        if not self.passed_over:
            return ""
        counted = sorted(self.passed_over.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = [f"{number:,} {suffix}" for suffix, number in counted[:8]]
        rest = sum(number for _, number in counted[8:])
        total = sum(self.passed_over.values())
        return f"{total:,} files passed over: {', '.join(shown)}" + (f", {rest:,} others" if rest else "")


def open_source(uri: str) -> Source:
    """Plan the files of a folder, an `s3://` prefix, a list, a tar, a Parquet file, or a pattern of them.

    Raises DataError when there is nothing, UsageError when it is not clear what is meant.
    """
    if not uri.strip():
        raise UsageError("the source is empty; give a folder, an s3:// prefix, a list, tars or Parquet files")
    head, _, name = uri.rstrip("/").rpartition("/")
    suffix = name.lower().rpartition(".")[2] if "." in name else ""
    is_folder = "://" not in uri and os.path.isdir(os.path.expanduser(uri))
    if any(sign in name for sign in "*?{") and not is_folder:
        return _matching(uri, head or "/" * uri.startswith("/") or ".", name)
    is_folder |= uri.endswith("/")  # Spark calls folders train.parquet; in a bucket only the slash tells
    if not is_folder and suffix in ("tar", "parquet", *LIST_SUFFIXES, "gz", "tgz", "zip", "bz2", "zst"):
        return _one_file(uri, head or "/" * uri.startswith("/") or ".", name, suffix)
    return _folder(uri)


def _folder(uri: str) -> Source:
    store = open_store(uri)
    if isinstance(store, LocalStore) and not Path(store.uri).is_dir():
        raise DataError(f"no folder at {store.uri}; give the folder that holds your images")
    return _chosen(uri, store, _listing(store))


def _chosen(uri: str, store: Store, listing: "_Listing") -> Source:
    """Images, or else tars, or else Parquet files. Beside images and tars Parquet files are tables about them."""
    found = listing.found
    if found["images"] and found["tars"]:
        raise UsageError(
            f"{uri} holds {len(found['images']):,} image files and {len(found['tars']):,} tars; "
            f"say which: {uri.rstrip('/')}/*.tar, or a folder that holds one kind"
        )
    kind = next((kind for kind in _KINDS if found[kind]), None)
    passed_over = listing.passed_over
    if kind is None:
        seen = f"; {sum(passed_over.values()):,} other files are there" if passed_over else ""
        raise DataError(f"no images below {store.uri}; files must end in {_SUFFIXES}, .tar or .parquet{seen}")
    if kind != "parquet" and found["parquet"]:
        passed_over[".parquet"] += len(found["parquet"])
    chosen = sorted(found[kind])
    return Source(store, kind, [key for key, _ in chosen], [size for _, size in chosen], passed_over=passed_over)


@dataclass
class _Listing:
    """What lies below a store, by kind: (key, size), and the rest by suffix."""

    found: dict[Kind, list[tuple[str, int]]] = field(default_factory=lambda: {"images": [], "tars": [], "parquet": []})
    passed_over: Counter[str] = field(default_factory=Counter)

    def pass_over(self, name: str) -> None:
        suffix = name.rpartition(".")[2].lower() if "." in name else ""
        self.passed_over[f".{suffix}" if 0 < len(suffix) <= _MAX_SUFFIX_CHARACTERS else "without a suffix"] += 1


def _listing(store: Store) -> _Listing:
    listing = _Listing()
    if isinstance(store, LocalStore):
        _walk_folder(store.uri, listing)
        return listing
    for entry in store.list():
        kind = _KIND_OF_SUFFIX.get(entry.key.lower().rpartition(".")[2])
        if kind is None:
            listing.pass_over(entry.key.rpartition("/")[2])
        elif not _is_readable(entry):
            listing.passed_over["with a name that is no key"] += 1
        else:
            listing.found[kind].append((entry.key, entry.num_bytes))
    return listing


def _is_readable(entry: ObjectInfo) -> bool:
    try:
        check_key(entry.key)
    except UsageError:
        return False
    return True


def _walk_folder(root: str, listing: _Listing) -> None:
    """One `stat` per image and none for the rest; links to files are followed, links to folders are not (they may go round)."""
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        with _scan(folder) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append((f"{prefix}{name}/", entry.path))
                    continue
                kind = _KIND_OF_SUFFIX.get(name.lower().rpartition(".")[2])
                if kind is None:
                    listing.pass_over(name)
                elif (num_bytes := _file_size(entry)) is None:
                    listing.passed_over["links to folders or to nothing"] += 1
                elif "\\" in name or not _is_text(name):
                    listing.passed_over["with a name that is no key"] += 1
                else:
                    listing.found[kind].append((prefix + name, num_bytes))


def _scan(folder: str) -> "os._ScandirIterator[str]":
    try:
        return os.scandir(folder)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error


def _file_size(entry: "os.DirEntry[str]") -> int | None:
    """Size in bytes; None for what is no file (any more), such as a link to itself."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise DataError(f"cannot look at {entry.path}: {error.strerror}") from error


def _is_text(name: str) -> bool:
    """Names that are not UTF-8 come from the file system as halves of surrogate pairs."""
    return name.isascii() or name.encode("utf-8", "replace").decode() == name


def _matching(uri: str, folder: str, pattern: str) -> Source:
    """The files of one folder whose names match a shell pattern or a range in braces."""
    store = open_store(folder)
    names = set(expand_range(pattern)) if _RANGE.search(pattern) else None
    if names is None and "{" in pattern:
        raise UsageError(f"{pattern} is not a pattern; write ranges as {{000000..000123}}")
    listing, kept = _listing(store), _Listing()
    for kind, found in listing.found.items():
        for key, size in found:
            if key in names if names is not None else "/" not in key and fnmatch.fnmatchcase(key, pattern):
                kept.found[kind].append((key, size))
    have = {key for found in kept.found.values() for key, _ in found}
    if not have:
        raise DataError(f"no images, tars or Parquet files match {uri}")
    if names is not None and (missing := sorted(names - have)):
        raise DataError(f"{len(missing)} of the {len(names)} files of {uri} are missing, the first is {missing[0]}")
    return _chosen(uri, store, kept)


def expand_range(pattern: str) -> Iterator[str]:
    """`a-{008..011}.tar` -> a-008.tar ... a-011.tar; one range, zeros kept. Raises UsageError."""
    match = _RANGE.search(pattern)
    if match is None or any(sign in pattern[: match.start()] + pattern[match.end() :] for sign in "{}*?"):
        raise UsageError(f"{pattern} needs exactly one range such as {{000000..000123}} and no other signs")
    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MAX_EXPANDED:
        raise UsageError(f"the range {{{first}..{last}}} has to go up, by less than {_MAX_EXPANDED:,}")
    for number in range(int(first), int(last) + 1):
        yield f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"


def _one_file(uri: str, folder: str, name: str, suffix: str) -> Source:
    store = open_store(folder)
    if suffix in ("gz", "tgz", "zip", "bz2", "zst"):
        raise UsageError(f"{uri} is compressed; images do not compress, unpack it once and give the folder or the plain tar")
    num_bytes = store.size(name)
    if num_bytes is None:
        raise DataError(f"no file at {uri}; give a folder of that name with a slash behind it")
    if suffix == "tar":
        return Source(store, "tars", [name], [num_bytes])
    entries = read_list(store, name, num_bytes)
    if entries is None:
        return Source(store, "parquet", [name], [num_bytes])
    if not entries.keys:
        raise DataError(f"{uri} lists no file that could be read; give one path or URI a line")
    return Source(store, "images", entries.keys, entries.sizes, labels=entries.labels, rejected=entries.rejected)
