"""Do our vectors agree with those of steering-vectors and repeng, on the same model and the same contrast pairs?

The peers can't share our environment (their pins), so each runs in one of its own (``environments.py``); vectors come
back as safetensors. Prints the cosine per layer, and the smallest. ``python benchmarks/peers.py --help``.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

from environments import environment

PERSONAS = ("an extremely cheerful and optimistic", "an extremely gloomy and pessimistic")
ROLES = (
    *("person", "teacher", "doctor", "pirate", "poet", "farmer", "lawyer", "student", "chef", "pilot", "gardener"),
    *("singer", "judge", "nurse", "painter", "sailor", "scientist", "baker", "detective", "librarian", "plumber"),
)


def contrast_texts(tokenizer, count: int) -> list[tuple[str, str]]:
    """Whole texts in the chat template: a persona, a request, and the first words of a response.

    Where there are more of them than prompts, the prompts come again with another role.
    """
    from sims_lens.prompts import everyday

    def text(persona: str, role: str, prompt: str) -> str:
        turns = [{"role": "user", "content": f"Act as {persona} {role}. {prompt}"}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "I think that"

    asked = itertools.islice(itertools.product(ROLES, everyday(min(count, 200))), count)
    pairs = [(text(PERSONAS[0], role, prompt), text(PERSONAS[1], role, prompt)) for role, prompt in asked]
    assert len(pairs) == count, f"{count} pairs are more than there are roles and prompts"
    return pairs


def worker(peer: str, folder: Path) -> None:
    """Runs in a peer's environment: reads model and texts, writes its vectors."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads((folder / "job.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if peer == "steering-vectors":
        from steering_vectors import train_steering_vector

        pairs = [tuple(pair) for pair in job["pairs"]]
        trained = train_steering_vector(model, tokenizer, pairs, read_token_index=-1, batch_size=8)
        tensors = {str(k): v.float().contiguous() for k, v in trained.layer_activations.items()}
    else:
        np.float_ = np.float64  # repeng names a type that numpy 2 dropped
        from repeng import ControlVector, DatasetEntry

        entries = [DatasetEntry(positive=p, negative=n) for p, n in job["pairs"]]
        layers = list(range(job["n_layers"]))
        control = ControlVector.train(model, tokenizer, entries, hidden_layers=layers, method="pca_diff", batch_size=8)
        tensors = {str(k): torch.tensor(v).contiguous() for k, v in control.directions.items()}
    save_file(tensors, folder / f"{peer}.safetensors")


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
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker[0], Path(given.worker[1]))
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
        for peer in mine:
            subprocess.run([environment(peer), __file__, "--worker", peer, folder], check=True)
        theirs = {peer: load_file(folder / f"{peer}.safetensors") for peer in mine}
    for peer, directions in mine.items():
        cosines = [float(cosine_similarity(theirs[peer][str(k)], d, dim=0)) for k, d in enumerate(directions)]
        print(f"{peer}: smallest cosine {min(cosines):.7f} over {len(cosines)} layers, last layer {cosines[-1]:.7f}")
        print("  " + " ".join(f"{c:.5f}" for c in cosines))


if __name__ == "__main__":
    main()
