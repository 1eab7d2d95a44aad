"""The `heliostat` command: `heliostat <verb> [RECIPE] [key=value ...]`.

Nothing heavy is imported before a verb is known, so that `--help` answers at once. Exit status: 0 done, 1 failed, 2 the request
is wrong, 130 interrupted.
"""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from heliostat import __version__
from heliostat.errors import HeliostatError, UsageError

STAGE_VERBS = {
    "crawl": "pages, WARC files or lists of URLs, politely: raw/<name>@<version>",
    "ingest": "pack image files into shards: raw/<name>@<version>",
    "embed": "hashes, detectors and embeddings, each image decoded once: features/<name>@<version>",
    "dedup": "copies, their components, evaluation images: copies/<name>@<version>",
    "curate": "retrieve, balance, blur faces, pack: curated/<name>@<version>, with ledger, sheets and report",
    "pretrain": "train a backbone without labels: model/<name>@<version>; `data=./photos` needs no recipe",
    "sweep": "try settings side by side: sweep/<name>@<version>",
    "distill": "train a smaller student of the model: model/<name>-student@<version>",
    "evaluate": "k-NN and linear probe against baselines: report/<name>@<version>",
    "publish": "weights in the formats of others and a model card, checked: release/<name>@<version>",
}
OTHER_VERBS = {
    "run": "all stages of a recipe in order; finished ones are reused",
    "demo": "run the recipe laptop: the whole chain on real photographs",
    "shard": "pack or index images without a recipe: heliostat shard SOURCE name=photos makes raw/photos@1",
    "lineage": "print what an artifact was made from: heliostat lineage KIND/NAME@VERSION [--html FILE]",
    "artifacts": "list the complete artifacts of a store",
    "why": "tell the story of one image: heliostat why [CURATED-ARTIFACT] ID-OR-URL",
    "what-if": "the funnel at other thresholds, from what is stored: heliostat what-if [CURATED-ARTIFACT] dup_threshold=0.7",
    "forget": "remove an image everywhere, and remember not to take it again: heliostat forget ID-OR-URL-OR-DOMAIN",
    "recipes": "list the shipped recipes",
}


@dataclass(frozen=True)
class Request:
    """A parsed command line."""

    verb: str
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    dry_run: bool
    html: str = ""


class _Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see heliostat --help")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser, help text included."""
    verbs = "\n".join(f"  {verb:10} {text}" for verb, text in {**OTHER_VERBS, **STAGE_VERBS}.items())
    parser = _Parser(
        prog="heliostat",
        usage="heliostat VERB [RECIPE] [key.path=value ...] [--dry-run] [--debug]",
        description="Turn your own raw images into your own vision foundation models.",
        epilog=f"verbs:\n{verbs}\n\nA stage verb reads keys of its own section first: `heliostat pretrain R optim.lr=2e-4`\n"
        "sets pretrain.optim.lr. RECIPE is a file or the name of a shipped recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", help="what to do, see below")
    parser.add_argument("words", nargs="*", metavar="RECIPE | key=value", help="a recipe, and settings that override it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and what it will cost, then stop")
    parser.add_argument("--html", metavar="FILE", default=None, help="lineage: also write a page with a drawing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the logs of workers")
    parser.add_argument("--version", action="version", version=f"heliostat {__version__}")
    return parser


def parse(arguments: Sequence[str]) -> Request:
    """Split the words into recipe (no `=`) and overrides (with `=`). Raises UsageError."""
    options = build_parser().parse_intermixed_args(list(arguments))
    verbs = [*OTHER_VERBS, *STAGE_VERBS]
    if options.verb not in verbs:
        near = difflib.get_close_matches(options.verb, verbs, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(verbs)}"
        raise UsageError(f"unknown verb: {options.verb}. {hint}")
    about_images = options.verb in ("why", "forget")  # whose names may hold the sign
    is_override = _is_store if about_images else _is_override
    words = tuple(word for word in options.words if not is_override(word))
    if options.html is not None:
        _check_html(options.verb, options.html)
    overrides = tuple(word for word in options.words if is_override(word))
    return Request(options.verb, words, overrides, options.dry_run, options.html or "")


def _check_html(verb: str, file: str) -> None:
    if verb != "lineage":
        raise UsageError(f"--html belongs to heliostat lineage, not to {verb}; leave it out")
    if not file or _is_store(file):
        raise UsageError(f"--html needs a file, got {file or 'nothing'}; write --html lineage.html")


def _is_override(word: str) -> bool:
    """`key=value`. A path may hold the sign too: `s3://bucket/date=2024-01-01`, `./run=3`."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key


def _is_store(word: str) -> bool:
    """`store=...`, or something like it that is better refused than taken for the name of an image."""
    key, sign, _ = word.partition("=")
    return bool(sign) and bool(difflib.get_close_matches(key, ["store"], cutoff=0.7))


def _one_word(request: Request, meaning: str, default: str = "") -> str:
    if len(request.words) > 1 or (not request.words and not default):
        given = " ".join(request.words) or "nothing"
        raise UsageError(f"heliostat {request.verb} takes one {meaning}, got {given}; see heliostat --help")
    return request.words[0] if request.words else default


def dispatch(request: Request) -> None:
    """Run one verb. Raises HeliostatError."""
    from heliostat.runtime import verbs

    if request.verb == "recipes":
        verbs.print_recipes()
    elif request.verb == "lineage":
        verbs.print_lineage(_one_word(request, "artifact"), request.overrides, html=request.html)
    elif request.verb == "artifacts":
        verbs.print_artifacts(request.overrides)
    elif request.verb == "why":
        if not 1 <= len(request.words) <= 2:
            raise UsageError("heliostat why takes an id or source, a curated artifact before it if need be; see --help")
        verbs.print_why(*(request.words if len(request.words) == 2 else ("", request.words[0])), request.overrides)
    elif request.verb == "what-if":
        verbs.print_what_if(_one_word(request, "curated artifact", "-").removeprefix("-"), request.overrides)
    elif request.verb == "forget":
        verbs.forget_images(_one_word(request, "image id, URL or domain"), request.overrides, dry_run=request.dry_run)
    elif request.verb == "shard":
        source = _one_word(request, "folder, list, tar or Parquet file")
        verbs.shard(source, request.overrides, dry_run=request.dry_run)
    elif request.verb == "demo":
        verbs.run_recipe(_one_word(request, "recipe", "laptop"), request.overrides, dry_run=request.dry_run)
    elif request.verb == "run":
        verbs.run_recipe(_one_word(request, "recipe"), request.overrides, dry_run=request.dry_run)
    else:
        has_data = (
            request.verb == "pretrain"
            and not request.words
            and any(override.startswith("data=") for override in request.overrides)
        )
        recipe = _one_word(request, "recipe", verbs.OWN_IMAGES if has_data else "")
        verbs.run_recipe(recipe, request.overrides, stage=request.verb, dry_run=request.dry_run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        os.environ["HELIOSTAT_DEBUG"] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` and schedulers end like Ctrl-C: runs are closed
    try:
        dispatch(parse(words))
    except HeliostatError as error:
        if debug:
            raise
        print(f"heliostat: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("heliostat: interrupted; the same command resumes where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
