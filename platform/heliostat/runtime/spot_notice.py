"""EDGE to the metadata service of a spot machine, which announces when the machine is taken back (AWS's IMDSv2)."""

import http.client
import json
from datetime import UTC, datetime
from urllib.parse import urlsplit

from heliostat.errors import ConfigError

_LIFETIME_SECONDS = "21600"
_ASK_SECONDS = 2.0


class SpotNotice:
    """Asks `<url>/latest/meta-data/spot/instance-action`, with a session token."""

    def __init__(self, url: str) -> None:
        """Assign. Raises ConfigError unless url is http://host or http://host:port."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(
                f"scaling.spot_notice_url {url!r} is not http://host or http://host:port; on AWS: http://169.254.169.254"
            )
        self._host, self._port = parts.hostname, parts.port or 80
        self._token = ""

    def seconds_left(self) -> float | None:
        """Seconds until the machine goes; None while nothing is announced or nobody answers."""
        try:
            status, body = self._ask()
            if status == 401:  # the token has run out
                self._token = ""
                status, body = self._ask()
        except (OSError, http.client.HTTPException):
            return None
        if status != 200:
            return None
        try:
            action = json.loads(body)
            when = datetime.fromisoformat(str(action["time"]).replace("Z", "+00:00"))
            return max(0.0, (when - datetime.now(UTC)).total_seconds())
        except (ValueError, KeyError, TypeError):  # also a time without its zone
            return 120.0  # AWS promises two minutes

    def _ask(self) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_ASK_SECONDS)
        try:
            if not self._token:
                connection.request(
                    "PUT", "/latest/api/token", headers={"X-aws-ec2-metadata-token-ttl-seconds": _LIFETIME_SECONDS}
                )
                answer = connection.getresponse()
                self._token = answer.read(4096).decode("ascii", "replace") if answer.status == 200 else ""
            headers = {"X-aws-ec2-metadata-token": self._token} if self._token else {}
            connection.request("GET", "/latest/meta-data/spot/instance-action", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(65536)
        finally:
            connection.close()
