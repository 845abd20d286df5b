"""What a stop or a crash cut off is made up for: a validation that was not made, a best adapter that is not there."""

from __future__ import annotations

from dataclasses import replace

from pipeline.errors import RunFolderError
from pipeline.files import manifest_faults
from pipeline.run_folder.paths import step_name
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.published import published_step
from pipeline.training.run import Run


def make_up_validation(run: Run) -> None:
    """Validate the step at which a resumed run stands, as if for the first time, where that was cut off."""
    counters = run.counters
    if not counters.step or not run.due(run.config.train.validate_every_steps):
        return
    behind = counters.best_step == counters.step and published_step(run.paths) != counters.step
    if not behind and counters.validated_step == counters.step:
        return
    if counters.best_step == counters.step:  # known, but not published: better than itself once more
        run.counters = replace(counters, best_step=None, best_validation_nll=None)
    run.metrics.keep_until(counters.step, validated=False)
    run.validate()
    run.save()


def restore_best(run: Run) -> None:
    """Publish the best adapter from its checkpoint where adapter/ holds another: a crash or damage came between.

    Raises:
        RunFolderError: its checkpoint is gone, too.
    """
    best = run.counters.best_step
    if best is None or published_step(run.paths) == best:
        return
    folder = run.paths.checkpoints / step_name(best)
    if manifest_faults(folder):
        raise RunFolderError(
            str(run.paths.adapter), None, f"is not that of the best step, {best}, and {folder.name} is damaged",
            "Remove the run folder and train again.",
        )
    load_checkpoint(folder, run.slot)
    run.publish(run.validation_of(best))
