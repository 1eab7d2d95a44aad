"""What a stage's run in the tracker says besides metrics: where it ran, what it worked from, what it made and cost."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat import __version__
from heliostat.artifacts import Artifact, ArtifactStore, Draft
from heliostat.costs import cost_text
from heliostat.lineage import lineage, render_lineage, render_page, total_costs
from heliostat.tracking import Link, Run

ENVIRONMENT = "environment.json"
LINEAGE = "lineage.html"
_PACKAGES = (
    *("ray", "torch", "deepspeed", "mlflow", "numpy", "scipy", "pyarrow", "safetensors", "pydantic", "pillow", "simplejpeg"),
    *("opencv-python-headless", "faiss-cpu", "faiss-gpu", "boto3", "aiohttp", "lxml", "triton", "nvidia-ml-py"),
)


def code_version() -> str:
    """Version of the package, with the git commit when it runs from a checkout."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{__version__}+{commit}" if commit else __version__


def _git(*words: str) -> str:
    """What git says about the checkout that holds this package; empty outside one."""
    folder = Path(__file__).parent
    if not (folder.parents[2] / "pyproject.toml").is_file():
        return ""
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *words],  # noqa: S607  (the user's own git)
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def environment() -> dict[str, Any]:
    """The driver's interpreter, packages, code and machine. For the tracker only: an artifact's record names no machine."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "packages": packages,
        "code": code_version(),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "host": socket.gethostname(),
    }


def link_to(artifact: Artifact) -> Link:
    """An artifact as the tracker names it."""
    return Link(str(artifact.ref), artifact.record.fingerprint, artifact.files.uri)


def tags_of(draft: Draft, stage: str) -> dict[str, str]:
    """The identity of what a run makes, and its edges of the lineage."""
    tags = {"heliostat.artifact": str(draft.ref), "heliostat.stage": stage, "heliostat.fingerprint": draft.fingerprint}
    return tags | {f"heliostat.input.{role}": str(artifact.ref) for role, artifact in draft.inputs.items()}


def describe_start(run: Run, draft: Draft) -> None:
    """The environment and the inputs."""
    if not run.id:
        return
    run.log_bytes(ENVIRONMENT, (json.dumps(environment(), indent=1) + "\n").encode())
    run.set_tags({"heliostat.files": draft.files.uri})
    run.log_inputs({role: link_to(artifact) for role, artifact in draft.inputs.items()})


def describe_result(run: Run, draft: Draft, stage: str, summary: Mapping[str, Any]) -> None:
    """Costs, and the model where one was made. Before the commit, so that what exists is always known to the tracker."""
    if not run.id:
        return
    step = int(summary["counts"].get("steps", 0))
    if summary["costs"]:
        run.log_metrics(summary["costs"], step)
    if draft.ref.kind == "model":
        model = Link(str(draft.ref), draft.fingerprint, draft.files.uri)
        tags = tags_of(draft, stage) | {"heliostat.code": code_version()}
        run.log_model(model, step=step, tags=tags, metrics={**summary["metrics"], **summary["costs"]})


def describe_lineage(run: Run, artifacts: ArtifactStore, artifact: Artifact) -> None:
    """The tree, as the run's note and as a page: MLflow draws one step of it, this all."""
    if not run.id:
        return
    tree = lineage(artifacts, artifact.ref)
    cost = cost_text(total_costs(tree))
    note = ["```", *render_lineage(tree), "```", *([f"All training in this tree: {cost}."] if cost else [])]
    run.set_tags({"mlflow.note.content": "\n".join([*note, f"Drawn in the artifact `{LINEAGE}`."])})
    run.log_bytes(LINEAGE, render_page(tree).encode())
