"""The adapted layers of a denoiser: indexed by adapter, and kept in step with what diffusers does to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dblightning.adapters.fit import fingerprint
from dblightning.adapters.gated import AUTOCAST_HOOK, GATED, GatedLayer, GateState, keep_float32, why_not


class AdaptedLayers:
    """The layers of a denoiser that adapters sit on.

    The model stays diffusers' own: what ``load_lora_weights``, ``delete_adapters``, ``unload_lora_weights`` and another
    bank on the same model do is followed at the next use.

    Args:
        denoiser: the frozen model; its parameters get ``requires_grad=False``.

    Raises:
        ValueError: an adapter of the model cannot be gated; the model is as it was.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.state = GateState()
        self._layers: list[GatedLayer] = []
        self._sides: dict[str, list[Tensor]] = {}  # each adapter's parameters
        self._layouts: list[tuple[tuple[int, float], ...]] = []  # the layers' distinct arrangements of adapters
        self._columns: list[tuple[int, ...]] = []  # and each one's columns of the gates
        #: multiplications of the gated layers' adapters, over those of the base layers they are on
        self.gated_share = 0.0
        self._installed: dict[str, Any] = {}  # the model's PEFT configs, as `refresh` found them
        _check_layers(_tuner_layers(denoiser))
        denoiser.requires_grad_(False)
        self._fingerprint = fingerprint(denoiser)
        self.state.names = list(self._configs())
        self.refresh()

    @property
    def unet(self) -> nn.Module:
        """The denoiser under its first name."""
        return self.denoiser

    @property
    def names(self) -> list[str]:
        """Adapters in gate order."""
        self._follow()
        return list(self.state.names)

    def layers(self) -> Iterator[GatedLayer]:
        """Every adapted layer."""
        self._follow()
        return iter(self._layers)  # kept by `refresh`: walking the modules takes milliseconds, too long for every step

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these adapters are all there are, in this order; the others wait at no cost.

        A gate vector has one entry per adapter and a gated layer computes every adapter it knows, so what is not used
        should not be there.

        Raises:
            ValueError: a name that is not loaded.
        """
        self._follow()
        for name in names:
            self._check_known(name)
        before = self.state.names
        if list(names) == before:
            yield
            return
        self._name(list(names))
        try:
            yield
        finally:
            self._name([name for name in before if name in self._configs()])

    def _name(self, names: list[str]) -> None:
        self.state.names = names
        for layer in self._layers:
            layer.index()
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the layers' distinct arrangements of adapters: one or two, as a rule."""
        arrangements = [(layer.arrangement(), layer.columns()) for layer in self._layers]
        distinct = list(dict.fromkeys(arrangements))
        self._layouts, self._columns = [each for each, _ in distinct], [each for _, each in distinct]
        for layer, arrangement in zip(self._layers, arrangements, strict=True):
            layer.layout = distinct.index(arrangement)
        shapes = [(sum(layer._ranks), layer.get_base_layer().weight.shape) for layer in self._layers]
        base = sum(shape.numel() for _, shape in shapes)
        self.gated_share = sum(rank * (shape[0] + shape[1:].numel()) for rank, shape in shapes) / max(base, 1)

    def refresh(self) -> None:
        """Re-index all layers; called after adapters were added, or the model was moved to another device.

        Raises:
            ValueError: an adapter that cannot be gated, before any layer is changed.
        """
        layers = _tuner_layers(self.denoiser)
        _check_layers(layers)
        configs = self._configs()
        scaled: dict[str, float] = {}
        for module in layers:
            if not isinstance(module, GatedLayer):
                _unhook(module)
                # same class but for `forward`: so adapters read by diffusers' own loader become gated as they are
                module.__class__ = GATED[type(module)]
            assert isinstance(module, GatedLayer)
            module.install(self.state)
            for name, scale in module.own_scaling.items():
                if module.scaling[name] != scale:
                    scaled[name] = module.scaling[name] / scale
                module.scaling[name] = scale
                keep_float32(module, name)
            # all are "active" for PEFT; the gates choose. Assigned: PEFT's own setter would make all trainable
            module._active_adapter = list(configs)
        self._layers = layers  # type: ignore[assignment]
        self._sides = {
            name: [each for layer in self._layers for each in layer.adapter_parameters(name)] for name in configs
        }
        self._installed = configs
        self._lay_out()
        if scaled:
            warnings.warn(
                "the scales given by set_adapters() are not taken over: "
                + ", ".join(f"{name!r} was at {scale:g} and is at full strength" for name, scale in scaled.items())
                + "; say the strength per call, by weights= or kl_scale=",
                stacklevel=4,
            )

    def _configs(self) -> dict[str, Any]:
        """The model's adapters as PEFT has them: name → config."""
        return dict(getattr(self.denoiser, "peft_config", None) or {})

    def _follow(self) -> None:
        """Take over what happened to the model's adapters by other means than this bank's."""
        configs = self._configs()
        same = configs.keys() == self._installed.keys() and all(
            configs[name] is self._installed[name] for name in configs
        )
        if same and (not self._layers or self._layers[0].gate_state is self.state):
            return
        gone = not configs and bool(self._installed)
        kept = [name for name in self.state.names if name in configs]
        before, self.state.names = self.state.names, kept + [name for name in configs if name not in self._installed]
        try:
            self.refresh()
        except ValueError:
            self.state.names = before
            raise
        if gone:  # the base may have been changed for good: fuse_lora(), then unload_lora_weights()
            self._fingerprint = fingerprint(self.denoiser)

    def _check_use(self, adapted: bool) -> None:
        """Raises ValueError if diffusers' own methods have set the model's adapters otherwise than the gates say."""
        self._follow()
        installed = list(self._installed)
        for layer in self._layers:
            if layer.merged_adapters:
                raise ValueError(
                    f"adapter {layer.merged_adapters[0]!r} is fused into the base weights by fuse_lora(), so even the "
                    "base model would contain it; call unfuse_lora() first"
                )
            if not adapted:
                continue
            if layer.scaling != layer.own_scaling:
                name = next(name for name in layer.scaling if layer.scaling[name] != layer.own_scaling.get(name))
                raise ValueError(
                    f"adapter {name!r} was given the scale {layer.scaling[name] / layer.own_scaling[name]:g} by "
                    "set_adapters(), which a blend would not know of; say the strength per call, by weights= or "
                    f"kl_scale=, and call set_adapters({installed}) to take the scale back"
                )
            if layer._disable_adapters:
                raise ValueError(
                    "the adapters are switched off by disable_lora(); call enable_lora(), or use method='base'"
                )
            if layer._active_adapter != installed:
                raise ValueError(
                    f"set_adapters() has chosen {layer._active_adapter}, but each call chooses adapters by weights=; "
                    f"call set_adapters({installed}) to take the choice back"
                )

    def _check_known(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"no adapter {name!r} is loaded; the names are {self.state.names}")


def _tuner_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers that PEFT has put adapters on."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _check_layers(layers: Sequence[nn.Module]) -> None:
    """Raises ValueError if a layer cannot be gated."""
    for layer in layers:
        reason = why_not(layer)
        if reason:
            raise ValueError(reason)


def _unhook(layer: nn.Module) -> None:
    """Let a layer's class decide its forward again, where diffusers' layerwise casting has put PEFT's in its place.

    That hook keeps PEFT from casting inputs; a gated layer casts none.
    """
    hooks = getattr(layer, "_diffusers_hook", None)
    if hooks is not None and "forward" in layer.__dict__:
        hooks.remove_hook(AUTOCAST_HOOK, recurse=False)
        layer.__dict__.pop("forward")
