"""How much of what a datasheet promises a training step gets, by the kind of work: one table for all models and machines.

Where the numbers come from, and how far they are from published runs that they were not taken from: docs/planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass

# of the peak FLOP/s, with the norms, permutations and other small kernels that stand around them
LINEAR = 0.55  # projections of attention, dense MLPs, the output layer
ATTENTION = 0.45  # fused causal attention, forward and backward together
EXPERTS = 0.30  # grouped products of experts, with routing and permutation
# of bytes a second
HBM = 0.6
LINK = 0.8  # NVLink, network and host
IMBALANCE = 2.0  # the rank with most tokens has 1 + IMBALANCE / sqrt(experts a rank) of the mean, where nothing forces balance
EAGER_LAYER = 2e-4  # seconds that launching the kernels of a layer takes while a token at a time is sampled without CUDA graphs


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What systems do differently. The defaults are this one's; published runs name theirs."""

    fp8: bool = False  # the linear layers of the decoder
    once_per_node: bool = False  # a token for several experts of another machine crosses the network once (DeepEP, HybridEP)
    hidden_dispatch: float = 0.0  # the part of the exchange of tokens that is hidden behind computation
    forced_balance: bool = False  # every expert is given as many tokens, whatever the router says


def imbalance(experts: int, ep: int, execution: Execution) -> float:
    """Tokens of the rank that has most, over the mean; the others wait for it."""
    if ep == 1 or execution.forced_balance:
        return 1.0
    return 1 + IMBALANCE / (experts / ep) ** 0.5
