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
# # Judging the judge
#
# Self-improving steering is only as good as what ranks the responses. `sims.audit` asks, before anything is learnt,
# what a ranker does on **known-answer pairs** (a real response against the same words shuffled, another prompt's
# response, a truncated one), whether it says the same twice and after the order is swapped, whether it just likes
# length, and whether it agrees with a reference. Here: an oracle, a model that judges itself, and two judges with
# planted faults.

# %%
import random

import sims_lens as sims

model = sims.load("embedded", kind="bridge")
prompts = sims.everyday(10)
sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=24))
drawn = list(sampler.sample(prompts, n=4, plan=sims.SteeringPlan(()), seed=0))
responses = [[s.text for s in drawn if s.prompt == i] for i in range(len(prompts))]
responses[0]

# %% [markdown]
# ## An oracle
#
# Reading ease is a formula: perfectly consistent. That does not make it a judge of quality: shuffled words read just as
# easily. The audit reports both.

# %%
oracle = sims.audit(sims.ReadingEase(), prompts, responses)
oracle

# %%
sims.plots.reliability_card(oracle)

# %% [markdown]
# ## The model as its own judge
#
# A model of 135M parameters does not follow an instruction to compare two answers, but it can be asked by likelihood:
# how much more probable is the response when the prompt asks for a "more helpful" answer than for a "less helpful" one?
# The form and the criterion decide whether that beats a coin: the audit says so before the loop trusts it.

# %%
judge = sims.SelfJudge("more helpful").bind(model)
own = sims.audit(judge, prompts, responses)
own

# %%
cheerful = sims.audit(sims.SelfJudge("more cheerful").bind(model), prompts, responses, reference=sims.Vader())
cheerful

# %% [markdown]
# ## Judges with planted faults
#
# One takes the longest response for the best. One flips a coin in three cases of ten. The audit names both faults.


# %%
def longest(prompt, responses):
    return [float(len(r)) for r in responses]


coin = random.Random(0)


def unsure(prompt, responses):
    scores = sims.ReadingEase().rank(prompt, responses)
    return [-s for s in scores] if coin.random() < 0.3 else scores


unsure.judges = True  # it can contradict itself, so it is asked twice

# %%
long = sims.audit(longest, prompts, responses, reference=sims.ReadingEase())
noisy = sims.audit(unsure, prompts, responses, reference=sims.ReadingEase())
print(long)
print(noisy)

# %%
sims.plots.reliability_card(noisy)

# %% [markdown]
# ## What the loop does with it
#
# `sims.improve` audits the ranker on the first responses and stops, with the reason, when a judge is no better than
# chance. It asks again about the pairs of each iteration. `RankingConfig(audit="report")` goes on all the same.

# %%
config = sims.SIMSConfig(
    iterations=1,
    sampling=sims.SamplingConfig(max_new_tokens=16),
    steering=sims.SteeringConfig(layers=(22,)),
    evaluation=sims.EvaluationConfig(validation=0.0, controls=0, samples=1, measured=1),
)
toss = random.Random(1)


def nonsense(prompt, responses):
    return [toss.random() for _ in responses]


nonsense.judges = True
try:
    sims.improve(model, sims.everyday(40), ranker=nonsense, config=config, out="runs/nonsense")
except sims.SimsError as error:
    print("stopped:", error)
