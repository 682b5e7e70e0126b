"""The loop beside what it has to beat: :func:`compare`."""

from sims_lens.comparison.dpo import DPOConfig
from sims_lens.comparison.result import Comparison, Method, Spent, open_comparison
from sims_lens.comparison.running import compare

__all__ = ["Comparison", "DPOConfig", "Method", "Spent", "compare", "open_comparison"]
