"""From a condition to pictures."""

from tbac.sampling.guidance import Guidance
from tbac.sampling.pipeline import UniImageOutput, UniImagePipeline

__all__ = ["Guidance", "UniImageOutput", "UniImagePipeline"]
