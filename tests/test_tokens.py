"""A text's scores are the projections that the model's own cache gives, and its page is text, whatever is in it."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from common import D_MODEL, KINDS, plan_of, vector
from test_plots import write_run

import sims_lens as sims
from sims_lens.activations import residual_norms
from sims_lens.adapter import adapt
from sims_lens.analysis.directions import Directions
from sims_lens.analysis.tokens import Token, TokenScores, spell, token_scores, visible
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.plots import TEMPLATE
from sims_lens.plots.tokens import SHOWN, token_heatmap

TEXT = ("Why?", " So be it.")
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)> \u202e\n\x1b[0m\' onload="x" 🎉')


def cached(model: Any, site: str = "resid_post", plan: sims.SteeringPlan | None = None) -> dict[int, torch.Tensor]:
    """Streams from TransformerLens' own cache, on the whole text at once."""
    adapter = adapt(model)
    prompt, response = adapter.encode(TEXT[0]), adapter.encode_response(TEXT[1])
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        if plan is None:
            _, cache = model.run_with_cache(tokens)
            suffix = f"hook_{site}"
        else:
            with sims.steering(model, plan) as steered, steered.prompt(len(prompt)):
                _, cache = model.run_with_cache(tokens)
            suffix = f"hook_{site}"
    found = {layer: cache[f"blocks.{layer}.{suffix}"][0].detach() for layer in range(tiny.N_LAYERS)}
    for layer in range(tiny.N_LAYERS):
        if plan is not None and layer in plan.layers:
            found[layer] = cache[f"blocks.{layer}.steer_{site}.hook_post"][0].detach()
    return found


@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_agrees_with_the_models_own_cache(model: Any, site: str) -> None:
    plan = plan_of(1, scope="generation", site=site)
    directions = Directions("v", (0, 1, 2), torch.stack([vector(k) for k in range(3)]), site)
    found = token_scores(model, TEXT, directions, plan=plan)
    assert found.steered is not None and found.layers == (0, 1, 2)
    for rows, streams in ((found.unsteered, cached(model, site)), (found.steered, cached(model, site, plan))):
        for layer, row in zip(found.layers, rows, strict=True):
            expected = streams[layer] @ (vector(layer) / vector(layer).norm())
            torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-4)
    norms = residual_norms(model, site=site)
    torch.testing.assert_close(found.residual_norm, torch.tensor([norms[k] for k in range(3)]))
    torch.testing.assert_close(found.at(1)["steered"], found.steered[1] / norms[1])


def test_a_plan_moves_its_own_tokens_by_what_it_adds(llama: Any) -> None:
    plan = plan_of(1, scope="response", coefficient=3.0)
    found = token_scores(llama, TEXT, plan)
    assert found.plan is plan and found.layers == (1,) and found.steered is not None
    moved = found.steered[0] - found.unsteered[0]
    response = torch.tensor([region == "response" for region in found.regions])
    assert torch.equal(moved[~response], torch.zeros(int((~response).sum())))
    torch.testing.assert_close(moved[response], (3.0 * vector(1).norm()).expand(int(response.sum())), atol=1e-3, rtol=0)


def test_regions_and_tokens_are_those_of_the_text(llama: Any) -> None:
    adapter = adapt(llama)
    found = token_scores(llama, TEXT, {1: vector(1)})
    prompt, response = adapter.encode(TEXT[0]), adapter.encode_response(TEXT[1])
    assert [t.id for t in found.tokens] == [*prompt, *response]
    assert found.regions == ("prompt",) * (len(prompt) - 1) + ("last_prompt",) + ("response",) * len(response)
    assert found.steered is None and found.plan is None
    alone = token_scores(llama, TEXT[0], {1: vector(1)})
    assert alone.regions == found.regions[: len(prompt)]
    torch.testing.assert_close(alone.unsteered, found.unsteered[:, : len(prompt)], atol=1e-4, rtol=1e-4)


def test_sources(llama: Any) -> None:
    both = {0: vector(1), 2: vector(2)}
    whole = token_scores(llama, TEXT, both)
    one = token_scores(llama, TEXT, both, layer=2)
    assert one.layers == (2,)
    torch.testing.assert_close(one.unsteered[0], whole.unsteered[1])
    known = Directions("d", (0, 2), torch.stack(list(both.values())), residual_norm=torch.tensor([2.0, 4.0]))
    found = token_scores(llama, TEXT, known, layer=2)
    assert found.residual_norm.tolist() == [4.0] and torch.equal(found.at()["unsteered"], found.unsteered[0] / 4.0)
    nothing = token_scores(llama, TEXT, plan_of(1), plan=sims.SteeringPlan(()))
    assert nothing.steered is None


def test_a_run_gives_its_last_iteration_and_its_plan(llama: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    vectors = torch.stack([vector(k) for k in range(3)])
    for iteration in run.iterations:
        scale = 1.0 if iteration.index == len(run.iterations) else -1.0
        changed = {"mean_difference": scale * vectors, "median_norm": torch.ones(3), "split_half": torch.ones(3)}
        changed["shuffled"] = torch.zeros(1, 3, D_MODEL)
        iteration.__dict__["tensors"] = {**iteration.tensors, **changed}
    last = replace(run.iterations[-1], plan=plan_of(1))
    last.__dict__["tensors"] = run.iterations[-1].tensors
    run = replace(run, iterations=(*run.iterations[:-1], last))
    found = token_scores(llama, TEXT, run)
    expected = token_scores(llama, TEXT, {k: vector(k) for k in range(3)}, plan=plan_of(1))
    torch.testing.assert_close(found.unsteered, expected.unsteered)
    assert found.steered is not None and expected.steered is not None and found.layer == 1
    torch.testing.assert_close(found.steered, expected.steered)
    assert found.name == f"iteration {len(run.iterations)}"


def test_the_table(llama: Any) -> None:
    found = token_scores(llama, TEXT, {0: vector(0), 1: vector(1)}, plan=plan_of(0))
    table = found.table()
    assert len(table) == 2 * len(found.tokens)
    assert table.groupby("layer")["first"].sum().tolist() == [1, 1] and table["first"].iloc[0]
    assert table["steered"].tolist() == pytest.approx(found.steered.flatten().tolist())  # type: ignore[union-attr]
    assert (table["unsteered"] / table["residual_norm"]).tolist() == pytest.approx(table["unsteered_relative"].tolist())
    text = "".join(table[(table["layer"] == 0) & (table["region"] == "response")]["token"])
    assert text == TEXT[1]
    assert "unsteered" in repr(found) and "response" in repr(found)


def scores(**changes: Any) -> TokenScores:
    tokens = (Token(1, "<s>"), *(Token(k, t) for k, t in enumerate([" so", "\n", "<i>", " ", "\u202e"], start=2)))
    regions = ("prompt", "prompt", "last_prompt", "response", "response", "response")
    values = torch.tensor([[9e4, 1.0, -2.0, 0.0, 4.0, -1.0]])
    made = TokenScores("v", "resid_post", tokens, regions, (3,), values, 2 * values, torch.tensor([2.0]), plan_of(3))
    return replace(made, **changes)


class Spans(HTMLParser):
    """Every tag of a page with its attributes, and the spans' texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_text_becomes_markup(zoo: Any, kind: str) -> None:
    found = token_scores(zoo("gpt2", kind), HOSTILE, plan_of(1))
    tokens = tuple(replace(t, text=HOSTILE[k % 2]) for k, t in enumerate(found.tokens))
    whole = replace(found, name=HOSTILE[0], tokens=tokens)
    for page in (found._repr_html_(), whole._repr_html_()):
        parsed = Spans(page)
        assert {tag for tag, _ in parsed.tags} <= {"div", "b", "span"}
        assert {key for _, attributes in parsed.tags for key in attributes} <= {"title", "style"}
        assert "\u202e" not in page and "\x1b" not in page and "\\u202e" in page
    for figure in (token_heatmap(found), token_heatmap(whole), token_heatmap(replace(whole, layers=(1,)), layer=1)):
        text = str(figure.to_dict())
        assert "<script" not in text and "<img" not in text


def test_the_page_has_every_token_twice_with_its_numbers() -> None:
    made = scores()
    parsed = Spans(made.html())
    spans = [(a, t) for (tag, a), t in zip(parsed.tags, parsed.texts, strict=True) if tag == "span" and "title" in a]
    assert [t for _, t in spans] == 2 * ["<s>", " so", "⏎\n", "<i>", "␣", "\\u202e"]
    assert spans[1][0]["title"] == "1: ␣so (prompt): unsteered +0.500; steered +1.000"
    first, positive, negative, zero = (spans[k][0]["style"] or "" for k in (0, 1, 2, 3))
    assert "background" not in first and "dashed" in first
    assert "213, 94, 0" in positive and "40, 140, 210" in negative and ", 0.00)" in zero
    assert "solid" in zero and "solid" not in positive  # the response is underlined
    assert made.limit() < 5.0  # the first position is left out
    with pytest.raises(PlanError, match="layer 9 was not scored"):
        made.html(9)


def test_characters_of_several_tokens_are_spelt_once(zoo: Any) -> None:
    tokenizer = zoo("llama", KINDS[0]).tokenizer
    ids = tokenizer("a🎉é\n", add_special_tokens=False)["input_ids"]
    found = spell(tokenizer, ids)
    assert [(t.text, t.part, t.parts) for t in found] == [
        ("a", 1, 1),
        *(("🎉", k, 4) for k in range(1, 5)),
        *(("é", k, 2) for k in (1, 2)),
        ("\n", 1, 1),
    ]
    assert found[1].label == "🎉⟨1/4⟩" and found[0].label == "a"
    half = spell(tokenizer, ids[1:3])
    assert [t.text for t in half] == ["<F0>", "<9F>"]
    assert "".join(t.text for t in spell(tokenizer, ids) if t.part == 1) == "a🎉é\n"


def test_a_leading_space_that_a_tokenizer_drops_is_kept() -> None:
    pieces = {0: "▁so", 1: "<0xF0>", 2: "▁"}
    decoded = {(0,): "so", (1,): "\ufffd", (2,): ""}
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=lambda i: pieces.get(i),
        decode=lambda ids, **_: decoded.get(tuple(ids), "\ufffd"),
    )
    assert [t.text for t in spell(tokenizer, [0, 2])] == [" so", " "]
    assert spell(tokenizer, [1])[0].text == "<0xF0>"
    assert spell(tokenizer, [9])[0].text == "<9>"  # a row of a padded vocabulary


def test_what_has_no_shape_is_written_out() -> None:
    assert visible(" a\t\u200d\x00\xa0") == "␣a⇥\\u200d\\x00\\xa0"


def test_figures() -> None:
    made = scores()
    figure = token_heatmap(made)
    assert [list(t.y) for t in figure.data] == [[None, 0.5, -1.0, 0.0, 2.0, -0.5], [None, 1.0, -2.0, 0.0, 4.0, -1.0]]
    assert figure.layout.template.layout.font == TEMPLATE.layout.font
    assert list(figure.layout.xaxis2.ticktext) == ["&lt;s&gt;", "␣so", "⏎", "&lt;i&gt;", "␣", "\\u202e"]
    rows: dict[str, Any] = {
        "unsteered": made.unsteered.repeat(2, 1),
        "steered": None,
        "residual_norm": torch.tensor([2.0, 4.0]),
    }
    two = replace(made, layers=(3, 4), **rows)
    heat = token_heatmap(two).data
    assert len(heat) == 1 and [list(row) for row in heat[0].z][1] == [None, 0.25, -0.5, 0.0, 1.0, -0.25]
    long = scores(
        tokens=tuple(Token(k, str(k)) for k in range(100)),
        regions=("prompt",) * 30 + ("last_prompt",) + ("response",) * 69,
        unsteered=torch.ones(1, 100),
        steered=None,
    )
    assert list(token_heatmap(long).data[0].x) == list(range(23, 23 + SHOWN))
    assert "Tokens 23 to 70 of 100" in token_heatmap(long).layout.title.subtitle.text
    assert list(token_heatmap(long, start=90).data[0].x) == list(range(90, 100))
    for bad in (100, -1, True):
        with pytest.raises(ConfigError, match="start must be"):
            token_heatmap(long, start=bad)
    with pytest.raises(PlanError, match="layer 1 was not scored"):
        token_heatmap(long, layer=1)


def test_inputs_are_left_alone(llama: Any) -> None:
    given = {1: vector(4)}
    token_scores(llama, TEXT, given, plan=plan_of(1))
    assert torch.equal(given[1], vector(4))


def test_refusals(llama: Any, unchecked: None) -> None:
    v = {1: vector(1)}
    with pytest.raises(PlanError, match="need one set of directions"):
        token_scores(llama, TEXT, {"a": v, "b": v})
    with pytest.raises(PlanError, match="no direction at layer 2"):
        token_scores(llama, TEXT, v, layer=2)
    with pytest.raises(PlanError, match="d_model = 32"):
        token_scores(llama, TEXT, {1: torch.ones(5)})
    with pytest.raises(PlanError, match="is zero"):
        token_scores(llama, TEXT, {1: torch.zeros(D_MODEL)})
    with pytest.raises(PromptError, match="a prompt or"):
        token_scores(llama, ("a", "b", "c"), v)  # type: ignore[arg-type]
    for text, what in ((("a", ""), "response"), (("a", " \n"), "response"), ("", "prompt"), ("\t ", "prompt")):
        with pytest.raises(PromptError, match=f"the {what} is .* no tokens to score; give one with text in it"):
            token_scores(llama, text, v)
    with sims.steering(llama, plan_of(0)), pytest.raises(ModelError, match="a plan is attached"):
        token_scores(llama, TEXT, v)
    with pytest.raises(PromptError, match="context"):
        token_scores(llama, ("a", "b" * 200), v)
