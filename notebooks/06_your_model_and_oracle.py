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
# # Bring your own model and oracle
#
# Every seam takes what you have: a model that TransformerLens knows or a local checkpoint, prompts from a file, any
# function as a ranker, a second ranker as an independent evaluator, an estimator of your own.

# %%
import json
from pathlib import Path

import torch

import sims_lens as sims

# %% [markdown]
# ## A model
#
# `sims.load` takes a hub id (`"HuggingFaceTB/SmolLM2-135M-Instruct"`, with `revision=`), a local Hugging Face folder,
# or `"embedded"`, as a `HookedTransformer` or a `TransformerBridge`. A model that you have built or booted yourself
# (`HookedTransformer.from_pretrained(...)`, `TransformerBridge.boot_transformers(...)`) can be used as it is. Here a
# GPT-2 with random weights stands in for your checkpoint, to show that a folder is all it takes.

# %%
from transformers import GPT2Config, GPT2LMHeadModel

embedded = sims.load("embedded", kind="bridge")
tokenizer = embedded.tokenizer
torch.manual_seed(0)
tiny = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=4, n_embd=64, n_head=4, n_positions=256))
tiny.save_pretrained("my-model")
tokenizer.save_pretrained("my-model")
mine = sims.load("my-model", kind="bridge")
print(mine.cfg.architecture, mine.cfg.n_layers, "layers")

# %% [markdown]
# ## Prompts from a file

# %%
Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in sims.everyday(36)))
prompts = sims.read_prompts("prompts.jsonl")
len(prompts), prompts[0]

# %% [markdown]
# ## An oracle
#
# Any function of a prompt and its responses that gives one score for each, higher is better. A function in the shape of
# a reward function, `f(prompts=, completions=)`, works too; so does `sims.RewardModel("...")` for a sequence classifier
# and `sims.EndpointJudge(...)` for a model behind an API. This one likes short words.


# %%
def short_words(prompt, responses):
    """Minus the mean number of letters of a word."""
    return [-sum(map(len, r.split())) / max(1, len(r.split())) for r in responses]


# %%
config = sims.SIMSConfig(
    iterations=2,
    sampling=sims.SamplingConfig(max_new_tokens=20),
    steering=sims.SteeringConfig(layers=(20,)),
    evaluation=sims.EvaluationConfig(validation=0.0, controls=3, samples=2, measured=1),
)
run = sims.improve(
    embedded, prompts, ranker=short_words, evaluator=sims.ReadingEase(), config=config, out="runs/short-words"
)
run

# %% [markdown]
# The evaluator is a ranker that the loop never learns from: what moves there is a side effect, or a sign that the
# oracle was gamed.

# %%
sims.plots.win_rate(run)

# %% [markdown]
# ## An estimator
#
# A class with `name`, `reads` and `fit(positive, negative) -> Transform`. Here the mean difference without its largest
# entries, where a few massive dimensions might drown the rest. `fit_quality` says at each layer how it does on pairs
# that were held out.


# %%
class Clipped:
    name = "clipped_mean_difference"
    reads = "means"

    def fit(self, positive, negative):
        difference = (positive - negative).mean(0)
        limit = 3 * difference.std()
        return sims.Addition(difference.clamp(-limit, limit))


pairs = sims.tone_pairs(48)
for estimator in (sims.MeanDifference(), Clipped(), sims.LogisticProbe()):
    found = sims.fit(embedded, pairs, estimator=estimator, layers=range(10, 30, 4))
    print(found.estimator)
    print(found.table()[["accuracy", "auc", "effect_size", "split_half"]].round(3).to_string(), "\n")

# %% [markdown]
# ## Your model, steered
#
# A random model has nothing to say, but everything that steers a real one works on it: hook points, plans, files.

# %%
plan = sims.fit(mine, pairs, layers=[2]).plan(2, coefficient=0.5)
with sims.steering(mine, plan) as steered:
    _, cache = mine.run_with_cache(torch.tensor([[5, 6, 7]]))
    print(*steered.hook_names, sep="\n")
plan.save("mine.safetensors")
try:
    with sims.steering(embedded, sims.SteeringPlan.load("mine.safetensors")):
        pass
except sims.SimsError as error:
    print("refused:", error)
