"""What Megatron asks of Transformer Engine, in plain torch and on a CPU, for one rank: a stand-in for tests.

Names and shapes of parameters, keyword arguments, states and the shapes that FP8 refuses are those of Transformer Engine (read in
its modules); products in FP8 are rounded to float8 and multiplied in float32. There are neither its kernels nor its speed, and
what it computes otherwise is for tests/gpu on a GPU to show.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"  # as much of the interface as is here
__all__ = ["common", "pytorch"]
