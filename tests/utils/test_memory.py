"""The garbage collector during a training."""

import gc
import weakref

import pytest

from cmvae.utils.memory import garbage_collected_on_request


class Cycle:
    def __init__(self):
        self.itself = self


def many_cycles():
    """Enough garbage for the collector to run by itself."""
    references = [weakref.ref(Cycle()) for _ in range(20 * gc.get_threshold()[0])]
    return sum(reference() is not None for reference in references)


def test_garbage_stays_until_it_is_asked_for_and_afterwards_not():
    total = 20 * gc.get_threshold()[0]
    with garbage_collected_on_request():
        assert many_cycles() == total
        assert gc.collect(1) >= total
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert many_cycles() < total


def test_an_error_leaves_the_collector_on():
    with pytest.raises(RuntimeError), garbage_collected_on_request():
        raise RuntimeError
    assert gc.isenabled()
