"""The Hugging Face hub: asked once whether it answers, and left alone where it does not.

Its clients try every request of every file six times, which takes a minute where nobody answers. Here one request
decides for a whole command: without an answer within `ANSWER_SECONDS` the libraries work from their caches.
"""

from __future__ import annotations

import functools
import os
import sys
import threading

from pipeline.errors import SetupError, one_line
from pipeline.fetch import is_embedded
from pipeline.terminal import say

ANSWER_SECONDS = 5.0
"""Time for the hub's first answer, the look-up of its name included."""
OFFLINE = "HF_HUB_OFFLINE"
"""The hub's own variable: processes that are started inherit what has been found out."""
_KEPT_OFFLINE = "LORADROP_HUB_UNREACHABLE"
"""Why `OFFLINE` was set here: a process that inherits both does not take it for the user's wish."""


@functools.cache
def unreachable() -> str:
    """Why hub names come from the cache alone; empty where the hub answers.

    Asks at most once per process. Without an answer huggingface_hub, transformers and datasets work offline from then
    on, here and in processes that this one starts.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return os.environ.get(_KEPT_OFFLINE) or f"{OFFLINE} is set"
    reason = ask(constants.ENDPOINT)
    if reason:
        os.environ.update({OFFLINE: "1", _KEPT_OFFLINE: reason})
        constants.HF_HUB_OFFLINE = True
        if (datasets := sys.modules.get("datasets.config")) is not None:  # read when it was imported
            datasets.HF_HUB_OFFLINE = datasets.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]
    return reason


@functools.cache
def tell_of_cache() -> None:
    """Say, once, that what is read is the cache's, whatever the hub may have by now."""
    say(f"loradrop: the hub is out of reach ({unreachable()}): models and data come from its cache on this machine")


def ask(endpoint: str) -> str:
    """One request, by the hub's own client (proxies, certificates); why there is no answer, empty where there is.

    In a thread of its own, because looking up a name takes as long as the system likes.
    """
    from huggingface_hub.utils import get_session

    found: list[str] = []

    def request() -> None:
        try:
            status = get_session().head(endpoint, timeout=ANSWER_SECONDS, follow_redirects=False).status_code
            found.append(f"{endpoint} answers {status}" if status >= 500 else "")
        except Exception as error:  # of the client, of TLS, of what the address may be
            found.append(f"{endpoint}: {one_line(str(error)) or type(error).__name__}")

    thread = threading.Thread(target=request, daemon=True, name="hub")
    thread.start()
    thread.join(ANSWER_SECONDS + 1.0)
    return found[0] if found else f"{endpoint} does not answer within {ANSWER_SECONDS:g} s"


def check_model_at_hand(path: str, revision: str | None) -> None:
    """Refuse a hub model that the cache does not hold while the hub is out of reach. Local and embedded names pass.

    Raises:
        SetupError: with the way out.
    """
    if is_embedded(path) or os.path.exists(os.path.expanduser(path)):
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:  # no name on the hub: whoever loads it says so
        return
    if not unreachable():
        return
    if not isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        raise out_of_reach("model.path", path)
    tell_of_cache()


def out_of_reach(field: str, name: str) -> SetupError:
    """The error of a name that the cache does not hold while the hub is `unreachable`."""
    remedy = "Connect (a mirror: HF_ENDPOINT=…, a proxy: HTTPS_PROXY=…), or give a local folder."
    constraint = f"is not in the hub's cache on this machine, and the hub is out of reach ({unreachable()})"
    return SetupError(field, name, constraint, remedy)
