"""What a recipe may call sets of images and the artifacts that it names: checked when it is read, before anything starts."""

import re
from collections.abc import Iterable, Mapping

from heliostat.artifacts import ArtifactRef
from heliostat.errors import UsageError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""What can be the name or the version of an artifact."""


def check_set_names(names: Iterable[str], what: str) -> None:
    """ValueError unless every name can be part of an artifact's. what: the key that holds them."""
    for name in names:
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{what}: {name!r} cannot name an artifact; use letters, digits, '.', '_' and '-'")


def check_kind(key: str, name: str, kind: str) -> None:
    """ValueError unless `name`, where there is one, is kind/name@version of this kind."""
    try:
        if not name or ArtifactRef.parse(name).kind == kind:
            return
    except UsageError as error:
        raise ValueError(f"{key}: {error}") from error
    raise ValueError(f"{key}={name} is of another kind; name {kind}/NAME@VERSION")


def join_sets(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Both mappings as one. Raises ValueError for a name that stands for two artifacts."""
    for name, artifact in second.items():
        if first.get(name, artifact) != artifact:
            raise ValueError(f"{name} names two sets, {first[name]} and {artifact}; rename one of them")
    return {**first, **second}
