"""What does decoding in bfloat16 do to results? The same prompts, plan, seeds and random numbers in both.

On the embedded model: how far the next-token distribution moves (KL of float32's from bfloat16's, on the same texts),
how many samples stay the same, and whether the effect of a plan, its perplexity and its KL to the base model come out
alike. ``python benchmarks/half_precision.py``; about five CPU minutes.
"""

import argparse

import numpy as np
import torch

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.data import by_prompt
from sims_lens.plan import NOTHING
from sims_lens.rankers import bound_ranker, rank
from sims_lens.stats import bootstrap_mean
from sims_lens.twin import Twin, run_responses, twin_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--samples", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = sims.load("embedded")
    prompts = sims.everyday(given.prompts)
    plan = sims.fit(model, sims.tone_pairs()).plan(17, coefficient=0.2)
    ranker = bound_ranker(sims.Vader(), model)
    drawn = {}
    for dtype in ("float32", "bfloat16"):
        sampler = sims.LocalSampler(model, sims.SamplingConfig(dtype=dtype))
        for name, steered in (("base", NOTHING), ("steered", plan)):
            samples = list(sampler.sample_and_measure(prompts, n=given.samples, plan=steered, seed=0))
            drawn[dtype, name] = [s for group in by_prompt(rank(ranker, prompts, samples)) for s in group]

    same = [a.tokens == b.tokens for a, b in zip(drawn["float32", "base"], drawn["bfloat16", "base"], strict=True)]
    print(f"samples of the base model that are the same token for token: {np.mean(same):.3f}")
    moved = divergence(model, prompts, drawn["float32", "base"])
    found = bootstrap_mean(moved)
    print(
        f"KL(float32 || bfloat16), nats per token, on float32's texts: {found.estimate:.5f} [{found.low:.5f}, "
        f"{found.high:.5f}]"
    )

    def over_prompts(samples, value):
        return np.array([np.mean([value(s) for s in group]) for group in by_prompt(samples)])

    for what, value in (("VADER score", lambda s: s.score), ("NLL", lambda s: s.nll), ("KL to base", lambda s: s.kl)):
        found = {key: over_prompts(samples, value) for key, samples in drawn.items()}
        effect = {dtype: found[dtype, "steered"] - found[dtype, "base"] for dtype in ("float32", "bfloat16")}
        print(
            f"{what}, steered less base: float32 {bootstrap_mean(effect['float32'])}, bfloat16 "
            f"{bootstrap_mean(effect['bfloat16'])}, difference {bootstrap_mean(effect['bfloat16'] - effect['float32'])}"
        )


def divergence(model, prompts, samples) -> np.ndarray:
    """Per prompt, the mean KL per token between the two precisions on given texts."""
    adapter = adapt(model)
    twins = [twin_of(model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found = []
    for group in by_prompt(samples):
        responses = [(0, s.tokens) for s in group if s.tokens]
        ids = [adapter.encode(prompts[group[0].prompt])]
        logits = []
        for twin in twins:
            assert isinstance(twin, Twin), twin
            with torch.inference_mode():
                run = run_responses(
                    twin, ids, responses, device=adapter.device, points={}, before=lambda _width, _prompt: None
                )
            logits.append(run.float().log_softmax(-1))
        kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
        found.append(np.mean([kl[row, : len(tokens)].mean().item() for row, (_, tokens) in enumerate(responses)]))
    return np.array(found)


if __name__ == "__main__":
    main()
