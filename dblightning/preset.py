"""A preset: one preference with everything that makes its images again, as a small YAML file. Imports no torch.

    preset = Preset.read("warm.yaml")
    pipe = preset.pipeline()
    image = pipe("A red circle.", **preset.call()).images[0]

The studio, the service, the preference search and your own script read and write the same file.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from dblightning.miniature import EMBEDDED
from dblightning.weights import Weights, WeightSchedule, check_kl_scale, check_weights

if TYPE_CHECKING:
    from dblightning.pipeline import DiffusionBlendPipeline


@dataclass(frozen=True)
class Preset:
    """A preference and the settings of its images; a field is the YAML's key and, where there is one, the call's word.

    Attributes:
        weights: adapter → weight, each ≥ 0, sum 1; or a list of such, w(t): knots equally far apart from the first
            denoising step to the last, with straight lines between them. None where the method takes none ("base").
        kl_scale: λ ≥ 0.
        method: a method's name or a dotted path, as the pipeline takes it.
        num_inference_steps: denoising steps, at least 1.
        guidance_scale: classifier-free guidance, at least 0; 1 is off, None the model's own.
        eta: DDIM's η in [0, 1]; None is the pipeline's choice.
        seed: of the noise, 0 … 2⁶³ − 1; None draws one anew each time.
        base: folder, hub id or "miniature".
        adapters: name → folder or file; None takes those that come with the base.
        method_options: further arguments of the method's class.
        note: where it comes from, for people.

    Raises:
        TypeError, ValueError: a value that cannot be, in one sentence.
    """

    weights: Weights | Sequence[Weights] | None = None
    kl_scale: float = 1.0
    method: str = "db-mpa"
    num_inference_steps: int = 20
    guidance_scale: float | None = None
    eta: float | None = None
    seed: int | None = None
    base: str = "miniature"
    adapters: Mapping[str, str] | None = None
    method_options: Mapping[str, Any] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen
        if self.weights is not None:
            names = None if self.adapters is None else list(self.adapters)
            set_field(self, "weights", _weights(self.weights, names))
        if self.adapters is not None:
            set_field(self, "adapters", {str(name): str(path) for name, path in self.adapters.items()})
        check_kl_scale(_number("kl_scale", self.kl_scale))
        _within("guidance_scale", self.guidance_scale, 0, 100)
        _within("eta", self.eta, 0, 1)
        _whole("num_inference_steps", self.num_inference_steps, 1, 1000)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.method, str) or not self.method:
            raise TypeError(f"method must be a name such as db-mpa, got {self.method!r}")

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_yaml(cls, text: str, source: str = "the preset") -> Self:
        """The preset of a YAML text.

        Args:
            text: a mapping of the fields' names; what is left out has its default.
            source: what messages call the text.

        Raises:
            ValueError: not YAML, an unknown key, or a value that cannot be.
        """
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(content, source)

    @classmethod
    def from_dict(cls, content: Any, source: str = "the preset") -> Self:
        """The preset of a mapping of the fields' names.

        Raises:
            ValueError: no mapping, an unknown key, or a value that cannot be.
        """
        known = [each.name for each in fields(cls)]
        if not isinstance(content, Mapping):
            raise ValueError(f"{source} must be a mapping of {', '.join(known)}, got {content!r}")
        unknown = [key for key in content if key not in known]
        if unknown:
            raise ValueError(f"{source} has no key {unknown[0]!r}; the keys are {', '.join(known)}")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The preset of a file; adapters' relative paths in it are relative to the file's folder where they lie there.

        Raises:
            FileNotFoundError: no such file. ValueError: see :meth:`from_yaml`.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no preset file {path}")
        preset = cls.from_yaml(path.read_text(encoding="utf-8"), str(path))
        if preset.adapters is None:
            return preset
        beside = {name: path.parent / each for name, each in preset.adapters.items()}
        found = {name: str(beside[name]) if beside[name].exists() else each for name, each in preset.adapters.items()}
        return preset.replaced(adapters=found)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values, without those that are None or empty."""
        return {
            each.name: _plain(value) for each in fields(self) if (value := getattr(self, each.name)) not in (None, "")
        }

    def to_yaml(self) -> str:
        """Its YAML, keys in the order of the fields; :meth:`from_yaml` gives an equal preset."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def write(self, path: str | Path) -> Path:
        """Write its YAML; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")
        return path

    def replaced(self, **changes: Any) -> Self:
        """The same preset with other values of some fields."""
        return type(self)(**{each.name: getattr(self, each.name) for each in fields(self)} | changes)

    # ── use ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def pipeline(self, **options: Any) -> DiffusionBlendPipeline:
        """Load base and adapters; ``options`` are those of ``DiffusionBlendPipeline.from_pretrained``.

        Raises:
            FileNotFoundError, ValueError: see there.
        """
        from dblightning.pipeline import DiffusionBlendPipeline

        return DiffusionBlendPipeline.from_pretrained(self.base, adapters=self.adapters, **options)

    def call(self, images: int = 1, generator: bool = True) -> dict[str, Any]:
        """Keyword arguments of a pipeline's call.

        Args:
            images: number of images of the call; with a seed each gets a generator of its own, seed, seed + 1, ….
            generator: whether to make generators (torch); False leaves the noise to the caller.

        Returns:
            weights, kl_scale, method, num_inference_steps, guidance_scale, eta, and where there is any, generator and
            method_options.
        """
        given: dict[str, Any] = {
            "weights": self.weight_schedule(),
            "kl_scale": self.kl_scale,
            "method": self.method,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
        }
        if self.method_options:
            given["method_options"] = dict(self.method_options)
        if generator and self.seed is not None:
            import torch

            given["generator"] = [torch.Generator().manual_seed(self.seed + i) for i in range(images)]
        return given

    def weight_schedule(self) -> Weights | WeightSchedule | None:
        """The weights as the pipeline takes them: a mapping, a function of the step for knots, None for none."""
        if self.weights is None or isinstance(self.weights, Mapping):
            return self.weights
        return interpolated(self.weights) if len(self.weights) > 1 else self.weights[0]


def adapter_names(base: str, adapters: Mapping[str, str] | None = None) -> list[str]:
    """Names of the adapters that a pipeline of this base and these adapters has, without loading it."""
    return list(adapters_of(base) if adapters is None else adapters)


def adapters_of(base: str | Path) -> dict[str, Path]:
    """Name → folder of the adapters that a base brings: an embedded pipeline's, or a saved one's; {} for others."""
    if str(base) in EMBEDDED:
        return EMBEDDED[str(base)].adapters()
    index = Path(base).expanduser() / "dblightning.json"
    names = json.loads(index.read_text(encoding="utf-8"))["adapters"] if index.is_file() else []
    return {name: index.parent / "adapters" / name for name in names}


def even_preset(base: str = "miniature", adapters: Mapping[str, str] | None = None) -> Preset:
    """Equal weights of the first two adapters, where there are any; where nobody has a preference yet."""
    names = adapter_names(base, adapters)[:2]
    return Preset(
        weights={name: 1 / len(names) for name in names} if names else None,
        method="db-mpa" if names else "base",
        # what the miniatures' adapters were trained and measured at
        guidance_scale=3.0 if base in EMBEDDED else None,
        base=base,
        adapters=adapters,
    )


def interpolated(knots: Sequence[Weights]) -> WeightSchedule:
    """w(t) through knots: a function (step_index, num_steps) → weights, straight between neighbouring knots.

    >>> schedule = interpolated([{"a": 1.0}, {"a": 0.5, "b": 0.5}, {"b": 1.0}])
    >>> [schedule(step, 5) for step in (0, 1, 4)]
    [{'a': 1.0, 'b': 0.0}, {'a': 0.75, 'b': 0.25}, {'a': 0.0, 'b': 1.0}]

    Args:
        knots: at least two, equally far apart from the first step to the last; each sums to 1, so every step does.
    """
    names = list(dict.fromkeys(name for knot in knots for name in knot))

    def weights(step_index: int, num_steps: int) -> dict[str, float]:
        place = step_index / max(num_steps - 1, 1) * (len(knots) - 1)
        left = min(int(place), len(knots) - 2)
        share = place - left
        return {n: (1 - share) * knots[left].get(n, 0.0) + share * knots[left + 1].get(n, 0.0) for n in names}

    return weights


def _weights(given: Any, names: Sequence[str] | None) -> dict[str, float] | list[dict[str, float]]:
    """Checked copies; ``names`` None takes the weights' own."""
    if isinstance(given, Mapping):
        return check_weights(given, list(given) if names is None else names, kind="preset's adapters")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise TypeError(f"weights must map names to numbers, or be a list of such mappings, got {given!r}")
    if not all(isinstance(knot, Mapping) for knot in given):
        raise TypeError(f"each knot of weights must map names to numbers, got {given!r}")
    return [check_weights(knot, list(knot) if names is None else names, kind="preset's adapters") for knot in given]


def _number(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _within(name: str, value: Any, least: float, most: float) -> None:
    if value is not None and not (math.isfinite(_number(name, value)) and least <= value <= most):
        raise ValueError(f"{name} must lie in [{least}, {most}], got {value!r}")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
