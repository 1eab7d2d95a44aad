"""Small JSON objects that are read whole, and may have been damaged since they were written."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

from heliostat.errors import StorageError
from heliostat.storage.store import Store

T = TypeVar("T")


def read_json(files: Store, key: str, parse: Callable[[Any], T], fix: str) -> T:
    """What `parse` makes of a JSON object. Raises ObjectNotFoundError where there is none.

    Raises StorageError, which names the object and `fix`, where it is not JSON or `parse` cannot use it: every write is atomic,
    so that it was changed afterwards.
    """
    data = files.read(key)
    try:
        return parse(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StorageError(f"{files.uri}/{key} is damaged ({len(data)} bytes that cannot be used); {fix}") from error
