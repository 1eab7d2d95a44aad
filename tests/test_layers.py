"""The layer rule and the owner table of the house, enforced on every import, lazy ones included."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "heliostat"

# Import only from the left; rooms of one level never import each other.
LEVELS = [
    ["errors", "metrics"],
    ["config"],
    ["retries"],
    ["storage"],
    ["artifacts", "claims", "tracking", "costs"],
    ["lineage"],
    ["kernels"],
    ["models"],
    ["data"],
    ["crawling", "curation", "training", "evaluation", "publishing"],
    ["runtime"],
    ["cli"],
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Outside system -> the only places of the package that may import it.
OWNERS = {
    "ray": ["runtime/"],
    "faiss": ["curation/index.py"],
    "mlflow": ["tracking/mlflow_"],
    "pynvml": ["costs/nvml.py"],
    "deepspeed": ["training/zero_engine.py"],
    "boto3": ["storage/boto.py"],
    "botocore": ["storage/boto.py"],
    "urllib3": ["storage/boto.py"],
    "pyarrow.fs": ["storage/boto.py"],
    "requests": ["crawling/fetch.py"],
    "httpx": ["crawling/fetch.py"],
    "aiohttp": ["crawling/fetch.py"],
    "urllib.request": ["crawling/fetch.py"],
    "http.client": ["crawling/fetch.py", "runtime/spot_notice.py"],
    "yarl": ["crawling/fetch.py"],
    "lxml": ["crawling/links.py"],
    "protego": ["crawling/robots.py"],
    "warcio": ["crawling/warc.py"],
    "optuna": ["runtime/sweep_search.py"],
    "triton": ["kernels/"],
    "transformers": ["publishing/huggingface_format.py"],
    "timm": ["publishing/timm_format.py"],
    "onnx": ["publishing/onnx_format.py"],
    "onnxruntime": ["publishing/onnx_format.py", "curation/detector_models.py", "curation/program_embedder.py"],
    "onnxscript": ["publishing/onnx_format.py"],
    "torchvision": ["publishing/torchvision_operators.py"],
}


def imports_of(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write heliostat.<room>.<module>"
            found += [(node.lineno, node.module or "")]
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "heliostat" else ""


def violations(package: Path) -> list[str]:
    problems = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package).as_posix()
        here = relative.split("/")[0].removesuffix(".py")
        if here in ("__init__", "__main__"):
            continue
        for line, module in imports_of(path):
            there = room_of(module)
            if there in LEVEL_OF and there != here:
                if LEVEL_OF[there] > LEVEL_OF[here]:
                    problems.append(f"{relative}:{line}: {here} imports {there}, which is to its right in the layer rule")
                elif LEVEL_OF[there] == LEVEL_OF[here] and here not in ("errors", "metrics", "artifacts", "tracking"):
                    problems.append(
                        f"{relative}:{line}: {here} and {there} are neighbours and must meet only through artifacts"
                    )
            for system, owners in OWNERS.items():
                outside = module == system or module.startswith(f"{system}.")
                if outside and not any(relative.startswith(owner) for owner in owners):
                    problems.append(f"{relative}:{line}: {system} may be imported only in {', '.join(owners)}")
    return sorted(set(problems))


def test_every_module_belongs_to_a_room_of_the_plan() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - set(LEVEL_OF) <= {"__init__", "__main__"}


def test_imports_follow_the_layer_rule_and_the_owner_table() -> None:
    assert violations(PACKAGE) == []


def test_the_rule_catches_a_lazy_import_of_a_neighbour_and_of_a_foreign_system(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "wrong.py").write_text(
        "def f():\n    import ray\n    from heliostat.evaluation import knn\n    from heliostat.runtime import session\n"
    )
    found = violations(tmp_path)
    assert [problem.split(":")[1] for problem in found] == ["2", "3", "4"]


def test_jobs_and_dashboards_use_the_package_and_not_the_outside_systems() -> None:
    for folder in ("jobs", "dashboards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = {module.split(".")[0] for _, module in imports_of(path)}
            assert not names & {system.split(".")[0] for system in OWNERS if system not in ("urllib.request", "http.client")}, (
                path
            )
