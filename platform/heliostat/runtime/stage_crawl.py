"""crawl: pages, WARC files or lists of URLs -> a raw artifact with a log of every URL."""

import json
from collections import Counter
from typing import Any

import pyarrow.compute as pc

from heliostat.artifacts import WORK, Artifact, ArtifactRef, Draft, FileRecord, compute_fingerprint
from heliostat.crawling.config import check_contact
from heliostat.crawling.download import DownloadUrls, retry_list
from heliostat.crawling.extract import ExtractLinks, plan_inputs
from heliostat.crawling.plan import Plan, plan_downloads
from heliostat.crawling.tables import LOG_SCHEMA, links_key, log_key, read_table, table_to_bytes
from heliostat.curation.forget_list import read_forget_list
from heliostat.data.packing import Packing
from heliostat.data.quarantine import QUARANTINE
from heliostat.errors import DataError, UsageError
from heliostat.runtime.ledger_rows import CRAWL, fetch_log_of
from heliostat.runtime.pipelines import Context, Summary, config_of, make
from heliostat.runtime.recipe import CrawlStage
from heliostat.runtime.relay import Gauges
from heliostat.runtime.shards import RayTasks
from heliostat.runtime.stage_ingest import assemble, put_raw, rows_key
from heliostat.runtime.step_times import TIMES, StepTimes
from heliostat.storage import Store, open_store
from heliostat.tracking import Run

"""Where links, plan and fetch log of a crawl lie in its artifact."""

CRAWL_JSON = "crawl.json"


def crawl(context: Context, config: CrawlStage) -> Artifact:
    """Make the recipe's raw artifact from the web. Raises UsageError without a contact or without an input."""
    check_contact(config)
    earlier = _earlier(context, config)
    given = plan_inputs(config) if earlier is None else []
    settings = config_of(config, without=("pages", "warcs", "urls", "retry"))
    settings["inputs_digest"] = _digest(given)

    def work(draft: Draft, run: Run) -> Summary:
        context.need_ray()
        times = StepTimes()
        run_tasks, room = RayTasks(context.progress, times), draft.files.child(CRAWL)
        inputs = given if earlier is None else plan_inputs(_with_retries(config, earlier, room))
        _extract(context, config, draft, inputs, run_tasks)
        with times.step("planning the downloads"):
            keys = [links_key(task["index"]) for task in inputs]
            plan = plan_downloads(room, keys, urls_per_task=config.urls_per_task)
        _say_plan(context, plan)
        statuses = _download(context, config, draft, plan, run_tasks)
        draft.put(CRAWL_JSON, json.dumps({"plan": _counts(plan), "statuses": statuses}, indent=1).encode())
        draft.put(TIMES, json.dumps(times.rows("crawl"), indent=1).encode())
        context.progress.say(f"          {_statuses_text(statuses)}")
        found = assemble(draft, len(plan.tasks))
        if found.manifest.num_rows == found.num_unreadable:
            raise DataError(f"none of {plan.num_urls} URLs gave an image ({_statuses_text(statuses)}); see {QUARANTINE}")
        summary = put_raw(draft, found)
        run.log_metrics({"crawl/urls": float(plan.num_urls), "crawl/images": float(summary.counts["images"])}, 0)
        return summary

    inputs = {} if earlier is None else {"retried": earlier}
    return make(context, context.recipe.ref("raw"), stage="crawl", config=settings, inputs=inputs, work=work)


def _earlier(context: Context, config: CrawlStage) -> Artifact | None:
    """The crawl whose failures are tried again."""
    if not config.retry:
        return None
    earlier = context.load(ArtifactRef.parse(config.retry))
    if fetch_log_of(earlier) is None:
        raise UsageError(f"crawl.retry={config.retry} is no crawl: it has no log of URLs")
    return earlier


def _with_retries(config: CrawlStage, earlier: Artifact, room: Store) -> CrawlStage:
    """The configuration with lists of the URLs to try again, one a fetch log; the lists stay in the artifact."""
    num_urls = 0
    for key in sorted(earlier.record.files):
        if key.startswith(f"{CRAWL}/fetch_log/"):
            again = retry_list(read_table(earlier.files, key, LOG_SCHEMA))
            num_urls += again.num_rows
            if again.num_rows:
                room.put(f"again/{key.rpartition('/')[2]}", table_to_bytes(again))
    if not num_urls:
        raise DataError(f"{earlier.ref} has no URL whose failure may have passed; there is nothing to try again")
    return config.model_copy(update={"pages": (), "warcs": (), "urls": (f"{room.uri}/again",)})


def _digest(inputs: list[dict[str, Any]]) -> str:
    """Of what goes in: names and sizes of the files, and URLs; hosts and paths themselves are in no record."""
    described = []
    for task in inputs:
        keys = list(task.get("keys", ())) + [key for _, key in task.get("lists", ())]
        stores = [task["store"]] * len(task.get("keys", ())) if "store" in task else []
        stores += [store for store, _ in task.get("lists", ())]
        sizes = [open_store(store).size(key) for store, key in zip(stores, keys, strict=True)]
        described.append({"kind": task["kind"], "keys": keys, "sizes": sizes, "urls": list(task.get("urls", ()))})
    return compute_fingerprint("crawl", {"inputs": described}, {})


def _extract(context: Context, config: CrawlStage, draft: Draft, inputs: list[dict[str, Any]], run_tasks: RayTasks) -> None:
    """Links of all inputs; what is damaged or could not be fetched is said, and its links are those up to there."""
    room = draft.files.child(CRAWL)
    finished = {entry.key for entry in room.list("links/")}
    waiting = [task for task in inputs if links_key(task["index"]) not in finished]
    failed = Counter[str]()
    for result in run_tasks(ExtractLinks(room, config), waiting, label="finding links"):
        failed.update(result["failed_pages"])
        for damage in result["damage"]:
            context.progress.say(f"          damaged: {damage}")
    if failed:
        context.progress.say(f"          pages without an answer: {_statuses_text(failed)}")


def _say_plan(context: Context, plan: Plan) -> None:
    refused = f", {_statuses_text(plan.refused)} refused" if plan.refused else ""
    context.progress.say(
        f"          {plan.num_links:,} links = {plan.num_urls:,} URLs of {plan.num_hosts:,} hosts, "
        f"{plan.num_repeated:,} repeated{refused}"
    )
    if plan.num_urls == 0:
        raise DataError("the crawl finds no image to fetch; look at crawl/links in the draft for why each link is refused")


def _counts(plan: Plan) -> dict[str, Any]:
    return {
        "links": plan.num_links,
        "urls": plan.num_urls,
        "repeated": plan.num_repeated,
        "hosts": plan.num_hosts,
        "refused": plan.refused,
    }


def _download(context: Context, config: CrawlStage, draft: Draft, plan: Plan, run_tasks: RayTasks) -> dict[str, int]:
    """Fetch and pack; returns how many URLs ended how, as the fetch log tells."""
    finished = {entry.key for entry in draft.files.list(f"{WORK}rows/")}
    waiting = [task for task in plan.task_list if rows_key(task["index"]) not in finished]
    refusal = read_forget_list(context.artifacts.store)
    packing = Packing(config.images_per_shard, config.shard_bytes, "tar", None if refusal.is_empty else refusal)
    gauges, done, room = Gauges(), len(plan.tasks) - len(waiting), draft.files.child(CRAWL)
    for result in run_tasks(DownloadUrls(room, draft.files, config, packing), waiting, label="fetching"):
        for key, file in result["written"].items():
            draft.note(key, FileRecord(**file))
        done += 1
        gauges.set(str(draft.ref), {"crawl/tasks_done": float(done)})
    total = Counter[str]()
    for task in plan.task_list:
        counted = pc.value_counts(read_table(room, log_key(task["index"]), LOG_SCHEMA)["status"])
        total.update({pair["values"]: pair["counts"] for pair in counted.to_pylist()})
    return dict(sorted(total.items()))


def _statuses_text(statuses: Counter[str] | dict[str, int]) -> str:
    ordered = sorted(statuses.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)
