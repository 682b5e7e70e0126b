"""Does a damaged or forged file ever crash sims_lens, hang it, or make it ask for memory? Mutated files of every kind.

`python benchmarks/fuzz.py` reads 100,000 of them, each through its public reader in a process whose memory and time are
limited, and writes `docs/data/fuzz.json`. Right is what is read, or refused with a `SimsError`; anything else is a
finding, and the exit code is 1. The same seed makes the same cases: `--only KIND --case N` repeats one.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fuzz_artifacts import Artifact, artifacts

from sims_lens.errors import SimsError

MEMORY = 256 << 20
"""Bytes of address space that a case may take beyond what the process has."""

SECONDS = 10.0
"""That a case may take. A hundred times what the slowest takes by itself, on a machine with nothing else to do."""

LARGE = (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 1e308, 1e999, -1e999)
STRINGS = (
    "",
    "\x00",
    "\ud800",
    "\u2028",
    "../../../etc/passwd",
    "</script>",
    "NaN",
    "-1",
    "x" * 5000,
    "%s%n{0}",
    "日本",
)
JUNK = (None, True, False, [], {}, [[]], {"": None}, [None] * 3, [0.0] * 3, "", float("nan"))


# --- mutations --------------------------------------------------------------------------------------------------------


def mutated(data: bytes, ending: str, rng: random.Random) -> bytes:
    """One mutation, or some: of the bytes, or of what they mean."""
    if ending == ".safetensors" and rng.random() < 0.6:
        return of_safetensors(data, rng)
    if ending == ".json" and rng.random() < 0.7:
        return of_json(data, rng)
    if ending == ".jsonl" and rng.random() < 0.7:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        lines[at] = of_json(lines[at], rng) if lines[at] else as_line(rng)
        return b"\n".join(lines)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data = of_bytes(data, rng)
    return data


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    other = rng.randrange(len(data) + 1)
    what = rng.randrange(7)
    if what == 0 and at < len(data):  # a flipped bit
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if what == 1:  # cut off
        return data[:at]
    if what == 2:  # a length, an offset
        width, form = rng.choice(((4, "<I"), (8, "<Q")))
        aligned = at // width * width
        number = int(rng.choice(LARGE[:-3])) % (1 << 8 * width)
        return data[:aligned] + struct.pack(form, number) + data[aligned + width :]
    if what == 3:  # a part elsewhere
        return data[:at] + data[other : other + rng.randrange(64)] + data[at:]
    if what == 4:  # noise
        return data[:at] + rng.randbytes(rng.choice((1, 4, 64))) + data[at:]
    if what == 5:  # a part taken out
        return data[: min(at, other)] + data[max(at, other) :]
    return (
        data[:at] + rng.choice((b"\x00", b"\xff\xfe", b"\r", b'"', b"\n\n", b"\xef\xbb\xbf", b"[" * 5000)) + data[at:]
    )


def of_json(data: bytes, rng: random.Random) -> bytes:
    """A value of it replaced, taken out, doubled or moved; as text where JSON's own writer would not write it."""
    try:
        value = json.loads(data)
    except ValueError:
        return of_bytes(data, rng)
    what = rng.randrange(10)
    if what == 0:  # deeper than a parser can go
        depth = rng.choice((100, 3000, 100_000))
        return data.replace(b":", b":" + b"[" * depth + b"]" * depth + b",", 1) if rng.random() < 0.5 else b"[" * depth
    if what == 1:  # a number of many digits
        return data.replace(b"1", b"1" * rng.choice((50, 400, 10_000)), 1)
    if what == 2:  # a name twice
        return data.replace(b"{", b'{"version": [], ', 1) if b"{" in data else data + data
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = changed(value, rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def changed(value: object, rng: random.Random) -> object:
    """The same with one change, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.14:
            return {**value, rng.choice((*STRINGS, "tries", "format", "later")): rng.choice(JUNK)}
        if what < 0.2:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        what = rng.random()
        if what < 0.1:
            return value[:at] + value[at + 1 :]
        if what < 0.15:
            return value + value[at:]
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return rng.choice((*LARGE, *STRINGS, *JUNK, [value], {"a": value}, str(value)))


def as_line(rng: random.Random) -> bytes:
    return json.dumps(rng.choice((*LARGE, *STRINGS, *JUNK))).encode("utf-8", "surrogatepass")


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A header that lies: about its own length, a dtype, a shape, an offset, or what is in the metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__")
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    what = rng.randrange(8)
    if what == 0:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "F32 ", "", 3))
    elif what == 1:
        entry["shape"] = rng.choice(([2**40], [2**32, 2**32], [-1], [], [0], [10**9, 0], "8", [1.5], [2**64]))
    elif what == 2:
        entry["data_offsets"] = rng.choice(([0, 2**62], [2**62, 0], [-1, 4], [0], [0, 0], [4, 8], None))
    elif what == 3:
        header[rng.choice(names)] = rng.choice((*JUNK, dict(entry)))
    elif what in (4, 5) and about:
        key = rng.choice(list(about))
        text = about[key].encode()
        about[key] = (of_json(text, rng) if text[:1] in b"{[" else of_bytes(text, rng)).decode("utf-8", "replace")
    elif what == 6:
        header = changed(header, rng)
    made = json.dumps(header).encode("utf-8", "surrogatepass")
    claimed = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)) if what == 7 else len(made)
    return struct.pack("<Q", claimed) + made + data[8 + length :]


# --- running ----------------------------------------------------------------------------------------------------------


def generator(seed: int, kind: str, case: int) -> random.Random:
    return random.Random(f"{seed}:{kind}:{case}")


class _TooSlowError(BaseException):
    """Not an Exception: no reader may take it for a damaged file."""


def too_slow(*_: object) -> None:
    raise _TooSlowError


def place(artifact: Artifact, root: Path) -> Path:
    """Where its file lies: by itself, or in the run folder that it belongs to."""
    if artifact.name.startswith("run: "):
        path = root / "run" / artifact.file
        path.with_name("checksums.jsonl").unlink(missing_ok=True)  # or nothing but checksums would be tried
        return path
    folder = root / "work"
    folder.mkdir(exist_ok=True)
    return folder / artifact.file


def work(artifact: Artifact, root: Path, options: argparse.Namespace, cases: range, pipe: object) -> None:
    """Some cases of one kind, in a process of their own; what was found goes into the pipe."""
    path = place(artifact, root)
    signal.signal(signal.SIGALRM, too_slow)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, refused = Counter(), Counter()
    slowest = 0.0
    for case in cases:
        pipe.send(("case", case))
        rng = generator(options.seed, artifact.name, case)
        path.write_bytes(mutated(artifact.data, path.suffix, rng))
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            found = artifact.read(path)
            counts["read"] += 1
            if rng.random() < options.looks:
                counts["looked at"] += 1
                artifact.look(found)
        except SimsError as error:
            counts["refused"] += 1
            refused[type(error).__name__] += 1
            if "\n" in str(error) and artifact.name not in ("comparison",):
                pipe.send(("finding", (case, f"a refusal of several lines: {str(error)[:200]!r}", "")))
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            pipe.send(("finding", (case, f"{type(error).__name__}: {str(error)[:200]}", where)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with suppress(FileNotFoundError):
        path.unlink()
    path.write_bytes(artifact.data) if artifact.name.startswith("run: ") else None
    pipe.send(("done", (dict(counts), dict(refused), round(slowest, 3), round(grown, 1))))


def fuzzed(artifact: Artifact, root: Path, options: argparse.Namespace, cases: range) -> dict:
    """One kind: how often it was read and refused, and every finding."""
    context = multiprocessing.get_context("fork")
    result = {"kind": artifact.name, "cases": len(cases), "read": 0, "looked at": 0, "refused": 0, "findings": []}
    start, begin = time.perf_counter(), cases.start
    while begin < cases.stop:
        ours, theirs = context.Pipe(duplex=False)
        rest = range(begin, cases.stop)
        process = context.Process(target=work, args=(artifact, root, options, rest, theirs))
        process.start()
        theirs.close()
        last, done = begin - 1, False
        while True:
            if not ours.poll(3 * SECONDS):
                process.kill()
                result["findings"].append({"case": last, "what": f"no answer within {3 * SECONDS:.0f} s", "where": ""})
                break
            try:
                what, said = ours.recv()
            except EOFError:
                process.join()
                died = {"case": last, "what": f"the process ended with {process.exitcode}", "where": ""}
                result["findings"].append(died)
                break
            if what == "case":
                last = said
            elif what == "finding":
                result["findings"].append(dict(zip(("case", "what", "where"), said, strict=True)))
            else:
                counts, refused, slowest, grown = said
                result |= counts | {"errors": refused, "slowest_seconds": slowest, "memory_mib": grown}
                done = True
                break
        process.join()
        begin = cases.stop if done else last + 1
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--looks", type=float, default=0.02, help="share of the read ones that are looked at too")
    parser.add_argument("--only", help="a kind, or what its name begins with")
    parser.add_argument("--case", type=int, help="this one only, with its traceback")
    parser.add_argument("--out", type=Path, help="JSON; docs/data/fuzz.json is written with --out docs/data/fuzz.json")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz_", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        kinds = [a for a in artifacts(root) if a.name.startswith(options.only or "")]
        if not kinds:
            parser.error(f"no kind begins with {options.only!r}")
        if options.case is not None:
            return repeat(kinds[0], root, options)
        torch.set_num_threads(1)
        for artifact in kinds:
            warm(artifact, root)
        start, total = time.perf_counter(), sum(a.share for a in kinds)
        results = []
        for artifact in kinds:
            count = -(-round(options.cases * artifact.share) // total)
            results.append(found := fuzzed(artifact, root, options, range(int(count))))
            print(line(found), flush=True)
        seconds = time.perf_counter() - start
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = spent.ru_utime + spent.ru_stime
    finally:
        shutil.rmtree(root, ignore_errors=True)
    findings = sum(len(r["findings"]) for r in results)
    cases = sum(r["cases"] for r in results)
    print(f"{cases:,} cases in {seconds:.0f} s ({cpu:.0f} s of one core): {findings} findings")
    for result in results:
        for finding in distinct(result["findings"]):
            print(f"\n{result['kind']}, case {finding['case']}: {finding['what']}\n{finding['where']}")
    if options.out:
        about = {"seed": options.seed, "looks": options.looks, "memory_mib": MEMORY >> 20, "limit_seconds": SECONDS}
        about |= {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        whole = {"about": about, "cases": cases, "seconds": round(seconds, 1), "core_seconds": round(cpu, 1)}
        whole |= {"findings": findings, "kinds": results}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")
    return int(findings > 0)


def warm(artifact: Artifact, root: Path) -> None:
    """Read the good one: what is imported and kept on first use is not a case's."""
    path = place(artifact, root)
    path.write_bytes(artifact.data)
    found = artifact.read(path)
    if not artifact.name.startswith("run: ") or artifact.file == "run.json":
        artifact.look(found)


def repeat(artifact: Artifact, root: Path, options: argparse.Namespace) -> int:
    """One case again, outside the limits."""
    path = place(artifact, root)
    data = mutated(artifact.data, path.suffix, generator(options.seed, artifact.name, options.case))
    path.write_bytes(data)
    print(data[:4000])
    try:
        artifact.look(artifact.read(path))
    except SimsError as error:
        print(f"refused: {type(error).__name__}: {error}")
    return 0


def distinct(findings: list[dict]) -> list[dict]:
    """One of each place."""
    return list({(f["where"] or f["what"]): f for f in reversed(findings)}.values())


def line(found: dict) -> str:
    return (
        f"{found['kind']:34} {found['cases']:6} cases: {found['read']:6} read, {found['looked at']:5} looked at, "
        f"{found['refused']:6} refused, {len(found['findings']):4} findings, {found['seconds']:6.1f} s, slowest "
        f"{found.get('slowest_seconds', 0):.2f} s, +{found.get('memory_mib', 0):.0f} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
