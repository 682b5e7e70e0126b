"""Is an agreement of directions more than chance? The labels of the pairs that they were fitted to, shuffled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import Row, capture
from sims_lens.adapter import adapt
from sims_lens.behaviour import PairBehaviour, TextPair, encode_pairs
from sims_lens.checks import check_dimensions, check_kind, check_list, check_seed, shown
from sims_lens.errors import ConfigError, FitError, PromptError, RunError
from sims_lens.estimators import unit
from sims_lens.hooks import steering
from sims_lens.run import Run
from sims_lens.scope import TokenScope
from sims_lens.stats import holm
from sims_lens.store import Folder

if TYPE_CHECKING:
    import pandas as pd

_SHARE = 0.95
_SAME_MODEL = 0.98
"""Median cosine over layers, at the least, of a run's mean differences as they were fitted and as read again."""


_TIE = 1e-9
"""A shuffle that gives the labels as they are has the same cosine up to rounding; it counts."""


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """Is the cosine of a mean difference with a direction larger than shuffled labels give? One test per layer.

    Args:
        layers: that were tested.
        cosine: of the mean difference with the direction.
        band: the 95th percentile of its magnitude under shuffled labels.
        one_sided: p of a cosine at least as high.
        two_sided: p of a magnitude at least as high.
        holm: ``two_sided``, adjusted for the number of layers (Holm 1979).
        permutations: shuffles; no p can be below 1 / (1 + permutations).
    """

    layers: tuple[int, ...]
    cosine: Float[Tensor, " layer"] = field(repr=False)
    band: Float[Tensor, " layer"] = field(repr=False)
    one_sided: Float[Tensor, " layer"] = field(repr=False)
    two_sided: Float[Tensor, " layer"] = field(repr=False)
    holm: Float[Tensor, " layer"] = field(repr=False)
    permutations: int

    def table(self) -> "pd.DataFrame":
        """One row per layer."""
        import pandas as pd

        names = ("cosine", "band", "one_sided", "two_sided", "holm")
        return pd.DataFrame(
            {name: getattr(self, name).tolist() for name in names}, index=pd.Index(self.layers, name="layer")
        )


def permutation_p(
    differences: Float[Tensor, "pair layer d_model"],
    reference: Float[Tensor, "layer d_model"],
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> PermutationTest:
    """Is the cosine of a mean difference with a direction larger than shuffled labels give?

    Better and worse text are swapped in each pair at random, in the same pairs at every layer, and the cosine is taken
    again; ``p = (1 + as extreme ones) / (1 + permutations)``. The test is exact if, were there nothing to find, either
    order of a pair would be as likely, whatever the direction; so the direction must not be fitted to the same pairs.

    Args:
        differences: activations of the better text less those of the worse one.
        reference: the direction that it is compared with, kept as it is.
        permutations: how many.
        seed: of the swaps.

    Raises:
        FitError: there are no pairs, or shapes differ.

    Reference: Phipson & Smyth 2010, "Permutation p-values should never be zero"; Holm 1979.
    """
    check_dimensions("differences", differences, 3, FitError)
    check_dimensions("reference", reference, 2, FitError)
    check_seed(seed)
    if len(differences) < 1 or differences.shape[1:] != reference.shape:
        raise FitError(
            f"differences [pair, layer, d_model] and a reference [layer, d_model] are needed; got "
            f"{list(differences.shape)} and {list(reference.shape)}"
        )
    if type(permutations) is not int or permutations < 1:
        raise ConfigError(f"permutations must be an integer of at least 1, got {permutations!r}")
    generator = torch.Generator().manual_seed(seed)
    pairs = len(differences)
    signs = torch.randint(0, 2, (permutations, pairs), generator=generator).double() * 2 - 1
    signs = torch.cat([torch.ones(1, pairs, dtype=torch.float64), signs])
    cosines = []
    axes = unit(reference.detach().double().cpu())
    for rows, axis in zip(differences.detach().double().cpu().unbind(1), axes, strict=True):
        gram = rows @ rows.T  # the norm of a signed sum needs no sum of d_model values
        norms = ((signs @ gram) * signs).sum(-1).clamp(min=0).sqrt()
        cosines.append(torch.where(norms > 0, (signs @ (rows @ axis)) / norms, 0.0))
    found = torch.stack(cosines, dim=1)
    return tested(tuple(range(len(reference))), found[0], found[1:])


def pair_differences(
    model: Any,
    pairs: Sequence[TextPair],
    *,
    site: str = "resid_post",
    scope: TokenScope | str = "response",
    batch_rows: int = 32,
) -> Float[Tensor, "pair layer d_model"]:
    """Activations of each pair's better text less those of its worse one, averaged over the tokens in scope.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, as it is now.
        pairs: (prompt, better text, worse text).
        site: where in every block.
        scope: which tokens are averaged.
        batch_rows: texts in one forward pass.

    Raises:
        PromptError: there are no pairs, or a text is longer than the context.
    """
    if not isinstance(pairs, PairBehaviour):
        check_list("pairs", pairs, "[('Say a.', 'better', 'worse')]", PromptError)
    if not pairs:
        raise PromptError(f"there are no pairs, {pairs!r}; give (prompt, better text, worse text)")
    for index, pair in enumerate(pairs := getattr(pairs, "pairs", pairs)):
        if not (isinstance(pair, (tuple, list)) and len(pair) == 3 and all(isinstance(text, str) for text in pair)):
            raise PromptError(f"pair {index} is not (prompt, better text, worse text): {shown(pair)}")
    prompts, texts = encode_pairs(adapt(model), pairs)
    rows = [(prompts[prompt], texts[text]) for prompt, *both in pairs for text in both]
    means = capture(model, rows, site=site, scope=scope, batch_rows=batch_rows).means
    return means[0::2] - means[1::2]


def run_differences(model: Any, run: Run, iteration: int) -> Float[Tensor, "pair layer d_model"]:
    """The paired differences that an iteration of a run was fitted to, read again as the loop read them: with the plan
    before that iteration attached.

    Args:
        model: the run's model, unsteered.
        run: the run.
        iteration: counted from 1.

    Raises:
        RunError: there is no such iteration, or the mean of what was read is not what the run has.
    """
    check_kind("run", run, Run, "open one with sims_lens.open_run(path)", RunError)
    if type(iteration) is not int or not 1 <= iteration <= len(run.iterations):
        raise RunError(f"iteration {iteration!r} is not one of the finished ones, 1..{len(run.iterations)}")
    adapter, turn = adapt(model), run.iterations[iteration - 1]
    if (adapter.n_layers, adapter.d_model) != tuple(turn.vectors.shape):
        raise RunError(
            f"the run is of {run.model.model} with [layer, d_model] = {list(turn.vectors.shape)}, {adapter.name} has "
            f"{[adapter.n_layers, adapter.d_model]}; give the run's model"
        )
    chosen = Folder(turn.path).read_rows("pairs")
    drawn: dict[tuple[int, int, int], tuple[int, ...]] = {}
    for t in {int(row[f"{side}_iteration"]) or iteration for row in chosen for side in ("best", "worst")}:
        drawn |= {(t, s.prompt, s.draw): s.tokens for s in run.samples(t, "train")}
    encoded = {row["prompt"]: adapter.encode(run.prompts[row["prompt"]]) for row in chosen}
    rows: list[Row] = [
        (encoded[row["prompt"]], drawn[int(row[f"{side}_iteration"]) or iteration, row["prompt"], row[side]])
        for row in chosen
        for side in ("best", "worst")
    ]
    with steering(model, run.before(iteration)):
        means = capture(model, rows, site=run.config.steering.site).means
    differences = means[0::2] - means[1::2]
    agreement = float(torch.cosine_similarity(differences.mean(0), turn.vectors.float(), dim=-1).median())
    if not agreement >= _SAME_MODEL:
        raise RunError(
            f"{adapter.name} does not give the activations of the run, which is of {run.model.model}: the mean "
            f"difference of iteration {iteration} has a cosine of {agreement:.2f} with the run's; load that model"
        )
    return differences


def tested(
    layers: tuple[int, ...], cosine: Float[Tensor, " layer"], null: Float[Tensor, "permutation layer"]
) -> PermutationTest:
    """Cosines held against those that shuffled labels gave.

    Args:
        layers: what the cosines are of.
        cosine: with the labels as they are.
        null: with shuffled ones.
    """
    count = len(null)
    one = (1 + (null >= cosine - _TIE).sum(0)) / (1 + count)
    two = (1 + (null.abs() >= cosine.abs() - _TIE).sum(0)) / (1 + count)
    return PermutationTest(
        layers=layers,
        cosine=cosine.float(),
        band=null.abs().quantile(_SHARE, dim=0).float(),
        one_sided=one,
        two_sided=two,
        holm=torch.tensor(holm(two.tolist()), dtype=two.dtype),
        permutations=count,
    )


__all__ = ["PermutationTest", "pair_differences", "permutation_p", "run_differences", "tested"]
