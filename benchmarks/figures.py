"""Draw a run's figures as PNGs: ``make figures ARGS="runs/demo docs/figures"``. Needs a Chromium on the machine."""

import sys
from pathlib import Path

import plotly.io as pio

import sims_lens as sims


def main(run_path: str = "runs/demo", out: str = "docs/figures") -> None:
    run = sims.open_run(run_path)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("win_rate", "effect", "vector_norms", "layer_similarity", "iteration_similarity", "side_effects"):
        figure = getattr(sims.plots, name)(run)
        figure.update_layout(paper_bgcolor="white")
        path = folder / f"{name}.png"
        pio.write_image(figure, path, width=figure.layout.width, height=figure.layout.height, scale=2)
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
