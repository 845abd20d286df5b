"""Counters of the server in Prometheus' text format (version 0.0.4): few enough to be written out here."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of a histogram's classes, in seconds; the last class has none."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What has happened since the start. Only the event loop's thread counts."""

    def __init__(self) -> None:
        self.accepted = 0
        """Requests whose bodies have come, of those that want work done."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
        self._total: defaultdict[str, float] = defaultdict(float)
        self.rows = 0
        self.tokens = 0
        """Written."""

    @property
    def answered(self) -> int:
        """Requests of any kind that were answered, whatever the status."""
        return sum(self._requests.values())

    def answer(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered.

        Args:
            route: one of the server's own, so that nobody can make up new ones.
        """
        self._requests[route, status] += 1
        self._seconds[route][bisect_left(BUCKETS, seconds)] += 1
        self._total[route] += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]], passes: Mapping[str, int]) -> str:
        """The page.

        Args:
            gauges: name -> (meaning, what it is now).
            passes: kind -> passes of the model.
        """
        lines = _family("loradrop_requests_total", "counter", "Requests answered.")
        lines += [
            f'loradrop_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self._requests.items())
        ]
        name = "loradrop_request_seconds"
        lines += _family(name, "histogram", "From a request's first line to the end of its answer.")
        for route, counts in sorted(self._seconds.items()):
            below = 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                below += count
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {below}')
            lines.append(f'{name}_sum{{route="{route}"}} {self._total[route]:.6f}')
            lines.append(f'{name}_count{{route="{route}"}} {below}')
        lines += _family("loradrop_passes_total", "counter", "Passes of the model, all members in each.")
        lines += [f'loradrop_passes_total{{over="{kind}"}} {count}' for kind, count in sorted(passes.items())]
        for counted, meaning, value in (
            ("rows", "Rows classified.", self.rows), ("tokens", "Tokens written.", self.tokens),
        ):
            lines += [*_family(f"loradrop_{counted}_total", "counter", meaning), f"loradrop_{counted}_total {value}"]
        for gauge, (meaning, now) in gauges.items():
            lines += [*_family(f"loradrop_{gauge}", "gauge", meaning), f"loradrop_{gauge} {now:g}"]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
