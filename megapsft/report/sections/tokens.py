"""What runs kept of single tokens: which words are clipped, and how sure the policy is of what it is trained on."""

from __future__ import annotations

from megapsft.report.clipped import by_epoch, cloud, rates, read_counts
from megapsft.report.figure import Figure
from megapsft.report.folders import Shown
from megapsft.report.probabilities import first_and_last, probability_histogram
from megapsft.report.run import Run
from megapsft.report.section import Section

NOTE = "Of what log.tokens recorded; clipped: clipping made the loss of the token strictly larger."


def section(shown: Shown) -> Section | None:
    figures = [one for number, run in enumerate(shown.runs) for one in figures_of(run, number)]
    return Section(name="Tokens", figures=figures, note=NOTE) if figures else None


def figures_of(run: Run, number: int) -> list[Figure]:
    """Of one run; a cloud for each epoch in which anything was clipped."""
    if run.folder is None:
        return []
    figures: list[Figure] = []
    epochs = by_epoch(read_counts(run.folder))
    if any(word.clipped for words in epochs.values() for word in words):
        clouds = [(epoch, words) for epoch, words in epochs.items() if any(word.clipped for word in words)]
        figures += [cloud(run.name, epoch, words, f"clipped-{number}-{epoch}") for epoch, words in clouds]
        figures.append(rates(run.name, epochs, f"clip-rates-{number}"))
    recorded = first_and_last(run.folder)
    if recorded:
        title = f"{run.name}: probabilities of trained tokens"
        figures.append(probability_histogram(recorded, f"token-probabilities-{number}", title))
    return figures


__all__ = ["figures_of", "section"]
