"""A stage's frame: reuse or resume its artifact, open a run, work, commit; and the chain of stages of a recipe."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from heliostat.artifacts import WORK, Artifact, ArtifactRef, ArtifactStore, Draft, clean
from heliostat.claims import Claim, claim
from heliostat.costs import add_costs, compute_costs, cost_text, read_attempts, share_costs
from heliostat.errors import ArtifactConflictError, ArtifactNotFoundError, HeliostatError, PreemptedError, UsageError
from heliostat.runtime.progress import Progress
from heliostat.runtime.recipe import Recipe
from heliostat.runtime.run_description import code_version, describe_lineage, describe_result, describe_start, tags_of
from heliostat.runtime.session import describe_session, open_session
from heliostat.storage import Store, check_writable, open_store
from heliostat.tracking import Run, Tracker, open_tracker


@dataclass(frozen=True)
class Summary:
    """What a stage says about its artifact. The stage itself logs metrics to its run."""

    counts: Mapping[str, int]
    metrics: Mapping[str, float] = field(default_factory=dict)


Work = Callable[[Draft, Run], Summary]

_MADE_BY = {
    "raw": "ingest",
    "features": "embed",
    "copies": "dedup",
    "curated": "curate",
    "model": "pretrain",
    "sweep": "sweep",
    "report": "evaluate",
    "release": "publish",
}


class Context:
    """What the stages of one recipe share. Ray and the tracker are opened when a stage first needs them."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        _refuse_lost_store(recipe.store)
        self.recipe = recipe
        self.progress = progress
        self.artifacts = ArtifactStore(open_store(recipe.store))
        self._open = contextlib.ExitStack()
        self._has_session = False

    @cached_property
    def tracker(self) -> Tracker:
        """The tracker of the recipe."""
        return open_tracker(self.recipe.tracking, self.artifacts.store, self.progress.say)

    def load(self, ref: ArtifactRef) -> Artifact:
        """An artifact that a stage reads. Raises ArtifactNotFoundError that names the stage which makes it."""
        found = self.artifacts.find(ref)
        if found is None:
            verb = self.recipe.maker_of(ref) or _MADE_BY[ref.kind]
            raise ArtifactNotFoundError(
                f"no artifact {ref} in {self.recipe.store}; `heliostat {verb}` makes it, run that first"
            )
        return found

    def need_ray(self) -> None:
        """Open the Ray session unless it is open."""
        if self._has_session:
            return
        self._open.enter_context(open_session(self.recipe.cluster))
        self._has_session = True
        self.progress.say(f"  Ray: {describe_session()}")

    def close(self) -> None:
        """Close the Ray session."""
        self._open.close()
        self._has_session = False


def _refuse_lost_store(uri: str) -> None:
    """A Ray job runs in a copy of the working directory that vanishes with it, and a relative store would vanish too."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") and "://" not in uri and not os.path.isabs(os.path.expanduser(uri)):
        raise UsageError(
            f"store={uri} is relative to the job's temporary directory; give s3://bucket/prefix or an absolute path"
        )


@dataclass(frozen=True)
class Plan:
    """An artifact to make: what goes into its fingerprint."""

    ref: ArtifactRef
    config: Mapping[str, Any]
    inputs: Mapping[str, Artifact]


def make(
    context: Context, ref: ArtifactRef, *, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact], work: Work
) -> Artifact:
    """Make one artifact, or take it as it is when it is complete with the same fingerprint.

    Whatever stops the work closes the tracker's run as FAILED or KILLED and leaves the draft to be taken up again.
    """

    def alone(open_drafts: Mapping[str, tuple[Draft, Run]]) -> Mapping[str, Summary]:
        return {"": work(*open_drafts[""])}

    return make_together(context, {"": Plan(ref, config, inputs)}, stage=stage, work=alone)[""]


def make_together(
    context: Context,
    plans: Mapping[str, Plan],
    *,
    stage: str,
    work: Callable[[Mapping[str, tuple[Draft, Run]]], Mapping[str, Summary]],
) -> dict[str, Artifact]:
    """Make several artifacts in one piece of work; those that are complete are taken as they are and not given to it.

    The work's summaries are kept in the drafts before the first commit, so that an interruption between two commits costs no
    work. Returns the artifacts under the names of the plans.
    """
    with contextlib.ExitStack() as stack:
        complete = {plan.ref: context.artifacts.find(plan.ref) for plan in plans.values()}
        claims = [stack.enter_context(_claim(context, ref)) for ref, artifact in complete.items() if artifact is None]
        for artifact in complete.values():
            if artifact is not None:
                _end_run_left_open(context, artifact)
        found = {name: _begin(context, plan, stage) for name, plan in plans.items()}
        drafts = {name: draft for name, draft in found.items() if isinstance(draft, Draft)}
        made = _work_alone(context, drafts, claims, stage=stage, work=work)
        return {name: one if isinstance(one, Artifact) else made[name] for name, one in found.items()}


def _work_alone(
    context: Context,
    drafts: Mapping[str, Draft],
    claims: Sequence[Claim],
    *,
    stage: str,
    work: Callable[[Mapping[str, tuple[Draft, Run]]], Mapping[str, Summary]],
) -> dict[str, Artifact]:
    """Fill the drafts and commit them, each with an open run; under claims, which are checked before the first commit."""
    made: dict[str, Artifact] = {}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        runs = {name: stack.enter_context(_run(context, draft, stage)) for name, draft in drafts.items()}
        waiting = {name: (draft, runs[name]) for name, draft in drafts.items() if "summary" not in draft.state}
        try:
            summaries = work(waiting) if waiting else {}
            _check_alone(context, claims, drafts)
        except HeliostatError:
            rivals = _made_meanwhile(context, drafts)
            if rivals is None:
                raise
            return rivals
        costs = _costs(context, [drafts[name] for name in summaries])
        for name, one in summaries.items():
            drafts[name].remember(summary={"counts": dict(one.counts), "metrics": dict(one.metrics), "costs": costs})
        for name, draft in drafts.items():
            describe_result(runs[name], draft, stage, draft.state["summary"])
            made[name] = _commit(draft)
            describe_lineage(runs[name], context.artifacts, made[name])
            counts = ", ".join(f"{value:,} {what}" for what, value in made[name].record.counts.items())
            which = f"{draft.ref} " if len(drafts) > 1 else ""
            context.progress.say(f"          {which}done in {time.monotonic() - started:.0f} s: {counts}")
            if made[name].record.costs:
                context.progress.say(f"          {which}cost {cost_text(made[name].record.costs)}")
    for artifact in made.values():
        clean(artifact.files)  # after the ends of the runs, whose ids the drafts remember
    return made


def _check_alone(context: Context, claims: Sequence[Claim], drafts: Mapping[str, Draft]) -> None:
    """Before a commit: raises ArtifactConflictError where another run has taken over, or has even finished."""
    for held in claims:
        held.check()
    for draft in drafts.values():
        if context.artifacts.find(draft.ref) is not None:
            raise ArtifactConflictError(f"{draft.ref} was finished by another run meanwhile; run the command again to use it")


def _made_meanwhile(context: Context, drafts: Mapping[str, Draft]) -> dict[str, Artifact] | None:
    """What another run of the same command finished while this one seemed dead: its scratch is gone, and so is ours."""
    rivals = {name: context.artifacts.find(draft.ref) for name, draft in drafts.items()}
    made = {name: one for name, one in rivals.items() if one is not None and one.record.fingerprint == drafts[name].fingerprint}
    if len(made) < len(drafts):
        return None
    for one in made.values():
        context.progress.say(f"          {one.ref} was finished by another run meanwhile; its result is used")
    return made


def _claim(context: Context, ref: ArtifactRef) -> contextlib.AbstractContextManager[Claim]:
    return claim(context.artifacts.store, str(ref), f"{ref} is being made", lambda text: context.progress.say(f"  {text}"))


def _end_run_left_open(context: Context, artifact: Artifact) -> None:
    """Close the tracker's run of an artifact whose maker was killed between the commit and the end of its run."""
    run_id = str(context.artifacts.state_left(artifact).get("run_id", ""))
    if run_id:
        run = context.tracker.attach(run_id, lambda text: context.progress.say(f"  {text}"))
        describe_lineage(run, context.artifacts, artifact)
        run.finish("FINISHED")


def _begin(context: Context, plan: Plan, stage: str) -> Artifact | Draft:
    say = context.progress.say
    found = context.artifacts.begin(
        plan.ref, config=plan.config, inputs=plan.inputs, notify=lambda text: context.progress.say(f"  {text}")
    )
    if isinstance(found, Artifact):
        say(f"{stage:9} {plan.ref}: reused, made {found.record.created}")
    else:
        say(f"{stage:9} {plan.ref}{': resuming' if found.resumed else ''}")
        check_writable(found.files)
    return found


@contextlib.contextmanager
def _run(context: Context, draft: Draft, stage: str) -> Iterator[Run]:
    run = context.tracker.start(
        str(draft.ref),
        config=draft.config,
        tags=tags_of(draft, stage),
        resume_id=str(draft.state.get("run_id", "")),
        notify=lambda text: context.progress.say(f"  {text}"),
    )
    draft.remember(run_id=run.id)
    status = "FAILED"
    try:
        describe_start(run, draft)
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, PreemptedError):
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def _commit(draft: Draft) -> Artifact:
    summary = draft.state["summary"]
    return draft.commit(
        counts=summary["counts"],
        metrics=summary["metrics"],
        costs=summary["costs"],
        code_version=code_version(),
        keep_draft=True,  # it knows the run, which is still open
    )


def _costs(context: Context, drafts: Sequence[Draft]) -> dict[str, float]:
    """What the work on these drafts has cost so far, restarts and trials included: an equal share for each of them."""
    together = [attempt for draft in drafts for attempt in read_attempts(draft.files)]
    trials = [read_attempts(trial) for draft in drafts for trial in _trials_within(draft)]
    costs = add_costs(compute_costs(attempts, context.recipe.costs) for attempts in (together, *trials) if attempts)
    return share_costs(costs, len(drafts))


def _trials_within(draft: Draft) -> list[Store]:
    """The scratch of each trial of a sweep: runs of their own, whose steps none of the others does again."""
    names = {entry.key.split("/")[2] for entry in draft.files.list(f"{WORK}trials/")}
    return [draft.files.child(f"{WORK}trials/{name}") for name in sorted(names)]


def config_of(section: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section as plain values for the fingerprint, without keys that change no result (dotted keys name nested ones)."""
    plain: dict[str, Any] = section.model_dump(mode="json")
    for dotted in without:
        *parents, last = dotted.split(".")
        target = plain
        for parent in parents:
            target = target[parent]
        target.pop(last)
    return plain
