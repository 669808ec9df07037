"""Drawing tokens: the exact distribution, filters as transformers has them, impossible tokens, edge values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastgrpo.records import Sampling
from fastgrpo.rollout.loop.sampling import sample, uniforms


def _uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _transformers(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after the warpers that `generate` would run, in its order."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.double().softmax(-1)


def test_sampled_tokens_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws against softmax(logits / T), at the 0.1 % level."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    tokens, logprob = sample(logits.expand(40_000, 5), _uniform(40_000), Sampling(1, 0.8))
    expected = torch.softmax(logits / 0.8, 0)
    counts = torch.bincount(tokens, minlength=5)
    chi_square = ((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum().item()
    assert chi_square < 18.47  # 99.9 % quantile for 4 degrees of freedom
    torch.testing.assert_close(logprob.exp(), expected[tokens])


def test_every_token_gets_its_share_of_the_unit_interval() -> None:
    """Evenly spaced numbers instead of random ones: counts are exact to one, over several blocks of the vocabulary."""
    draws, vocabulary = 60_000, 300
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, _ = sample(logits.expand(draws, -1), uniform, Sampling(1))
    expected = draws * logits.double().softmax(0)
    assert ((torch.bincount(tokens, minlength=vocabulary) - expected).abs() <= 1.01).all()


@pytest.mark.parametrize(
    "filters",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"top_k": 9999}],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_filters_are_those_of_transformers(filters: dict[str, float], temperature: float) -> None:
    """Possible tokens, and log-probs that are renormalised."""
    sampling = Sampling(1, temperature, **filters)  # type: ignore[arg-type]
    logits = 2 * torch.randn(4, 500, generator=torch.Generator().manual_seed(2))
    expected = _transformers(logits, sampling)
    draws = 3000
    tokens, logprob = sample(logits.repeat(draws, 1), _uniform(4 * draws), sampling)
    probability = expected.repeat(draws, 1).gather(1, tokens[:, None]).squeeze(1)
    assert (probability > 0).all()
    torch.testing.assert_close(logprob.double().exp(), probability, rtol=1e-5, atol=0)
    likely = expected > 0.01
    counts = torch.stack([torch.bincount(t, minlength=500) for t in tokens.view(draws, 4).T])
    deviation = (counts - draws * expected) / (draws * expected).sqrt().clamp(min=1)
    assert deviation[likely].abs().max() < 5


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((2000, 400), -math.inf)
    logits[:, 131] = 0.0
    for uniform in (_uniform(2000), torch.zeros(2000).double(), torch.full((2000,), 1 - 2.0**-53, dtype=torch.float64)):
        tokens, logprob = sample(logits, uniform, Sampling(1))
        assert (tokens == 131).all()
        assert (logprob == 0).all()


def test_the_ends_of_the_unit_interval() -> None:
    """The first and the last possible token, whatever lies around them; a vocabulary that fills its blocks, too."""
    for vocabulary in (3, 128, 129, 1000):
        logits = torch.full((2, vocabulary), -math.inf)
        logits[:, 1 : vocabulary - 1] = torch.randn(vocabulary - 2, generator=torch.Generator().manual_seed(0))
        tokens, _ = sample(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), Sampling(1))
        assert tokens.tolist() == [1, vocabulary - 2]


def test_temperature_zero_is_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    tokens, logprob = sample(logits, torch.tensor([0.99, 0.99]).double(), Sampling(1, 0.0))
    assert tokens.tolist() == [1, 0]
    assert logprob.tolist() == [0.0, 0.0]


def test_a_broken_row_shows_and_leaves_the_others() -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    whole, _ = sample(logits, torch.full((3,), 0.4).double(), Sampling(1))
    logits[1, 5] = math.nan
    tokens, logprob = sample(logits, torch.full((3,), 0.4).double(), Sampling(1))
    assert logprob.isnan().tolist() == [False, True, False]
    assert tokens[[0, 2]].tolist() == whole[[0, 2]].tolist()
    assert 0 <= tokens[1] < 200


def test_half_precision_logits() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprob = sample(logits, _uniform(5), Sampling(1))
    expected = logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """More numbers than are worked on at once: the same tokens and bits as a row alone."""
    logits = torch.randn(9, 70_000, generator=torch.Generator().manual_seed(0))
    uniform = _uniform(9)
    tokens, logprob = sample(logits, uniform, Sampling(1))
    alone = [sample(logits[i : i + 1], uniform[i : i + 1], Sampling(1)) for i in range(9)]
    assert torch.equal(tokens, torch.cat([t for t, _ in alone]))
    assert torch.equal(logprob, torch.cat([p for _, p in alone]))


def test_random_numbers_of_samples_differ_and_repeat() -> None:
    first, second = uniforms(3, 0, 2, 1000)
    (other,) = uniforms(3, 1, 1, 1000)
    assert torch.equal(first, uniforms(3, 0, 1, 1000)[0])
    assert torch.corrcoef(torch.stack([first, second, other])).fill_diagonal_(0).abs().max() < 0.1
    assert not torch.equal(first, uniforms(4, 0, 1, 1000)[0])
    assert first.min() >= 0
    assert first.max() < 1
