"""Which runs there are to do. Learning rates are chosen from runs that are done, so more of them become known as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from evidence.measured import Measured
from evidence.methods import Method, table
from evidence.results import Outcome, Results
from evidence.runs import Spec
from evidence.sizes import Sizes

RULE = (
    "of the learning rates that are tried, the one with the best accuracy on the in-domain validation problems after the last "
    "step, with the first seed; the lower one of two that are equal"
)


@dataclass
class Plan:
    """The methods of some sizes as runs."""

    sizes: Sizes
    stored: Callable[[Spec], Measured | None]  # what came of a run, where it is done
    guess: bool = False  # take the middle learning rate where none can be chosen yet: for a first look
    methods: dict[str, Method] = field(init=False)

    def __post_init__(self) -> None:
        self.methods = table(self.sizes)

    def rates(self, name: str) -> tuple[float, ...]:
        """What is tried: the middle `sizes.rates` of the method's."""
        rates = self.methods[name].rates
        left_out = max(0, len(rates) - self.sizes.rates) // 2
        return rates[left_out : len(rates) - left_out]

    def tried(self, name: str) -> dict[float, float] | None:
        """Of each learning rate the accuracy that RULE speaks of; None as long as one is not known."""
        found = {}
        for rate in self.rates(name):
            spec = self.spec(name, self.sizes.seeds[0], rate)
            measured = spec and self.stored(spec)
            if measured is None:
                return None
            found[rate] = measured.accuracy["valid"][-1]
        return found

    def rate(self, name: str) -> float | None:
        """The learning rate by RULE, or the only one; None as long as it cannot be chosen."""
        if other := self.methods[name].rate_of:
            return self.rate(other)
        rates = self.rates(name)
        if len(rates) == 1:
            return rates[0]
        tried = self.tried(name)
        if tried is None:
            return rates[len(rates) // 2] if self.guess else None
        return max(tried, key=lambda rate: (tried[rate], -rate))

    def spec(self, name: str, seed: int, rate: float | None = None) -> Spec | None:
        """The run of a method, at its own learning rate if none is given; None as long as a rate cannot be chosen."""
        method, rate = self.methods[name], self.rate(name) if rate is None else rate
        start = self.spec(method.start, seed) if method.start else None
        if rate is None or (method.start and start is None):
            return None
        settings = (*method.set, f"train.seed={seed}", *(f"{key}={rate}" for key in method.rate_keys))
        return Spec(config=method.config, rows=method.rows, set=settings, start=start, amounts=self.sizes.amounts)

    def known(self) -> Iterator[tuple[str, Spec]]:
        """(what it is, run) of all that are known by now; the same run may come twice."""
        for name, method in self.methods.items():
            seeds = self.sizes.seeds
            tuned = () if method.rate_of else self.rates(name)
            found = [(f"{name}, rate {rate:g}", self.spec(name, seeds[0], rate)) for rate in tuned]
            found += [(f"{name}, seed {seed}", self.spec(name, seed)) for seed in seeds]
            yield from ((label, spec) for label, spec in found if spec)

    def results(self) -> Results:
        """What came of all methods, once all runs are done."""
        found = {}
        for name, method in self.methods.items():
            runs = {seed: self.stored(self.spec(name, seed)) for seed in self.sizes.seeds}
            rates = () if method.rate_of else self.rates(name)
            trials = {rate: self.stored(self.spec(name, self.sizes.seeds[0], rate)) for rate in rates}
            found[name] = Outcome(samples=method.samples, rate=self.rate(name), trials=trials, runs=runs)
        return found
