"""plait: hybrid post-training that interlaces expert tokens with verified on-policy samples."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["resume", "train"]

if TYPE_CHECKING:
    from .launch.api import resume, train


def __getattr__(name: str) -> Any:
    """`plait.train` and `plait.resume`, imported on first use: `import plait` stays light."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .launch import api

    return getattr(api, name)
