# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The loop, step by step
#
# One iteration of self-improving steering by hand: **sample** responses, **rank** them, **contrast** the best with the
# worst, **capture** the residual stream, **fit** a direction, **steer** with it, **evaluate** on prompts that the fit
# never saw, against a control that learnt nothing. Then the same in one call. (SIMS: Zhu et al. 2025, arXiv
# 2507.08967.)

# %%
import numpy as np

import sims_lens as sims

model = sims.load("embedded", kind="bridge")
prompts = sims.everyday(34)
train, heldout = prompts[:22], prompts[22:]
sampling = sims.SamplingConfig(responses=4, max_new_tokens=20)

# %% [markdown]
# ## 1. Sample
#
# Every response has random numbers of its own, derived from the seed, the prompt and its number: it does not depend on
# what it is batched with, and the steered and the unsteered model draw with the same ones.

# %%
sampler = sims.LocalSampler(model, sampling)
nothing = sims.SteeringPlan(())
drawn = list(sampler.sample(train, n=sampling.responses, plan=nothing, seed=1))
for sample in drawn[:4]:
    print(sample.draw, "|", sample.text)

# %% [markdown]
# ## 2. Rank
#
# A ranker gives one score to each response of a prompt, higher is better. Any function does; this one is Flesch's
# reading ease. Notebook 05 is about whether a ranker deserves trust.

# %%
ranker = sims.ReadingEase()
groups = [[s for s in drawn if s.prompt == i] for i in range(len(train))]
scores = [ranker.rank(prompt, [s.text for s in group]) for prompt, group in zip(train, groups)]
print(train[0])
for sample, score in sorted(zip(groups[0], scores[0]), key=lambda pair: -pair[1]):
    print(f"{score:6.1f} | {sample.text}")

# %% [markdown]
# ## 3. Contrast
#
# The best against the worst response of each prompt. Prompts whose responses all score the same teach nothing.

# %%
contrast = []
for prompt, group, found in zip(train, groups, scores):
    best, worst = int(np.argmax(found)), int(np.argmin(found))
    if found[best] > found[worst]:
        contrast.append((prompt, group[best].text, group[worst].text, found[best] - found[worst]))
print(len(contrast), "pairs, mean margin", round(float(np.mean([c[-1] for c in contrast])), 1))

# %% [markdown]
# ## 4. Capture and fit
#
# `sims.fit` averages the residual stream over the response tokens of both texts and takes the mean difference at every
# layer. Accuracy and split-half cosine are of pairs that were held out of the fit.

# %%
fitted = sims.fit(model, [c[:3] for c in contrast])
fitted.table()[["accuracy", "effect_size", "split_half", "length", "residual_norm"]].iloc[
    [0, 6, 12, 17, 22, 26, 29]
].round(3)

# %% [markdown]
# ## 5. Steer
#
# The unit direction at one late layer, at 0.2 median residual norms, on the last prompt token and all generated tokens.

# %%
plan = fitted.plan(22, coefficient=0.2)
plan

# %% [markdown]
# ## 6. Evaluate, beside a control
#
# On held-out prompts: paired with the unsteered model's responses, and beside the same pairs with shuffled labels at
# the same norm. The interval is over prompts. `side_effects` adds perplexity under the unsteered model and KL.

# %%
control = sims.fit(model, [c[:3] for c in contrast], estimator=sims.ShuffledLabels(sims.MeanDifference(), seed=3))
measured = {
    name: sims.SampledBehaviour(ranker, heldout, samples=2, sampling=sampling).measure(model, what)
    for name, what in {"base": nothing, "steered": plan, "shuffled": control.plan(22, coefficient=0.2)}.items()
}
for name in ("steered", "shuffled"):
    print(f"{name:>9}: {sims.bootstrap_mean((measured[name] - measured['base']).numpy())} points of reading ease")

# %% [markdown]
# ## 7. Go round again, in one call
#
# `sims.improve` does all of this, with an audit of the ranker first, a layer chosen on validation prompts, controls,
# side effects and costs; each step is on disk before the next begins, and the same call goes on where it stopped.

# %%
config = sims.SIMSConfig(
    iterations=2,
    sampling=sampling,
    steering=sims.SteeringConfig(layers=(22,)),
    evaluation=sims.EvaluationConfig(validation=0.0, controls=3, samples=2, measured=1),
)
run = sims.improve(model, prompts, ranker=ranker, config=config, out="runs/loop")
run

# %%
sims.plots.effect(run)

# %% [markdown]
# Do the later iterations find the same direction? The dashed line is how well two halves of the first iteration's own
# pairs agree: that much disagreement is noise.

# %%
sims.plots.iteration_similarity(run)

# %%
sims.plots.side_effects(run)

# %%
sims.plots.sample_browser(run)
