"""Members until a row's answer is settled: as many passes as the row needs. Pure numpy.

Of M members n have predicted. S_n is the sum of the most probable choice's probabilities over these n, less that of
the runner-up. The answer is settled where S_n > (M - n) h: it stands even if the members that are left spoke against
it by h on average. With h = 1, the most that a member can say, the answers are those of all members for certain. A
smaller h, the margin, saves passes and may change answers; which h do so in at most a share d of rows, rows without
labels tell: the h are tested from 1 downwards, each by Clopper and Pearson's bound of how often the answer changes,
until one fails (fixed-sequence testing, as in `pipeline.scores.abstention`). So P(more than d of rows change) <= 5 %,
for rows like those of the test, which are independent and have decided neither members nor their order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.scores.abstention import LEVEL, upper_bounds
from pipeline.scores.bootstrap import Floats, Ints
from pipeline.scores.ensemble import average

ROUND = 2
"""Members that predict between two looks."""
MARGINS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.0)
"""In the order of testing."""


def settled(log_probs: Floats, left: int, margin: float) -> NDArray[np.bool_]:
    """Whether the answers of rows are settled by the n members that have predicted (n, N, C): (N,).

    Args:
        left: members that have not: M - n.
    """
    if not left:
        return np.ones(log_probs.shape[1], dtype=np.bool_)
    totals = np.sort(np.exp(log_probs.astype(np.float64)).sum(axis=0), axis=-1)
    lead = totals[:, -1] - totals[:, -2] if totals.shape[-1] > 1 else np.full(len(totals), np.inf)
    return np.asarray(lead > left * margin)


def passes_needed(log_probs: Floats, margin: float) -> Ints:
    """Members after which each row is settled, `ROUND` at a time in the order of (M, N, C): (N,)."""
    members, rows, _ = log_probs.shape
    found = np.zeros(rows, dtype=np.int64)
    for made in (*range(ROUND, members, ROUND), members):
        found[(found == 0) & settled(log_probs[:made], members - made, margin)] = made
    return found


def adaptive_average(log_probs: Floats, passes: Ints) -> Floats:
    """The mixture of each row's first `passes` (N,) members: (M, N, C) -> (N, C). What later ones say is not looked at.
    """
    found = np.empty(log_probs.shape[1:])
    for made in np.unique(passes):
        found[passes == made] = average(log_probs[:made, passes == made])
    return found


def choose_margin(log_probs: Floats, share: float, level: float = LEVEL) -> float:
    """The last margin, from 1 on, of which it is shown that at most `share` of answers change; 1 needs no showing.

    Args:
        log_probs: (M, N, C) of independent rows.
        share: between 0 and 1; 0: none may.
    """
    rows, whole = log_probs.shape[1], average(log_probs).argmax(axis=-1)
    chosen = MARGINS[0]
    for value in MARGINS[1:]:
        answers = adaptive_average(log_probs, passes_needed(log_probs, value)).argmax(axis=-1)
        changed = np.array([np.count_nonzero(answers != whole)])
        if upper_bounds(np.array([rows]), changed, level)[0] > share:
            break
        chosen = value
    return chosen
