"""The story of one image in sentences, for `heliostat why`: what each stage saw, in the order of the stages."""

from collections.abc import Mapping
from typing import Any

from heliostat.curation.ledger import FORGOTTEN, KEPT
from heliostat.curation.ledger_read import Ledger

Row = Mapping[str, Any]
Settings = Mapping[str, float | None]

_MEANING = {
    "robots": "robots.txt of its host disallows it",
    "forbidden_address": "its host has an address inside a private network",
    "opt_out": "its host or page reserves it from training",
    "asked_to_forget": "somebody asked for it to be forgotten",
    "above_nsfw_threshold": "its score is above the threshold",
    "exact_duplicate": "another file has the same bytes",
    "hash_copy": "another image has nearly the same hash",
    "copy": "a better copy of the same picture stays for it",
    "shows_evaluation_image": "it, or a copy of it, shows an image of an evaluation set",
    "not_retrieved": "no curated image has it among its nearest",
    "cluster_not_matched": "its cluster holds too few curated images",
    "over_cluster_quota": "its cluster had given its share already",
    "over_max_images": "the curated set had brought in its most already",
    "over_cluster_level": "its cluster is large, and balance drew others",
}


def explain(ledger: Ledger, id_or_source: str) -> list[str]:
    """The story of an image, one paragraph per file of it.

    id_or_source: a whole id, its first 8 or more digits, or a source. Raises DataError as `Ledger.find`.
    """
    story = list[str]()
    for row in ledger.find(id_or_source).to_pylist():
        twin = ""
        if row["reason"] == "exact_duplicate":
            twin = next((other["source"] for other in ledger.find(row["id"]).to_pylist() if other["stage"] != "exact"), "")
        story += tell(row, ledger.settings, twin=twin)
    return story


def tell(row: Row, settings: Settings, *, twin: str = "") -> list[str]:
    """Sentences about one row of a ledger. settings: `Ledger.settings`. twin: the file of the same bytes that went on."""
    if row["decision"] == FORGOTTEN or (row["reason"] == "asked_to_forget" and not row["source"]):
        return [f"Image {_short(row['id'])} was forgotten: somebody asked for it, and nothing but its id is left."]
    story = [_opening(row)]
    story += _evidence(row)
    if row["id"] is not None:
        story += _detectors(row, settings)
        story += _duplicate(row, twin)
        story += _copies(row, settings)
        story += _reference(row, settings)
        story += _retrieval(row)
        story += _clusters(row)
    return [*story, _ending(row)]


def _short(identity: str | None) -> str:
    return "without id" if identity is None else identity[:12]


def _opening(row: Row) -> str:
    if row["id"] is None:
        return f"{row['source']} never became an image."
    size = f"{row['width']} x {row['height']} {row['format']}" if row["width"] else "of a format that could not be read"
    label = f", label {row['label']}" if row["label"] is not None else ""
    return f"{row['source']} is image {_short(row['id'])}: {size}, {row['length']} bytes{label}."


def _evidence(row: Row) -> list[str]:
    """Where it was found on the web, and what was said there about its use."""
    story = []
    if row["page"]:
        story.append(f"It was found on {row['page']}" + (f", beside the text {row['alt']!r}." if row["alt"] else "."))
    facts = [
        ("the server answered", row["http_status"]),
        ("robots.txt said", row["robots"]),
        ("the page declares the licence", row["licence"]),
        ("it is reserved by", row["opt_out"]),
    ]
    known = [f"{words} {value}" for words, value in facts if value]
    if known:
        text = ", ".join(known)
        story.append(f"{text[0].upper()}{text[1:]}.")
    return story


def _detectors(row: Row, settings: Settings) -> list[str]:
    story = []
    if row["nsfw"] is not None:
        threshold = settings.get("max_nsfw_score")
        side = (
            ""
            if threshold is None
            else f", {'above' if row['nsfw'] > threshold else 'not above'} the threshold {threshold:.3g}"
        )
        story.append(f"Its NSFW score is {row['nsfw']:.3f}{side}.")
    if row["num_faces"]:
        faces = "1 face was" if row["num_faces"] == 1 else f"{row['num_faces']} faces were"
        story.append(f"{faces} found in it" + (" and blurred." if row["faces_blurred"] else "."))
    return story


def _duplicate(row: Row, twin: str) -> list[str]:
    if row["duplicate_of"] is None:
        return []
    if row["reason"] == "exact_duplicate":
        return [f"It has the same bytes as {twin or 'another file'}, which went on in its place (stage exact)."]
    apart = "" if row["hash_distance"] is None else f", {row['hash_distance']:.3g} apart"
    return [f"By its hash it is the picture of image {_short(row['duplicate_of'])}{apart}."]


def _copies(row: Row, settings: Settings) -> list[str]:
    """What the stage copies found about one row."""
    if row["reason"] == "exact_duplicate":
        return []  # the story of its twin
    story = []
    threshold = settings.get("dup_threshold")
    if row["nearest_copy"] is not None and row["similarity"] is not None:
        side = (
            ""
            if threshold is None
            else f", {'above' if row['similarity'] > threshold else 'not above'} the threshold {threshold:.3g}"
        )
        story.append(f"The nearest other image is {_short(row['nearest_copy'])}, similarity {row['similarity']:.3f}{side}.")
    if row["representative"] is not None:
        others = (row["component_size"] or 1) - 1
        copies = "no copies" if not others else "1 copy" if others == 1 else f"{others} copies"
        similarity = row["similarity_to_representative"]  # null for duplicates that were dropped before
        apart = "" if similarity is None else f", similarity {similarity:.3f}"
        story.append(
            f"It represents component {row['component']}, which holds {copies} of it."
            if row["representative"] == row["id"]
            else f"Component {row['component']} ({row['component_size']} images) is represented by "
            f"{_short(row['representative'])} instead{apart}."
        )
    return story


def _reference(row: Row, settings: Settings) -> list[str]:
    if row["nearest_reference"] is None:
        return []
    threshold = settings.get("decontamination_threshold")
    similarity = row["similarity_to_reference"]
    side = "" if threshold is None else f", {'above' if similarity > threshold else 'not above'} the threshold {threshold:.3g}"
    of = f" of {row['evaluation_set']}" if row["evaluation_set"] else ""
    return [f"The nearest evaluation image{of} is {_short(row['nearest_reference'])}, similarity {similarity:.3f}{side}."]


def _retrieval(row: Row) -> list[str]:
    """One sentence per curated set that brought it in."""
    story, by_set = [], dict[tuple[str, str], list[Mapping[str, Any]]]()
    for link in row["retrieved_by"] or []:
        by_set.setdefault((link["set"], link["mode"]), []).append(link)
    for (name, mode), links in by_set.items():
        others = len(links) - 1
        more = "" if not others else f", and {others} other curated image{'s' if others > 1 else ''} of it did too"
        if links[0]["curated_id"] is None:
            story.append(f"Set {name} brought it in through a matched cluster ({mode} mode).")
        else:
            story.append(
                f"Image {_short(links[0]['curated_id'])} of set {name} retrieved it at rank {links[0]['rank']}, similarity "
                f"{links[0]['similarity']:.3f}{more} ({mode} mode)."
            )
    return story


def _clusters(row: Row) -> list[str]:
    levels = row["cluster_levels"]
    if not levels:
        return []
    above = f", below {', '.join(str(level) for level in levels[1:])}" if len(levels) > 1 else ""
    return [f"It lies in cluster {levels[0]}{above}."]


def _ending(row: Row) -> str:
    if row["decision"] == KEPT:
        return "It was kept."
    meaning = f" ({_MEANING[row['reason']]})" if row["reason"] in _MEANING else ""
    detail = f" In its own words: {row['detail']}." if row["detail"] else ""
    if row["stage"] == "decode":
        return f"It was dropped by stage decode: {row['reason']}." + detail
    return f"It was dropped by stage {row['stage']}: {row['reason']}{meaning}.{detail}"
