"""The metric `draw_noise` against the noise of the gradient of a linear encoder, over many draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import negcache_fn
from negcache_fn import StepOptions
from tests.support.builders import make_state, unit

SEEDS = 60  # the measured noise is then within a tenth or so of its expectation
DOCUMENTS, QUERIES, DIM = 300, 16, 8


def noise(num_draws: int, scale: float) -> tuple[float, float]:
    """Of the gradient in a matrix that all documents are multiplied by: measured, and the mean of the metric."""
    embeddings, queries, documents = (
        unit(count, DIM, seed, torch.float64) for seed, count in enumerate((DOCUMENTS, QUERIES, QUERIES))
    )
    state = make_state(embeddings, ids=torch.arange(DOCUMENTS), features=embeddings)
    gradients: list[Tensor] = []
    predicted: list[Tensor] = []
    for seed in range(SEEDS):
        change = torch.zeros(DIM, DIM, dtype=torch.float64, requires_grad=True)
        state["seed"].fill_(seed)
        out = negcache_fn.step(
            state,
            queries,
            documents,
            lambda features, change=change: features + features @ change,
            options=StepOptions(num_draws=num_draws),
            scale=scale,
            ids=torch.arange(QUERIES) + DOCUMENTS,
        )
        gradients += torch.autograd.grad(out.loss, change)
        predicted.append(out.metrics["draw_noise"])
    stacked = torch.stack(gradients).flatten(1)
    mean = stacked.mean(0)
    measured = (stacked - mean).square().sum(1).mean().sqrt() / mean.norm()
    return float(measured), float(torch.stack(predicted).mean())


@pytest.mark.parametrize("scale", [3.0, 20.0])
def test_it_is_the_noise_of_the_gradient_up_to_what_the_encoder_makes_of_it(scale: float) -> None:
    """How the documents' gradients add up depends on the encoder: the metric tells the size of the noise, no more."""
    found = [noise(num_draws, scale) for num_draws in (4, 16, 64)]
    for measured, predicted in found:
        assert predicted / 4 < measured < predicted * 2
    assert sorted(found, reverse=True) == found
    assert [predicted for _, predicted in found] == sorted((predicted for _, predicted in found), reverse=True)
