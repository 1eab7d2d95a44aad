"""The traps of the folder layout."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "heliostat"


def test_platform_is_a_source_root_and_never_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_the_standard_library_keeps_its_platform_module() -> None:
    import platform

    assert platform.python_version()


def test_no_room_is_empty() -> None:
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "recipes"):
            assert [path for path in folder.glob("*.py") if path.name != "__init__.py"], folder


def test_no_function_is_longer_than_sixty_lines() -> None:
    long_functions = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long_functions.append(f"{path.name}:{node.lineno} {node.name}")
    assert long_functions == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    missing = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert missing == []


def test_every_test_folder_mirrors_a_folder_of_the_package() -> None:
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "golden", "end_to_end", "fixtures"):
            assert (PACKAGE / folder.name).is_dir() or (ROOT / folder.name).is_dir(), folder


def test_tracked_text_names_no_machine_path() -> None:
    pattern = re.compile("/" + "work/|/" + "root/|python" + "hosted")
    for path in [*ROOT.glob("*.*"), *PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py")]:
        if path.is_file() and path.name != ".git":  # a file in a worktree, not tracked
            assert not pattern.search(path.read_text()), path
