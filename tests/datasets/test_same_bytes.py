"""The same data gives the same bytes, whatever packs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from packing import contents

PROGRAM = """
import argparse, sys
from pathlib import Path
from cmvae.datasets import folder, table
from cmvae.datasets.writer import write_shards

workers = int(sys.argv[1])
for module, arguments in (
    (table, "t.csv --vector=x --categorical=kind --text=note --label=label --group=group --date=day"),
    (folder, "data"),
):
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    module.add_arguments(parser)
    name = module.__name__.rpartition(".")[2]
    source = module.from_arguments(parser.parse_args([*arguments.split(), f"--out=out/{name}"]))
    write_shards(source, f"out/{name}", shard_size=7, num_workers=workers, table=source.table)
"""


def write_data(place: Path, order: int) -> None:
    (place / "data" / "notes").mkdir(parents=True)
    (place / "data" / "Notes 2").mkdir()
    rows = ["x,kind,note,label,group,day"]
    labels = ["0", "1", "2", "3", "nan", "\u732b", ""]
    for n in range(40):
        words = " ".join(f"w{m * n % 11}" for m in range(6))
        rows.append(
            f"{n / 3},{labels[n % 6]},{words} \u0130,{labels[n % 7]},g{n // 2},2024-01-{1 + n % 28:02d}"
        )
    (place / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    for n in range(40)[::order]:
        for folder in ("notes", "Notes 2")[::order]:
            (place / "data" / folder / f"\u732b{n}.txt").write_text(f"a b c{n % 3}", encoding="utf-8")


def pack(place: Path, order: int, workers: int, **environment: str) -> dict[str, bytes]:
    place.mkdir()
    write_data(place, order)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(workers)],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        f"{name}/{file}": data
        for name in ("table", "folder")
        for file, data in contents(place / "out" / name).items()
    }


def test_hashes_locales_file_orders_and_packers_do_not_show(tmp_path):
    first = pack(tmp_path / "a", 1, 1, PYTHONHASHSEED="1", LC_ALL="C.UTF-8")
    again = pack(
        tmp_path / "b", -1, 3, PYTHONHASHSEED="2", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"
    )
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
