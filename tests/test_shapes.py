"""What signatures say of types and shapes holds in the decoding loop too, where other tests don't check it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path

import jaxtyping

jaxtyping.install_import_hook("sims_lens", "beartype.beartype")

import tiny
import torch
from common import KINDS, plan_of

import sims_lens as sims
from sims_lens.sampling.draw import choose
from sims_lens.twin import response_logits

try:
    choose(torch.zeros(2, 3), torch.zeros(5), temperature=1.0, top_k=None)
except jaxtyping.TypeCheckError:
    pass
else:
    raise AssertionError("nothing is checked")
for architecture in ("llama", "gpt_neox"):
    tiny.write(architecture, Path(sys.argv[1]) / architecture)
    for kind in KINDS:
        model = sims.load(Path(sys.argv[1]) / architecture, kind=kind)
        sampler = sims.LocalSampler(model, sims.SamplingConfig(max_new_tokens=6, top_k=20, top_p=0.9, min_p=0.01))
        asked = dict(n=3, seed=1, plan=plan_of(1, scope="response") + plan_of(2, scope="all"))
        drawn = list(sampler.sample(["a", "b c"], **asked))
        assert sampler.road == "twin", sampler.road
        assert sorted(s.tokens for s in sampler.sample_and_measure(["a", "b c"], **asked)) == sorted(
            s.tokens for s in drawn
        )
        read = [sample for sample, _ in sampler.sample_and_read(["a", "b c"], site="resid_post", **asked)]
        assert sorted(s.tokens for s in read) == sorted(s.tokens for s in drawn)
        with sims.steering(model, asked["plan"]):
            response_logits(model, [[1, 2, 3], [4]], [(0, [5, 6]), (1, [7])])
        with sims.steering(model, plan_of(1)), model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x)]):
            list(sampler.sample(["a"], n=2, seed=0, plan=plan_of(2)))
"""


def test_in_the_decoding_loop(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
