"""`loradrop serve`: the calibrated ensemble of a run or an export behind HTTP, until it is told to stop.

Everything that can be refused is, before a model is loaded: settings, the packages, the address. SIGTERM and SIGINT
stop accepting; what was accepted is answered, and the command ends with 0.
"""

from __future__ import annotations

import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.errors import EXIT_OK, ConfigError, RunFolderError, SetupError
from pipeline.files import MANIFEST
from pipeline.plan.request import Request
from pipeline.run_folder.paths import RunPaths
from pipeline.serving.settings import ServeSettings, read_settings
from pipeline.terminal import say

if TYPE_CHECKING:
    from pipeline.serving.service import Service

EXPORT = "export"
"""The folder that `export` makes in that of a run, whose name says more."""
KEEP_ALIVE = 30
"""Seconds for which a connection may be idle."""


def serve(request: Request) -> int:
    """Serve --run-dir; the exit code.

    Raises:
        UserError: something to mend in settings, folder or machine.
    """
    settings = read_settings(request.host, request.port, request.api_key_file, request.overrides)
    _require_packages()
    if not RunPaths(request.run).config.exists() and not (request.run / MANIFEST).is_file():
        what = "holds neither a run nor an export"
        remedy = "Give the folder of a run that was reported, or its export/."
        raise RunFolderError("--run-dir", str(request.run), what, remedy)
    listener = _bound(settings)
    with listener:
        service = _loaded(request, settings)
        _run(service, settings, listener)
    metrics = service.metrics
    say(f"serve: stopped; {metrics.accepted} requests were accepted, {metrics.answered} of any kind answered")
    return EXIT_OK


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        what = "is not installed, and the server is made of it"
        remedy = 'Install the extra: pip install "loradrop[serve]" (in a checkout: -c constraints.txt -e ".[serve]").'
        raise SetupError(str(error.name), None, what, remedy) from error


def _bound(settings: ServeSettings) -> socket.socket:
    """A socket at the address, at which nobody is listened to yet. Raises `ConfigError` where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:  # of the resolver, too
        where = f"{settings.host}:{settings.port}"
        remedy = "Give another --host or --port (0: any that is free)."
        raise ConfigError("--host, --port", where, f"cannot be listened at ({error.strerror})", remedy) from error
    return listener


def _loaded(request: Request, settings: ServeSettings) -> Service:
    from pipeline.ensemble.ensemble import Ensemble
    from pipeline.serving.service import Service

    ensemble = Ensemble.load(request.run, trust_remote_code=settings.trusted)
    threshold = None if request.abstain is None else ensemble.threshold(request.abstain)
    ensemble.adapters.model.eval()  # once, instead of before and after every pass
    name = request.run.parent.name if request.run.name == EXPORT else request.run.name
    return Service(ensemble, name, settings.limits, threshold)


def _run(service: Service, settings: ServeSettings, listener: socket.socket) -> None:
    """Until a signal comes."""
    import uvicorn

    from pipeline.serving.app import build_app
    from pipeline.serving.hurry import HurriedProtocol

    protocol: Any = partial(HurriedProtocol, seconds=settings.limits.body_seconds)
    config = uvicorn.Config(
        build_app(service, settings), http=protocol, log_level="warning", access_log=False,
        timeout_keep_alive=KEEP_ALIVE, server_header=False, proxy_headers=False, lifespan="on",
    )
    listener.listen()  # before it is said, so that nobody who reads it comes too early
    host, port = listener.getsockname()[:2]
    members = len(service.ensemble.members)
    say(
        f"serve: {service.name}, {members} member{'s' * (members != 1)}, at http://"
        f"{f'[{host}]' if ':' in host else host}:{port}/"
        + ("; an API key is asked for" if settings.key else "")
    )
    # uvicorn raises the signal that ended it once more when it has finished: that is no reason to end otherwise.
    before = {number: signal.signal(number, _finished) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finished(number: int, frame: object) -> None:
    """Nothing: all that was accepted has been answered."""
