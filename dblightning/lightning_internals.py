"""Names of Lightning that are not public, in one place: what to look at when Lightning changes.

Every other module of the package takes these through the functions here (tests/test_lightning_internals.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.strategies import Strategy


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """The trainer that runs the module, or None outside of one, where the public ``module.trainer`` raises."""
    return module._trainer


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """Time the strategy's ranks wait for one another in a collective; None where it has a single process."""
    return getattr(strategy, "_timeout", None)


def logged_step(trainer: L.Trainer) -> int:
    """The step under which this rollout's metrics are logged: rollouts done before it, in this run and before."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def finish_logging_of_batch(trainer: L.Trainer) -> None:
    """Log the current batch's metrics now, where an exception is about to end the batch before Lightning does."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def validate_now(trainer: L.Trainer) -> None:
    """Run the fit's validation once, before its first batch; its values are logged at step 0.

    Nothing happens where this fit never validates.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if not trainer.enable_validation:
        return
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first
