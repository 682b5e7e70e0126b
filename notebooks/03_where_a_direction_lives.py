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
# # Where a direction lives
#
# A steering vector can be fitted at every layer. Where does it act, how large is it beside the stream, do the layers
# share one direction, is it more than chance, and what does it write? Here: the direction from gloomy to cheerful
# answers in SmolLM2-135M-Instruct, with every number beside its floor and ceiling.

# %%
import sims_lens as sims

model = sims.load("embedded")
pairs = sims.tone_pairs()  # (prompt, cheerful answer, gloomy answer)
train, test = pairs[:40], pairs[40:]
fitted = sims.fit(model, train)
fitted.table()[["accuracy", "effect_size", "split_half", "length", "residual_norm"]].iloc[::4].round(3)

# %% [markdown]
# Held-out accuracy is perfect at every layer: the two kinds of text are easy to tell apart. So accuracy does not say
# where steering works. A sweep does.
#
# ## Layer × coefficient
#
# Teacher-forced: by how much does the plan raise the log-probability of the cheerful text over that of the gloomy one,
# on pairs that the fit never saw? Nothing is sampled, the unsteered part of each pass is run once, and cells that can
# no longer be the best within the fluency budget get no more pairs (`adaptive=False` measures all on all).

# %%
sweep = sims.layer_sweep(model, fitted, coefficients=(0.05, 0.1, 0.2, 0.4), layers=range(1, 30, 2), behaviour=test)
sweep

# %%
sims.plots.layer_sweep(sweep)

# %% [markdown]
# What does an effect cost? Each point is a layer with a coefficient; the line joins those that no other beats.

# %%
sims.plots.frontier(sweep)

# %% [markdown]
# The margin on given texts is not what the model says. So the best layer, an early and a late one again, in generation
# mode, by a sentiment score of what they say.

# %%
best = sweep.best
said = sims.layer_sweep(
    model,
    fitted,
    coefficients=(0.1, 0.2, 0.3),
    layers=sorted({5, best.layer, 27}),
    ranker=sims.Vader(),
    prompts=sims.everyday(16),
    sampling=sims.SamplingConfig(max_new_tokens=24),
)
said

# %% [markdown]
# ## Norms
#
# The mean difference beside the stream that it was found in. The first position is kept apart: its norm is some hundred
# times that of the others in the middle layers, and would make nonsense of any mean. Lower panels and tables say how
# far typical text already lies along the direction.

# %%
norms = sims.vector_norms(model, fitted)
sims.plots.norm_profile(norms)

# %%
sims.plots.projection_profile(norms)

# %% [markdown]
# ## Similarity
#
# Do neighbouring layers share a direction? Do other estimators find it? A cosine means something between a floor and a
# ceiling. The floor: random directions, isotropic ones and ones with the stream's own covariance, which agree far more
# because the stream is anisotropic. The ceiling: what two noisy fits of one true direction would give.

# %%
others = {
    "mean difference": fitted,
    "logistic probe": sims.fit(model, train, estimator=sims.LogisticProbe()),
    "PCA of differences": sims.fit(model, train, estimator=sims.PCA()),
    "shuffled labels": sims.fit(model, train, estimator=sims.ShuffledLabels(sims.MeanDifference(), seed=1)),
}
similarity = sims.direction_similarity(others, model=model)
sims.plots.similarity_profile(similarity, [("mean difference", name) for name in list(others)[1:]])

# %%
sims.plots.similarity(similarity, "mean difference")

# %% [markdown]
# How many dimensions do thirty layers' directions span, beside thirty random ones?

# %%
sims.plots.shared_subspace(similarity.shared_subspace(["mean difference"]))

# %% [markdown]
# Two halves of the pairs, fitted apart: is their agreement more than shuffled labels give? The p-values are adjusted
# for the number of layers.

# %%
from sims_lens.analysis import pair_differences, permutation_p

other_half = sims.fit(model, train[20:])
reference = sims.analysis.directions_of(other_half)[0].vectors
test_of_chance = permutation_p(pair_differences(model, train[:20]), reference, permutations=3000)
test_of_chance.table().iloc[::4].round(4)

# %% [markdown]
# ## The model's own axes
#
# Is it just the mean of the stream, its largest principal component, or the unembedding of "happy" less that of "sad"?

# %%
axes = sims.model_axes(model, tokens=[" happy", " sad"], components=2)
beside = sims.direction_similarity({"cheerful": fitted}, axes)
sims.plots.similarity_profile(beside, [("cheerful", name) for name in axes])

# %% [markdown]
# ## What it writes
#
# The logit lens of the vector at each layer: the tokens that it promotes and suppresses if nothing came after it. A
# random direction also has a top token; z-scores within the dashed band are no larger than those. Early layers'
# directions are rewritten by the layers after them, so the lens says little there.

# %%
found = sims.readout(model, fitted, top=8)
sims.plots.readout_layers(found)

# %% [markdown]
# The same layer by layer, with a slider that also works in a static page.

# %%
steps = {str(layer): sims.plots.readout(found, layer=layer) for layer in range(1, 30, 4)}
sims.plots.slider(steps, label="layer")

# %% [markdown]
# ## Where in a text
#
# The projection of every token on the direction, unsteered and steered.

# %%
plan = fitted.plan(best.layer, coefficient=best.coefficient)
scores = sims.token_scores(
    model,
    ("How was your day?", "It was awful at first, but then my friends came and we laughed."),
    fitted,
    layer=best.layer,
    plan=plan,
)
scores

# %%
sims.plots.token_heatmap(scores)
