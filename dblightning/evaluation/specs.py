"""Blends of an evaluation: one method with one preference (``BlendSpec``), or a sweep of them (``BlendSweep``)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from dblightning.blending import DBKLA, DBMPALS, METHODS, Base, Blend, Single, resolve_blend
from dblightning.draws import DEFAULT_DRAWS
from dblightning.methods import load_method
from dblightning.sampling import Steering
from dblightning.settings import Number, check_settings
from dblightning.steering import STEERING
from dblightning.weights import check_weights

#: a method of this module alone: an adapter trained on the preference itself, the oracle of the paper's section 5
MORL = "morl"


@dataclass
class BlendSpec:
    """One method with its preference.

    Args:
        method: base, single, db-mpa, db-kla, db-mpa-ls, rewarded-soup, rewarded-soup-factors, code, rgg, best-of-n or
            morl; or the dotted path of a ``Blend`` or ``Steering`` class of your own, such as my_package.MyBlend.
        weights: reward → weight, each ≥ 0, sum 1; none for base. Adapters carry the names of the rewards they were
            trained on. For morl it is the preference its adapter was trained for.
        kl_scale: λ of DB-KLA; 1 is plain. For morl: the λ its adapter was retrained for, with KL weight α/λ.
        ls_schedule: "rotation", "golden", "iid" (the paper's) or "systematic", for db-mpa-ls.
        adapter: the adapter that runs, for morl, single and db-kla, where its name is not the reward's.
        options: further arguments of the method's class, such as ``candidates`` of code.
    """

    method: str = "db-mpa"
    weights: dict[str, float] = field(default_factory=dict)
    kl_scale: float = 1.0
    ls_schedule: str = DEFAULT_DRAWS
    adapter: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    #: whether the label has twelve digits, not six, and an oracle's adapter; :func:`expand` sets it where needed
    exact_label: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def steers(self) -> bool:
        """Whether the method steers the base model's steps."""
        return issubclass(self._kind, Steering)

    @property
    def _kind(self) -> Any:
        """The method's class."""
        known: dict[str, Any] = {**METHODS, **STEERING, MORL: Single}
        return load_method(self.method, known, Blend, Steering)

    @property
    def draws(self) -> bool:
        """Whether it draws an adapter at each step, by ``ls_schedule``: db-mpa-ls and classes derived from it."""
        return issubclass(self._kind, DBMPALS)

    @property
    def _drawn_by(self) -> str:
        """``ls_schedule`` where it is read; else what every row of a score table had at first."""
        return self.ls_schedule if self.draws else "iid"

    @property
    def adapters(self) -> list[str]:
        """The adapters it runs."""
        if self.steers or self.method == "base":
            return []
        if self.adapter is not None:
            return [self.adapter]
        return [name for name, weight in self.weights.items() if weight]

    def blend(self) -> Blend:
        """The blend it names.

        Raises:
            ValueError: method, weights, adapter and kl_scale that do not fit each other.
        """
        if self.adapter is not None and not issubclass(self._kind, (Single, DBKLA)):
            raise ValueError(f"method {self.method!r} takes its adapters from the weights; leave adapter out")
        if self.steers:
            return Base()
        if self.method == MORL:
            if self.adapter is None:
                raise ValueError(f"morl needs adapter: the one trained on {self.weights or 'its weights'}")
            if self.options:
                raise ValueError(f"morl has no options, got {self.options}; leave them out")
            check_weights(self.weights, list(self.weights))
            check_settings({"kl_scale": self.kl_scale}, {"kl_scale": Number(least=0)})
            return Single(self.adapter)
        # without the zeros: an adapter of weight 0 is not run, so it need not be there
        used = {name: weight for name, weight in self.weights.items() if weight}
        weights = used if self.adapter is None else {self.adapter: 1.0}
        options = dict(self.options)
        if isinstance(strengths := options.get("strengths"), dict):
            # of an adapter with weight 0, which need not be there, it says nothing
            options["strengths"] = {name: strengths[name] for name in strengths if self.weights.get(name) != 0}
        return resolve_blend(self.method, weights or None, self.kl_scale, ls_schedule=self.ls_schedule, options=options)

    @property
    def label(self) -> str:
        """A short name, usable as a folder's: db-mpa_aesthetic-0.3_alignment-0.7."""
        number = ("{:.12g}" if self.exact_label else "{:g}").format
        parts = [self.method]
        parts += [f"{name}-{number(float(weight))}" for name, weight in sorted(self.weights.items()) if weight]
        parts += [self.adapter] if self.adapter is not None and (self.method != MORL or self.exact_label) else []
        parts += [f"lambda-{number(float(self.kl_scale))}"] if self.kl_scale != 1 else []
        parts += [self._drawn_by] if self._drawn_by != "iid" else []
        parts += [f"{name}-{value}" for name, value in sorted(self.options.items())]
        return re.sub(r"[/\\]", "-", "_".join(parts))  # one folder, whatever the names and options hold

    @property
    def key(self) -> str:
        """Identity of its images among all blends': see :func:`blend_key`."""
        return blend_key(self.columns())

    def columns(self) -> dict[str, Any]:
        """Its columns of the score table."""
        return {
            "blend": self.label,
            "method": self.method,
            "kl_scale": self.kl_scale,
            "ls_schedule": self._drawn_by,
            "adapter": self.adapter,
            "options": json.dumps(self.options, sort_keys=True),
            **{f"weight/{name}": weight for name, weight in self.weights.items()},
        }


def blend_key(columns: Mapping[str, Any]) -> str:
    """Everything a blend's images depend on beside the adapters' weights, exactly: equal keys, equal images.

    A label is for people and rounds; this is what rows are found again by.

    Args:
        columns: :meth:`BlendSpec.columns`, or a row of a score table of any version.
    """
    weights = [
        (name.removeprefix("weight/"), float(weight))
        for name, weight in columns.items()
        if name.startswith("weight/") and weight
    ]
    method, options = columns["method"], json.loads(columns.get("options") or "{}")
    # DB-MPA-LS draws adapters in the order of the weights, and a method of somebody else's may do what it likes
    unordered = method in (*METHODS, *STEERING, MORL) and method != "db-mpa-ls"
    ordered = sorted(weights) if unordered else weights
    scale, schedule = float(columns.get("kl_scale", 1.0)), columns.get("ls_schedule", "iid")
    return json.dumps([method, ordered, scale, schedule, columns.get("adapter"), options], sort_keys=True)


@dataclass
class BlendSweep:
    """Every method × preference × λ of some lists.

    Args:
        methods: see ``BlendSpec.method``.
        names: the rewards the weights are for.
        weights: for two names a number w each, the first name's weight, 1 − w the second's; else one list of weights
            each, as long as ``names``. For one name [1].
        kl_scales: λ values.
        ls_schedules: for db-mpa-ls; other methods take part once.
        adapter: the adapter of each point, for morl, single and db-kla; "{w}" stands for the first name's weight and
            "{kl_scale}" for λ, so that "morl_{w}" is morl_0_2 at w = 0.2 (adapters' names hold no dots).
        options: see ``BlendSpec.options``.
    """

    methods: list[str]
    names: list[str]
    weights: list[float | list[float]]
    kl_scales: list[float] = field(default_factory=lambda: [1.0])
    ls_schedules: list[str] = field(default_factory=lambda: [DEFAULT_DRAWS])
    adapter: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def specs(self) -> list[BlendSpec]:
        """Its points, method by method.

        Raises:
            ValueError: an empty list, weights that do not fit the names, or a placeholder that nothing is put in for.
        """
        for name in ("methods", "names", "weights", "kl_scales", "ls_schedules"):
            if not getattr(self, name):
                raise ValueError(f"a sweep needs at least one entry in {name}, got {getattr(self, name)!r}")
        points = [self._point(each) for each in self.weights]
        found = []
        for method in self.methods:
            for schedule in self.ls_schedules if BlendSpec(method).draws else [DEFAULT_DRAWS]:
                for kl_scale in self.kl_scales:
                    for weights in points:
                        adapter = self._adapter(weights, kl_scale)
                        found.append(BlendSpec(method, weights, kl_scale, schedule, adapter, dict(self.options)))
        return found

    def _adapter(self, weights: dict[str, float], kl_scale: float) -> str | None:
        try:
            return self.adapter and self.adapter.format(w=_name(weights[self.names[0]]), kl_scale=_name(kl_scale))
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"the adapter of a sweep may hold {{w}} and {{kl_scale}} and no other brackets, got {self.adapter!r}"
            ) from error

    def _point(self, weights: float | list[float]) -> dict[str, float]:
        if isinstance(weights, Sequence):
            values = [float(each) for each in weights]
        elif len(self.names) == 2:
            values = [float(weights), round(1 - float(weights), 12)]
        else:
            values = [float(weights)]
        if len(values) != len(self.names):
            raise ValueError(
                f"a sweep over {self.names} needs {len(self.names)} weights per point, got {weights}; "
                "only two names take one number"
            )
        return dict(zip(self.names, values, strict=True))


def _name(number: float) -> str:
    """A number as part of an adapter's name, which holds no dots."""
    return f"{number:g}".replace(".", "_")


def expand(blends: Sequence[BlendSpec], sweeps: Sequence[BlendSweep] = ()) -> list[BlendSpec]:
    """Single blends, then the sweeps' points, each once. Labels that different blends share get more digits.

    Raises:
        ValueError: nothing to run, or two different blends whose labels agree all the same.
    """
    found: dict[str, BlendSpec] = {}
    for spec in [*blends, *(each for sweep in sweeps for each in sweep.specs())]:
        found.setdefault(blend_key(dict(sorted(spec.columns().items()))), spec)
    if not found:
        raise ValueError("nothing to compare: name at least one blend, for example {method: base}, or a sweep")
    specs = list(found.values())
    labels = Counter(spec.label for spec in specs)
    specs = [_written_out(spec) if labels[spec.label] > 1 else spec for spec in specs]
    by_label: dict[str, BlendSpec] = {}
    for spec in specs:
        other = by_label.setdefault(spec.label, spec)
        if other is not spec:
            raise ValueError(
                f"two blends share the label {spec.label!r}: {other} and {spec}; rename a reward or adapter"
            )
    return specs


def _written_out(spec: BlendSpec) -> BlendSpec:
    spec = copy(spec)
    spec.exact_label = True
    return spec
