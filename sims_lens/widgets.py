"""A console for Jupyter: turn a direction up and down, move it to another layer, and read what the model says.

:class:`Console` does the work and knows no widgets; :func:`console` puts sliders and a prompt box on it.
"""

import html
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import residual_norms
from sims_lens.adapter import adapt, check_lengths
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.analysis.tokens import TokenScores, token_scores
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import PlanError, SimsError
from sims_lens.estimators.quality import LEAST_PAIRS
from sims_lens.evaluate import side_effects
from sims_lens.hooks import check_fits, check_unsteered
from sims_lens.plan import NOTHING, Intervention, SteeringPlan
from sims_lens.prompts import check_prompts
from sims_lens.run import Run
from sims_lens.sampling import LocalSampler
from sims_lens.sites import check_layer
from sims_lens.supervised import STRENGTH, SteeringFit
from sims_lens.transforms import Addition, unit_direction

STRONGEST: Final = 0.5
STEP: Final = 0.02
_KEPT: Final = 64
_LONGEST: Final = 200
_SHOWN: Final = 300


@dataclass(frozen=True, eq=False)
class ConsoleView:
    """What the model says to a prompt, unsteered and steered.

    Args:
        prompt: what was asked.
        plan: what the model was steered with.
        layer: where.
        coefficient: how strongly, in multiples of the median residual norm there.
        base: the unsteered response, with its NLL.
        steered: the steered response, with its NLL under the base model and the KL from it.
        scores: how far the stream lies along the direction at each token of the steered response; None where it has
            no tokens.
    """

    prompt: str
    plan: SteeringPlan = field(repr=False)
    layer: int
    coefficient: float
    base: Sample
    steered: Sample
    scores: TokenScores | None = field(repr=False)

    def _repr_html_(self) -> str:
        steered = f"layer {self.layer}, {self.coefficient:+.2f} &times; median residual norm"
        heat_map = "" if self.scores is None else f'<div style="margin-top:1em">{self.scores._repr_html_()}</div>'
        return (
            '<div style="font-family:system-ui,sans-serif;line-height:1.5;color:inherit">'
            '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:1em">'
            f"{_answer('Unsteered', '', self.base)}{_answer('Steered', steered, self.steered)}</div>{heat_map}</div>"
        )


class Console:
    """Steers a model with one direction per layer, and keeps the unsteered responses. It knows no widgets.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: a :class:`~sims_lens.run.Run` or :class:`~sims_lens.supervised.SteeringFit` has a direction for each
            layer that it was fitted at. A :class:`~sims_lens.plan.SteeringPlan` has that of the layers which it steers;
            any other layer gets the direction of the nearest of those. What is added is always
            ``coefficient * (median residual norm of the layer) * (unit direction)``.
        sampling: how responses are drawn.
        seed: of the sampling; unsteered and steered responses are drawn with the same random numbers.

    Raises:
        PlanError: the source has no direction to add, or does not fit the model.
        RunError: the run has no finished iteration.
    """

    def __init__(
        self,
        model: Any,
        source: Run | SteeringFit | SteeringPlan,
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.sampling, self.seed = model, sampling or SamplingConfig(), seed
        check_unsteered(model)
        self._adapter = adapt(model)
        self._plan = _plan_of(source)
        self._moves = isinstance(source, SteeringPlan)
        check_fits(self._adapter, self._plan)
        self._first = self._plan.interventions[0]
        self._directions = _directions(source, self._plan)
        self._norms: dict[int, float] = {}
        self._unsteered: dict[tuple[str, SamplingConfig], Sample] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that can be steered: every one where the source is a plan, else those with a direction."""
        return tuple(range(self._adapter.n_layers)) if self._moves else self._directions.layers

    @property
    def start(self) -> tuple[int, float]:
        """Layer and coefficient (in multiples of the median residual norm) of the source's own plan, at its first."""
        layer = self._first.layer
        return layer, round(self._lengths[layer] / self.norm(layer), 6)

    @property
    def _lengths(self) -> dict[int, float]:
        """Signed length of what the plan adds at each of its layers, along the console's direction, absolute."""
        found: dict[int, float] = {}
        for i in self._plan.interventions:
            strength = i.coefficient * self.norm(i.layer) if i.units == "residual_norm" else i.strength
            along = float(i.transform.tensors()["vector"].float() @ self.direction(i.layer))
            found[i.layer] = found.get(i.layer, 0.0) + strength * along
        return found

    def __repr__(self) -> str:
        return (
            f"Console of {self._directions.name} on {self._adapter.name}, layers {self.layers[0]} to {self.layers[-1]}"
        )

    def direction(self, layer: int) -> Float[Tensor, " d_model"]:
        """The unit direction that is added at a layer.

        Raises:
            PlanError: there is no such layer, or no direction for it.
        """
        check_layer(layer, self._adapter.n_layers, self._adapter.name)
        if self._moves:
            nearest = min(self._directions.layers, key=lambda own: (abs(own - layer), own))
            return unit_direction(self._directions.at(nearest), "the plan's direction")
        return unit_direction(self._directions.at(layer), f"the direction of layer {layer}")

    def norm(self, layer: int) -> float:
        """The median residual norm at a layer, first position left out: what a coefficient is counted in.

        It is the source's own where that is known, so that the console steers as the source's plan does; it is measured
        on the packaged prompts otherwise.
        """
        known = {i.layer: i.residual_norm for i in self._plan.interventions if i.residual_norm is not None}
        if layer in known:
            return known[layer]
        norms = self._directions.residual_norm
        if norms is not None and layer in self._directions.layers:
            norm = float(norms[self._directions.layers.index(layer)])
            if math.isfinite(norm) and norm > 0:
                return norm
        if not self._norms:
            self._norms = residual_norms(self.model, site=self._directions.site)
        return self._norms[layer]

    def plan(self, layer: int, coefficient: float) -> SteeringPlan:
        """The plan that steers so: the source's site, tokens and decay, at one layer.

        Args:
            layer: one of :attr:`layers`.
            coefficient: in multiples of the median residual norm there.

        Raises:
            PlanError: there is no direction for the layer, or the coefficient is not finite.
        """
        made = Intervention(
            layer,
            self._directions.site,
            Addition(self.direction(layer)),
            coefficient,
            units="residual_norm",
            scope=self._first.scope,
            residual_norm=self.norm(layer),
            half_life=self._first.half_life,
        )
        return SteeringPlan((made,), self._plan.provenance)

    def steer(self, layer: int, coefficient: float, prompt: str, *, tokens: int | None = None) -> ConsoleView:
        """Ask the model, unsteered and steered, with the same random numbers.

        Args:
            layer: one of :attr:`layers`.
            coefficient: in multiples of the median residual norm there.
            prompt: what to ask.
            tokens: longest response; that of the sampling where None.

        Raises:
            PlanError: there is no direction for the layer, or the coefficient is not finite.
            PromptError: the prompt is empty, or too long for the context.
        """
        check_prompts([prompt])
        sampling = self.sampling if tokens is None else replace(self.sampling, max_new_tokens=tokens)
        check_lengths(self._adapter, [prompt], sampling.max_new_tokens)
        plan = self.plan(layer, coefficient)
        base = self._base(prompt, sampling)
        steered = base if coefficient == 0 else self._draw(prompt, plan, sampling)
        scores = None
        if steered.text:
            at = Directions(
                name="the direction",
                layers=(layer,),
                vectors=self.direction(layer)[None],
                site=self._directions.site,
                residual_norm=torch.tensor([self.norm(layer)]),
            )
            scores = token_scores(self.model, (prompt, steered.text), at, layer=layer, plan=plan)
        return ConsoleView(prompt, plan, layer, coefficient, base, steered, scores)

    def _base(self, prompt: str, sampling: SamplingConfig) -> Sample:
        key = prompt, sampling
        if key not in self._unsteered:
            drawn = self._draw(prompt, NOTHING, sampling)
            while len(self._unsteered) >= _KEPT:
                del self._unsteered[next(iter(self._unsteered))]
            self._unsteered[key] = drawn
        return self._unsteered[key]

    def _draw(self, prompt: str, plan: SteeringPlan, sampling: SamplingConfig) -> Sample:
        drawn = list(LocalSampler(self.model, sampling).sample([prompt], n=1, plan=plan, seed=self.seed))
        return side_effects(self.model, [prompt], drawn, plan)[0]


def _plan_of(source: Any) -> SteeringPlan:
    """The source's own plan, of additions at one site."""
    if not isinstance(source, (Run, SteeringFit, SteeringPlan)):
        raise PlanError(f"a console takes a SteeringPlan, a SteeringFit or a Run, got {type(source).__name__}")
    if isinstance(source, SteeringFit):
        found = source.plan((source.best() if source.pairs >= LEAST_PAIRS else source.layers)[0])
        found = replace(found, interventions=tuple(_added(i, source) for i in found.interventions))
    else:
        found = source.plan if isinstance(source, Run) else source
    if not found.interventions:
        raise PlanError("the plan steers nothing, so there is no direction to turn up; give one with an intervention")
    other = [i for i in found.interventions if not isinstance(i.transform, Addition)]
    if other:
        raise PlanError(f"{other[0].describe()} adds no vector; use plan.using(sims.Addition) to add its direction")
    if len({i.site for i in found.interventions}) > 1:
        raise PlanError("the plan steers several sites; give a console one of them")
    return found


def _added(i: Intervention, fitted: SteeringFit) -> Intervention:
    """The intervention itself; the direction of one that is no addition, to be added at the usual strength."""
    if isinstance(i.transform, Addition):
        return i
    norm = float(fitted.residual_norm[fitted.layers.index(i.layer)])
    direction = getattr(i.transform, "direction", None)
    if direction is None:
        raise PlanError(f"{i.describe()} has no direction to add")
    known = norm if math.isfinite(norm) and norm > 0 else None
    return Intervention(
        i.layer, i.site, Addition(direction), STRENGTH, units="residual_norm", scope=i.scope, residual_norm=known
    )


def _directions(source: Any, plan: SteeringPlan) -> Directions:
    """A direction for each layer that the source has one for."""
    if isinstance(source, SteeringPlan):
        found: dict[int, Tensor] = {}
        weights = {i.layer: i for i in reversed(plan.interventions)}
        for layer, first in weights.items():
            at = [i for i in plan.interventions if i.layer == layer]
            if len(at) == 1:  # its sign stays in the coefficient, where the user put it
                found[layer] = first.transform.tensors()["vector"].float()
            else:
                (of_plan,) = directions_of(replace(plan, interventions=tuple(at)))
                found[layer] = of_plan.vectors[0]
        layers = tuple(sorted(found))
        return Directions(
            "the plan", layers, torch.stack([found[layer] for layer in layers]), plan.interventions[0].site
        )
    several = directions_of(source)
    last = several[-1]
    if isinstance(source, Run) and source.config.steering.compose == "accumulate":
        units = [d.vectors / d.vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12) for d in several]
        shares = source.best.coefficients if source.best else [1.0] * len(units)
        parts = [share * unit for share, unit in zip(shares, units, strict=False)]
        return replace(last, name="the run", vectors=torch.stack(parts).sum(0))
    return replace(last, name="the run" if isinstance(source, Run) else "the fit")


# The widgets


def console(
    model: Any,
    plan: Run | SteeringFit | SteeringPlan,
    *,
    prompt: str = "Tell me about the sea.",
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Any:
    """A console in a notebook: sliders for layer, coefficient and length, a prompt box, the unsteered and the steered
    response side by side, and below them how far each token lies along the direction.

    Letting go of a slider asks again. What goes wrong (a prompt that is too long, say) is said in one line.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plan: a plan, a fit or a run; see :class:`Console`. The sliders start where its own plan is.
        prompt: what is asked first.
        sampling: how responses are drawn.
        seed: of the sampling.

    Returns:
        An ``ipywidgets.VBox``, which a notebook shows where it is the last line of a cell.

    Raises:
        SimsError: ipywidgets is not installed.
        PlanError: the plan has no direction to add, or does not fit the model.
        RunError: the run has no finished iteration.
    """
    try:
        widgets: Any = importlib.import_module("ipywidgets")
    except ImportError as error:
        raise SimsError(
            f"the console needs the package ipywidgets ({error}): pip install 'sims-lens[jupyter]'"
        ) from error
    return _Panel(Console(model, plan, sampling=sampling, seed=seed), prompt, widgets).box


class _Panel:
    """The widgets around a console."""

    def __init__(self, console: Console, prompt: str, widgets: Any) -> None:
        self.console = console
        layer, coefficient = console.start
        reach = max(STRONGEST, math.ceil(abs(coefficient) * 10) / 10)
        tokens = console.sampling.max_new_tokens
        wide = {"layout": widgets.Layout(width="98%"), "style": {"description_width": "90px"}}
        released = {"continuous_update": False, **wide}
        self.prompt = widgets.Textarea(value=prompt, description="prompt", rows=2, **wide)
        self.layer = widgets.SelectionSlider(options=console.layers, value=layer, description="layer", **released)
        self.coefficient = widgets.FloatSlider(
            value=coefficient, min=-reach, max=reach, step=STEP, readout_format="+.2f", description="coefficient",
            **released,
        )  # fmt: skip
        longest = max(tokens, _LONGEST)
        self.tokens = widgets.IntSlider(value=tokens, min=1, max=longest, description="tokens", **released)
        self.button = widgets.Button(description="Generate", button_style="primary")
        self.status, self.output = widgets.HTML(), widgets.HTML()
        self.controls = (self.prompt, self.layer, self.coefficient, self.tokens, self.button)
        self.box = widgets.VBox([*self.controls, self.status, self.output], layout=widgets.Layout(max_width="900px"))
        self.button.on_click(lambda _button: self.generate())
        for slider in (self.layer, self.coefficient, self.tokens):
            slider.observe(lambda _change: self.generate(), names="value")
        self.generate()

    def generate(self) -> None:
        """Ask as the controls say, and show the answer, or in one line what went wrong."""
        with self._busy():
            try:
                view = self.console.steer(
                    self.layer.value, self.coefficient.value, self.prompt.value, tokens=self.tokens.value
                )
            except Exception as error:  # an exception in a widget's callback is shown to nobody
                self.output.value = ""  # an old answer beside new sliders would be taken for theirs
                self.status.value = f'<span role="alert">{html.escape(_line(error))}</span>'
            else:
                self.output.value, self.status.value = view._repr_html_(), ""

    @contextmanager
    def _busy(self) -> Iterator[None]:
        for control in self.controls:
            control.disabled = True
        self.status.value = "Generating &hellip;"
        try:
            yield
        finally:
            for control in self.controls:
                control.disabled = False


def _answer(title: str, about: str, sample: Sample) -> str:
    """One response with its figures; ``about`` is HTML."""
    figures = [f"{name} {value:.2f}" for name, value in (("NLL", sample.nll), ("KL", sample.kl)) if value is not None]
    text = html.escape(sample.text) + ("" if sample.ended else '<span style="opacity:.6">&hellip;</span>')
    shown = text or '<span style="opacity:.6">(empty)</span>'
    return (
        f'<div style="border:1px solid rgba(122,125,130,.55);border-radius:6px;padding:.6em .8em">'
        f'<div><b>{title}</b> <span style="opacity:.75">{about}</span></div>'
        f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;margin:.4em 0">{shown}</div>'
        f'<div style="opacity:.75;font-size:.9em">{", ".join(figures)} nats per token; {len(sample.tokens)} tokens'
        "</div></div>"
    )


def _line(error: Exception) -> str:
    """What an error says, in one line of a bearable length."""
    said = " ".join(str(error).split())
    text = said if isinstance(error, SimsError) else f"{type(error).__name__}: {said}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


__all__ = ["Console", "ConsoleView", "console"]
