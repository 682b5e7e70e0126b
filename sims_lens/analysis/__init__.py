"""The microscope: what a plan does, measured. Each analysis returns a labelled result; ``sims.plots`` draws it."""

from sims_lens.analysis.interactions import Interaction, interaction

__all__ = ["Interaction", "interaction"]
