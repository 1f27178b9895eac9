"""The loop: source batches to updates, all of it on one screen."""

from __future__ import annotations

from megapsft.train.prepare import with_advantages, with_constants
from megapsft.train.run import Run
from megapsft.train.update import update


def train(run: Run) -> None:
    """Carry a run from where it stands to its last step. Collective; the same calls on every rank."""
    for step in run.steps():
        phase = run.enter(step)  # plain SFT first, then the objective with a fresh optimizer
        groups = with_advantages(run.source.next_groups(step), phase.objective)
        run.refuse_noise(groups)
        batch = run.pack(groups, phase.objective)
        batch = with_constants(run.policy, run.reference, batch, phase.objective)
        if run.critic:
            batch = run.critic.with_values(batch, phase.objective)
        for minibatch in batch.minibatches:  # several updates a step: from the second on, ratios leave 1
            lr = run.learning_rate(step, phase)
            report = update(run.policy, phase.objective, run.optimizer, minibatch, lr, run.reference, run.tokens)
            if run.critic:
                report = run.critic.update(phase.objective, minibatch, report)
            run.log_update(step, phase, report)
        run.log_step(step, phase)
        run.stop_if_asked(step)  # then nothing but a checkpoint follows
        run.evaluate_if_due(step)
        run.save_if_due(step, phase)
    run.close()
