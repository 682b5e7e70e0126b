"""Where to steer, and how strongly: every layer at every coefficient, each with its effect and what it costs.

Two modes. *Teacher-forced*: by how much the log-probability margin on fixed pairs of texts rises; nothing is sampled,
and a cell costs a fraction of a forward pass over the pairs. *Generation*: by how much a ranker's score of sampled
responses rises. The first finds where to look, the second says whether the model then says so.

Most cells of a sweep are plainly weak or plainly broken, which a few pairs show. So the pairs are given out in rounds,
each as large as all before it, and a cell gets the next one only while it can still be the best within the budget: a
race.
"""

from sims_lens.analysis.sweep.candidates import COEFFICIENTS
from sims_lens.analysis.sweep.result import FIGURES, LayerSweep, SweepCell
from sims_lens.analysis.sweep.running import layer_sweep

__all__ = ["COEFFICIENTS", "FIGURES", "LayerSweep", "SweepCell", "layer_sweep"]
