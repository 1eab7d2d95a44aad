"""What must never be recorded or shown: users, passwords and tokens inside URIs."""

import re
from collections.abc import Mapping

_USER = re.compile(r"//[^/\s]*@")
_QUERY = re.compile(r"([?&;][^=&\s]*(?:pass|token|secret|signature|credential|sig|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Text whose URIs show neither user and password nor the values of secret query parameters."""
    return _QUERY.sub(r"\1***", _USER.sub("//***@", text))


def plain_texts(values: Mapping[str, object]) -> dict[str, str]:
    """Values as texts without secrets."""
    return {key: without_secrets(str(value)) for key, value in values.items()}
