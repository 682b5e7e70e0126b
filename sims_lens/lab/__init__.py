"""The laboratory: what can go wrong, made to go wrong on purpose, and measured.

Each experiment returns a frozen result with a ``table()``, a ``verdict()`` and its figures
(:func:`sims_lens.plots.figures`). ``docs/laboratory.md`` says what each one asks and what it found.

>>> sorted(__all__)[:3]
['COEFFICIENTS', 'CorruptedEffect', 'CorruptedPairs']
"""

from sims_lens.lab.conversation import MultiTurn, multi_turn
from sims_lens.lab.corruption import Curve, Moments, corruption_curve
from sims_lens.lab.distribution import OutOfDistribution, default_groups, out_of_distribution
from sims_lens.lab.failures import Failure, FailureLedger, failures
from sims_lens.lab.misled import Misled, MisledIteration, MisledRun, misled, reward_hacking, wrong_oracles
from sims_lens.lab.noise import SHARES, CorruptedEffect, CorruptedPairs, oracle_noise, poisoned_negatives
from sims_lens.lab.oracles import LengthBiased, Loophole, Noisy, Reversed
from sims_lens.lab.steerability import COEFFICIENTS, Steerability, steerability

__all__ = [
    "COEFFICIENTS",
    "CorruptedEffect",
    "CorruptedPairs",
    "Curve",
    "Failure",
    "FailureLedger",
    "LengthBiased",
    "Loophole",
    "Misled",
    "MisledIteration",
    "MisledRun",
    "Moments",
    "MultiTurn",
    "Noisy",
    "OutOfDistribution",
    "Reversed",
    "SHARES",
    "Steerability",
    "corruption_curve",
    "default_groups",
    "failures",
    "misled",
    "multi_turn",
    "oracle_noise",
    "out_of_distribution",
    "poisoned_negatives",
    "reward_hacking",
    "steerability",
    "wrong_oracles",
]
