"""Every error that sims_lens raises on purpose: one line that names the value and the remedy.

All of them are :class:`SimsError`, so that a caller (the command line, say) can tell "you gave me something I
can't use" from a bug. Those about a wrong value are ``ValueError`` as well.
"""


class SimsError(Exception):
    """Base class: something was given that cannot be used; the message names it and says what to do."""


class ConfigError(SimsError, ValueError):
    """A setting is out of range or contradicts another one."""


class ModelError(SimsError, ValueError):
    """A model cannot be loaded, or is not one that can be steered."""


class PromptError(SimsError, ValueError):
    """A prompt, or a file of prompts, cannot be used."""


class PlanError(SimsError, ValueError):
    """A steering plan is malformed, or does not fit the model."""


class RankerError(SimsError, ValueError):
    """A ranker failed, or returned something that is not one finite score per response."""


class BankError(SimsError, ValueError):
    """A memory bank belongs to another model, ranker or set of prompts, or is damaged."""


class RunError(SimsError, ValueError):
    """A run directory is damaged, holds another run, or has nothing to go on with."""


class DamagedError(RunError):
    """A file of a run directory is not what was written."""


class ResultError(SimsError, ValueError):
    """A result can't be read back from JSON: it is damaged, or something else."""


class TooFewPairsError(RunError):
    """The ranker hardly tells the responses of an iteration apart: there is nothing to fit to."""


class FitError(SimsError, ValueError):
    """A direction or a transform cannot be fitted to the activations that were given."""


class ExportError(SimsError, ValueError):
    """A plan can't be written in another tool's format without changing what it does, or a file can't be read."""


class CapabilityError(SimsError, ValueError):
    """A capability evaluation can't be run: a package, a task or its data is missing, or a request can't be met."""


class SamplerError(SimsError, ValueError):
    """An engine that samples failed, or can't do what is asked of it."""
