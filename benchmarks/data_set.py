"""Memory and time of opening a data set of many records, against parsing it into Python objects.

    python -m benchmarks.data_set --records 200000

Each side runs in a process of its own. Memory is the growth of what the process itself holds (RssAnon); pages of a mapped
file are the kernel's to drop and are not counted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parser

SIDES = ("json.load", "JSON list", "JSON lines", "parquet", "webdataset")
READS = 2000


def write(folder: Path, count: int) -> None:
    """Two turns of about 600 characters each, LLaVA form, text only."""
    import pyarrow as pa
    from pyarrow import parquet

    from tests.distill.data_sets import tar_shard

    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], k=5000)

    def record(number: int) -> dict[str, Any]:
        text = " ".join(words[number % 4000 :][:100])
        turns = [("human", f"{number} {text}"), ("gpt", text), ("human", text), ("gpt", text)]
        return {"id": str(number), "conversations": [{"from": role, "value": value} for role, value in turns]}

    with (folder / "d.json").open("w") as listed, (folder / "d.jsonl").open("w") as lines:
        for number in range(count):
            line = json.dumps(record(number))
            lines.write(line + "\n")
            listed.write(("[" if number == 0 else ",\n") + line)
        listed.write("]")
    (folder / "parquet").mkdir()
    (folder / "tar").mkdir()
    for shard, start in enumerate(range(0, count, 20_000)):
        rows = [record(number) for number in range(start, min(start + 20_000, count))]
        parquet.write_table(pa.Table.from_pylist(rows), folder / "parquet" / f"{shard:03}.parquet", row_group_size=1000)
        tar_shard(folder / "tar" / f"{shard:03}.tar", [(row, ()) for row in rows], start)


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def measure(side: str, folder: Path) -> dict[str, float]:
    """Open one side and read records of it in random order."""
    from distill.data import source, tables

    if side == "parquet":
        tables.library()  # the library's own size is not the data set's
    before, started = anonymous_mib(), time.perf_counter()
    if side == "json.load":
        with (folder / "d.json").open() as f:
            opened: Any = json.load(f)
    else:
        names = {"JSON list": "d.json", "JSON lines": "d.jsonl", "parquet": "parquet", "webdataset": "tar"}
        opened = source.open_source_of(folder / names[side])
    seconds = time.perf_counter() - started
    drawn = random.Random(1).sample(range(len(opened)), min(READS, len(opened)))
    started = time.perf_counter()
    for number in drawn:
        opened[number]
    read = (time.perf_counter() - started) / len(drawn)
    return {"mib": anonymous_mib() - before, "open_s": seconds, "read_us": 1e6 * read, "records": len(opened)}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--records", type=int, default=200_000)
    options.add_argument("--side", choices=SIDES, help="measure only this one, in this process")
    options.add_argument("--folder", type=Path)
    told = options.parse_args()
    if told.side:
        print(json.dumps(measure(told.side, told.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), told.records)
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        rows = {}
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.data_set", "--side", side, "--folder", folder]
            runs = []
            for _ in range(told.rounds):
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            rows[side] = {key: sorted(run[key] for run in runs) for key in runs[0]}
            shown = {key: values[len(values) // 2] for key, values in rows[side].items()}
            print(
                f"{side}: {shown['mib']:.0f} MiB, opened in {shown['open_s']:.1f} s, {shown['read_us']:.0f} us a record"
            )
        size = (Path(folder) / "d.json").stat().st_size
    value = {"rows": rows, "settings": {"records": told.records, "json_bytes": size}, "machine": machine()}
    if told.out is not None:
        told.out.parent.mkdir(parents=True, exist_ok=True)
        told.out.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value))


if __name__ == "__main__":
    main()
