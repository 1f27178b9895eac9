"""The loop: source batches to updates, all of it on one screen."""

from __future__ import annotations

from megapsft.train.run import Run
from megapsft.train.update import add_old_policy, update


def train(run: Run) -> None:
    """Carry a run from where it stands to its last step. Collective; the same calls on every rank."""
    for step in run.steps():
        phase = run.enter(step)  # plain SFT first, then the objective with a fresh optimizer
        samples = run.source.next_samples(step)
        batch = run.pack(samples, phase.objective)
        batch = add_old_policy(run.policy, batch, phase.objective)
        for minibatch in batch.minibatches:  # several updates a step: from the second on, ratios leave 1
            report = update(run.policy, phase.objective, run.optimizer, minibatch, run.learning_rate(step, phase))
            run.log_update(step, phase, report)
        run.log_step(step, phase)
        run.save_if_due(step, phase)
    run.close()
