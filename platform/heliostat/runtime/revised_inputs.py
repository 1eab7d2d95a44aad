"""Images that somebody asked to forget while a stage was interrupted: what it had made of them is thrown away."""

import json
from collections.abc import Iterable

from heliostat.artifacts import DRAFT, Artifact, Draft
from heliostat.runtime.pipelines import Context


def start_again_if_revised(context: Context, draft: Draft, inputs: Iterable[Artifact]) -> None:
    """Empty a draft whose earlier attempt read inputs that `heliostat forget` has changed since.

    The fingerprint does not tell: it says what an artifact is made of and how. Call it before anything is read.
    """
    revisions = json.dumps([[str(one.ref), one.record.revisions] for one in inputs])
    before = draft.state.get("revisions")
    if before is not None and before != revisions:
        context.progress.say("  images were forgotten meanwhile: this stage starts again")
        for entry in list(draft.files.list()):
            if entry.key != DRAFT:
                draft.files.delete(entry.key)
    draft.remember(revisions=revisions)
