"""Rows are cut into passes of the fastest size, which is found on the way."""

from __future__ import annotations

from pipeline.data.sampler import length_sorted_chunks
from pipeline.prediction.pace import Pace


class Machine:
    """A clock, and passes whose seconds per token depend on their size."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def run(self, pace: Pace, costs: list[int], budget: int, members: int) -> list[int]:
        """Tokens of every pass."""
        sizes = []
        for chunk in pace.chunks(costs, budget, members):
            sizes.append(members * sum(costs[row] for row in chunk))
            self.now += sizes[-1] * self.seconds.get(sizes[-1], 9.0)
        return sizes


def test_every_size_is_tried_once_and_the_fastest_kept() -> None:
    machine = Machine({1024: 3.0, 2048: 1.0, 4096: 2.0})
    pace = Pace(lambda: machine.now)
    sizes = machine.run(pace, [32] * 2000, 4096, 4)
    assert sizes[:4] == [4096, 4096, 2048, 1024] and set(sizes[4:-1]) == {2048} and sum(sizes) == 32 * 2000 * 4
    assert set(machine.run(pace, [32] * 640, 4096, 4)) == {2048}  # remembered
    machine.seconds = {1024: 1.0, 2048: 2.0, 4096: 3.0}
    assert set(machine.run(pace, [32] * 640, 4096, 4)) == {2048}
    assert machine.run(pace, [32] * 2000, 4096, 2)[4] == 1024  # of other members nothing was known


def test_what_is_short_or_has_one_member_is_not_measured() -> None:
    machine = Machine({1024: 1.0, 2048: 2.0, 4096: 3.0})
    pace = Pace(lambda: machine.now)
    assert set(machine.run(pace, [32] * 1280, 4096, 1)) == {4096}
    assert set(machine.run(pace, [32] * 128, 4096, 4)) == {4096}
    assert machine.run(pace, [32] * 1280, 4096, 4)[4] == 1024


def test_every_row_comes_once_the_longest_first_within_the_budget() -> None:
    costs, budget, members = [7, 3, 250, 9, 9, 1], 100, 3
    chunks = list(Pace().chunks(costs, budget, members))
    assert chunks == length_sorted_chunks(costs, budget, members)  # too small a budget to try others
    assert sorted(row for chunk in chunks for row in chunk) == list(range(6))
