"""How far apart the distributions of several branches are: the consistency terms of arXiv 2403.00812.

G branches of one example give G distributions P_1 … P_G over the same V outcomes. In nats; at least 0 (but for
rounding), and 0 only where all branches agree:

    kl   D = ½ [KL(P_1 ‖ P_2) + KL(P_2 ‖ P_1)]           the bidirectional KL of R-Drop (arXiv 2106.14448, eq. 2)
    js   D = 1/G Σ_g KL(P_g ‖ M),  M = 1/G Σ_g P_g       the generalized Jensen-Shannon divergence, at most ln G

`js` has the mask-free distribution among its branches, as HiddenCut's consistency loss has (arXiv 2106.00149).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

Kind = Literal["kl", "js"]


def divergence(kind: Kind, log_probs: Tensor) -> Tensor:
    """(G, …, V) log-probabilities of G branches -> (…) divergence in nats; `kl` takes two branches."""
    return jensen_shannon(log_probs) if kind == "js" else bidirectional_kl(*log_probs)


def bidirectional_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ [KL(P‖Q) + KL(Q‖P)] = ½ Σ_v (p_v - q_v)(log p_v - log q_v): (…, V)² -> (…).

    The product form is a sum of terms that are all ≥ 0, so nothing cancels where the two are close.
    """
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def jensen_shannon(log_probs: Tensor) -> Tensor:
    """1/G Σ_g KL(P_g ‖ M) with the mean M of all branches: (G, …, V) -> (…), between 0 and ln G."""
    log_mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    return (log_probs.exp() * (log_probs - log_mean)).sum(-1).mean(0)


def representation_log_probs(hidden: Tensor) -> Tensor:
    """(…, D) last-layer representations -> (…, D) log-probabilities over their features.

    For regression the paper compares representations, since one predicted number is no distribution. It does not say
    how a vector becomes one; a softmax over the features, as over logits, is our choice. A shift of all features by
    one number is invisible to it.
    """
    return hidden.float().log_softmax(-1)
