"""Whether products are in FP8 just now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformer_engine.common.recipe import Recipe


class FP8GlobalStateManager:
    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Recipe | None = None, fp8_group: object = None) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def fp8_model_init(enabled: bool = True, **options: object) -> None:
    raise NotImplementedError("weights held in FP8 are not in the stand-in")
