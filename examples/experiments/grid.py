"""What is to be run, from a TOML file: comparisons, and the trials that each of them asks for.

A comparison trains its methods on one task with one encoder. Methods meet at equal budgets: of steps, of documents
encoded, of seconds. Learning rate and first scale are tuned for each method and each budget, on validation queries, by
the first seed; the test queries are asked once for each budget and seed, by the setting that won.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tomllib

from examples.experiments.encoders import ENCODERS
from examples.experiments.keys import key_of
from examples.experiments.methods import Method
from examples.experiments.tasks import Source
from negcache_fn import StepOptions

__all__ = ["BUDGETS", "Comparison", "GradientStudy", "Grid", "Lexical", "Setting", "Trial", "read_grid"]

BUDGETS = ("steps", "documents", "seconds")


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    rate: float
    """Times the learning rates of the encoder."""
    scale: float
    """At first; it is learnt."""


@dataclass(frozen=True)
class Trial:
    """One training run: a function of its fields."""

    source: Source
    encoder: str
    method: Method
    setting: Setting
    seed: int
    budgets: dict[str, float]
    """Training stops when the last of them is used up."""
    test_at: tuple[str, ...]
    """The budgets at whose end the test queries are asked; the validation queries are at all."""
    decay: bool = False
    """Whether learning rates fall linearly, to nothing where the (one) budget is used up."""

    @property
    def key(self) -> str:
        """The same for the same trial, whatever comparison asks for it."""
        return key_of(self)


@dataclass(frozen=True)
class Lexical:
    """Search by tf-idf, where nothing is learnt."""

    source: Source

    @property
    def key(self) -> str:
        """The same for the same source."""
        return key_of(self)


@dataclass(frozen=True)
class Comparison:
    """Methods side by side."""

    name: str
    source: Source
    encoder: str
    methods: tuple[Method, ...]
    budgets: dict[str, float]
    settings: tuple[Setting, ...]
    decay: bool
    """Whether learning rates fall to nothing; each budget has trials of its own then."""
    seeds: int
    against: tuple[str, ...]
    """The methods that all are compared with, seed by seed; a gap that is closed begins at the first."""
    picture: tuple[str, ...]
    """The methods that its pictures show."""

    @property
    def lexical(self) -> Lexical:
        """What all have to beat."""
        return Lexical(self.source)

    def tuning(self) -> list[Trial]:
        """Every setting of every method; with one setting there is nothing to tune."""
        if len(self.settings) == 1:
            return []
        return [
            self._trial(method, setting, 0, budgets)
            for method in self.methods
            for setting in self.settings
            for budgets in self._together(self.budgets_of(method))
        ]

    def chosen(self, method: Method, found: dict[str, dict[str, Any]]) -> dict[str, Setting]:
        """The setting of best validation MRR@10 at each budget that the method was tuned for."""
        if len(self.settings) == 1:
            return dict.fromkeys(self.budgets_of(method), self.settings[0])
        chosen: dict[str, Setting] = {}
        for budgets in self._together(self.budgets_of(method)):
            at = {setting: found[self._trial(method, setting, 0, budgets).key]["at"] for setting in self.settings}
            for budget in budgets:
                chosen[budget] = max(self.settings, key=lambda setting: at[setting][budget]["validation"]["mrr@10"])
        return chosen

    def final(self, method: Method, found: dict[str, dict[str, Any]]) -> dict[tuple[str, int], Trial]:
        """By budget and seed: the trials whose test figures count. Equal settings share a trial."""
        chosen = self.chosen(method, found)
        trials: dict[tuple[str, int], Trial] = {}
        for setting in self.settings:
            for budgets in self._together([budget for budget, other in chosen.items() if other == setting]):
                for seed in range(self.seeds):
                    trial = self._trial(method, setting, seed, budgets, tested=True)
                    trials.update({(budget, seed): trial for budget in budgets})
        return trials

    def budgets_of(self, method: Method) -> list[str]:
        """All; the exhaustive softmax, the limit at equal steps, would use up the others before it began."""
        return ["steps"] if method.loss == "exhaustive" else list(self.budgets)

    def _together(self, budgets: list[str]) -> list[tuple[str, ...]]:
        """The budgets that one trial can serve."""
        if self.decay:
            return [(budget,) for budget in budgets]
        return [tuple(budgets)] if budgets else []

    def _trial(
        self, method: Method, setting: Setting, seed: int, budgets: tuple[str, ...], *, tested: bool = False
    ) -> Trial:
        return Trial(
            source=self.source,
            encoder=self.encoder,
            method=method,
            setting=setting,
            seed=seed,
            budgets={name: self.budgets[name] for name in budgets},
            test_at=budgets if tested else (),
            decay=self.decay,
        )


@dataclass(frozen=True)
class GradientStudy:
    """How far the gradients of methods are from the exact one, on the way of one run."""

    name: str
    source: Source
    encoder: str
    trained_by: Method
    setting: Setting
    steps: tuple[int, ...]
    """When the run is stopped."""
    methods: tuple[Method, ...]
    batches: int
    replicates: int
    """Gradients of each method for a batch."""
    seed: int = 0

    @property
    def key(self) -> str:
        """The same for the same study."""
        return key_of(self)


@dataclass(frozen=True)
class Grid:
    """All that is to be run, in this order."""

    comparisons: tuple[Comparison, ...]
    gradients: tuple[GradientStudy, ...]


def read_grid(file: Path, *, beir: Path | None = None) -> Grid:
    """The grid of a file; every comparison on the folder ``beir`` instead of its own task, if one is given.

    Raises:
        ValueError: an unknown key or name, with the file.
    """
    with file.open("rb") as opened:
        written = tomllib.load(opened)
    try:
        sources = {name: _made(name, Source, {"name": name, **given}) for name, given in written["tasks"].items()}
        methods = {name: _method(name, given) for name, given in written["methods"].items()}
        return Grid(
            tuple(_comparison(name, given, sources, methods, beir) for name, given in written["comparisons"].items()),
            tuple(_study(name, given, sources, methods, beir) for name, given in written.get("gradients", {}).items()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _method(name: str, given: dict[str, Any]) -> Method:
    options = _made(name, StepOptions, given.get("options", {}))
    return _made(name, Method, {"name": name, **given, "options": options})


def _comparison(
    name: str, given: dict[str, Any], sources: dict[str, Source], methods: dict[str, Method], beir: Path | None
) -> Comparison:
    used = _named(name, given, methods)
    if missing := set(given["against"]) - set(given["methods"]):
        raise ValueError(f"{name} is against {sorted(missing)}; expected some of its methods {given['methods']}")
    return Comparison(
        name=name,
        source=_source(given, sources, beir),
        encoder=given["encoder"],
        methods=used,
        budgets={budget: given[budget] for budget in BUDGETS if budget in given},
        settings=tuple(Setting(rate, scale) for rate in given["rates"] for scale in given["scales"]),
        decay=given.get("decay", False),
        seeds=given["seeds"],
        against=tuple(given["against"]),
        picture=tuple(given.get("picture", given["methods"])),
    )


def _study(
    name: str, given: dict[str, Any], sources: dict[str, Source], methods: dict[str, Method], beir: Path | None
) -> GradientStudy:
    used = _named(name, given, methods)
    return GradientStudy(
        name=name,
        source=_source(given, sources, beir),
        encoder=given["encoder"],
        trained_by=methods[given["trained_by"]],
        setting=Setting(given["rate"], given["scale"]),
        steps=tuple(given["steps"]),
        methods=used,
        batches=given["batches"],
        replicates=given["replicates"],
    )


def _named(name: str, given: dict[str, Any], methods: dict[str, Method]) -> tuple[Method, ...]:
    unknown = set(given["methods"]) - set(methods)
    if unknown:
        raise ValueError(f"{name} names the methods {sorted(unknown)}; expected some of {sorted(methods)}")
    if given["encoder"] not in ENCODERS:
        raise ValueError(f"{name} has encoder {given['encoder']!r}; expected one of {sorted(ENCODERS)}")
    return tuple(methods[method] for method in given["methods"])


def _source(given: dict[str, Any], sources: dict[str, Source], beir: Path | None) -> Source:
    return sources[given["task"]] if beir is None else Source(beir.name, str(beir.resolve()))


def _made(name: str, kind: Any, given: dict[str, Any]) -> Any:
    unknown = set(given) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{name} has the keys {sorted(unknown)}, which a {kind.__name__} has not")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
