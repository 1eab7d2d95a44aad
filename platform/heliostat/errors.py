"""The exceptions of Heliostat.

    HeliostatError                 exit status 1: something failed
    ├── UsageError                 exit status 2: the caller must change what was asked
    │   └── ConfigError            a recipe or an override is wrong
    ├── StorageError               object storage refused or failed
    │   ├── ObjectNotFoundError
    │   ├── ObjectExistsError      a conditional write lost the race
    │   ├── ObjectReplacedError    the object changed while it was read in pieces
    │   └── TransientStorageError  one request failed in a way that another may not; never leaves the storage room
    ├── ArtifactError
    │   ├── ArtifactNotFoundError
    │   └── ArtifactConflictError  the version exists with another configuration
    ├── DataError                  the images cannot serve the request
    ├── TrainingError
    │   ├── NonFiniteLossError
    │   ├── CheckpointError
    │   └── PreemptedError         stopped with a checkpoint, as asked: exit status 130, the same command goes on
    ├── TrackingError              the experiment tracker cannot be used
    │   └── TrackerLostError       it does not answer, and may answer later
    ├── PublishError               an export failed its parity check
    └── ClusterError               Ray cannot be started, joined or used

Every message is one line that names what is wrong, the value, the limit and the fix.
"""


class HeliostatError(Exception):
    """Anything that Heliostat reports to its user without a traceback."""

    exit_status = 1


class UsageError(HeliostatError):
    """The request itself is wrong; nothing was started."""

    exit_status = 2


class ConfigError(UsageError):
    """A recipe, an override or a combination of settings is wrong."""


class StorageError(HeliostatError):
    """Object storage refused a request or failed."""


class ObjectNotFoundError(StorageError):
    """The object does not exist."""


class ObjectExistsError(StorageError):
    """A write that must create the object found one already there."""


class ObjectReplacedError(StorageError):
    """The object is no longer the one whose reading was begun."""


class TransientStorageError(StorageError):
    """One request failed in a way that the next may not. The message is the reason alone; `advice` says what a user can do."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.advice = advice

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.advice)


class ArtifactError(HeliostatError):
    """An artifact cannot be read or written."""


class ArtifactNotFoundError(ArtifactError):
    """No complete artifact has this name and version."""


class ArtifactConflictError(ArtifactError):
    """The version exists with another fingerprint."""


class DataError(HeliostatError):
    """The images cannot serve the request."""


class TrainingError(HeliostatError):
    """A training run cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss was NaN or infinite more often than the policy allows."""


class CheckpointError(TrainingError):
    """A checkpoint is torn, foreign or of another configuration."""


class PreemptedError(TrainingError):
    """A run was asked to stop, and did so with a checkpoint of its last step."""

    exit_status = 130


class TrackingError(HeliostatError):
    """The experiment tracker cannot be reached or written."""


class TrackerLostError(TrackingError):
    """The experiment tracker does not answer now, and may answer later. `reason` says in a few words why."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.reason)


class PublishError(HeliostatError):
    """An export could not be made, or failed its parity check."""


class ClusterError(HeliostatError):
    """Ray cannot be started, joined or used as asked."""
