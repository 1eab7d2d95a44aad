"""`heliostat forget`: remove images from every artifact of a store, and remember not to take them again.

    1. the request is written to the forget list, so that later stages refuse the images whatever happens next
    2. a plan is made and written: which rows, files and bytes of which artifact; what is killed now is finished by the next run
    3. manifests lose their rows; only then the bytes in the shards become zeros, so no reader meets a row with wrong bytes
    4. tables are blanked, pages that show an image are replaced, records get the new checksums; the plan is removed

Fingerprints stay: an artifact is what its settings made it, minus what is listed in its `revisions`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from heliostat.artifacts import DRAFT, RECORD, ArtifactRecord, ArtifactRef, ArtifactStore, describe
from heliostat.claims import claim
from heliostat.curation.forget_files import (
    Moves,
    blank_json,
    blank_rows,
    drop_from_parquet_shard,
    drop_rows,
    drop_sources,
    is_ledger_sources,
    source_hashes,
    zero_in_tar,
)
from heliostat.curation.forget_list import (
    FORGOTTEN_LIST,
    ForgetList,
    Target,
    parse_target,
    read_forget_list,
    request_bytes,
    request_key,
)
from heliostat.curation.forget_plan import MANIFEST, Change, find_ids, plan_changes, resolve_prefix
from heliostat.curation.ledger import LEDGER_INDEX
from heliostat.data.quarantine import QUARANTINE
from heliostat.errors import ObjectNotFoundError
from heliostat.storage import Store, one_line_if_damaged, remove_partial_writes

__all__ = ["ForgetList", "ForgetReport", "Target", "forget", "parse_target", "read_forget_list"]

_DERIVED = ("model", "report", "release", "sweep")

_PAGE_GONE = (
    b'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Removed</title></head><body>\n'
    b"<p>This page showed an image that somebody asked to forget. A curation under a new version makes its sheets again.</p>\n"
    b"</body></html>\n"
)
"""Takes the place of a page that showed a forgotten image, so that links to it lead somewhere."""


@dataclass(frozen=True)
class ForgetReport:
    """What was, or would be, done. changes: by artifact, only those that hold something. downstream: what was made of them.

    unfinished: artifacts that are being made and may hold the images; unclean: files that name a source and cannot be cleaned.
    """

    target: Target
    ids: tuple[str, ...]
    changes: Mapping[str, Change]
    downstream: tuple[str, ...]
    unfinished: tuple[str, ...]
    is_dry_run: bool
    unclean: tuple[str, ...] = field(default=())

    @property
    def has_found(self) -> bool:
        """Whether the store had, or was found to have had, what was asked for."""
        return bool(self.ids or self.changes)

    def lines(self) -> list[str]:
        """For people."""
        verb = "would be" if self.is_dry_run else "are"
        lines = [f"{len(self.ids)} images {verb} forgotten; the request is {self.target.digest[:12]} of the forget list"]
        if not self.has_found:
            lines.append(
                "  nothing in the store has this name; `heliostat why` tells how a source is spelled. Later stages refuse it"
            )
        for ref, change in self.changes.items():
            removed = f"{change.num_rows} rows, {len(change.files)} files changed"
            removed += f", {len(change.pages)} pages replaced" if change.pages else ""
            lines.append(f"  {ref}: {removed}")
            lines += [f"    not ours to change, remove it there: {shard}" for shard in change.in_place]
        lines += [f"  {ref}: made from them; make it again or withdraw it" for ref in self.downstream]
        lines += [
            f"  {ref}: is being made and may hold them; finish or remove it, then forget again" for ref in self.unfinished
        ]
        lines += [f"  {key}: names a source and is no file that can be cleaned; remove it" for key in self.unclean]
        return lines


def forget(
    artifacts: ArtifactStore, target: str, *, is_dry_run: bool = False, notify: Callable[[str], None] = lambda _: None
) -> ForgetReport:
    """Forget an image by id (8 or more digits), a source (a URL or a name), or all images of a domain.

    Raises UsageError for a target that is none of these, DataError for first digits that begin no id or several.
    """
    wanted = resolve_prefix(artifacts, parse_target(target))
    if is_dry_run:
        return _forget(artifacts, wanted, is_dry_run=True, notify=notify)
    with claim(artifacts.store, FORGOTTEN_LIST.rstrip("/"), "images are being forgotten", notify) as alone:
        for folder in (FORGOTTEN_LIST.rstrip("/"), *map(str, artifacts.list())):
            remove_partial_writes(artifacts.store.child(folder))  # what killed runs left, which may hold an image or its name

        def tell(words: str) -> None:
            alone.check()  # before each step
            notify(words)

        return _forget(artifacts, wanted, is_dry_run=False, notify=tell)


def _forget(artifacts: ArtifactStore, wanted: Target, *, is_dry_run: bool, notify: Callable[[str], None]) -> ForgetReport:
    store = artifacts.store
    key = request_key(wanted)
    plan_key = f"{FORGOTTEN_LIST}_work/{wanted.digest}.json"
    known = _ids_of(store, key)
    if not is_dry_run and known is None:
        store.put(key, request_bytes(wanted, [wanted.text] if wanted.kind == "id" else []))
    before = _read_plan(store, plan_key)
    if before is not None and not is_dry_run:
        notify("finishing an interrupted run")
        _apply(artifacts, before, wanted, notify)
    notify("looking for the images in every artifact")
    found = find_ids(artifacts, wanted, known or [])
    plan = {ref: change for ref, change in plan_changes(artifacts, wanted, found).items() if change.is_needed}
    ids = sorted({*found.ids, *(known or [])})
    changes = {**(before or {}), **plan}
    report = ForgetReport(wanted, tuple(ids), changes, *_around(artifacts, changes), is_dry_run, _unclean(changes))
    if not is_dry_run:
        store.put(key, request_bytes(wanted, ids))
        store.put(plan_key, json.dumps({ref: change.as_dict() for ref, change in plan.items()}).encode())
        _apply(artifacts, plan, wanted, notify)
        store.delete(plan_key)
    return report


def _ids_of(store: Store, key: str) -> list[str] | None:
    """The ids of a request that was made before, None when it was not."""
    try:
        return list(json.loads(store.read(key))["ids"])
    except ObjectNotFoundError:
        return None


def _read_plan(store: Store, key: str) -> dict[str, Change] | None:
    try:
        return {ref: Change.from_dict(change) for ref, change in json.loads(store.read(key)).items()}
    except ObjectNotFoundError:
        return None


def _unclean(plan: Mapping[str, Change]) -> tuple[str, ...]:
    return tuple(f"{ref}/{key}" for ref, change in plan.items() for key in change.unclean)


def _around(artifacts: ArtifactStore, plan: Mapping[str, Change]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what was made of the changed artifacts, unfinished artifacts)."""
    inputs = {str(ref): set(artifacts.load(ref).record.inputs.values()) for ref in artifacts.list()}
    reached = set(plan)
    while more := {ref for ref, made_of in inputs.items() if ref not in reached and made_of & reached}:
        reached |= more
    keys = {entry.key for entry in artifacts.store.list()}
    drafts = sorted(key.removesuffix(f"/{DRAFT}") for key in keys if key.endswith(f"/{DRAFT}"))
    unfinished = tuple(ref for ref in drafts if f"{ref}/{RECORD}" not in keys)
    return tuple(sorted(ref for ref in reached if ref.partition("/")[0] in _DERIVED)), unfinished


def _apply(artifacts: ArtifactStore, plan: Mapping[str, Change], target: Target, notify: Callable[[str], None]) -> None:
    """Do all changes. Rows of manifests go first everywhere, old shards and records last.

    An artifact that was removed since the plan was made is passed over.
    """
    plan = {ref: change for ref, change in plan.items() if artifacts.find(ArtifactRef.parse(ref)) is not None}
    steps: tuple[tuple[str, Callable[[Store, Change, Moves], None]], ...] = (
        ("rows leave the manifests", _drop_rows),
        ("bytes become zeros", _zero),
        ("tables are blanked", _blank),
        ("pages are replaced, old shards deleted", _delete),
    )
    moves = _all_moves(plan)
    for words, step in steps:
        notify(words)
        for ref, change in plan.items():
            step(artifacts.files(ArtifactRef.parse(ref)), change, moves)
    notify("records are brought up to date")
    for ref, change in plan.items():
        if change.files or change.shards or change.moves or change.pages:
            _revise(artifacts, ArtifactRef.parse(ref), change, target)


def _all_moves(plan: Mapping[str, Change]) -> Moves:
    keys, offsets = dict[str, str](), dict[str, Mapping[str, int]]()
    for change in plan.values():
        for old, (new, places) in change.moves.items():
            keys[old], offsets[old] = new, {**offsets.get(old, {}), **places}
    return Moves(keys, offsets)


def _drop_rows(files: Store, change: Change, moves: Moves) -> None:
    del moves  # those of other artifacts do not concern a manifest
    own = Moves(
        {old: new for old, (new, _) in change.moves.items()}, {old: places for old, (_, places) in change.moves.items()}
    )
    for old, (new, _) in change.moves.items():
        if files.size(old) is not None:
            files.put(new, drop_from_parquet_shard(files.read(old), change.wanted.ids)[0])
    for key in (MANIFEST, QUARANTINE):
        if key in change.files:
            _rewrite(files, key, lambda data: drop_rows(data, change.wanted, own))


def _zero(files: Store, change: Change, moves: Moves) -> None:
    del moves
    for key, offsets in change.shards.items():
        _rewrite(files, key, lambda data, offsets=offsets: zero_in_tar(data, offsets))


def _blank(files: Store, change: Change, moves: Moves) -> None:
    for key in change.files:
        if key == LEDGER_INDEX and change.ledger_index is not None:
            index = change.ledger_index
            _rewrite(files, key, lambda _, index=index: (json.dumps(index, indent=1) + "\n").encode())
        elif key in (MANIFEST, QUARANTINE) or key in change.shards:
            continue
        elif key.endswith(".json"):
            _rewrite(files, key, lambda data: blank_json(data, change.wanted))
        elif is_ledger_sources(key):
            _rewrite(files, key, lambda data: drop_sources(data, source_hashes(change.wanted.sources)))
        else:
            _rewrite(files, key, lambda data: blank_rows(data, change.wanted, moves))


def _delete(files: Store, change: Change, moves: Moves) -> None:
    del moves
    for key in change.pages:
        files.put(key, _PAGE_GONE)
    for key in change.moves:
        files.delete(key)


def _rewrite(files: Store, key: str, transform: Callable[..., bytes]) -> None:
    """Write what `transform` makes of a file, if that is something else."""
    data = files.read(key)
    with one_line_if_damaged(files, key):
        new = transform(data)
    if new != data:
        files.put(key, new)


def _revise(artifacts: ArtifactStore, ref: ArtifactRef, change: Change, target: Target) -> None:
    """Put the new checksums and counts into the record, and the request among its revisions."""
    found = artifacts.load(ref)
    gone = {*change.moves}
    files = {key: file for key, file in found.record.files.items() if key not in gone}
    new_keys = [new for new, _ in change.moves.values()]
    for key in (*change.files, *change.pages, *change.shards, *new_keys):
        files[key] = describe(found.files.read(key))
    known: dict[str, Any] = found.record.model_dump()
    known |= {"files": dict(sorted(files.items())), "counts": change.counts}
    known["revisions"] = sorted({*known.get("revisions", []), target.digest})
    record = ArtifactRecord.model_validate(known)
    if record != found.record:
        found.files.put(RECORD, (record.model_dump_json(indent=1) + "\n").encode())
