"""An error that a worker met arrives at the driver as what it was."""

import pickle

import pytest

from heliostat import errors
from heliostat.errors import HeliostatError, TrackerLostError, TransientStorageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeliostatError)]
OF_TWO_PARTS = (TransientStorageError, TrackerLostError)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_between_processes(kind: type[HeliostatError]) -> None:
    error = kind("one line", "second part") if kind in OF_TWO_PARTS else kind("one line")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == "one line"
    assert vars(arrived) == vars(error)
