"""A Ray cluster to search on: a small private one on this machine, or the one RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline import ConfigError, SearchConfig, SetupError, StageFailed, read_bytes
from tune.stopping import Stopping
from tune.watch import TOKEN, RayWatch, end_bearers, token_sha256

OBJECT_STORE_BYTES = 100 * 2**20
"""Trials exchange a few numbers; Ray's own default would take a third of the memory."""
CONTROLLER_CPUS = 0.01
"""What a trial function takes that only waits for those who train: a TorchTrainer, or the worker of a pack."""
RUNS_ON_GPU, RUNS_ON_CPU = 8, 4
"""Runs of a pack where `search.pack` is auto. On a CPU a pass is bound by arithmetic with few of them, each trial that
waits for its run costs a process, and the later trials profit from what the earlier ones have shown."""
SCRATCH = "scratch"
MADE_FOR = "made_for"
"""In a scratch folder: which search it is of. Nothing else is removed, whatever a note names."""
NOISE = "ray.log"
PROBE_SECONDS = 120.0
"""For one task: its process imports Ray."""
START_ERRORS = (ConnectionError, OSError, ValueError, RuntimeError)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""Ray's tables, loggers and checkpoints of its own are off: the ledger replaces them."""

LOOPBACK = "127.0.0.1"
LOCAL = {
    "RAY_AUTH_MODE": "token",
    # Ray's way of saying that a cluster is for this machine alone. Without it Ray turns 127.0.0.1 into the outer
    # address, and its servers listen on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",  # one trial worker per core
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Capacity:
    """How many trials run at once, and on what."""

    concurrent: int
    workers: int
    gpus: int
    """Accelerators of each process, 0 or 1."""
    packs: tuple[str, ...] = ()
    """Names of the workers that train the trials, one per accelerator (or for all cores); none: each trains itself."""
    threads: int = 1
    """Of each such worker."""

    @property
    def worker_cpus(self) -> float:
        """What Ray reserves for a worker: the trials that wait for it need something, too."""
        return max(self.threads - 1, 0.5)

    def trial_resources(self) -> dict[str, float]:
        """What Tune reserves for the trial function; who trains in its place reserves its own share."""
        alone = self.workers == 1 and not self.packs
        return {"cpu": 1, "gpu": self.gpus} if alone else {"cpu": CONTROLLER_CPUS}

    def describe(self) -> str:
        """For people."""
        if self.packs:
            bases = "one base" if len(self.packs) == 1 else f"{len(self.packs)} bases"
            where = f"{len(self.packs)} GPUs" if self.gpus else f"{bases}, {self.threads} threads"
            return f"{self.concurrent} at once, packed on {where}"
        processes = "process" if self.workers == 1 else "processes"
        return f"{self.concurrent} at once, {self.workers} {processes} each{' with a GPU' if self.gpus else ''}"


def attached_to() -> str:
    """The address of the user's cluster; empty where the search starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


@contextmanager
def cluster(folder: Path, stopping: Stopping) -> Iterator[list[dict[str, float]]]:
    """Start (or attach to) Ray; yields the resources of each of its nodes; leaves no process and no file behind.

    A cluster of our own listens on the loopback interface and asks everybody for a token that is drawn anew and stands
    in the environment of its processes alone. An attached one has the user's settings (RAY_AUTH_MODE, RAY_AUTH_TOKEN).

    Args:
        folder: Takes what Ray prints, and a note of the session's scratch folder, so that the next search cleans
            up after one that was killed.
        stopping: Says with which exit code to leave when Ray dies.

    Raises:
        SetupError: the attached cluster asks for a token that we have not.
        StageFailed: Ray does not start.
    """
    address = attached_to()
    os.environ.update(QUIET)
    if not address:
        os.environ.update(LOCAL | {TOKEN: secrets.token_hex(32)})
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    scratch = _make_scratch(folder)
    watch: RayWatch | None = None
    with (folder / NOISE).open("w", encoding="utf-8") as noise, redirect_stdout(noise), redirect_stderr(noise):
        try:
            if not address:
                _start(scratch)
                watch = RayWatch(_vital_processes(), (scratch, folder), stopping.exit_code)
            else:
                _attach(address)
            with watch.watching() if watch else nullcontext():
                yield [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        finally:
            ray.shutdown()
            if watch:
                watch.end()
            shutil.rmtree(scratch, ignore_errors=True)


def plan(search: SearchConfig, nodes: Sequence[dict[str, float]], trials: int, packed: bool = False) -> Capacity:
    """Fit the search into the cluster.

    Args:
        nodes: the resources of each node.
        packed: whether workers train the trials, several at once.

    Raises:
        ConfigError: trials x workers exceeds the cluster: it would wait for itself for ever; or the packs.
    """
    if packed:
        return _plan_packs(search, nodes, trials)
    workers = search.workers_per_trial
    gpus, cpus = (sum(int(node.get(kind, 0)) for node in nodes) for kind in ("GPU", "CPU"))
    slots, kind = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if workers > slots:
        raise ConfigError(
            "search.workers_per_trial", workers, f"exceeds the {slots} {kind} of the cluster", f"Set at most {slots}."
        )
    most = slots // workers
    asked = search.concurrent
    if asked > most:
        raise ConfigError(
            "search.concurrent", asked,
            f"times search.workers_per_trial = {workers} needs {asked * workers} {kind}, the cluster has {slots}",
            f"Set at most {most}, or 0 for as many as fit.",
        )  # fmt: skip
    return Capacity(concurrent=min(asked or most, trials), workers=workers, gpus=1 if gpus else 0)


def _plan_packs(search: SearchConfig, nodes: Sequence[dict[str, float]], trials: int) -> Capacity:
    """A worker per GPU; without any, one per node, since no process has cores of two."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    hosts = [(int(node.get("GPU", 0)) if gpus else 1, int(node.get("CPU", 0))) for node in nodes]
    hosts = [(workers, cpus) for workers, cpus in hosts if workers and (cpus or gpus)] or [(1, 1)]
    size = search.pack if isinstance(search.pack, int) else (RUNS_ON_GPU if gpus else RUNS_ON_CPU)
    workers = sum(workers for workers, _ in hosts)
    most = size * workers
    if search.concurrent > most:
        raise ConfigError(
            "search.concurrent", search.concurrent, f"exceeds the {most} runs of the packs",
            f"Set at most {most}, 0 for as many as fit, or a larger search.pack.",
        )
    concurrent = min(search.concurrent or most, trials)
    names = tuple(f"pack_{number}" for number in range(min(workers, concurrent)))
    threads = min(max(1, cpus // workers) for workers, cpus in hosts)  # any of them fits into any node
    return Capacity(concurrent, 1, int(gpus > 0), names, threads)


def _start(scratch: Path) -> None:
    import ray

    try:
        ray.init(
            address="local",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(scratch / "ray"),
            _plasma_directory=str(scratch),  # not /dev/shm, which containers often make too small
            _node_ip_address=LOOPBACK,
        )
    except START_ERRORS as error:
        raise StageFailed(f"Ray does not start on this machine: {error}") from error


def _vital_processes() -> dict[str, int]:
    """Those of Ray's processes without which nothing goes on."""
    import ray

    started = ray._private.worker._global_node.all_processes
    return {name: info.process.pid for name in ("gcs_server", "raylet") for info in started[name]}


def _attach(address: str) -> None:
    import ray

    try:
        if not address.startswith("ray://"):
            _knock(address)
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.CRITICAL,
            runtime_env={"env_vars": _carried()},
        )
    except ray.exceptions.AuthenticationError as error:
        raise SetupError(
            "RAY_ADDRESS", address, "is a cluster that asks for its token, and the one given here is missing or wrong",
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as the cluster was started with.",
        ) from error
    except (*START_ERRORS, ray.exceptions.RayError) as error:
        raise StageFailed(f"Ray does not start at RAY_ADDRESS = {address}: {error}") from error


def _carried() -> dict[str, str]:
    """What processes on the nodes of an attached cluster need to know and cannot inherit from here."""
    kept = {name: os.environ[name] for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    return {**kept, **QUIET, "RAY_CHDIR_TO_TRIAL_DIR": "0"}


def _knock(address: str) -> None:
    """Raises Ray's AuthenticationError where the cluster wants another token: `ray.init` would try for minutes."""
    import ray
    from ray._private.authentication import authentication_token_setup
    from ray._private.services import canonicalize_bootstrap_address_or_die

    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` does
    ray._raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(address))


def _make_scratch(folder: Path) -> Path:
    note = folder / SCRATCH
    with suppress(OSError, ValueError):  # none, or what is no note of ours
        left = Path(read_bytes(note, 4096).decode().strip())
        made_for, _, token = read_bytes(left / MADE_FOR, 8192).decode().rpartition("\n")
        if made_for == str(folder):  # a folder from elsewhere may name anything
            end_bearers(token)
            shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # with links that somebody has put there: what is opened below is ours
    # Ray's socket paths must stay below 108 characters, so a long TMPDIR is no place for them.
    parent = tempfile.gettempdir()
    scratch = Path(tempfile.mkdtemp(prefix="loradrop-", dir=parent if len(parent) < 24 else "/tmp"))
    (scratch / MADE_FOR).write_text(f"{folder}\n{token_sha256()}", encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{scratch}\n", encoding="utf-8")
    return scratch


def probe() -> None:
    """`python -m tune.cluster`, for `loradrop doctor`: start Ray as a search does, have it run a task, end it.

    Raises:
        StageFailed: it does not start, or its task comes to nothing.
    """
    with tempfile.TemporaryDirectory(prefix="loradrop-") as folder, cluster(Path(folder) / ".ray", Stopping()):
        import ray

        doubled = ray.remote(num_cpus=CONTROLLER_CPUS)(lambda number: 2 * number)
        if ray.get(doubled.remote(21), timeout=PROBE_SECONDS) != 42:
            raise StageFailed("Ray starts, and its task gives another answer than it should")


if __name__ == "__main__":
    probe()
