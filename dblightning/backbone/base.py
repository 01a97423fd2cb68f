"""The interface of a denoiser with adapters, and what it is conditioned on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from dblightning.adapters import AdapterBank, Gating

#: height and width of an image in pixels
Size = tuple[int, int]
#: gates of a call's rows: whole, a gate vector per row, or None for the base model
Gates: TypeAlias = Gating | Tensor | None
#: what a model's output is: ε, v = √ᾱ ε − √(1−ᾱ) x₀, x₀, or the velocity ε − x₀ of a flow
Prediction = Literal["epsilon", "v_prediction", "sample", "velocity"]


def one_after_the_other(first: Tensor, second: Tensor) -> Tensor:
    """Both passes' rows, (2R, …)."""
    return torch.cat([first, second])


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Both passes of each row, (2R, …), so that the rows of a gate vector stay together."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


class Conditioning(NamedTuple):
    """Conditioning of the denoiser, for B images."""

    prompt_embeds: Tensor  # (B, L, D) text encoder output
    pooled: Tensor  # (B, P) one vector per prompt: the model's pooled embedding, else the end-of-text state
    negative_prompt_embeds: Tensor  # (B, L, D)
    negative_pooled: Tensor  # (B, P)
    #: the images' height and width in pixels; None: the backbone's own
    size: Size | None = None
    #: further inputs of the denoiser, (B, …) each, by the family's names: SDXL's ``time_ids``
    added: Mapping[str, Tensor] | None = None
    negative_added: Mapping[str, Tensor] | None = None  # of guidance's unconditional pass; None: ``added``
    guidance_rescale: float = 0.0  # φ in [0, 1] of Lin et al. 2023, eq. (16)
    lora_scale: float = 1.0  # scales every adapter's ΔW
    attention_kwargs: Mapping[str, Any] | None = None  # handed to the attention processors

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of rows ``index``, int64 (R,)."""
        return self._each(lambda part: part[index.to(part.device)])

    def to(self, dtype: torch.dtype) -> Conditioning:
        """The same in another precision."""
        return self._each(lambda part: part.to(dtype))

    def guided(self, both: Callable[[Tensor, Tensor], Tensor] = one_after_the_other) -> Conditioning:
        """Both passes of classifier-free guidance in 2B rows.

        Args:
            both: makes the 2B rows of the unconditional pass's B and the conditional one's.
        """
        added = self.added and {
            name: both((self.negative_added or self.added)[name], part) for name, part in self.added.items()
        }
        return self._replace(
            prompt_embeds=both(self.negative_prompt_embeds, self.prompt_embeds),
            pooled=both(self.negative_pooled, self.pooled),
            added=added,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        changed: dict[str, Any] = {
            name: change(part) for name, part in self._asdict().items() if isinstance(part, Tensor)
        }
        for name, parts in (("added", self.added), ("negative_added", self.negative_added)):
            changed[name] = None if parts is None else {key: change(part) for key, part in parts.items()}
        return self._replace(**changed)


class Backbone(nn.Module, ABC):
    """A frozen denoiser with adapters. Latents are float32 (B, C, h, w); images float (B, 3, H, W) in [0, 1]."""

    adapters: AdapterBank
    #: rows the denoiser has run since the count was last set to 0; guidance's second pass is not counted apart
    rows_run: int = 0

    @property
    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule, as in a diffusers scheduler's config."""

    @property
    def prediction(self) -> Prediction:
        """The kind of output of :meth:`denoise`.

        Raises:
            ValueError: a ``prediction_type`` of no known kind.
        """
        return prediction_of(self.scheduler_config)

    def schedule_options(self, num_inference_steps: int | None, size: Size | None = None) -> dict[str, Any]:
        """Further keywords of ``solvers.make_solver``: a flow's σ's depend on the images' size (None: the backbone's).

        Raises:
            ValueError: a size that the schedule was not made for.
        """
        return {}

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of the backbone's own size."""

    def latent_shape_of(self, size: Size | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``size``; None is the backbone's own.

        Raises:
            ValueError: a size that this backbone does not make.
        """
        if size is not None:
            raise ValueError(f"a {type(self).__name__} makes images of one size, got {size}")
        return self.latent_shape

    @property
    @abstractmethod
    def pooled_dim(self) -> int:
        """P, the size of ``Conditioning.pooled``."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None = None) -> Conditioning:
        """Conditioning of B prompts; each text is encoded once and cached.

        ``negative_prompt`` None means none given: the empty text, or zeros where the pipeline says so (SDXL).
        """

    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        gates: Gates = None,
    ) -> Tensor:
        """Model output of R rows with guidance applied.

        Args:
            latents: (R, C, h, w), float32.
            timesteps: scheduler timesteps, int64 (R,).
            conditioning: R rows.
            guidance_scale: classifier-free guidance; 1 turns it off (and halves the cost).
            gates: a :class:`Gating` of R rows; (R, m) alone, a gate vector per row; None is the base model.

        Returns:
            (R, C, h, w), float32; see :attr:`prediction`.
        """
        return self._denoise(latents, timesteps, conditioning, guidance_scale, Gating.of(gates))

    @abstractmethod
    def _denoise(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gating: Gating
    ) -> Tensor:
        """The computation of :meth:`denoise`, its gates in one form."""

    #: whether guidance is affine in the two passes' predictions, so that blending before or after it is the same
    affine_guidance: bool = True

    def passes(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float, gates: Gates = None
    ) -> Tensor:
        """The unconditional and the conditional prediction of R rows before guidance, (R, 2, C, h, w), float32.

        Of a backbone whose guidance is not affine; arguments as of :meth:`denoise`.
        """
        raise NotImplementedError(f"the guidance of a {type(self).__name__} is applied by denoise")

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float, conditioning: Conditioning) -> Tensor:
        """Both passes of :meth:`passes` as one prediction (R, C, h, w), float32."""
        raise NotImplementedError(f"the guidance of a {type(self).__name__} is applied by denoise")

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32, differentiable."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Backbone:
        """Always evaluation mode: the frozen model has no dropout to switch on."""
        return super().train(False)


def prediction_of(scheduler_config: Mapping[str, Any]) -> Prediction:
    """The kind of output a model predicts, as its diffusers scheduler's config says."""
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in get_args(Prediction):
        raise ValueError(f"prediction_type must be one of {get_args(Prediction)}, got {kind!r}")
    return cast(Prediction, kind)
