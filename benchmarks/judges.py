"""Which form of self-judgement beats chance? Every form and criterion, audited on responses of the embedded model.

Prints a table. ``python benchmarks/judges.py --help``.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import sims_lens as sims
from sims_lens.auditing import Audit
from sims_lens.data import by_prompt
from sims_lens.plan import NOTHING
from sims_lens.stats import Interval

FORMS = ("likelihood", "pairwise", "pointwise", "graded", "listwise")
CRITERIA = ("more cheerful", "more helpful", "more coherent")


def audits(prompt_count: int, samples: int, out: Path) -> None:
    model = sims.load("embedded", kind="bridge")
    prompts = sims.everyday(200)[-prompt_count:]  # the demo and the choice of templates used those before
    drawn = list(sims.LocalSampler(model).sample(prompts, n=samples, plan=NOTHING, seed=0))
    responses = [[s.text for s in group] for group in by_prompt(drawn)]
    rows = []
    for form in FORMS:
        for criterion in CRITERIA:
            judge = sims.SelfJudge(criterion, form=form).bind(model)
            found = sims.audit(judge, prompts, responses)
            reference = (
                sims.audit(judge, prompts, responses, reference=sims.Vader(), repeats=1)
                if (criterion == "more cheerful")
                else None
            )
            lists = prompt_count * 3 + prompt_count * 12
            row = {"form": form, "criterion": criterion, "audit": found.to_json(), "lists": lists}
            row["vader"] = reference.to_json() if reference else None
            row["unparsable"] = [judge.unparsable, judge.answers]
            rows.append(row)
            out.write_text(json.dumps(rows))
            print(form, criterion, found.verdict, found.reason, file=sys.stderr, flush=True)


def table(rows: list[dict]) -> str:
    def cell(interval: Interval | None) -> str:
        return "" if interval is None else f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"

    lines = [
        "| form | criterion | shuffled words | other prompt's answer | truncated | position consistency "
        "| first shown wins | VADER agrees best > worst | unparsable | tokens per response judged | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a = Audit.from_json(row["audit"])
        vader = Audit.from_json(row["vader"]).reference_accuracy if row["vader"] else None
        consistency = a.single_order_consistency or a.position_consistency
        judged = max(1, 3 * a.responses + 12 * a.prompts * 2)
        failed, answers = row["unparsable"]
        lines.append(
            f"| {row['form']} | {row['criterion']} | {cell(a.known_shuffled)} | {cell(a.known_other)} "
            f"| {cell(a.known_truncated)} | {cell(consistency)} | {cell(a.first_wins)} | {cell(vader)} "
            f"| {f'{failed} of {answers}' if answers else ''} "
            f"| {(a.cost.prefill + a.cost.decode) / judged:.0f} | {a.verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/data/judges.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run")
    given = parser.parse_args()
    if not given.table:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        audits(given.prompts, given.samples, given.out)
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
