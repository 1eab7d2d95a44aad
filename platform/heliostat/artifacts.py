"""Artifacts: `kind/name@version`, complete if and only if their `artifact.json` exists.

Layout under a store:

    <kind>/<name>@<version>/draft.json      while the artifact is being made: fingerprint and configuration
    <kind>/<name>@<version>/_work/...       resumable state of the stage, removed at commit
    <kind>/<name>@<version>/<files>         the content
    <kind>/<name>@<version>/artifact.json   the record, written last
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from heliostat.config import canonical_json, changed_fields
from heliostat.errors import (
    ArtifactConflictError,
    ArtifactError,
    ArtifactNotFoundError,
    ObjectNotFoundError,
    StorageError,
    UsageError,
)
from heliostat.storage import Store, read_json, remove_partial_writes

RECORD = "artifact.json"
DRAFT = "draft.json"
WORK = "_work/"
CHECKPOINT = re.compile(r"(^|/)_work/checkpoints/.*/checkpoint\.json$")
"""The file that makes a checkpoint of a training run visible: such a run is never thrown away because a setting changed."""
_RESTORE = "restore the file, or remove the folder to make it again"
KINDS = ("raw", "features", "copies", "curated", "model", "report", "release", "sweep")
_REF = re.compile(r"^(?P<kind>[a-z]+)/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<version>[A-Za-z0-9][A-Za-z0-9._-]*)$")


@dataclass(frozen=True, order=True)
class ArtifactRef:
    """The identity of an artifact, written `kind/name@version`."""

    kind: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"

    @classmethod
    def parse(cls, text: str) -> "ArtifactRef":
        """Parse `kind/name@version`. Raises UsageError."""
        match = _REF.fullmatch(text)
        if match is None or match["kind"] not in KINDS:
            raise UsageError(f"{text!r} is not an artifact; write kind/name@version with kind one of {', '.join(KINDS)}")
        return cls(match["kind"], match["name"], match["version"])


class FileRecord(BaseModel):
    """Size in bytes and sha256 of one file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_bytes: int
    sha256: str


class ArtifactRecord(BaseModel):
    """What `artifact.json` holds. Hosts, devices and absolute paths are never in it. A metric that is NaN reads "NaN"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    kind: str
    name: str
    version: str
    fingerprint: str
    inputs: dict[str, str] = {}
    input_fingerprints: dict[str, str] = {}
    config: dict[str, Any] = {}
    code_version: str = ""
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    costs: dict[str, float] = {}
    """Hours, energy, CO2 and dollars of its training, all attempts together, by the metrics `cost/...`."""
    files: dict[str, FileRecord] = {}
    created: str = ""
    revisions: list[str] = []
    """Requests to forget that changed its files since (digests in `forgotten/` of the store)."""

    @property
    def ref(self) -> ArtifactRef:
        """The identity of this artifact."""
        return ArtifactRef(self.kind, self.name, self.version)


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its record and the store that holds its files."""

    record: ArtifactRecord
    files: Store

    @property
    def ref(self) -> ArtifactRef:
        """The identity of this artifact."""
        return self.record.ref

    def read(self, key: str) -> bytes:
        """The content of one file. Raises ArtifactError when it is not what was committed, or gone."""
        try:
            data = self.files.read(key)
        except ObjectNotFoundError as error:
            raise ArtifactError(f"{self.ref}: {key} is gone; {_RESTORE}") from error
        _compare(self.record, key, describe(data))
        return data

    def read_json(self, key: str, parse: Callable[[Any], Any] = lambda plain: plain) -> Any:
        """What `parse` makes of one JSON file of the artifact. Raises StorageError where it is damaged."""
        return read_json(self.files, key, parse, f"restore it, or remove the folder to make {self.ref} again")


@dataclass
class Draft:
    """An artifact being made. `put` files, then `commit`; keys under `_work/` are scratch and vanish at commit."""

    ref: ArtifactRef
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, "Artifact"]
    files: Store
    state: dict[str, Any]
    resumed: bool
    _written: dict[str, FileRecord] = field(default_factory=dict)

    def put(self, key: str, data: bytes) -> FileRecord:
        """Write one file atomically and remember its checksum."""
        self.files.put(key, data)
        return self.note(key, describe(data))

    def note(self, key: str, file: FileRecord) -> FileRecord:
        """Remember the checksum of a file that another process wrote."""
        self._written[key] = file
        return file

    def remember(self, **state: Any) -> None:
        """Keep small values (such as a tracker's run id) in the draft, for the next attempt."""
        self.state.update(state)
        self.files.put(DRAFT, _draft_bytes(self.fingerprint, _settings(self.config, self.inputs), self.state))

    def commit(
        self,
        *,
        counts: Mapping[str, int],
        metrics: Mapping[str, float] | None = None,
        costs: Mapping[str, float] | None = None,
        code_version: str = "",
        keep_draft: bool = False,
    ) -> "Artifact":
        """Write the record, then remove the scratch; draft.json too unless it is kept until `clean` (see `state_left`).

        Raises ArtifactConflictError when a writer with other settings was first, ArtifactError when files have vanished.
        """
        files = {}
        for entry in self.files.list():
            if entry.key in (DRAFT, RECORD) or entry.key.startswith(WORK):
                continue
            files[entry.key] = self._written.get(entry.key) or describe(self.files.read(entry.key))
        self._refuse_gaps(files)
        record = ArtifactRecord(
            kind=self.ref.kind,
            name=self.ref.name,
            version=self.ref.version,
            fingerprint=self.fingerprint,
            inputs={role: str(artifact.ref) for role, artifact in self.inputs.items()},
            input_fingerprints={role: artifact.record.fingerprint for role, artifact in self.inputs.items()},
            config=dict(self.config),
            code_version=code_version,
            counts=dict(counts),
            metrics=dict(metrics or {}),
            costs=dict(costs or {}),
            files=files,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            self.files.put(RECORD, (record.model_dump_json(indent=1) + "\n").encode(), overwrite=False)
        except StorageError:  # another was first, and may have removed the temporary file of this write
            if self.files.size(RECORD) is None:
                raise
            winner = _load_record(self.files, self.ref)
            _refuse_change(winner, self.fingerprint, _settings(self.config, self.inputs))
            record = winner
        clean(self.files, keep_draft=keep_draft)
        return Artifact(record, self.files)

    def _refuse_gaps(self, files: Mapping[str, FileRecord]) -> None:
        missing = sorted(key for key in self._written.keys() - files.keys() if not key.startswith(WORK))
        if missing and self.files.size(RECORD) is None:
            raise ArtifactError(
                f"{self.ref}: {len(missing)} written files are gone before the commit, the first is {missing[0]}; "
                "does another run make the same version with other settings?"
            )


def describe(data: bytes) -> FileRecord:
    """Size and sha256 of a file's content."""
    return FileRecord(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def clean(files: Store, *, keep_draft: bool = False) -> None:
    """Remove the scratch of a committed artifact (what an interrupted commit left is removed too); draft.json last."""
    remove_partial_writes(files)
    for entry in list(files.list(WORK)):
        files.delete(entry.key)
    if not keep_draft:
        files.delete(DRAFT)


def _draft_bytes(fingerprint: str, settings: Mapping[str, Any], state: Mapping[str, Any]) -> bytes:
    return (json.dumps({"fingerprint": fingerprint, "config": settings, "state": state}, indent=1) + "\n").encode()


def _settings(config: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Configuration and inputs as messages about changes show them."""
    return {**config, "inputs": {role: _input_text(one.ref, one.record.fingerprint) for role, one in inputs.items()}}


def _input_text(ref: Any, fingerprint: str) -> str:
    return f"{ref} ({fingerprint[:8]})"


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changes = changed_fields(old, new)
    return "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")


def _draft_of(plain: Any) -> dict[str, Any]:
    """Checked before a byte of the folder is touched."""
    return {"fingerprint": str(plain["fingerprint"]), "config": dict(plain["config"]), "state": dict(plain["state"])}


def _load_record(files: Store, ref: ArtifactRef) -> ArtifactRecord:
    fix = f"restore the file, or remove the folder to make {ref} again"
    try:
        record = ArtifactRecord.model_validate_json(files.read(RECORD))
    except ObjectNotFoundError as error:
        raise ArtifactNotFoundError(f"no artifact {ref} in the store; run the stage that makes it first") from error
    except ValidationError as error:
        raise ArtifactError(f"{files.uri}/{RECORD} is damaged ({error.errors()[0]['msg']}); {fix}") from error
    if record.ref != ref:
        raise ArtifactError(f"{files.uri}/{RECORD} is the record of {record.ref}; {fix}")
    return record


def _refuse_change(found: ArtifactRecord, fingerprint: str, settings: Mapping[str, Any]) -> None:
    if found.fingerprint == fingerprint:
        return
    inputs = {role: _input_text(ref, found.input_fingerprints.get(role, "")) for role, ref in found.inputs.items()}
    raise ArtifactConflictError(
        f"{found.ref} exists with another configuration ({_changes({**found.config, 'inputs': inputs}, settings)}); "
        "give version=... or restore the settings"
    )


class ArtifactStore:
    """All artifacts under one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def files(self, ref: ArtifactRef) -> Store:
        """The store of one artifact's files, complete or not."""
        return self.store.child(str(ref))

    def find(self, ref: ArtifactRef) -> Artifact | None:
        """The artifact, or None when it is not complete."""
        files = self.files(ref)
        return Artifact(_load_record(files, ref), files) if files.size(RECORD) is not None else None

    def state_left(self, artifact: Artifact) -> dict[str, Any]:
        """What the draft of a complete artifact remembers, when its maker ended between the commit and `clean`; else empty."""
        try:
            return dict(read_json(artifact.files, DRAFT, _draft_of, "remove it")["state"])
        except ObjectNotFoundError:
            return {}

    def load(self, ref: ArtifactRef) -> Artifact:
        """The artifact. Raises ArtifactNotFoundError."""
        files = self.files(ref)
        return Artifact(_load_record(files, ref), files)

    def list(self) -> list[ArtifactRef]:
        """Every complete artifact, sorted."""
        keys = [entry.key for entry in self.store.list() if entry.key.endswith(f"/{RECORD}")]
        matches = [_REF.fullmatch(key.removesuffix(f"/{RECORD}")) for key in keys]
        return sorted(ArtifactRef(*match.groups()) for match in matches if match and match["kind"] in KINDS)

    def begin(
        self,
        ref: ArtifactRef,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        notify: Callable[[str], None],
    ) -> Artifact | Draft:
        """The finished artifact when it exists with this fingerprint, else a draft to fill.

        A draft that an interrupted run left is taken up again when its fingerprint agrees, and is discarded (with a notice)
        when it does not. Raises ArtifactConflictError when the version is complete with another fingerprint, or its draft holds
        checkpoints of a run with another one.
        """
        plain_config: dict[str, Any] = json.loads(canonical_json(config))
        plain_inputs = {role: artifact.record.fingerprint for role, artifact in inputs.items()}
        fingerprint = compute_fingerprint(ref.kind, plain_config, plain_inputs)
        found = self.find(ref)
        if found is not None:
            _refuse_change(found.record, fingerprint, _settings(plain_config, inputs))
            if found.files.size(DRAFT) is not None or any(found.files.list(WORK)):
                clean(found.files)
            return found
        files = self.files(ref)
        settings = _settings(plain_config, inputs)
        state, resumed = _take_up(files, ref, fingerprint, settings, notify)
        files.put(DRAFT, _draft_bytes(fingerprint, settings, state))
        return Draft(ref, fingerprint, plain_config, inputs, files, state, resumed)


def _take_up(
    files: Store, ref: ArtifactRef, fingerprint: str, settings: Mapping[str, Any], notify: Callable[[str], None]
) -> tuple[dict[str, Any], bool]:
    """What an unfinished run left: taken up when it is the same one, else discarded, unless it holds checkpoints."""
    remove_partial_writes(files)
    try:
        draft = read_json(files, DRAFT, _draft_of, f"remove the folder to start {ref} again")
    except ObjectNotFoundError:
        draft = None
    if draft is not None and draft["fingerprint"] == fingerprint:
        notify(f"{ref}: resuming an interrupted run")
        return draft["state"], True
    leftovers = list(files.list())
    has_checkpoints = any(CHECKPOINT.search(entry.key) for entry in leftovers)
    if draft is None and has_checkpoints:
        raise ArtifactConflictError(
            f"{ref} has checkpoints and no {DRAFT} that tells of which run; restore it, give version=... for a new run, or "
            f"remove {files.uri} to throw them away"
        )
    if draft is not None and has_checkpoints:
        raise ArtifactConflictError(
            f"{ref} has checkpoints of an unfinished run with other settings ({_changes(draft['config'], settings)}); "
            f"restore them to go on, give version=... for a new run, or remove {files.uri} to throw it away"
        )
    if leftovers:
        notify(f"{ref}: discarding {len(leftovers)} files of an unfinished run with other settings")
    for entry in leftovers:
        files.delete(entry.key)
    return {}, False


def compute_fingerprint(kind: str, config: Mapping[str, Any], input_fingerprints: Mapping[str, str]) -> str:
    """sha256 over kind, resolved configuration and the fingerprints of the inputs; names and places are not in it."""
    text = canonical_json({"kind": kind, "config": config, "inputs": input_fingerprints})
    return hashlib.sha256(text.encode()).hexdigest()


def check_files(artifact: Artifact, prefix: str) -> None:
    """Raise ArtifactError where a file below `prefix` is gone: a listing would not show that one is missing."""
    there = {entry.key for entry in artifact.files.list(prefix)}
    gone = sorted(key for key in artifact.record.files if key.startswith(prefix) and key not in there)
    if gone:
        raise ArtifactError(f"{artifact.ref}: {gone[0]} is gone; {_RESTORE}")


def verify(artifact: Artifact) -> int:
    """Re-read every file and compare its checksum; returns the number of files. Raises ArtifactError on a mismatch."""
    for key in artifact.record.files:
        artifact.read(key)
    return len(artifact.record.files)


def _compare(record: ArtifactRecord, key: str, found: FileRecord) -> None:
    expected = record.files.get(key)
    if expected is None:
        raise ArtifactError(f"{record.ref}: {key} is no file of it; give the version that has one")
    if found != expected:
        raise ArtifactError(
            f"{record.ref}: {key} is damaged, it has {found.num_bytes} bytes, sha256 {found.sha256[:12]}; recorded "
            f"{expected.num_bytes} bytes, {expected.sha256[:12]}; {_RESTORE}"
        )
