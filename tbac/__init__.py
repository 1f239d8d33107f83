"""Ladder-side diffusion tuning: a frozen multimodal LLM conditions a diffusion transformer block by block."""

__version__ = "0.1.0"
