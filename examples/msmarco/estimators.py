"""The estimators of a run, as the options of its steps."""

from __future__ import annotations

from examples.msmarco.options import Options
from negcache_fn import StepOptions

__all__ = ["step_options"]


def step_options(options: Options) -> StepOptions:
    """The options of every step of a run: its estimator, with its number of draws."""
    if options.estimator == "paper":
        return StepOptions(
            draws_per_query=options.draws_per_query, share_draws=False, staleness_correction="none", in_batch=False
        )
    return StepOptions(draws_per_query=options.draws_per_query)
