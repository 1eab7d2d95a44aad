"""Entries to a server, in order, whether it answers or not.

While it answers, an entry is sent before `send` returns. When it does not, entries wait in a spool and a thread tries again;
nothing overtakes what waits. Both changes are said once.
"""

import threading
import time
from collections.abc import Callable

from heliostat.errors import TrackerLostError, TrackingError
from heliostat.tracking.run import Notify
from heliostat.tracking.spool import Entry, SpoolFile, SpoolFolder

Apply = Callable[[Entry], None]
_MOST_FAILURES = 3  # of one entry while the server answers otherwise: then it is the entry, and it must not hold up the rest
_LINGER_SECONDS = 5.0  # how long the end of a run waits for a worker of it that is about to end and holds records


class Delivery:
    """The one way from this process to one server.

    `apply` and `probe` (a request that changes nothing) raise TrackerLostError when it does not answer.
    """

    def __init__(
        self, apply: Apply, probe: Callable[[], None], spools: SpoolFolder, *, where: str, retry_every_seconds: float
    ) -> None:
        self._apply, self._probe, self._spools = apply, probe, spools
        self._where, self._retry_seconds = where, retry_every_seconds
        self._failures: tuple[Entry | None, int] = (None, 0)
        self._lock = threading.RLock()
        self._flushing = threading.Lock()
        self._waiting: SpoolFile | None = None
        self._lost_since = 0.0
        self._dropped = 0
        self._said: set[str] = set()
        self._notify: Notify = print

    @property
    def is_lost(self) -> bool:
        """Whether the server did not answer the last time."""
        return self._lost_since > 0

    def send(self, entry: Entry, notify: Notify) -> None:
        """Send an entry, or keep it until the server answers again. An entry that the server refuses is said and dropped."""
        with self._lock:
            self._notify = notify
            if not self.is_lost:
                try:
                    self._deliver(entry)
                    return
                except TrackerLostError as error:
                    self._begin_outage(error)
            self._keep(entry)

    def send_abandoned(self, notify: Notify) -> None:
        """Send what processes that are gone have left; what cannot be sent now stays for the next time."""
        if self._spools.is_empty():
            return
        with self._lock:
            self._notify = notify
            if self.is_lost:
                return
            try:
                sent = self._flush_abandoned()
            except TrackerLostError as error:
                self._begin_outage(error)
                return
        if sent:
            notify(f"{self._where}: {sent} records that an earlier process could not send are there now")

    def settle(self, notify: Notify) -> None:
        """At the end of a run: try once more to send what waits, and say what is left and where."""
        deadline = time.monotonic() + _LINGER_SECONDS
        while not self._spools.is_empty():
            if self.is_lost:
                self._flush()
            else:
                self.send_abandoned(notify)
            if self.is_lost or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not self._spools.is_empty():
            notify(
                f"{self._where}: records of the run still wait in {self._spools.folder}; the next heliostat command that "
                "uses this store and server from this machine sends them"
            )

    def _deliver(self, entry: Entry) -> None:
        try:
            self._apply(entry)
        except TrackerLostError as error:
            if not self._is_its_own_fault(entry):
                raise
            self._say_refusal(entry, error)
        except TrackingError as error:  # a training run does not end because a record of it is refused
            self._say_refusal(entry, error)

    def _is_its_own_fault(self, entry: Entry) -> bool:
        """Whether one entry failed again and again while the server answers."""
        before, count = self._failures
        self._failures = (entry, count + 1 if entry == before else 1)
        if self._failures[1] < _MOST_FAILURES:
            return False
        try:
            self._probe()
        except TrackerLostError:
            return False
        return True

    def _say_refusal(self, entry: Entry, error: TrackingError) -> None:
        text = f"{error}; the record ({entry.call}) is dropped and the run goes on"
        if text not in self._said:
            self._said.add(text)
            self._notify(text)

    def _begin_outage(self, error: TrackerLostError) -> None:
        self._lost_since = time.monotonic()
        self._notify(
            f"{self._where} is lost ({error.reason}); the run goes on, its records wait in {self._spools.folder} and are sent "
            "when it is back"
        )
        threading.Thread(target=self._retry, name="tracking-retry", daemon=True).start()

    def _keep(self, entry: Entry) -> None:
        try:
            self._waiting = self._waiting or self._spools.create()
            kept = self._waiting.append(entry, self._spools.limit_bytes)
            reason = f"the limit tracking.spool_bytes={self._spools.limit_bytes} is reached"
        except OSError as error:
            kept, reason = False, f"{self._spools.folder} cannot be written: {error.strerror or error}"
        if not kept:
            self._dropped += 1
            if self._dropped == 1:
                self._notify(f"{self._where} is lost and {reason}; further records are dropped from here on")

    def _retry(self) -> None:
        while self.is_lost:
            time.sleep(self._retry_seconds)
            self._flush()

    def _flush(self) -> None:
        """Send what waits, that of processes before us first; the outage is over when nothing is left."""
        with self._flushing:
            if not self.is_lost:
                return
            try:
                sent = self._flush_abandoned()
                while True:
                    with self._lock:  # nothing may be appended between the last look and the end of the outage
                        found = self._waiting.next() if self._waiting else None
                        if found is None:
                            self._end_outage(sent)
                            return
                    entry, after = found
                    self._deliver(entry)
                    sent += 1
                    self._waiting.offset = after  # type: ignore[union-attr]
            except TrackerLostError:
                return

    def _flush_abandoned(self) -> int:
        sent = 0
        for file in self._spools.abandoned():
            try:
                while (found := file.next()) is not None:
                    self._deliver(found[0])
                    file.offset = found[1]
                    sent += 1
            except TrackerLostError:
                file.release()
                raise
            file.discard()
        return sent

    def _end_outage(self, sent: int) -> None:
        seconds, dropped = time.monotonic() - self._lost_since, self._dropped
        if self._waiting is not None:
            self._waiting.discard()
        self._waiting, self._lost_since, self._dropped = None, 0.0, 0
        lost = f", {dropped} were dropped" if dropped else ""
        self._notify(f"{self._where} is back after {seconds:.0f} s; {sent} waiting records are sent{lost}")
