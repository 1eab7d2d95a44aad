"""What `heliostat why` and `heliostat what-if` find out about a curation."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from heliostat.artifacts import Artifact, ArtifactRef, ArtifactStore, check_files
from heliostat.crawling.config import UrlFilterConfig
from heliostat.crawling.reasons import REASONS
from heliostat.crawling.tables import LINKS_SCHEMA, read_table
from heliostat.crawling.urls import plain_host, plain_url, url_filter
from heliostat.curation.copies_rows import read_facts
from heliostat.curation.dedup import EDGES
from heliostat.curation.forget_list import parse_target
from heliostat.curation.ledger import MIN_ID_PREFIX, is_id
from heliostat.curation.ledger_read import open_ledger
from heliostat.curation.pool_facts import read_edges_above, read_pool_facts
from heliostat.curation.story import explain
from heliostat.curation.what_if import parse_overrides, sweep_lines, what_if
from heliostat.data.manifest import read_manifest
from heliostat.errors import ArtifactNotFoundError, DataError, UsageError
from heliostat.runtime.ledger_rows import CRAWL


def curations(artifacts: ArtifactStore, name: str) -> list[Artifact]:
    """The curated artifact of that name, or all of the store, the newest first. Raises UsageError and ArtifactNotFoundError."""
    if name:
        ref = ArtifactRef.parse(name)
        if ref.kind != "curated":
            raise UsageError(f"{name} is not a curated artifact; only curation keeps a ledger")
        return [artifacts.load(ref)]
    found = [artifacts.load(ref) for ref in artifacts.list() if ref.kind == "curated"]
    if not found:
        raise ArtifactNotFoundError(
            f"no curated artifact in {artifacts.store.uri}; heliostat curate makes one, or give store=..."
        )
    return sorted(found, key=lambda one: (one.record.created, str(one.ref)), reverse=True)


def why(artifacts: ArtifactStore, name: str, image: str) -> list[str]:
    """The story of an image in sentences, in every curation that knows it. Raises DataError when none does."""
    lines, found = list[str](), curations(artifacts, name)
    names = _spellings_of_source(image)
    if is_id(image):
        names = list(dict.fromkeys([image.lower(), image]))
    for curated in found:
        story = _story(curated, names)
        if story is not None:
            lines += [f"{curated.ref}:"] if len(found) > 1 and not story.is_joined else []
            lines += story.lines
    lines = lines or next((told for one in names if (told := _refused_links(artifacts, one))), [])
    if not lines and len(found) == 1:
        return explain(open_ledger(found[0].files), image)  # which refuses it, and says among how many rows
    if not lines:
        raise DataError(f"no image with id or source {image!r} in {', '.join(str(one.ref) for one in found)}")
    return lines


class _Story(NamedTuple):
    """is_joined: from the manifest, of an image that never was in the pool."""

    lines: list[str]
    is_joined: bool


def _story(curated: Artifact, names: Sequence[str]) -> _Story | None:
    """What one curation says of the first of the names that it knows. Raises DataError for too few digits of an id."""
    for name in names:
        try:
            return _Story(explain(open_ledger(curated.files), name), is_joined=False)
        except DataError as error:
            if "give more digits" in str(error):
                raise
        if joined := _joined_as_it_is(curated, name):
            return _Story(joined, is_joined=True)
    return None


def _spellings_of_source(source: str) -> list[str]:
    """As a crawl keeps a URL that it asks for, as it keeps one that it refuses, and as it was given."""
    refused = url_filter(UrlFilterConfig()).check(source).url if "://" in source else source
    return list(dict.fromkeys([plain_url(source), refused, source]))


def spellings(target: str) -> list[str]:
    """What a person asked to forget in every spelling that a store may hold: as a crawl writes it, then as it was given.

    target, and the results: as `curation.forget_list.parse_target` takes them. Raises UsageError.
    """
    found = parse_target(target)
    names = [found.text]
    if found.kind == "source":
        names = _spellings_of_source(found.text)
    elif found.kind == "domain":
        names = list(dict.fromkeys([_plain_host(found.text), found.text]))
    return [f"{found.kind}:{text}" for text in names]


def _plain_host(name: str) -> str:
    try:
        return plain_host(name)
    except DataError:  # no crawl has such a host, a list of URLs may
        return name


def _joined_as_it_is(curated: Artifact, image: str) -> list[str]:
    """What the manifest says about an image that came with a curated set and never was in the pool."""
    if not any(role.startswith("set_") for role in curated.record.inputs):
        return []
    manifest = read_manifest(curated.files)
    by_id = pc.starts_with(manifest["id"], image) if len(image) >= MIN_ID_PREFIX else pa.scalar(False)
    hits = manifest.filter(pc.or_(pc.equal(manifest["source"], image), by_id))
    sets = ", ".join(role.removeprefix("set_") for role in curated.record.inputs if role.startswith("set_"))
    return [
        f"{row['source']} is image {row['id'][:12]}: {row['width']} x {row['height']} {row['format']}. It is in the training "
        f"set, and was never in the pool: it came with a curated set that joins as it is ({sets})."
        for row in hits.to_pylist()
    ]


def _refused_links(artifacts: ArtifactStore, url: str) -> list[str]:
    """What the crawls of a store say about a URL that was found and never fetched; reads all their links."""
    if "://" not in url:
        return []
    for ref in artifacts.list():
        raw = artifacts.load(ref) if ref.kind == "raw" else None
        for key in sorted(raw.record.files) if raw is not None else ():
            if raw is None or not key.startswith(f"{CRAWL}/links/"):
                continue
            links = read_table(raw.files, key, LINKS_SCHEMA)
            hits = links.filter(pc.equal(links["url"], url))
            if hits.num_rows:
                row = hits.slice(0, 1).to_pylist()[0]
                meaning = REASONS[row["reason"]].meaning if row["reason"] else "another page opts out of its use"
                page = f" on {row['page']}" if row["page"] else ""
                return [
                    f"{url} was found by the crawl {ref}{page} and never fetched: {row['reason'] or 'opt_out'} ({meaning})."
                ]
    return []


def what_would_be(artifacts: ArtifactStore, name: str, words: Sequence[str]) -> list[str]:
    """What other thresholds would have done to the newest, or the named, curation. Raises UsageError for what is not stored."""
    asked = parse_overrides(words)
    curated = curations(artifacts, name)[0]
    copies = artifacts.load(ArtifactRef.parse(curated.record.inputs["copies"]))
    join = read_facts(copies)["statistics"].get("join")
    if join is None:
        raise UsageError(f"{copies.ref} has no edges: copies were not looked for (dedup.copies.enabled=false)")
    facts = read_pool_facts(open_ledger(curated.files))
    check_files(copies, EDGES)
    edges = read_edges_above(copies.files, EDGES, join["floor"])
    results = [what_if(facts, edges, one, edge_floor=join["floor"]) for one in asked]
    return [
        f"{curated.ref}, from the edges of {copies.ref}:",
        *(results[0].lines() if len(results) == 1 else sweep_lines(results)),
    ]
