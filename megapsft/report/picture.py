"""What all pictures share: colours, and the package that draws them, which is optional."""

from __future__ import annotations

import importlib.util

from megapsft.errors import Refused

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by the colour-blind too


def need_matplotlib(wanted: str, without: str | None = None) -> None:
    """Refuse what could not be drawn, before the work that it would show.

    Args:
        wanted: what asks for a picture.
        without: what else the user may do than install it.

    Raises:
        Refused: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'megapsft[report]'" + (f", or {without}" if without else "")
        raise Refused(wanted, f"needs matplotlib ({error})", remedy) from None


def has_matplotlib() -> bool:
    """Whether pictures can be drawn, where they are drawn only if they can."""
    return importlib.util.find_spec("matplotlib") is not None


__all__ = ["LINES", "has_matplotlib", "need_matplotlib"]
