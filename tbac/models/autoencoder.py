"""Images to scaled latents and back, with a frozen `AutoencoderDC`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from tbac.models.locks import CallLock, one_at_a_time
from tbac.models.weights import WeightFiles


@dataclass(frozen=True)
class PartReader:
    """Reads `encoder` or `decoder` from a folder's files when it is called with that name.

    Attributes:
        files: of the folder.
        dtype: type that the tensors get.
    """

    files: WeightFiles
    dtype: torch.dtype

    def __call__(self, part: str) -> dict[str, Tensor]:
        read = self.files.read(lambda name: name.startswith(f"{part}."))
        return {name: tensor.to(self.dtype) for name, tensor in read.items()}


class FrozenAutoencoder(nn.Module):
    """A deep-compression autoencoder that never trains.

    Args:
        model: the autoencoder; latents are multiplied by its config's `scaling_factor`. A half of it (encoder or
            decoder) that is on the meta device is read when it is first used.
        read: `encoder` or `decoder` -> its tensors by their names in `model`; needed with a model on the meta device.
    """

    def __init__(self, model: AutoencoderDC, read: Callable[[str], dict[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self._read = read
        self.lock = CallLock()

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "FrozenAutoencoder":
        """Open a folder with `config.json` and weights; encoder and decoder are each read on first use.

        Training on cached latents never reads the encoder, and nothing but sampling reads the decoder.

        Raises:
            ValueError: when the weights aren't those of the config, by name.
        """
        files = WeightFiles(folder)
        with init_empty_weights(include_buffers=False):
            model = AutoencoderDC.from_config(AutoencoderDC.load_config(folder))
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        wrong = sorted(set(expected.items()) ^ set(files.read_shapes().items()))
        if wrong:
            raise ValueError(f"{folder}: the autoencoder's weights don't fit its config, such as {wrong[0][0]}")

        return cls(model, PartReader(files, dtype))

    def train(self, mode: bool = True) -> "FrozenAutoencoder":
        """Stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the tensors that have been read; the others get device and type when they are read."""
        return super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)

    @property
    def compression(self) -> int:
        """Pixels per latent along one axis."""
        return 2 ** (len(self.model.config.encoder_block_out_channels) - 1)

    @one_at_a_time
    def load_part(self, name: str, device: torch.device | str = "cpu") -> nn.Module:
        """Return `encoder` or `decoder`, and read its weights first if that hasn't been done."""
        part = getattr(self.model, name)
        if self._read is not None and next(part.parameters()).is_meta:
            with torch.inference_mode(False):  # a model that trains later reads these too
                tensors = {k.removeprefix(f"{name}."): v.to(device) for k, v in self._read(name).items()}
                part.load_state_dict(tensors, assign=True)
                part.requires_grad_(False)
        return part

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels as scaled latents (batch, channel, height / compression, width / compression).

        Args:
            pixels: (batch, 3, height, width) in [-1, 1]; or uint8 in [0, 255].
        """
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
        weight = next(self.load_part("encoder", pixels.device).parameters())
        return self.model.encode(pixels.to(weight.dtype)).latent * self.model.config.scaling_factor

    @apply_forward_hook
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to pixels (batch, 3, height, width), clamped to [-1, 1]."""
        weight = next(self.load_part("decoder", latents.device).parameters())
        pixels = self.model.decode(latents.to(weight.dtype) / self.model.config.scaling_factor).sample
        return pixels.float().clamp(-1, 1)
