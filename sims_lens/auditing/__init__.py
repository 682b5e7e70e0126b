"""Can this ranker be trusted? Measures with intervals, and a verdict: usable, weak, or no better than chance.

A loop that learns from its own judgement learns noise, or a habit such as "the first one shown", just as willingly as
quality. :func:`audit` finds that out before anything is learnt, from prompts and responses alone; :func:`audit_pairs`
is the light form for the contrast pairs of one iteration.
"""

from sims_lens.auditing.ask import is_judge
from sims_lens.auditing.measure import audit, audit_pairs
from sims_lens.auditing.result import MEASURES, Audit, MarginBand, Measure, PairAudit, Verdict

__all__ = [
    "MEASURES",
    "Audit",
    "MarginBand",
    "Measure",
    "PairAudit",
    "Verdict",
    "audit",
    "audit_pairs",
    "is_judge",
]
