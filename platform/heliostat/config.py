"""Strict recipes: YAML in, frozen pydantic models out, one override dialect, errors of one line.

A recipe is a mapping of sections. `load_mapping` reads it, `apply_overrides` lays `key.path=value` over it, and `validate`
turns it into a model. Numbers follow YAML 1.2 (`2e-4` is a number); a key that appears twice is refused.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from heliostat.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

_MOST = 2**63 - 1
_BRANCHES = {"bool", "constrained-float", "constrained-int", "constrained-str", "float", "int", "none", "str"}

RECIPES = Path(__file__).parent / "recipes"


class StrictModel(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,  # fingerprints are hashed from JSON, which has neither
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise ConfigError(
                    f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: key {key!r} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Resolve a recipe argument: an existing file first, else a shipped one by its stem (`laptop`, `recipes/laptop.yaml`)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.stem}.yaml"
    if shipped.is_file() and str(path.parent) in (".", "recipes"):
        return shipped
    known = _names_in_recipes() | {stem: stem for stem in shipped_recipes()}
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"Did you mean {known[near[0]]}?" if near else f"Shipped recipes: {', '.join(shipped_recipes())}"
    raise ConfigError(f"no recipe at {name}. {hint}")


def _names_in_recipes() -> dict[str, str]:
    """Name inside a shipped recipe -> its stem: people ask for what artifacts show (`model/demo@1`: laptop.yaml)."""
    return {str(load_mapping(RECIPES / f"{stem}.yaml")["name"]): stem for stem in shipped_recipes()}


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document; a syntax error becomes a ConfigError of one line."""
    try:
        loader = _Loader(text)  # refuses control characters
        loader.name = source
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a recipe file as a mapping of sections."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {path}: {error}") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, this is a {type(data).__name__}")
    return data


def _unshared(value: Any) -> Any:
    """A deep copy in which sections that a YAML anchor shares are separate, so that an override changes only one of them."""
    if isinstance(value, Mapping):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay `key.path=value` strings over a recipe; values are YAML. Returns a new mapping."""
    result: dict[str, Any] = _unshared(mapping)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"{override!r} is not an override; write key.path=value")
        target = result
        *parents, last = dotted.strip().split(".")
        for depth, parent in enumerate(parents):
            child = target.setdefault(parent, {})
            if child is None:
                child = target[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{'.'.join(parents[: depth + 1])} is a value, not a section; {dotted} cannot be set")
            target = child
        target[last] = parse_yaml(text, f"override {dotted}") if text.strip() else None
    return result


def _submodel(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _submodel(argument)) is not None:
            return found
    return None


def walk_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, FieldInfo) of a model, sections before their fields."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        child = _submodel(field.annotation)
        if child is not None:
            yield from walk_fields(child, f"{prefix}{name}.")


def _unknown_key(model: type[BaseModel], dotted: str) -> str:
    known = [key for key, _ in walk_fields(model)]
    *parents, last = dotted.split(".")
    parent = ".".join(part for part in parents if not part.isdigit())  # a position in a list is not part of a key
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    names = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)]
    far = [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.7)]
    guess = ([names[last]] if last in names else []) or near or far
    hint = f" Did you mean {guess[0]}?" if guess else f" Known here: {', '.join(siblings)}"
    return f"unknown key: {dotted}.{hint}"


def validate(model: type[M], mapping: Mapping[str, Any], source: str) -> M:
    """Validate a mapping; the first error is raised as one line that names key, value and limit."""
    _refuse_huge(mapping, source, "")
    try:
        return model.model_validate_json(json.dumps(mapping, allow_nan=True))
    except TypeError as error:
        raise ConfigError(f"{source}: {error}; a recipe holds numbers, strings, booleans, lists and mappings") from error
    except ValidationError as error:
        first = error.errors()[0]
        dotted = _dotted(mapping, first["loc"])
        if first["type"] == "extra_forbidden":
            message = _unknown_key(model, dotted)
        elif first["type"] == "missing":
            message = f"missing key: {dotted}; add it to the recipe or give {dotted}=..."
        elif first["type"] == "value_error":
            message = f"{dotted}: {first['ctx']['error']}" if dotted else str(first["ctx"]["error"])
        else:
            message = f"{dotted}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {message}{more}") from error


def _refuse_huge(value: Any, source: str, key: str) -> None:
    if isinstance(value, int) and not -_MOST <= value <= _MOST:
        raise ConfigError(f"{source}: {key}={value} is outside of -2^63 to 2^63; whole numbers have 64 bits")
    if isinstance(value, Mapping | list):
        for name, one in value.items() if isinstance(value, Mapping) else enumerate(value):
            _refuse_huge(one, source, f"{key}.{name}" if key else str(name))


def _dotted(mapping: Mapping[str, Any], location: Sequence[int | str]) -> str:
    """The key of a value, without what pydantic adds for the validators and the branches of unions that it went through."""
    parts: list[str] = []
    value: Any = mapping
    for index, part in enumerate(location, start=1):
        is_given = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int)
        if not is_given and (index < len(location) or str(part) in _BRANCHES or "[" in str(part)):
            continue
        parts.append(str(part))
        value = value[part] if is_given else None
    return ".".join(parts)


def load_recipe(model: type[M], name: str, overrides: Sequence[str] = ()) -> M:
    """Find, read, override and validate a recipe."""
    path = find_recipe(name)
    return validate(model, apply_overrides(load_mapping(path), overrides), path.name)


def canonical_json(value: Any) -> str:
    """Sorted, minimal JSON: the form that is hashed into fingerprints. Refuses NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys, leaves unchanged (lists are leaves)."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf that differs, sorted."""
    before, after = flatten(old), flatten(new)
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in keys
        if before.get(key, math.nan) != after.get(key, math.nan)
    ]
