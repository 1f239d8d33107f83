"""The model: frozen MLLM, taps, ladder, denoiser, autoencoder, and UniImage that joins them.

`UniImage` is imported when it is first asked for, since its libraries take seconds, and options and tap rules need none
of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbac.models.uniimage import UniImage

__all__ = ["UniImage"]


def __getattr__(name: str) -> Any:
    if name == "UniImage":
        from tbac.models.uniimage import UniImage

        return UniImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
