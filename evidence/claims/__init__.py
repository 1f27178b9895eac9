"""The claims, in their order. Each says beforehand what would make it hold; all are judged, whichever way they fall."""

from evidence.claims import (
    a_entropy,
    b_out_of_domain,
    c_clip,
    d_refresh,
    e_warm_up,
    f_before_rl,
    g_others,
    h_one_stage,
    i_before_dpo,
)
from evidence.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = tuple(
    module.CLAIM
    for module in (a_entropy, b_out_of_domain, c_clip, d_refresh, e_warm_up, f_before_rl, g_others, h_one_stage, i_before_dpo)
)

__all__ = ["CLAIMS", "Claim"]
