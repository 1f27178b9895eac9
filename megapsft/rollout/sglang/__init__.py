"""SGLang servers as an engine: started and watched over, or given by their urls."""

from megapsft.rollout.sglang.engine import SGLang

__all__ = ["SGLang"]
