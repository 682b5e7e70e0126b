"""Plans on the Hugging Face hub: one safetensors file and a model card that says what it is.

Only ``plan.safetensors`` is ever downloaded, and nothing in it is run. Who may read or write is the business of
``hf auth login``: no token passes through here.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from sims_lens.checks import check_kind
from sims_lens.errors import PlanError
from sims_lens.plan import Intervention, Provenance, SteeringPlan
from sims_lens.sites import hook_name
from sims_lens.transforms import label

FILE = "plan.safetensors"
"""The plan's name in its repository."""

_CITATION = """\
```bibtex
@article{zhu2025sims,
  title   = {Self-Improving Model Steering},
  author  = {Zhu, Rongyi and Wang, Yuhui and Jiang, Tanqiu and Liang, Jiacheng and Wang, Ting},
  journal = {arXiv preprint arXiv:2507.08967},
  year    = {2025}
}
```"""


def push_to_hub(
    plan: SteeringPlan,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add a steering plan",
    results: str | None = None,
    license: str | None = None,
) -> str:
    """Put a plan and its model card on the Hugging Face hub, in one commit.

    Args:
        plan: what to publish.
        repo_id: ``"owner/name"``; the repository is made where it isn't there yet. Its plan and its card are replaced.
        private: whether to make a new repository private, whatever its owner's default is.
        revision: the branch, made where it isn't there yet; None for the main one.
        message: of the commit.
        results: see :func:`model_card`.
        license: see :func:`model_card`.

    Returns:
        The commit's address.

    Raises:
        PlanError: the plan can't be saved, the hub can't be reached, or it doesn't let you write there.
    """
    from huggingface_hub import CommitOperationAdd, create_branch, create_commit, create_repo

    check_kind("repo_id", repo_id, str, "give one such as 'you/plan'", PlanError)
    card = model_card(plan, repo_id=repo_id, results=results, license=license)
    with tempfile.TemporaryDirectory(prefix="sims_lens_") as folder:
        file = plan.save(Path(folder) / FILE)
        with _explained("write the plan to", repo_id, revision):
            create_repo(repo_id, private=private or None, exist_ok=True)
            if revision is not None:
                create_branch(repo_id, branch=revision, exist_ok=True)
            commit = create_commit(
                repo_id,
                [CommitOperationAdd(FILE, file), CommitOperationAdd("README.md", card.encode())],
                commit_message=message,
                revision=revision,
            )
    return commit.commit_url


def from_hub(repo_id: str, *, revision: str | None = None) -> SteeringPlan:
    """Read a plan that :func:`push_to_hub` put on the Hugging Face hub.

    Args:
        repo_id: ``"owner/name"``.
        revision: branch, tag or commit; None for the newest. A commit always gives the same plan.

    Returns:
        The plan, bit for bit. The repository and the commit are added to what its provenance names as its source.

    Raises:
        PlanError: the hub can't be reached, there is no such repository, revision or plan, it isn't open to you, or
            the file is damaged.
    """
    from huggingface_hub import hf_hub_download

    check_kind("repo_id", repo_id, str, "give one such as 'you/plan'", PlanError)
    if revision is not None:
        check_kind("revision", revision, str, "give a branch, tag or commit", PlanError)
    with _explained("read a plan from", repo_id, revision):
        path = Path(hf_hub_download(repo_id, FILE, revision=revision))
    plan = SteeringPlan.load(path)
    origin = f"hub: {repo_id}@{path.parent.name}"  # snapshots/<commit>/plan.safetensors
    source = f"{plan.provenance.source} ({origin})" if plan.provenance.source else origin
    return replace(plan, provenance=replace(plan.provenance, source=source))


def model_card(
    plan: SteeringPlan,
    *,
    repo_id: str | None = None,
    results: str | None = None,
    license: str | None = None,
) -> str:
    """The README of a published plan: what it does where, where it came from, how to use it, what isn't known.

    Args:
        plan: what the card is about. Its texts are shown as they are: they are no markup.
        repo_id: where it is published; None for a file at hand.
        results: what was measured, in Markdown of your own. Without it the card says that nothing was.
        license: a hub identifier such as ``"mit"``; None to say nothing about it.

    >>> import torch
    >>> card = model_card(SteeringPlan.addition({1: torch.ones(4)}))
    >>> print(card[card.index("| hook") : card.index("## How")].strip())
    | hook point | transform | coefficient | tokens |
    |---|---|---|---|
    | `blocks.1.hook_resid_post` | addition | +1 | generation |
    """
    from huggingface_hub import ModelCardData

    check_kind("plan", plan, SteeringPlan, "see SteeringPlan.addition({layer: vector})", PlanError)
    origin = plan.provenance
    data = ModelCardData(
        base_model=origin.model if _is_hub_id(origin.model) else None,
        library_name="sims-lens",
        license=license,
        tags=["steering-vector", "activation-steering", "transformer-lens", "sims"],
    )
    known = [(f.name, getattr(origin, f.name)) for f in fields(origin) if getattr(origin, f.name)]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Steering plan for {_code(origin.model)}" if origin.model else "# Steering plan",
        "A steering plan changes what a language model writes by changing its residual stream while it runs; the "
        "model's weights stay as they are. It was saved by sims_lens, a plugin for "
        "[TransformerLens](https://github.com/TransformerLensOrg/TransformerLens).",
        "## What it does",
        "\n".join(
            [
                "| hook point | transform | coefficient | tokens |",
                "|---|---|---|---|",
                *(_row(i) for i in plan.interventions),
            ]
        ),
        "## How to use it",
        f"```python\n{_usage(origin, repo_id)}\n```",
        "The file is plain safetensors: loading it runs no code.",
        "## Where it came from",
        "\n".join(f"- {name}: {_code(str(value))}" for name, value in known) or "The plan does not say.",
        "## Results",
        results or "No effect was reported with this plan: neither how well it steers, nor what else it changes.",
        "## Before you use it",
        "\n".join(
            [
                "- It was made for one model"
                + (" and is refused on those of other names." if origin.model else ", but does not name it."),
                "- Steering changes more than it is meant to: fluency, length, other behaviours. Measure them on "
                "prompts of your own, with and without it, before you rely on it.",
                "- More is not better: with a larger coefficient text falls apart at some point.",
                "- What is said above about its origin is what the file says, and nobody has checked it.",
            ]
        ),
        "## Citation",
        "If it was made by self-improving model steering (SIMS), cite the method:",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _row(i: Intervention) -> str:
    if i.units == "absolute":
        amount = f"{i.coefficient:+g}"
    else:
        norm = "median residual norm" if i.residual_norm is None else f"{i.residual_norm:.4g} (median residual norm)"
        amount = f"{i.coefficient:+g} x {norm}"
    decay = "" if i.half_life is None else f", half as strong after {i.half_life:g} generated tokens"
    return f"| `{hook_name(i.layer, i.site)}` | {label(i.transform)} | {amount}{decay} | {i.scope.name} |"


def _usage(origin: Provenance, repo_id: str | None) -> str:
    """Python that works: nothing from a plan gets into it but a name that the hub could have given."""
    plan = f'sims.SteeringPlan.load("{FILE}")' if repo_id is None else f"sims.from_hub({json.dumps(repo_id)})"
    if origin.revision.startswith("sha256:"):
        model = 'sims.load("embedded")'
    elif not _is_hub_id(origin.model):
        model = 'sims.load("path/to/the/model")'
    elif len(origin.revision) == 40 and set(origin.revision) <= set("0123456789abcdef"):
        model = f'sims.load("{origin.model}", revision="{origin.revision}")'
    else:
        model = f'sims.load("{origin.model}")'
    return (
        f"import sims_lens as sims\n\nplan = {plan}\nmodel = {model}\nwith sims.steering(model, plan):\n"
        '    print(model.generate("Tell me about the sea.", max_new_tokens=40))'
    )


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _code(text: str) -> str:
    """A stranger's text as a code span, in which neither Markdown nor HTML means anything."""
    text = "".join(c if c.isprintable() else " " for c in text.replace("`", "'"))
    return f"`{' '.join(text.split()) or ' '}`"


@contextmanager
def _explained(what: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into one line with a remedy.

    Its texts are not passed on, nor chained: a server's answer can hold anything, a token included.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, or that of its successor

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise PlanError(f"cannot {what} {repo_id!r}{at}: {_reason(error, repo_id)}") from None


def _reason(error: Exception, repo_id: str) -> str:
    from huggingface_hub import errors

    for kind, reason in {  # the more special one first
        errors.GatedRepoError: f"it is gated; ask for access at https://huggingface.co/{repo_id} and log in",
        errors.RepositoryNotFoundError: "there is no such repository, or it is private; check the name, or log in with "
        "'hf auth login'",
        errors.RevisionNotFoundError: "it has no such revision; look at its branches, tags and commits",
        errors.RemoteEntryNotFoundError: f"it holds no {FILE}; plans are put there by sims_lens.push_to_hub",
        errors.LocalEntryNotFoundError: "the hub can't be reached, and no copy is in the cache; go online, unset "
        "HF_HUB_OFFLINE, or load a file with SteeringPlan.load(path)",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it, or write a file with plan.save(path)",
        errors.LocalTokenNotFoundError: "you are not logged in; run 'hf auth login'",
        errors.HFValidationError: "that is no name of a repository; it must be 'owner/name'",
    }.items():
        if isinstance(error, kind):
            return reason
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"you may not ({status}); log in with 'hf auth login' and a token that has the right to"
    if status is not None:
        return f"the hub answered with status {status}; try again later"
    return f"the hub can't be reached ({type(error).__name__}); check the network, then try again"
