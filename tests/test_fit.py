"""A planted direction is recovered; shuffled labels recover nothing; inputs are left alone."""

import torch

from sims_lens.fit import mean_difference, shuffled_mean_differences, split_half_cosine, unit

PAIRS, LAYERS, WIDTH = 200, 3, 64


def planted(noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    direction = unit(torch.randn(LAYERS, WIDTH, generator=generator))
    shared = torch.randn(PAIRS, LAYERS, WIDTH, generator=generator)
    positive = shared + direction + noise * torch.randn(PAIRS, LAYERS, WIDTH, generator=generator)
    negative = shared - direction + noise * torch.randn(PAIRS, LAYERS, WIDTH, generator=generator)
    return positive, negative, direction


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def test_mean_difference_recovers_the_planted_direction_and_its_sign() -> None:
    positive, negative, direction = planted()
    before = positive.clone(), negative.clone()
    found = mean_difference(positive, negative)
    assert (cosine(found, direction) > 0.9).all()
    torch.testing.assert_close(mean_difference(negative, positive), -found)
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


def test_half_precision_activations_are_averaged_in_float32() -> None:
    positive = torch.full((1000, 4), 0.1, dtype=torch.bfloat16)
    assert mean_difference(positive, torch.zeros_like(positive)).dtype == torch.float32


def test_shuffled_labels_recover_nothing() -> None:
    positive, negative, direction = planted()
    shuffled = shuffled_mean_differences(positive, negative, count=20, seed=0)
    assert shuffled.shape == (20, LAYERS, WIDTH)
    assert cosine(shuffled, direction).mean().abs() < 0.15
    assert shuffled.norm(dim=-1).mean() < 0.5 * mean_difference(positive, negative).norm(dim=-1).mean()
    assert torch.equal(shuffled, shuffled_mean_differences(positive, negative, count=20, seed=0))


def test_split_half_cosine_tells_signal_from_noise() -> None:
    positive, negative, _ = planted()
    assert (split_half_cosine(positive, negative, seed=0) > 0.7).all()
    noise = torch.randn(PAIRS, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
    assert split_half_cosine(noise, torch.zeros_like(noise), seed=0).abs().max() < 0.3
    assert split_half_cosine(positive[:1], negative[:1], seed=0).isnan().all()


def test_unit_leaves_zero_alone() -> None:
    assert torch.equal(unit(torch.zeros(3)), torch.zeros(3))
    torch.testing.assert_close(unit(torch.tensor([0.0, -2.0])), torch.tensor([0.0, -1.0]))
