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
# # An ablation study of a steered behaviour
#
# Adding one vector at layer 17 makes SmolLM2-135M-Instruct prefer cheerful answers to gloomy ones. Which parts of the
# model make that of it? We measure on pairs that the direction was not fitted to, teacher-forced: the **margin** is the
# log-probability per token of the cheerful text less that of the gloomy one.
#
# 1. Does a random direction of the same norm do as much?
# 2. Which layers of a plan over several layers matter?
# 3. Which heads and MLPs carry the effect downstream?
# 4. Which of them read the added direction itself?
# 5. Does the unsteered model need the direction for the behaviour? 6. What is written to the logits, and by whom?

# %%
import sims_lens as sims

model = sims.load("embedded")
pairs = sims.tone_pairs()
train, test = pairs[:40], pairs[40:52]
fitted = sims.fit(model, train)
plan = fitted.plan(17, coefficient=0.2)
behaviour = sims.PairBehaviour(test, name="cheerfulness")
plan

# %% [markdown]
# ## 1 and 2. Leave one layer out
#
# A plan over four layers. Each is left out, and each is replaced by random directions of the same norm: if those do as
# well, it is not the direction that matters. The p-values are of sign flips over pairs, adjusted for the number of
# parts.

# %%
several = fitted.plan([13, 17, 21, 25], coefficient=0.08)
left_out = sims.leave_one_out(model, several, behaviour, controls=3)
left_out

# %%
sims.plots.leave_one_out(left_out)

# %% [markdown]
# Every layer contributes, the contributions add up, and a random direction in the place of one loses about all that
# leaving it out does. The effect is one of the direction, not of the norm.
#
# ## 3. What carries the effect
#
# For each attention head and MLP from the steered layer on: the steered run with this component's output taken from the
# unsteered run (*lost*), and the unsteered run with its output from the steered run (*restored*). A gradient predicts
# all of them in one backward pass; here the sixteen largest are then patched exactly.

# %%
carried = sims.component_effects(model, plan, behaviour, exact=16)
carried

# %%
sims.plots.component_effects(carried, value="gradient")

# %%
sims.plots.attribution_check(carried)

# %% [markdown]
# ## 4. Who reads the direction
#
# A component may carry the effect because it reads the added vector itself, or because it reads what others made of it.
# Here one component at a time reads the stream *without* the addition, everything else as it is.

# %%
readers = sims.direction_readers(model, plan, behaviour, exact=8)
readers

# %%
sims.plots.direction_readers(readers)

# %% [markdown]
# ## 5. Does the unsteered model need it?
#
# Steering shows that the direction is *sufficient*. To be *necessary* is another thing: take it out of the unsteered
# model everywhere, as Arditi et al. did for refusal, beside random directions, isotropic ones and ones that hold as
# much of the stream's variance.

# %%
ablated = sims.directional_ablation(model, fitted, behaviour, layer=17, controls=3)
ablated

# %%
sims.plots.directional_ablation(ablated)

# %% [markdown]
# ## 6. What is written to the logits
#
# One token: after "It was", the logit of " wonderful" less that of " terrible". The residual stream is a sum of what
# every component wrote, the steering delta among them; nothing is left over.

# %%
attribution = sims.logit_attribution(model, (test[0][0], "It was"), plan, answer=" wonderful", versus=" terrible")
attribution

# %%
sims.plots.logit_attribution(attribution)

# %%
parts = sims.analysis.residual_components(model, (test[0][0], "It was"), plan)
print(
    f"{len(parts.components)} components, the steering delta among them; relative error of their sum: {parts.error:.1e}"
)

# %% [markdown]
# ## Conclusion
#
# The figures that it rests on, from the results above:

# %%
direct, top = carried.direct.share, carried.top(3)
print(f"effect of the plan: {carried.effect} nats per token")
print(f"straight to the logits: {100 * direct.estimate:.0f}% [{100 * direct.low:.0f}, {100 * direct.high:.0f}]")
for found in top:
    lost, read = found.lost.share, readers.of(repr(found.component))
    print(
        f"without {found.component}: {100 * lost.estimate:.0f}% [{100 * lost.low:.0f}, {100 * lost.high:.0f}] lost; "
        f"reading the addition itself, by gradient: {100 * read.gradient.share.estimate:.0f}%"
    )
print(f"gradient against exact patching: Spearman {carried.agreement}")
print(ablated.verdict())

# %% [markdown]
# The vector itself hardly touches the logits. Four layers above, head 21.1 reads it and carries about a third of the
# effect; MLPs 22, 26 and 29 and head 25.6 carry about a fifth to a quarter each, partly of what others made of it (MLP
# 26 loses nothing when it alone does not read the addition); the MLPs right above, 18 and 19, work *against* it. Single
# losses do not add up, because a path through two components is lost with either. The gradient ranks the components as
# exact patching does, at a tenth of its cost.
#
# The direction is sufficient and not necessary: without it the unsteered model does not prefer cheerful answers less,
# but more, and finds both kinds of text less likely. What the model uses to prefer one answer over the other is not
# this one direction. All of this is of one model, one layer, twelve pairs of one style; the intervals cover the pairs,
# not the choice of the layer nor the fit.
