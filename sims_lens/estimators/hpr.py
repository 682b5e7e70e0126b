"""Fitting a Householder pseudo-rotation: per layer a probe without bias and a net for the angle, on token pairs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, gelu

from sims_lens.checks import check_integer, check_seed, is_number, shown
from sims_lens.errors import ConfigError, FitError
from sims_lens.transforms import HPR

# As published, and nothing that a user would turn.
_ANGLE_LAYERS = 4
_WARMUP = 0.05
_MAX_GRADIENT_NORM = 1.0
_IDENTICAL = 0.75
_COSINE_LIMIT = 1 - 1e-7

_EVALUATION_ROWS = 256
"""Pairs that are evaluated at once; bounds memory and changes no result."""


@dataclass(frozen=True, eq=False)
class HPRReport:
    """Fitted layers, and how well each does on the validation pairs.

    Args:
        transforms: one per layer of the activations, in their order.
        accuracy: share of validation activations that the probe puts on the right side; 0.5 is chance.
        angle_error: root mean square error of the predicted angle on the same activations, in radians.
        epochs: which epoch's parameters were kept, counted from 1.
    """

    transforms: tuple[HPR, ...]
    accuracy: Float[Tensor, " layer"]
    angle_error: Float[Tensor, " layer"]
    epochs: tuple[int, ...]


def top_layers(accuracy: Float[Tensor, " layer"], count: int = 5) -> tuple[int, ...]:
    """Which layers to edit: those of the most accurate probes, ascending; of equal ones the earlier.

    Reference: Pham & Nguyen 2024 edit the top 5; their script's own default is 8.

    >>> top_layers(torch.tensor([0.5, 0.9, 0.7, 0.9]), count=2)
    (1, 3)
    """
    order = torch.argsort(accuracy, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


@dataclass(frozen=True)
class HouseholderRotation:
    """Householder pseudo-rotation (HPR): turn negative activations to the positive side, by a learned angle.

    Per layer: a probe ``p(a) = sigmoid(w·a)``, trained to tell positive from negative activations, and an angle net
    ``gamma(a) = pi * sigmoid(MLP(a))`` of widths d, d/2, d/4, d/8, 1 with exact GELUs, trained to predict the angle
    between a and its positive counterpart (0 for positive ones). The loss is their binary cross-entropy plus the mean
    squared error. What is fitted acts as :class:`sims_lens.transforms.HPR`.

    Reference: Pham & Nguyen, "Householder Pseudo-Rotation", EMNLP 2024 (arXiv 2409.10053), section 3 and their
        implementation (github.com/VinAIResearch/HPR), whose optimiser (AdamW without weight decay, a linear schedule
        with 5% warm-up, gradients clipped at norm 1), initialisation and batches (16 pairs of *tokens*, not of
        responses) are the defaults here. As there, a pair of which 75% of the entries are identical is left out at
        that layer. Deviations:

        - Every layer is trained as the published code trains one target layer: its gradient is clipped and its epoch
          chosen by its own. The published run over all layers clips their common gradient and keeps the one epoch
          with the best accuracy averaged over layers.
        - Of epochs that are equally accurate the one with the smaller angle error is kept, not the first: where a
          probe is perfect at once, that would be an angle net trained for one epoch.
        - The cross-entropy is computed from logits. The value is the same, but it still has a gradient where the
          sigmoid rounds to 0 or 1.
        - The published split is by question. Here validation is one run of neighbouring pairs (it may wrap around
          the end), placed by the seed: tokens of a response stay together if their pairs do.

    Args:
        learning_rate: the highest one, after the warm-up.
        epochs: passes over the training pairs.
        batch_size: token pairs per step.
        validation_share: of the pairs; they choose the epoch and say how good each layer is.
        seed: of the split, the initial parameters and the order; the same for every layer.
    """

    name: ClassVar[str] = "hpr"
    reads: ClassVar[str] = "tokens"

    learning_rate: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    validation_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.learning_rate) or not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be a positive number, got {shown(self.learning_rate)}")
        if not is_number(self.validation_share) or not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must be between 0 and 1, got {shown(self.validation_share)}")
        for name in ("epochs", "batch_size"):
            check_integer(name, getattr(self, name))
        check_seed(self.seed)

    def fit(self, positive: Float[Tensor, "pair d_model"], negative: Float[Tensor, "pair d_model"]) -> HPR:
        """The transform of one layer; see :meth:`fit_report`."""
        _check(positive, negative, dimensions=2)
        return self.fit_report(positive[:, None], negative[:, None]).transforms[0]

    def fit_layers(
        self, positive: Float[Tensor, "pair layer d_model"], negative: Float[Tensor, "pair layer d_model"]
    ) -> tuple[HPR, ...]:
        """One transform per layer; see :meth:`fit_report`."""
        return self.fit_report(positive, negative).transforms

    def fit_report(
        self, positive: Float[Tensor, "pair layer d_model"], negative: Float[Tensor, "pair layer d_model"]
    ) -> HPRReport:
        """Fit every layer at once, on the device of the activations; a layer's result does not depend on the others.

        Works under ``torch.no_grad`` and ``torch.inference_mode`` as well; no global random state is read or moved.

        Args:
            positive: activations of the better responses' tokens.
            negative: of the worse ones', row by row the counterpart. Rows of one response belong next to each other.

        Raises:
            FitError: fewer than two pairs, shapes that differ, values that are not finite, a layer where no training
                or no validation pair differs, or training that diverged.
        """
        _check(positive, negative, dimensions=3)
        with torch.inference_mode(False), torch.enable_grad():
            return self._fit(positive.detach(), negative.detach())

    def _fit(self, positive: Tensor, negative: Tensor) -> HPRReport:
        pairs, layers, d_model = positive.shape
        generator = torch.Generator().manual_seed(self.seed)
        validation, training = _split(pairs, self.validation_share, generator)
        for rows, what in ((training, "training"), (validation, "validation")):
            batches = _batches(positive, negative, torch.split(rows, _EVALUATION_ROWS))
            usable = torch.stack([batch.weight.sum(1) for batch in batches]).sum(0)
            if bool((usable == 0).any()):
                raise FitError(
                    f"at layer {int(usable.argmin())} of the {layers} given, all {len(rows)} {what} pairs are (nearly) "
                    "identical; give more pairs, or leave the layer out"
                )

        parameters = _initial(layers, d_model, generator, positive.device)
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0, fused=True)
        steps = self.epochs * math.ceil(len(training) / self.batch_size)
        step = 0
        best = [parameter.detach().clone() for parameter in parameters]
        accuracy = torch.full((layers,), -1.0, device=positive.device)
        error, epochs = torch.full_like(accuracy, math.inf), torch.zeros_like(accuracy)
        for epoch in range(1, self.epochs + 1):
            order = training[torch.randperm(len(training), generator=generator)]
            for batch in _batches(positive, negative, torch.split(order, self.batch_size)):
                optimizer.param_groups[0]["lr"] = self.learning_rate * _schedule(step, steps)
                optimizer.zero_grad()
                _loss(parameters, batch).sum().backward()  # type: ignore[no-untyped-call]
                _clip(parameters)
                optimizer.step()
                step += 1
            found, off = _evaluate(parameters, _batches(positive, negative, torch.split(validation, _EVALUATION_ROWS)))
            better = off.isfinite() & ((found > accuracy) | ((found == accuracy) & (off < error)))
            accuracy, error = torch.where(better, found, accuracy), torch.where(better, off, error)
            epochs = torch.where(better, float(epoch), epochs)
            for kept, parameter in zip(best, parameters, strict=True):
                kept[better] = parameter.detach()[better]
        if bool((epochs == 0).any()):
            raise FitError(
                f"training diverged at layer {int(epochs.argmin())} of the {layers} given; "
                f"try a learning_rate below {self.learning_rate:g}"
            )
        return HPRReport(
            tuple(_transform([parameter[layer] for parameter in best]) for layer in range(layers)),
            accuracy.cpu(),
            error.cpu(),
            tuple(int(epoch) for epoch in epochs),
        )


class _Batch(NamedTuple):
    """Activations of some pairs at every layer, first the positive ones, then the negative ones."""

    stream: Float[Tensor, "layer row d_model"]
    label: Float[Tensor, "layer row"]
    angle: Float[Tensor, "layer row"]
    weight: Float[Tensor, "layer row"]
    """1, or 0 where the pair is left out at that layer."""


def _check(positive: Tensor, negative: Tensor, *, dimensions: int) -> None:
    for values, what in ((positive, "positive"), (negative, "negative")):
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise FitError(
                f"{what} activations must be a tensor of floats, got {getattr(values, 'dtype', type(values))}"
            )
    if positive.ndim != dimensions or positive.shape != negative.shape:
        shape = "[pair, d_model]" if dimensions == 2 else "[pair, layer, d_model]"
        raise FitError(
            f"positive and negative activations must both be {shape}, row by row counterparts; "
            f"got {list(positive.shape)} and {list(negative.shape)}"
        )
    if len(positive) < 2 or positive[0].numel() == 0:
        raise FitError(
            f"an HPR needs two pairs of activations at least, one to train and one to validate; got {len(positive)} "
            f"of shape {list(positive.shape[1:])}"
        )
    for values, what in ((positive, "positive"), (negative, "negative")):
        if not bool(torch.isfinite(values).all()):
            raise FitError(f"{what} activations hold NaN or infinite entries; capture them again in float32")


def _split(
    pairs: int, share: float, generator: torch.Generator
) -> tuple[Int[Tensor, " held_out"], Int[Tensor, " row"]]:
    """Validation and training rows; the former are neighbours, so that few responses lie in both."""
    count = min(max(1, round(share * pairs)), pairs - 1)
    rows = (torch.arange(pairs) + torch.randint(pairs, (1,), generator=generator)) % pairs
    return rows[:count], rows[count:]


def _batches(positive: Tensor, negative: Tensor, rows: Sequence[Tensor]) -> Iterator[_Batch]:
    for chosen in rows:
        index = chosen.to(positive.device)
        better, worse = (values[index].float().transpose(0, 1) for values in (positive, negative))
        cosine = cosine_similarity(better, worse, dim=-1).clamp(-_COSINE_LIMIT, _COSINE_LIMIT)
        differs = ((better == worse).float().mean(-1) < _IDENTICAL).float()
        yield _Batch(
            torch.cat([better, worse], dim=1),
            torch.cat([torch.ones_like(cosine), torch.zeros_like(cosine)], dim=1),
            torch.cat([torch.zeros_like(cosine), cosine.acos()], dim=1),
            torch.cat([differs, differs], dim=1),
        )


def _initial(layers: int, d_model: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """The probe ``[layer, 1, d]``, then weights ``[layer, out, in]`` and biases ``[layer, 1, out]`` in turn.

    As ``nn.Linear`` initialises them (uniform within 1 / sqrt(in)); the same values at every layer.
    """
    widths = [*(max(1, d_model // 2**k) for k in range(_ANGLE_LAYERS)), 1]
    shapes = [((1, d_model), d_model)]
    for width, out in pairwise(widths):
        shapes += [((out, width), width), ((1, out), width)]
    drawn = [(torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(width) for shape, width in shapes]
    return [value.to(device).repeat(layers, 1, 1).requires_grad_() for value in drawn]


def _predict(parameters: Sequence[Tensor], stream: Tensor) -> tuple[Tensor, Tensor]:
    """The probe's logits and the angles, ``[layer, row]``."""
    probe, *net = parameters
    hidden = stream
    for index, (weight, bias) in enumerate(zip(net[::2], net[1::2], strict=True)):
        hidden = torch.baddbmm(bias, gelu(hidden) if index else hidden, weight.mT)
    return torch.bmm(stream, probe.mT)[..., 0], torch.pi * torch.sigmoid(hidden)[..., 0]


def _loss(parameters: Sequence[Tensor], batch: _Batch) -> Float[Tensor, " layer"]:
    logit, angle = _predict(parameters, batch.stream)
    each = binary_cross_entropy_with_logits(logit, batch.label, reduction="none") + (angle - batch.angle).square()
    return (each * batch.weight).sum(1) / batch.weight.sum(1).clamp(min=1)


def _clip(parameters: Sequence[Tensor]) -> None:
    """Scale each layer's gradient down to the greatest norm, as ``clip_grad_norm_`` would if it were alone."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factor = (_MAX_GRADIENT_NORM / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor[:, None, None])


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up from 0, then linear decay to 0."""
    warmup = math.ceil(_WARMUP * steps)
    return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


@torch.no_grad()
def _evaluate(parameters: Sequence[Tensor], batches: Iterator[_Batch]) -> tuple[Tensor, Tensor]:
    """Accuracy of the probe and root mean square error of the angle, per layer."""
    totals = []
    for batch in batches:
        logit, angle = _predict(parameters, batch.stream)
        right = (torch.sigmoid(logit) > 0.5) == (batch.label > 0.5)
        each = torch.stack([right.float(), (angle - batch.angle).square(), torch.ones_like(angle)])
        totals.append((each * batch.weight).sum(-1))
    right, squares, count = torch.stack(totals).sum(0)
    return right / count, (squares / count).sqrt()


def _transform(parameters: Sequence[Tensor]) -> HPR:
    probe, *net = parameters
    return HPR(probe[0], tuple(net[::2]), tuple(bias[0] for bias in net[1::2]))
