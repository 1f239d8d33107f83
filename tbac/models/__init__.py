"""The model: frozen MLLM, taps, ladder, denoiser, autoencoder, and UniImage that joins them."""

from tbac.models.uniimage import UniImage

__all__ = ["UniImage"]
