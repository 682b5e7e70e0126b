"""Do our vectors agree with those of steering-vectors and repeng, on the same model and the same contrast pairs?

The peers can't share our environment (their pins), so they run in one of their own, made on first use in
``.venv-peers``; vectors come back as safetensors. Prints the cosine per
layer, and the smallest. ``python benchmarks/peers.py --help``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = ("steering-vectors==0.12.2", "repeng==0.4.0")
PERSONAS = ("an extremely cheerful and optimistic", "an extremely gloomy and pessimistic")


def contrast_texts(tokenizer, count: int) -> list[tuple[str, str]]:
    """Whole texts in the chat template: a persona, a request, and the first words of a response."""
    from sims_lens.prompts import everyday

    def text(persona: str, prompt: str) -> str:
        turns = [{"role": "user", "content": f"Act as {persona} person. {prompt}"}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "I think that"

    return [(text(PERSONAS[0], p), text(PERSONAS[1], p)) for p in everyday(count)]


def worker(folder: Path) -> None:
    """Runs in the peers' environment: reads model and texts, writes both peers' vectors."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    np.float_ = np.float64  # repeng names a type that numpy 2 dropped
    from repeng import ControlVector, DatasetEntry
    from steering_vectors import train_steering_vector

    job = json.loads((folder / "job.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = [tuple(pair) for pair in job["pairs"]]

    def load():
        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()

    theirs = train_steering_vector(load(), tokenizer, pairs, read_token_index=-1, batch_size=8)
    tensors = {f"steering-vectors.{k}": v.float().contiguous() for k, v in theirs.layer_activations.items()}
    entries = [DatasetEntry(positive=p, negative=n) for p, n in pairs]
    layers = list(range(job["n_layers"]))
    control = ControlVector.train(load(), tokenizer, entries, hidden_layers=layers, method="pca_diff", batch_size=8)
    tensors |= {f"repeng.{k}": torch.tensor(v).contiguous() for k, v in control.directions.items()}
    save_file(tensors, folder / "vectors.safetensors")


def environment() -> Path:
    """The peers' environment: torch as here, the peers without their pins."""
    home = Path(".venv-peers")
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        from importlib.metadata import version

        uv = Path(sys.executable).with_name("uv")
        shared = [
            f"{name}=={version(name)}" for name in ("torch", "transformers", "numpy", "scikit-learn", "safetensors")
        ]
        links = (
            os.environ.get("UV_FIND_LINKS")
            or subprocess.run(
                [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
            ).stdout.strip()
        )
        install = [uv, "pip", "install", "--quiet", "--python", python]
        found = {**os.environ, **({"UV_FIND_LINKS": links} if links else {})}
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, home], check=True)
        subprocess.run([*install, *shared, "accelerate", "tqdm", "gguf"], check=True, env=found)
        subprocess.run([*install, "--no-deps", *PEERS], check=True, env=found)
        (home / ".ready").touch()
    return python


def ours(tokenizer, pairs: list[tuple[str, str]]):
    """Mean difference and PCA of differences at the last token; the last layer also after the final norm."""
    import torch

    import sims_lens as sims
    from sims_lens.activations import capture
    from sims_lens.estimators import PCA, MeanDifference, fit_layers

    model = sims.load("embedded", kind="bridge")
    ids = [tokenizer(text).input_ids for pair in pairs for text in pair]  # as the peers do: no second BOS
    read = capture(model, [(row, ()) for row in ids], scope="last_prompt").means
    with torch.no_grad():  # repeng reads the last layer where transformers puts it: after the final norm
        normed = model.original_model.model.norm(read[:, -1])
    positive, negative = read[0::2], read[1::2]
    found = {
        "steering-vectors": [t.direction for t in fit_layers(MeanDifference(), positive, negative)],
        "repeng": [t.direction for t in fit_layers(PCA(), positive, negative)],
    }
    found["repeng"][-1] = PCA().fit(normed[0::2], normed[1::2]).direction
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return
    from safetensors.torch import load_file
    from torch.nn.functional import cosine_similarity
    from transformers import AutoTokenizer

    from sims_lens.models import embedded_path

    model = str(embedded_path())
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = contrast_texts(tokenizer, given.pairs)
    mine = ours(tokenizer, pairs)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = {"model": model, "pairs": pairs, "n_layers": len(mine["repeng"])}
        (folder / "job.json").write_text(json.dumps(job))
        subprocess.run([environment().absolute(), __file__, "--worker", folder], check=True)
        theirs = load_file(folder / "vectors.safetensors")
    for peer, directions in mine.items():
        cosines = [float(cosine_similarity(theirs[f"{peer}.{k}"], d, dim=0)) for k, d in enumerate(directions)]
        print(f"{peer}: smallest cosine {min(cosines):.7f} over {len(cosines)} layers, last layer {cosines[-1]:.7f}")
        print("  " + " ".join(f"{c:.5f}" for c in cosines))


if __name__ == "__main__":
    main()
