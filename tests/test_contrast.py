"""Best against worst, with every prompt that gives no pair counted."""

from sims_lens.contrast import best_against_worst
from sims_lens.data import Sample, by_prompt


def sample(prompt: int, draw: int, score: float, tokens: tuple[int, ...] = (1,)) -> Sample:
    return Sample(prompt=prompt, draw=draw, tokens=tokens, text="x", ended=False, score=score)


def test_pairs_and_reasons() -> None:
    samples = [
        *[sample(0, k, s) for k, s in enumerate((0.1, 0.9, 0.5))],
        *[sample(1, k, 0.5) for k in range(3)],
        *[sample(2, k, s) for k, s in enumerate((0.5, 0.55, 0.5))],
        sample(3, 0, 1.0),
        sample(3, 1, 0.0, tokens=()),
    ]
    contrast = best_against_worst(samples, min_margin=0.1)
    assert [(p.prompt, p.best.draw, p.worst.draw) for p in contrast.pairs] == [(0, 1, 0)]
    assert contrast.dropped == {"tie": 1, "margin": 1, "empty": 1}
    assert contrast.pairs[0].margin == 0.8


def test_ties_for_best_take_the_first_draw() -> None:
    contrast = best_against_worst([sample(0, k, s) for k, s in enumerate((1.0, 1.0, 0.0, 0.0))])
    assert (contrast.pairs[0].best.draw, contrast.pairs[0].worst.draw) == (0, 2)


def test_by_prompt_orders_prompts_and_draws() -> None:
    groups = by_prompt([sample(2, 1, 0.0), sample(0, 0, 0.0), sample(2, 0, 0.0)])
    assert [[(s.prompt, s.draw) for s in g] for g in groups] == [[(0, 0)], [(2, 0), (2, 1)]]
