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
# # Quickstart
#
# Load a model, steer it with a vector, look at the hook points that steering adds, and let the model improve its own
# steering from unlabelled prompts. Everything runs offline on SmolLM2-135M-Instruct, on two CPU cores, in a few
# minutes. Give `sims.load` a hub id or a local folder for a model of your own.

# %%
import torch

import sims_lens as sims

model = sims.load("embedded")  # a HookedTransformer; kind="bridge" gives a TransformerBridge
model.cfg.model_name, model.cfg.n_layers, model.cfg.d_model

# %% [markdown]
# ## A steering vector from contrast pairs
#
# The package has 64 short pairs of a cheerful and a gloomy answer to one question. `sims.fit` reads the residual stream
# of both at every layer and takes the mean difference; accuracy and effect size are of pairs that were held out.

# %%
pairs = sims.tone_pairs()
pairs[:3]

# %%
fitted = sims.fit(model, pairs)
fitted.table().iloc[::3].round(3)

# %% [markdown]
# A **plan** says which transform acts at which hook point, how strongly, and on which tokens. The coefficient counts in
# median norms of the residual stream at that layer, so that it means about the same in every layer and model.

# %%
plan = fitted.plan(17, coefficient=0.25)
plan

# %%
prompt = "How was your weekend?"
sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=40))
for name, what in {"unsteered": 0 * plan, "cheerful": plan, "gloomy": -1 * plan}.items():
    for sample in sampler.sample([prompt], n=2, plan=what, seed=1):
        print(f"{name:>10} | {sample.text}")

# %% [markdown]
# Any TransformerLens call inside `with sims.steering(...)` is steered. The plan's hook points are listed with the
# model's own: cache them, patch them, ablate them. Zeroing `hook_delta` gives bitwise the unsteered logits.

# %%
tokens = model.to_tokens("The sea is", prepend_bos=False)
unsteered = model(tokens)
with sims.steering(model, plan.on("all")) as steered:
    logits, cache = model.run_with_cache(tokens)
    zeroed = model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.17.steer_resid_post.hook_delta", lambda delta, hook: 0 * delta)]
    )
    print(*steered.hook_names, sep="\n")
print("norm of what is added:", cache["blocks.17.steer_resid_post.hook_delta"][0, -1].norm().item())
print(
    "logits changed:",
    not torch.equal(logits, unsteered),
    "| with the delta zeroed:",
    not torch.equal(zeroed, unsteered),
)

# %% [markdown]
# ## The loop: no pairs at all
#
# SIMS needs only prompts and something that ranks responses: a function, a reward model, or the model itself. It
# samples several responses to each prompt, contrasts the best with the worst, fits a direction, steers with it, and
# goes round again. Here a small run with a reading-ease score; `sims-lens demo` is the full-size one.

# %%
config = sims.SIMSConfig(
    iterations=2,
    sampling=sims.SamplingConfig(max_new_tokens=20),
    steering=sims.SteeringConfig(layers=(22,)),
    evaluation=sims.EvaluationConfig(validation=0.0, controls=3, samples=2, measured=1),
)
run = sims.improve(model, sims.everyday(36), ranker=sims.ReadingEase(), config=config, out="runs/quickstart")
run

# %% [markdown]
# Win rate against the base model on held-out prompts. The diamonds are vectors of the same norm fitted to shuffled
# labels; in the band one more of them would lie with 95% probability, so an effect within it is no evidence of
# learning. Runs this small have wide intervals, and three controls a wide band: the full-size run has five, and 50
# prompts.

# %%
sims.plots.win_rate(run)

# %%
with sims.steering(model, run.plan):
    print(model.generate("Tell me about the sea.", max_new_tokens=40, verbose=False))

# %% [markdown]
# ## What travels
#
# A plan is one safetensors file that holds everything needed to apply it, and where it came from. `write_report` makes
# one self-contained page of a run.

# %%
run.plan.save("plan.safetensors")
again = sims.SteeringPlan.load("plan.safetensors")
print(again)
print("report:", sims.write_report(run, "report.html").name)
