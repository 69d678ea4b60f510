"""What encryption costs: reading encrypted data with `mst`, beside plain data.

`python benchmarks/encrypted_data.py [--mebibytes 128] [--pairs 5]` prints one JSON line a case; it
needs no extra. Plain and encrypted take turns on one thread, in a warm page cache; the figures are
medians of CPU seconds, which a busy machine moves less than the time on the wall, and that stands
beside them. Rows are chat turns of about 600 bytes.

The cases: bytes decrypted by `SealedFile` beside `cryptography` alone on segments in memory, at
several segment sizes; encryption; rows read whole as `mst train` does; and streaming's index and
rows in random order, tokenized.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mst.data.formats import Reading, iter_rows
from mst.data.line_index import index_lines, line_at
from mst.data.refusals import Refusals
from mst.seal.container.layout import SEGMENT_BYTES
from mst.seal.container.output import whole_file
from mst.seal.container.writer import encrypt
from mst.seal.keys.key_file import make_key_file, read_key_file
from mst.seal.keys.ring import KeyRing, ring_of
from mst.seal.keys.wrapping import KeyFileWay

RANDOM_ROWS = 10_000
TOKENIZER = Path(__file__).parents[1] / "tests/data/tokenizers/minimind/tokenizer.json"
SEGMENTS = (SEGMENT_BYTES, 64 << 10, 256 << 10)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds and the seconds that some work takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def turns(
    works: dict[str, Callable[[], object]], pairs: int
) -> dict[str, list[tuple[float, float]]]:
    """Do each work in turn, `pairs` times after one to warm up."""
    for each in works.values():
        each()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(pairs):
        for name, work in works.items():
            found[name].append(timed(work))
    return found


def medians(found: dict[str, list[tuple[float, float]]], part: int) -> dict[str, float]:
    """Return each work's median CPU seconds (part 0) or seconds (part 1)."""
    return {name: statistics.median(each[part] for each in times) for name, times in found.items()}


def slower(plain: list[tuple[float, float]], sealed: list[tuple[float, float]]) -> float:
    """Return by how many percent the second is slower: the median over the pairs."""
    ratios = (b[0] / a[0] for a, b in zip(plain, sealed, strict=True))
    return round(100 * (statistics.median(ratios) - 1), 1)


def make_rows(path: Path, mebibytes: int) -> int:
    """Write rows of words that don't repeat; return how many."""
    draw, count = random.Random(0), 0
    words = [secrets.token_hex(draw.randrange(1, 5)) for _ in range(5000)]
    with path.open("w") as file:
        while file.tell() < mebibytes << 20:
            for _ in range(1000):
                question, answer = (" ".join(draw.choices(words, k=45)) for _ in range(2))
                turns = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
                count += 1
    return count


def make_sealed(source: Path, target: Path, key: bytes, segment_bytes: int) -> None:
    """Encrypt a file."""
    target.unlink(missing_ok=True)
    with source.open("rb") as plain, whole_file(target) as sealed:
        encrypt(plain, sealed, ".jsonl", (KeyFileWay(key),), segment_bytes=segment_bytes)


def decryption(source: Path, target: Path, key: bytes, pairs: int, segment_bytes: int) -> None:
    """Print the speed of decryption beside that of the library alone, and of encryption."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    size, data = source.stat().st_size, source.read_bytes()
    written = timed(lambda: make_sealed(source, target, key, segment_bytes))
    cipher, nonce, bound = AESGCM(key), bytes(12), bytes(32)
    places = range(0, size, segment_bytes)
    pieces = [cipher.encrypt(nonce, data[at : at + segment_bytes], bound) for at in places]

    def library() -> None:
        for each in pieces:
            cipher.decrypt(nonce, each, bound)

    with KeyRing((key,)).open(target) as sealed:

        def ours() -> None:
            for number in range(sealed.count):
                sealed.segment(number)

        found = turns({"library": library, "mst": ours, "verify": sealed.verify}, pairs)
    cpu, wall = medians(found, 0), medians(found, 1)
    speed = {f"{name}_mb_per_cpu_second": round(size / 1e6 / cpu[name]) for name in cpu}
    speed |= {f"{name}_mb_per_second": round(size / 1e6 / wall[name]) for name in wall}
    say(
        case="decrypt, one thread",
        segment_bytes=segment_bytes,
        **speed,
        ratio_to_library=round(cpu["library"] / cpu["mst"], 2),
        encrypt_and_index_mb_per_cpu_second=round(size / 1e6 / written[0]),
    )


def reading(source: Path, target: Path, ring: KeyRing, pairs: int) -> None:
    """Print what reading rows costs, whole and streamed."""
    from tokenizers import Tokenizer

    def whole(path: Path) -> None:
        for _ in iter_rows(str(path), Reading(keys=ring)):
            pass

    def report(case: str, work: Callable[[Path], object], rows: int) -> None:
        found = turns({"plain": lambda: work(source), "encrypted": lambda: work(target)}, pairs)
        cpu = medians(found, 0)
        say(
            case=case,
            rows=rows,
            plain_rows_per_cpu_second=round(rows / cpu["plain"]),
            encrypted_rows_per_cpu_second=round(rows / cpu["encrypted"]),
            slower_percent=slower(found["plain"], found["encrypted"]),
            wall={name: round(each, 3) for name, each in medians(found, 1).items()},
        )

    rows = sum(1 for _ in iter_rows(str(source)))
    report("rows read whole", whole, rows)
    report("index for streaming", lambda path: index_lines(path, Refusals(), ring), rows)
    indices = {path: index_lines(path, Refusals(), ring) for path in (source, target)}
    order = random.Random(1).choices(range(rows), k=RANDOM_ROWS)

    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def lines(path: Path) -> None:
        for row in order:
            line_at(indices[path], row)

    def tokens(path: Path) -> None:
        for row in order:
            for turn in json.loads(line_at(indices[path], row))["messages"]:
                tokenizer.encode(turn["content"])

    report("lines in random order", lines, RANDOM_ROWS)
    report("rows in random order, parsed and tokenized", tokens, RANDOM_ROWS)


def say(**facts: Any) -> None:
    """Print one case."""
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Make the data and measure."""
    import cryptography
    from cryptography.hazmat.backends.openssl import backend

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--machine", default=platform.machine(), help="in words, for the record")
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "cryptography": cryptography.__version__}
    versions["openssl"] = backend.openssl_version_text()
    load = round(os.getloadavg()[0], 1)
    say(machine=args.machine, load=load, mebibytes=args.mebibytes, versions=versions)
    with tempfile.TemporaryDirectory() as parent:
        source, target, key_file = (
            Path(parent) / name for name in ("rows.jsonl", "rows.jsonl.mst", "key")
        )
        make_rows(source, args.mebibytes)
        make_key_file(key_file)
        key = read_key_file(key_file)
        for segment_bytes in SEGMENTS:
            decryption(source, target, key, args.pairs, segment_bytes)
        make_sealed(source, target, key, SEGMENT_BYTES)
        reading(source, target, ring_of(str(key_file), None), args.pairs)


if __name__ == "__main__":
    main()
