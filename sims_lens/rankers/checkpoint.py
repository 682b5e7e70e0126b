"""Where a ranker's own model comes from: a folder or the hub, safetensors only, no code of strangers."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from sims_lens.checks import check_path, one_line
from sims_lens.errors import RankerError

WANTED: Final = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What is downloaded: never pickled weights, never Python."""


class Checkpoint(NamedTuple):
    """A checkpoint on this machine.

    Args:
        folder: where its files are.
        label: the hub id, or the folder's name.
        identity: the commit on the hub; for a folder, a digest of its small files and of the weights' size and age.
    """

    folder: Path
    label: str
    identity: str


def locate(path_or_id: str | Path, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, downloading it if need be.

    Args:
        path_or_id: a folder with a Hugging Face checkpoint, or a hub id.
        revision: branch, tag or commit on the hub; only for a hub id.

    Returns:
        The checkpoint, with weights in safetensors.

    Raises:
        RankerError: there is no such folder or hub id, or its weights are pickled.
    """
    folder = check_path(path_or_id, RankerError).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise RankerError(f"revision {revision!r}: {str(path_or_id)!r} is a folder, which has none; leave it out")
        checkpoint = Checkpoint(folder, folder.resolve().name, _digest(folder))
    else:
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(
                str(path_or_id), revision=revision, allow_patterns=list(WANTED), ignore_patterns=["*/*"]
            )
        except (OSError, ValueError) as error:
            at = f" at revision {revision!r}" if revision else ""
            raise RankerError(
                f"the ranker's model {str(path_or_id)!r}{at} is neither a folder nor one that the Hugging Face hub "
                f"gives out here ({one_line(error, 100)}); check the name, log in if it is gated, and offline "
                "pass the folder of a downloaded checkpoint"
            ) from error
        checkpoint = Checkpoint(Path(found), str(path_or_id), Path(found).name)  # snapshots/<commit>
    if not (checkpoint.folder / "config.json").is_file():
        raise RankerError(
            f"{checkpoint.folder} has no config.json, so it is no Hugging Face checkpoint; check its name"
        )
    if not any((checkpoint.folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise RankerError(
            f"{checkpoint.folder} has no model.safetensors, and pickled weights (.bin, .pt) are not loaded, because "
            "unpickling can run code; where you trust the file, convert it with transformers: "
            "model.save_pretrained(folder)"
        )
    return checkpoint


def device_of(device: str | None) -> Any:
    """The ``torch.device`` that is meant: by default CUDA where there is one, else the CPU.

    Raises:
        RankerError: torch doesn't know the device, or it isn't there.
    """
    import torch

    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise RankerError(f"device {device!r} is not a device of torch; try 'cpu' or 'cuda'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise RankerError(f"device {device!r}: torch sees no CUDA device here; use device='cpu'")
    return target


def at_least(smallest: int, **sizes: int) -> None:
    """Raise :class:`RankerError` unless each size is ``smallest`` or more."""
    for name, value in sizes.items():
        if value < smallest:
            raise RankerError(f"{name} = {value} is less than {smallest}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and transformers' loading reports."""
    import transformers

    logging: Any = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _digest(folder: Path) -> str:
    """Identify a folder's content without reading gigabytes: weights count by their size and age, the rest by bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WANTED for path in folder.glob(pattern)):
        digest.update(path.name.encode() + b"\0")
        if path.suffix == ".safetensors":
            stat = path.stat()
            digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
        else:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + digest.hexdigest()
