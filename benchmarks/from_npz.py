"""ADBench's tables as Parquet: `X` as columns x00, x01, ... and `y` as `label`, in the order of the rows.

python -m benchmarks.from_npz ADBench/adbench/datasets/Classical DIR
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tables import LABEL


def convert(source: Path, folder: Path) -> Path:
    """Writes `35_SpamBase.npz` as `SpamBase.parquet`."""
    with np.load(source, allow_pickle=False) as arrays:
        x, y = arrays["X"], arrays["y"]
    columns = {f"x{i:02d}": column.astype(np.float32) for i, column in enumerate(x.T)}
    path = folder / f"{re.sub(r'^[0-9]+_', '', source.stem)}.parquet"
    pq.write_table(pa.table({**columns, LABEL: y.astype(np.int8)}), path, compression="zstd")
    return path


def main() -> None:
    """Converts a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Folder of .npz files.")
    parser.add_argument("folder", type=Path, help="Folder to write to.")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(args.source.glob("*.npz")):
        print(convert(source, args.folder))


if __name__ == "__main__":
    main()
