"""Who answers prompts: options that rollout and evaluate have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megapsft.errors import Refused

if TYPE_CHECKING:
    from megapsft.config import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Who answers, and how."""

    engine: Literal["inprocess", "sglang"] = "inprocess"  # this process; or SGLang servers.
    # sglang: servers that run already, with the weights of --model; default: they are started here.
    url: tuple[str, ...] = ()
    servers: int | None = None  # sglang: how many are started here; default: 1.
    tensor_parallel_size: int | None = None  # sglang: of each server that is started here; default: 1.
    # inprocess: responses at once, which bounds the cache of keys and values; default: 64.
    max_batch_size: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights while sampling; default: as stored.
    seed: int = 0  # of the in-process engine: the same gives the same responses.
    progress: bool = True  # show a bar.

    def resolved(self) -> RolloutConfig:
        """What was said of the engine.

        Raises:
            Refused: options of the other engine, or of servers that are not started; numbers below 1.
        """
        from megapsft.config import RolloutConfig

        of_started = {"servers": self.servers, "tensor_parallel_size": self.tensor_parallel_size}
        given = {"urls": self.url or None, **of_started, "max_batch_size": self.max_batch_size}
        given = {key: value for key, value in given.items() if value is not None}
        read = {"inprocess": {"max_batch_size"}, "sglang": {"urls", *of_started}}[self.engine]
        for key, value in given.items():
            option = "--url" if key == "urls" else "--" + key.replace("_", "-")
            if key not in read:
                rule = f"is not read where --engine {self.engine}"
                raise Refused(f"{option} {value}", rule, "leave it out, or use the other engine")
            if self.url and key in of_started:
                raise Refused(f"{option} {value}", "is of servers that are started here, and --url names others", "leave one out")
            if key != "urls" and value < 1:
                raise Refused(f"{option} {value}", "must be 1 or more", "leave it out for the default")
        # weights are never updated here: the ways that need servers on this host are none
        return RolloutConfig(engine=self.engine, weight_update="disk" if self.url else "tensor", **given)

    def dtype_for(self, model: Path) -> str:
        """What was said of the weights of `model`, a folder, or how they are stored."""
        from megapsft.evaluate.engine import dtype_of

        return self.dtype or dtype_of(model)


ENGINE = EngineOptions()
