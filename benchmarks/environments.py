"""Virtual environments for tools that can't share ours: their pins differ. Made on first use, beside the repository's.

Each has the versions of torch and its neighbours that are installed here, and the tool without its pins, so that
what is compared is the tool.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PEERS = {
    "steering-vectors": ("steering-vectors==0.12.2",),
    "repeng": ("repeng==0.4.0",),
    "steerkit": ("steerkit==0.3.0",),
}
ROOT = Path(__file__).resolve().parents[1]
_SHARED = ("torch", "transformers", "numpy", "scikit-learn", "safetensors", "tqdm")
_NEEDS = {
    "steering-vectors": (),
    "repeng": ("accelerate", "gguf"),
    "steerkit": ("transformer-lens", "matplotlib", "typer", "zarr"),
}
_OURS = ("einops", "jaxtyping", "plotly", "pandas", "huggingface-hub", "filelock", "platformdirs")
"""What ``sims_lens`` needs where it is imported from the repository: it makes steerkit's ``HookedTransformer``."""


def environment(peer: str) -> Path:
    """The Python of a peer's environment.

    Raises:
        subprocess.CalledProcessError: it can't be installed; its ``stderr`` says why.
    """
    home = ROOT / f".venv-{peer}"
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        uv = Path(sys.executable).with_name("uv")
        wanted = [*_SHARED, *_NEEDS[peer], *(_OURS if peer == "steerkit" else ())]
        _run(uv, "venv", "--clear", "--python", sys.executable, home)
        _run(uv, "pip", "install", "--python", python, *(_pin(name) for name in wanted))
        _run(uv, "pip", "install", "--python", python, "--no-deps", *PEERS[peer])
        (home / ".ready").touch()
    return python


def _pin(name: str) -> str:
    """The version that is installed here, if it is."""
    try:
        return f"{name}=={version(name)}"
    except ImportError:
        return name


def _run(*command: object) -> None:
    """Run uv, with the folder of wheels that pip knows of: uv doesn't read pip's configuration."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    known = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    links = os.environ.get("UV_FIND_LINKS") or known
    given = {**os.environ, **({"UV_FIND_LINKS": links} if links else {})}
    subprocess.run([str(part) for part in command], check=True, env=given, capture_output=True, text=True)
