"""Does a plan steer every prompt, or some of them the wrong way?

Reference: Tan et al. 2024, "Analyzing the Generalization and Reliability of Steering Vectors" (arXiv 2407.12404). Their
steerability of a dataset is the slope of the line that is fitted to the propensity over the multiplier; an example
whose slope is below 0 is anti-steerable. Our deviations: the line is fitted to each prompt, not to the mean; the
multiplier is a factor of a plan's own strength; the propensity is any :class:`~sims_lens.behaviour.Behaviour`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from sims_lens.behaviour import Behaviour, PairBehaviour, SampledBehaviour
from sims_lens.checks import check_list, check_number, check_seed, shown
from sims_lens.errors import ConfigError
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.lab.shown import Shown, columns, rate, share, signed
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.stats import CONFIDENCE, Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Steerability(Shown):
    """How each prompt answers to a plan; made by :func:`steerability`.

    Args:
        name: of the behaviour.
        measure_name: what a value is, with its unit.
        unit: what a value is of, "prompt" or "pair".
        coefficients: factors of the plan's strength.
        values: of each unit at each coefficient.
        slopes: least-squares slope of each unit, per unit of coefficient.
        errors: their standard errors, by the scatter around the line.
        prompts: the prompt of each unit, by number: pairs of one prompt are not independent.
        mean: mean slope.
        anti: share of anti-steerable units, those with a slope below 0.
        shown: share of units whose slope is *shown* to be below 0, by its own 95% interval.
        spread: standard deviation of the slopes over units.
        noise: what of it is scatter around the lines: the root mean square of ``errors``.
    """

    name: str
    measure_name: str
    unit: str
    coefficients: tuple[float, ...]
    values: Float[np.ndarray, "unit coefficient"]
    slopes: Float[np.ndarray, " unit"]
    errors: Float[np.ndarray, " unit"]
    prompts: tuple[int, ...]
    mean: Interval
    anti: Interval
    shown: Interval
    spread: float
    noise: float

    def table(self) -> "pd.DataFrame":
        """One row per unit: its slope, its standard error, and its value at each coefficient."""
        import pandas as pd

        rows = []
        for i, (slope, error) in enumerate(zip(self.slopes, self.errors, strict=True)):
            row: dict[str, Any] = {self.unit: i, "prompt": self.prompts[i], "slope": slope, "error": error}
            rows.append(row | {f"at {c:g}": v for c, v in zip(self.coefficients, self.values[i], strict=True)})
        return pd.DataFrame(rows).set_index(self.unit)

    def summary(self) -> dict[str, Any]:
        """The figures of all units, an interval as three entries."""
        found = columns(slope=self.mean, anti_steerable=self.anti, shown_anti_steerable=self.shown)
        return found | {"spread": self.spread, "noise": self.noise}

    def head(self) -> str:
        """One line."""
        span = f"{self.coefficients[0]:g} to {self.coefficients[-1]:g}"
        return f"Steerability: {self.name}, {len(self.slopes)} {self.unit}s, coefficients {span} x the plan"

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text."""
        q = np.quantile(self.slopes, [0.1, 0.5, 0.9])
        return [
            ("mean slope [95%]", "slopes, 10 / 50 / 90%", "spread", "of it scatter", "anti-steerable", "shown to be"),
            (
                signed(self.mean),
                " / ".join(f"{v:+.3g}" for v in q),
                f"{self.spread:.3g}",
                f"{self.noise:.3g}",
                share(self.anti),
                share(self.shown),
            ),
        ]

    def verdict(self) -> str:
        """Whether the plan can be relied on."""
        text = (
            f"The mean slope is {signed(self.mean)} ({self.measure_name}, for the plan's whole strength); "
            f"{share(self.anti)} of the {self.unit}s are anti-steerable, {share(self.shown)} are shown to be."
        )
        if self.noise > 0.7 * self.spread:
            text += " Most of the spread is scatter around the lines: more samples would tell the prompts apart."
        return text


def steerability(
    model: Any,
    plan: SteeringPlan,
    behaviour: Behaviour | None = None,
    *,
    prompts: Sequence[str] | None = None,
    ranker: object | None = None,
    coefficients: Sequence[float] = COEFFICIENTS,
    samples: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Steerability:
    """Fit a line to what each prompt's behaviour does over the strength of a plan.

    Args:
        model: unsteered.
        plan: what steers at coefficient 1.
        behaviour: what is measured: a :class:`~sims_lens.behaviour.PairBehaviour` has no sampling noise, so that its
            slopes are the prompts' own; one that is sampled calls some prompts anti-steerable by chance.
        prompts: with ``ranker``, instead of a behaviour: the mean score of responses to each.
        ranker: any that ``sims.improve`` accepts.
        coefficients: factors of the plan's strength; three or more for an error of the slope.
        samples: responses to each prompt at each coefficient, where they are sampled.
        seed: of the sampling and the intervals.
        progress: show a progress bar.

    Raises:
        ConfigError: neither or both of behaviour and ranker are given, or fewer than three different coefficients.

    Reference: see the top of the module.
    """
    check_unsteered(model)
    given = check_list("coefficients", coefficients, "(-1.0, 0.0, 1.0)")
    factors = tuple(sorted({check_number("a coefficient", c) for c in given}))
    if len(factors) < 3:
        raise ConfigError(f"coefficients must be three or more different numbers, got {tuple(coefficients)}")
    if (behaviour is None) == (ranker is None):
        raise ConfigError("give a behaviour, or a ranker with prompts, and not both")
    if behaviour is None:
        if prompts is None:
            raise ConfigError("a ranker needs prompts to be asked about; give prompts=[...]")
        behaviour = SampledBehaviour(ranker, prompts, samples=samples, seed=seed)
    if not isinstance(behaviour, Behaviour):
        raise ConfigError(f"behaviour must be a PairBehaviour or a SampledBehaviour, got {shown(behaviour)}")
    check_seed(seed)
    known = resolve(model, plan)
    columns_found = []
    with Progress(len(factors), show=progress) as bar:
        for factor in factors:
            bar.phase(f"{factor:g} x the plan")
            columns_found.append(behaviour.measure(model, known.scaled(factor)).double().numpy())
            bar.advance()
    of = _prompt_numbers(behaviour, len(columns_found[0]))
    return from_values(
        np.stack(columns_found, axis=1),
        factors,
        prompts=of,
        name=behaviour.name,
        measure_name=behaviour.measure_name,
        unit=behaviour.unit,
        seed=seed,
    )


def from_values(
    values: Float[np.ndarray, "unit coefficient"],
    coefficients: Sequence[float],
    *,
    prompts: Sequence[int] | None = None,
    name: str = "behaviour",
    measure_name: str = "value",
    unit: str = "prompt",
    seed: int = 0,
) -> Steerability:
    """The same of values that were measured elsewhere.

    Args:
        values: of each unit at each coefficient.
        coefficients: three or more different ones.
        prompts: the prompt of each unit, by number; each its own where None.
        name: of the behaviour.
        measure_name: what a value is, with its unit.
        unit: what a value is of.
        seed: of the intervals.
    """
    from scipy.special import stdtrit

    x = np.array(coefficients, dtype=np.float64)
    x -= x.mean()
    slopes = values @ x / (x @ x)
    residual = values - values.mean(1, keepdims=True) - slopes[:, None] * x
    free = len(x) - 2
    errors = np.sqrt((residual**2).sum(1) / free / (x @ x))
    reach = float(stdtrit(free, (1 + CONFIDENCE) / 2)) * errors
    of = tuple(range(len(values))) if prompts is None else tuple(prompts)
    return Steerability(
        name=name,
        measure_name=measure_name,
        unit=unit,
        coefficients=tuple(float(c) for c in coefficients),
        values=values,
        slopes=slopes,
        errors=errors,
        prompts=of,
        mean=bootstrap_mean(_by_prompt(slopes, of), seed=seed),
        anti=rate(_by_prompt(slopes < 0, of), seed=seed),
        shown=rate(_by_prompt(slopes + reach < 0, of), seed=seed),
        spread=float(slopes.std(ddof=1)) if len(slopes) > 1 else 0.0,
        noise=float(np.sqrt((errors**2).mean())),
    )


def _prompt_numbers(behaviour: Behaviour, count: int) -> tuple[int, ...]:
    """Units of one prompt share its number."""
    if not isinstance(behaviour, PairBehaviour):
        return tuple(range(count))
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(pair[0], len(numbers)) for pair in behaviour.pairs)


def _by_prompt(
    values: Float[np.ndarray, " unit"] | Bool[np.ndarray, " unit"], prompts: Sequence[int]
) -> Float[np.ndarray, " prompt"]:
    """Mean over the units of each prompt."""
    of = np.array(prompts)
    return np.array([values[of == i].mean() for i in np.unique(of)], dtype=np.float64)


__all__ = ["COEFFICIENTS", "Steerability", "from_values", "steerability"]
