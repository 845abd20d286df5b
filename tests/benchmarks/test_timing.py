from __future__ import annotations

import numpy as np
import pytest

from benchmarks.timing import Spread, alternate, clock, faster, ratio


@pytest.mark.parametrize("values", [[2.0], [3.0, 1.0], [5.0, 1.0, 4.0], [0.3, 0.1, 0.7, 0.9, 0.2]])
def test_a_spread_has_the_quartiles_of_numpy(values: list[float]) -> None:
    found = Spread.of(values)
    low, lower, median, upper, high = np.percentile(values, [0, 25, 50, 75, 100])
    ours = (found.low, found.lower_quartile, found.median, found.upper_quartile, found.high)
    np.testing.assert_allclose(ours, (low, lower, median, upper, high))
    assert found.count == len(values)


class Machine:
    """A clock, and works that move it; everything takes twice as long after every call of `second`."""

    def __init__(self) -> None:
        self.now, self.pace = 0.0, 1.0
        self.calls: list[str] = []

    def first(self) -> None:
        self.calls.append("first")
        self.now += 3.0 * self.pace

    def second(self) -> None:
        self.calls.append("second")
        self.now += 2.0 * self.pace
        self.pace *= 2.0


def test_works_take_turns_after_a_warm_up_and_drift_cancels() -> None:
    machine = Machine()
    times = alternate({"a": machine.first, "b": machine.second}, 3, lambda: machine.now)
    assert machine.calls == ["first", "second"] * 4
    assert times == {"a": [6.0, 12.0, 24.0], "b": [4.0, 8.0, 16.0]}
    assert ratio(times, "a", "b") == Spread(1.5, 1.5, 1.5, 1.5, 1.5, 3)
    assert ratio(times, "b", "a", 3.0).median == 2.0


def test_a_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    times = {"a": [1.0, 10.0, 3.0], "b": [1.0, 5.0, 6.0]}
    found = ratio(times, "a", "b")
    assert (found.median, found.low, found.high) == (1.0, 0.5, 2.0)


def test_the_faster_one_has_the_lower_median() -> None:
    assert faster({"a": [1.0, 9.0, 9.0], "b": [3.0, 3.0, 3.0]}, ["a", "b"]) == "b"


def test_the_clock_of_the_processor_does_not_count_waiting() -> None:
    import time

    wall, processor = clock("wall", "cpu"), clock("cpu", "cpu")
    before = wall(), processor()
    time.sleep(0.05)
    assert wall() - before[0] >= 0.05 > processor() - before[1]
