"""How far can a gradient be trusted to say which components carry a plan's effect?

Directions are fitted to half of the packaged contrast pairs (a cheerful and a gloomy answer to each prompt); on others,
every head and MLP from the steered layer on is patched exactly, and compared with what gradients predict: those of the
steered run, of the unsteered run, and averaged over runs between the two.
``python benchmarks/attribution.py --help``.
"""

import argparse
import json
import time
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.circuits import component_effects, direction_readers
from sims_lens.analysis.patching import attribute, gradients, pair_rows, record
from sims_lens.forced import force
from sims_lens.hooks import resolve
from sims_lens.prompts import tone_pairs

POINTS = {
    "steered run": (1.0,),
    "unsteered run": (0.0,),
    "half steered": (0.5,),
    "mean of both ends": (0.0, 1.0),
    "mean of 4 between": (0.125, 0.375, 0.625, 0.875),
}


def predicted(model, plan, pairs, points):
    """Mean over pairs of what each component's loss is to first order, and the seconds that it took."""
    started = time.perf_counter()
    plan = resolve(model, plan)
    scope, layer, sums = reduce(or_, (i.scope for i in plan.interventions)), min(plan.layers), 0.0
    for batch in force(model, pair_rows(adapt(model), pairs), scope=scope, together=2):
        with torch.no_grad():
            base = record(batch, layer).outputs
            with sims.steering(model, plan):
                steered = record(batch, layer).outputs
        for point in points:
            with sims.steering(model, plan.scaled(point)):
                slope = gradients(batch, layer)
            sums = sums - attribute(batch, slope, base, steered).sum(1) / len(points) / len(pairs)
    return sums.numpy(), time.perf_counter() - started


def one_layer(model, fit, layer, coefficient, pairs, rows, readers):
    plan = fit.plan([layer], coefficient=coefficient)
    found = component_effects(model, plan, pairs)
    print(found, flush=True)
    table = found.table()
    active = table["active"].to_numpy()
    seen = table[active]
    for name, points in POINTS.items():
        values, seconds = predicted(model, plan, pairs, points)
        own = seen.assign(predicted=values[active])
        row = {"layer": layer, "gradient of": name, "components": len(own), "seconds": seconds}
        for exact in ("lost", "restored"):
            row[f"spearman {exact}"] = float(own["predicted"].corr(own[exact], method="spearman"))
            row[f"pearson {exact}"] = float(own["predicted"].corr(own[exact]))
            row[f"error {exact}"] = float(np.linalg.norm(own["predicted"] - own[exact]) / np.linalg.norm(own[exact]))
        if name == "steered run":
            row["spearman interval"] = found.agreement.to_json()
        top = own["lost"].abs().nlargest(10).index
        row["top 10 found"] = int(own["predicted"].abs().nlargest(10).index.isin(top).sum())
        row["exact seconds"] = found.seconds["exact"]
        rows.append(row)
    result = {"effects": json.loads(table.reset_index().to_json(orient="records"))}
    if readers:
        read = direction_readers(model, plan, pairs, exact=readers)
        print(read, flush=True)
        result |= {"readers": json.loads(read.table().reset_index().to_json(orient="records"))}
        result |= {"readers spearman": read.agreement.to_json(), "readers patched": len(read.top(readers))}
    return result


def printed(rows) -> str:
    lines = [
        "| layer | gradient of | Spearman with lost | Pearson | relative error | of the top 10 | with restored | time |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        low, high = r.get("spearman interval", (0, np.nan, np.nan))[1:]
        ends = f" [{low:.3f}, {high:.3f}]" if "spearman interval" in r else ""
        lines.append(
            f"| {r['layer']} | {r['gradient of']} | {r['spearman lost']:.3f}{ends} | {r['pearson lost']:.3f} "
            f"| {r['error lost']:.2f} | {r['top 10 found']} | {r['spearman restored']:.3f} "
            f"| {r['seconds']:.1f} s, exact {r['exact seconds'] / r['seconds']:.0f} times as long |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--kind", default=None, help="hooked or bridge")
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 22])
    parser.add_argument("--coefficient", type=float, default=0.2, help="in median residual norms")
    parser.add_argument("--pairs", type=int, default=16, help="to measure on; the first 32 are fitted to")
    parser.add_argument("--readers", type=int, default=20, help="readers to check exactly; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    model = sims.load(args.model, **({"kind": args.kind} if args.kind else {}))
    pairs = tone_pairs()
    fit = sims.fit(model, pairs[:32])
    rows, found = [], {}
    for layer in args.layers:
        found[layer] = one_layer(model, fit, layer, args.coefficient, pairs[32 : 32 + args.pairs], rows, args.readers)
        if args.out:
            args.out.write_text(json.dumps({"settings": vars(args) | {"out": None}, "rows": rows, "found": found}))
    print(printed(rows))


if __name__ == "__main__":
    main()
