"""Plans on the hub: the round trip through a hub made of folders, the card, and errors that name the remedy."""

import hashlib
import re
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from common import plan_of, vector
from huggingface_hub import errors

import sims_lens as sims
from sims_lens.errors import PlanError
from sims_lens.hub import FILE, from_hub, model_card, push_to_hub
from sims_lens.plan import NOTHING, Provenance, SteeringPlan
from sims_lens.transforms import Clamp, Gated

TOKEN = "hf_" + "Z" * 34
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ORIGIN = Provenance("org/tiny-llama", COMMIT, "none", 3, 32, "improve, iteration 3", "c0ffee")
PLAN = plan_of(1, 2, provenance=ORIGIN, units="residual_norm", residual_norms={1: 12.5})


class FakeHub:
    """Repositories in folders: ``owner/name/branch/commit/file``, and a record of what was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[Any, ...]] = []

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.asked.append(("repo", repo_id, private))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.asked.append(("branch", branch))
        (self.root / repo_id / branch).mkdir(exist_ok=exist_ok)

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        files = {o.path_in_repo: o.path_or_fileobj for o in operations}
        contents = {name: f if isinstance(f, bytes) else Path(f).read_bytes() for name, f in files.items()}
        self.asked.append(("commit", commit_message, sorted(contents)))
        branch = self.root / repo_id / (revision or "main")
        oid = hashlib.sha1(b"".join(contents.values()), usedforsecurity=False).hexdigest()
        (branch / oid).mkdir()
        for name, content in contents.items():
            (branch / oid / name).write_bytes(content)
        (branch / "HEAD").write_text(oid)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{oid}")

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None) -> str:
        self.asked.append(("download", filename, revision))
        if commits := [found for found in (self.root / repo_id).glob(f"*/{revision}") if found.is_dir()]:
            return str(commits[0] / filename)
        branch = self.root / repo_id / (revision or "main")
        return str(branch / (branch / "HEAD").read_text() / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "create_branch", "create_commit", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(fake, name))
    return fake


def bits(plan: SteeringPlan) -> list[Any]:
    return [
        (i.describe(), {name: t.view(torch.int32).tolist() for name, t in i.transform.tensors().items()})
        for i in plan.interventions
    ]


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_pushed_plan_comes_back_bit_for_bit_and_says_from_where(hub: FakeHub) -> None:
    url = push_to_hub(PLAN, "me/kinder", private=True)
    back = from_hub("me/kinder")
    assert bits(back) == bits(PLAN)
    commit = url.rsplit("/", 1)[1]
    assert back.provenance.source == f"improve, iteration 3 (hub: me/kinder@{commit})"
    assert back.provenance.model == "org/tiny-llama" and back.provenance.config == "c0ffee"
    assert hub.asked == [
        ("repo", "me/kinder", True),
        ("commit", "Add a steering plan", ["README.md", FILE]),
        ("download", FILE, None),
    ]
    folder = hub.root / "me/kinder/main" / commit
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(PLAN, repo_id="me/kinder")


def test_revisions(hub: FakeHub) -> None:
    first = push_to_hub(PLAN, "me/kinder").rsplit("/", 1)[1]
    push_to_hub(2.0 * PLAN, "me/kinder", message="Twice as strong")
    push_to_hub(-PLAN, "me/kinder", revision="reversed")
    assert ("branch", "reversed") in hub.asked and ("commit", "Twice as strong", ["README.md", FILE]) in hub.asked
    assert ("repo", "me/kinder", None) in hub.asked  # not False: an owner's own default is left alone
    assert bits(from_hub("me/kinder")) == bits(2.0 * PLAN)
    assert bits(from_hub("me/kinder", revision="reversed")) == bits(-PLAN)
    assert bits(from_hub("me/kinder", revision=first)) == bits(PLAN)


def test_a_plan_without_a_source_gets_one(hub: FakeHub) -> None:
    commit = push_to_hub(plan_of(1), "me/kinder").rsplit("/", 1)[1]
    assert from_hub("me/kinder").provenance == Provenance(source=f"hub: me/kinder@{commit}")


def test_a_damaged_file_on_the_hub_is_refused(hub: FakeHub) -> None:
    commit = push_to_hub(PLAN, "me/kinder").rsplit("/", 1)[1]
    file = hub.root / "me/kinder/main" / commit / FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PlanError, match=f"me/kinder/main/{commit}/{FILE} is not a readable safetensors file"):
        from_hub("me/kinder")


def test_a_plan_that_cannot_be_saved_asks_the_hub_nothing(hub: FakeHub) -> None:
    with pytest.raises(PlanError, match="must have one size"):
        push_to_hub(PLAN + SteeringPlan.addition({0: vector(size=4)}), "me/kinder")
    assert hub.asked == []


# --- errors -----------------------------------------------------------------------------------------------------------


def http(kind: type[Exception], status: int = 404) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status}\nfor Bearer {TOKEN}", response=response)  # type: ignore[call-arg]


ERRORS: list[tuple[Exception, str]] = [
    (http(errors.GatedRepoError, 403), "it is gated; ask for access at https://huggingface.co/me/kinder and log in"),
    (http(errors.RepositoryNotFoundError), "there is no such repository, or it is private; check the name, or log in"),
    (http(errors.RevisionNotFoundError), "it has no such revision; look at its branches, tags and commits"),
    (http(errors.RemoteEntryNotFoundError), r"it holds no plan\.safetensors; plans are put there by sims_lens\.push"),
    (errors.LocalEntryNotFoundError(TOKEN), "the hub can't be reached, and no copy is in the cache; go online, unset"),
    (errors.OfflineModeIsEnabled(TOKEN), "HF_HUB_OFFLINE is set; unset it"),
    (errors.LocalTokenNotFoundError(TOKEN), "you are not logged in; run 'hf auth login'"),
    (errors.HFValidationError(TOKEN), "that is no name of a repository; it must be 'owner/name'"),
    (http(errors.HfHubHTTPError, 401), r"you may not \(401\); log in"),
    (http(errors.BadRequestError, 503), "the hub answered with status 503; try again later"),
    (errors.HTTPError(TOKEN), r"the hub can't be reached \(HTTPError\); check the network"),  # type: ignore[attr-defined]
    (TimeoutError(TOKEN), r"the hub can't be reached \(TimeoutError\); check the network"),
]


@pytest.mark.parametrize(("error", "message"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_errors_are_one_line_with_the_remedy_and_no_token(
    error: Exception, message: str, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    monkeypatch.setattr("huggingface_hub.create_repo", fails)
    at = " at revision 'v2'" if revision else ""
    for what, call in (
        ("read a plan from", from_hub),
        ("write the plan to", lambda *a, **k: push_to_hub(PLAN, *a, **k)),
    ):
        with pytest.raises(PlanError, match=f"^cannot {what} 'me/kinder'{at}: {message}") as caught:
            call("me/kinder", revision=revision)
        assert "\n" not in str(caught.value)
        assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own library, cut off from the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PlanError, match="cannot read a plan from 'nobody/nothing': the hub can't be reached, and no"):
        from_hub("nobody/nothing")
    with pytest.raises(PlanError, match="cannot write the plan to 'nobody/nothing': HF_HUB_OFFLINE is set"):
        push_to_hub(PLAN, "nobody/nothing")
    with pytest.raises(PlanError, match="cannot read a plan from 'a/b/c': that is no name of a repository"):
        from_hub("a/b/c")


# --- the card ---------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_the_card_says_what_the_plan_does_and_where_it_came_from() -> None:
    gated = SteeringPlan.of(
        {0: Gated(Clamp(vector(), 2.5), vector(1), 0.5)}, coefficient=0.75, site="attn_out", half_life=20.0
    )
    card = model_card(PLAN + gated, repo_id="me/kinder", license="mit")
    assert front_matter(card) == {
        "base_model": "org/tiny-llama",
        "library_name": "sims-lens",
        "license": "mit",
        "tags": ["steering-vector", "activation-steering", "transformer-lens", "sims"],
    }
    for line in (
        "# Steering plan for `org/tiny-llama`",
        "| `blocks.1.hook_resid_post` | addition | +2 x 12.5 (median residual norm) | all |",
        "| `blocks.2.hook_resid_post` | addition | +2 x median residual norm | all |",
        "| `blocks.0.hook_attn_out` | gated(clamp(value=2.5), threshold=0.5) "
        "| +0.75, half as strong after 20 generated tokens | generation |",
        f"- revision: `{COMMIT}`",
        "- n_layers: `3`",
        "- source: `improve, iteration 3`",
        'plan = sims.from_hub("me/kinder")',
        f'model = sims.load("org/tiny-llama", revision="{COMMIT}")',
        "No effect was reported with this plan: neither how well it steers, nor what else it changes.",
    ):
        assert line in card.splitlines(), line
    assert "arXiv:2507.08967" in card


def test_results_take_the_place_of_the_caveat() -> None:
    card = model_card(PLAN, results="Win rate 61% [55, 67].")
    assert "## Results\n\nWin rate 61% [55, 67].\n" in card and "No effect was reported" not in card
    assert 'plan = sims.SteeringPlan.load("plan.safetensors")' in card


@pytest.mark.parametrize(
    ("origin", "load"),
    [
        (Provenance("SmolLM2-135M-Instruct", "sha256:00"), 'sims.load("embedded")'),
        (Provenance("org/tiny", "main"), 'sims.load("org/tiny")'),
        (Provenance("tiny-llama"), 'sims.load("path/to/the/model")'),
        (Provenance(), 'sims.load("path/to/the/model")'),
        (Provenance('org/t"); import os; ("'), 'sims.load("path/to/the/model")'),
        (Provenance("org/tiny", '"); import os; ("'.ljust(40, "a")), 'sims.load("org/tiny")'),
    ],
)
def test_the_model_is_loaded_by_a_name_that_the_hub_could_have_given(origin: Provenance, load: str) -> None:
    card = model_card(plan_of(1, provenance=origin))
    assert f"model = {load}\n" in card
    assert ("base_model" in front_matter(card)) == (origin.model == "org/tiny")


def test_a_card_of_nothing() -> None:
    card = model_card(NOTHING)
    assert "The plan does not say." in card and "does not name it" in card and "`" not in card.split("## Where")[1][:30]


HOSTILE = (
    "<script>alert(1)</script>",
    "`<img src=x onerror=alert(1)>`",
    "x\n---\nlicense: other\n---\n",
    "a | b\n\n# Heading\n\n[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "``` \n</code></pre><b>bold</b> \\` \\",
    "base: 'x'\n\ttags: [evil]\r\n\u2028\x1b[31m\u202egnorw\ud800",
    "org/x: y #{anchor}",
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_of_a_plan_are_no_markup(text: str) -> None:
    origin = Provenance(model=text, revision=text, weight_processing=text, source=text, config=text)
    card = model_card(plan_of(1, provenance=origin), repo_id="me/kinder")
    assert set(front_matter(card)) == {"library_name", "tags"}
    plain = model_card(plan_of(1, provenance=Provenance("x", "x", "x", 0, 0, "x", "x")), repo_id="me/kinder")
    assert re.sub(r"`[^`\n]+`", "`x`", card) == re.sub(r"`[^`\n]+`", "`x`", plain)  # all of it is in code spans
    assert card.encode("utf-8") and all(c.isprintable() or c == "\n" for c in card)


def test_the_code_on_the_card_works(llama: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plan = plan_of(1, provenance=Provenance(llama.sims_source["model"]))
    asked: list[str] = []
    monkeypatch.setattr(sims, "from_hub", lambda name: asked.append(name) or plan, raising=False)
    monkeypatch.setattr(sims, "load", lambda name: asked.append(name) or llama)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(plan, repo_id="me/kinder"), re.DOTALL)
    exec(compile(code, "card", "exec"), {})
    assert asked == ["me/kinder", "path/to/the/model"] and "Tell me about the sea." in capsys.readouterr().out
