"""What the user is told when something is not supported or not right."""

from __future__ import annotations


class Refused(ValueError):
    """Refused at the door: names the value, the rule it breaks and the remedy.

    Example:
        >>> raise Refused("tensor_model_parallel_size=3", "must divide num_attention_heads=32", "use 1, 2, 4 or 8")
        Refused: tensor_model_parallel_size=3: must divide num_attention_heads=32; use 1, 2, 4 or 8
    """

    def __init__(self, value: str, rule: str, remedy: str):
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(f"{value}: {rule}; {remedy}")

    def __reduce__(self):  # survives being sent between processes
        return type(self), (self.value, self.rule, self.remedy)


class TrainingStopped(RuntimeError):
    """The run cannot go on: too many updates in a row were skipped, or nobody is left to sample. Its checkpoints are whole."""
