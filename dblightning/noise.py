"""Noise that belongs to an image: it depends on nothing but the run's seed, the prompt, the seed and its use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def image_seed(run_seed: int, prompt_id: int, seed: int, stream: str = "noise") -> int:
    """A 63-bit generator seed for one image and one purpose.

    It depends on nothing else, so an image is the same whatever the batch, the number of devices or the method it is
    compared with (common random numbers).
    """
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ImageNoise:
    """Standard normal noise and the draws of stochastic blends, from one CPU generator per image.

    Args:
        seeds: one generator seed per image.
        device: where the noise is wanted.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        #: as diffusers' schedulers take it: one per image, one for the whole batch, or None for the global one
        self.generators: list[torch.Generator] | torch.Generator | None = [
            torch.Generator().manual_seed(seed) for seed in seeds
        ]
        # apart from the noise, so that a method that draws sees the same noise as one that does not
        self.draws = [torch.Generator().manual_seed(image_seed(seed, 0, 0, "draws")) for seed in seeds]
        self.device = torch.device(device)

    @classmethod
    def of(
        cls,
        run_seed: int,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        stream: str = "noise",
    ) -> ImageNoise:
        """Noise of the images (prompt_id, seed) of one run; ``stream`` tells its uses apart (training, evaluation)."""
        keys = zip(prompt_ids, seeds, strict=True)
        return cls([image_seed(run_seed, prompt_id, seed, stream) for prompt_id, seed in keys], device)

    def __len__(self) -> int:
        return len(self.draws)

    def __call__(self, shape: Sequence[int], copies: int = 1) -> Tensor:
        """The next noise, float32 (B · copies, *shape), an image's copies side by side."""
        assert isinstance(self.generators, list)
        size = (copies, *shape)
        noise = torch.cat([torch.randn(size, generator=generator) for generator in self.generators])
        return noise.to(self.device, non_blocking=True)


class GeneratorNoise(ImageNoise):
    """Noise as diffusers' pipelines draw it: from one generator for the whole batch, or one per image.

    Args:
        generator: one generator, a list of B, or None for torch's global one. Generators of another device work.
        batch: number of images B.
        device: where the noise is wanted.
        dtype: precision in which it is drawn; the noise itself is float32.

    Raises:
        ValueError: a list of another length than B.
    """

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        batch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        listed = isinstance(generator, Sequence)
        given = list(generator) if isinstance(generator, Sequence) else [generator]
        if listed and len(given) != batch:
            raise ValueError(f"got {len(given)} generators for {batch} images; give one, or one per image")
        self.generators = given if listed else given[0]  # type: ignore[assignment]
        self.device = torch.device(device)
        self.dtype = dtype
        # from the states, without drawing: the noise stays what it is without a method that draws
        states = [torch.get_rng_state() if each is None else each.get_state() for each in given]
        keys = [hashlib.blake2b(state.numpy().tobytes(), digest_size=8).hexdigest() for state in states]
        # an image with a generator of its own draws the same in any batch; those that share one are counted
        places = [sum(each is other for other in given[:i]) for i, each in enumerate(given)] if listed else range(batch)
        seeds = [image_seed(int(keys[i % len(keys)], 16), place, 0, "draws") for i, place in enumerate(places)]
        self.draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int], copies: int = 1) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        batch = len(self.draws)
        if copies == 1:
            size = (batch, *shape)
            noise = randn_tensor(size, generator=self.generators, device=self.device, dtype=self.dtype)
        else:
            size = (batch, copies, *shape)
            noise = randn_tensor(size, generator=self.generators, device=self.device, dtype=self.dtype).flatten(0, 1)
        return noise.float()
