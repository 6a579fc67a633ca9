"""Pointing to another bundle, and back: what `beam-vae promote` and `beam-vae rollback` do."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import pyarrow as pa

from vae_model import files
from vae_model.bundle import Bundle, load_bundle, load_entry
from vae_model.pointer import MAX_HISTORY, Entry, Pointer, PointerError, is_pointer, name_for, read_pointer
from vae_model.schema import ConstantFeature, Feature, TableSchema


class PromotionError(ValueError):
    """A pointer may not be changed as asked."""


class Change(NamedTuple):
    """What became of a pointer: where there was none, `before` is None; where nothing was changed, the same."""

    before: Pointer | None
    after: Pointer


def promote(bundle: str, pointer: str, *, force: bool = False) -> Change:
    """Points to a bundle, once it is proved to be whole and to score as at training time.

    Args:
        bundle: URI of a bundle, or of another pointer, whose bundle is meant then.
        pointer: URI of the pointer, which ends in `.json`; it is made where there is none.
        force: Also where running pipelines would refuse the bundle for its columns.

    Raises:
        BundleError: The bundle is not whole, or scores otherwise.
        PromotionError: It cannot take the place of the one pointed to now.
    """
    if not is_pointer(pointer):
        raise PromotionError(f"{pointer}: expected the name of a pointer, which ends in .json")
    source = read_pointer(bundle) if is_pointer(bundle) else None
    place = source.locate(source.current) if source else bundle
    name = name_for(place, pointer)
    loaded = load_entry(source, source.current) if source else load_bundle(bundle)
    loaded.verify()
    before = _read_old(pointer, force)
    if before and not force:
        _refuse_other_columns(before, place, loaded)
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    entry = Entry(name, loaded.model_version, now)
    history: tuple[Entry, ...] = ()
    if before:
        old = before.current
        if (old.bundle, old.model_version) == (entry.bundle, entry.model_version):
            return Change(before, before)
        history = (old, *before.history)[:MAX_HISTORY]
    after = Pointer(pointer, entry, history)
    after.write()
    return Change(before, after)


def rollback(pointer: str) -> tuple[Pointer, Pointer]:
    """Points to the bundle before the current one again, once it is proved to be whole and to score as it did.

    Returns:
        The pointer before and after.

    Raises:
        BundleError: That bundle is no longer there, not whole, or another one by now.
        PromotionError: There was none before.
    """
    before = read_pointer(pointer)
    if not before.history:
        raise PromotionError(f"{pointer}: has no earlier bundle to go back to")
    entry, *older = before.history
    load_entry(before, entry).verify()
    after = Pointer(pointer, entry, tuple(older))
    after.write()
    return before, after


def readings(schema: TableSchema) -> dict[str, str]:
    """How each feature is read: "numeric", "timestamp", "categorical", or "any" where no value was ever seen."""
    return {feature.name: _reading(feature) for feature in schema.features}


def _reading(feature: Feature) -> str:
    if isinstance(feature, ConstantFeature):
        if feature.number is not None:
            return "numeric"
        return "categorical" if feature.levels else "any"
    return feature.kind


def refuse_successor(new: TableSchema, old: dict[str, str], columns: pa.Schema | None = None) -> str | None:
    """Why a model cannot go on where another one scored, or None.

    Args:
        new: Its schema.
        old: `readings` of the other one, whose columns the tables are known to have.
        columns: The tables' schema, where known: a new model may read any of its columns then.
    """
    problems = []
    for name, reading in readings(new).items():
        if name not in old:
            if columns is None:
                problems.append(f"{name}: is read by it, but not by the model before, so the input may lack it")
        elif reading != old[name] and "any" not in (reading, old[name]):
            problems.append(f"{name}: is read as {reading}, expected {old[name]} as by the model before")
    if columns is not None and (lacking := new.refuse(columns)):
        problems.append(lacking)
    return "; ".join(problems) or None


def _read_old(pointer: str, force: bool) -> Pointer | None:
    if not files.exists(pointer):
        return None
    try:
        return read_pointer(pointer)
    except PointerError as error:
        if force:
            return None
        raise PromotionError(f"{error}; --force replaces it") from error


def _refuse_other_columns(before: Pointer, place: str, new: Bundle) -> None:
    try:
        old = load_entry(before, before.current)
    except (ValueError, OSError) as error:
        raise PromotionError(f"{error}; so {place} cannot be compared with it; --force promotes it all the same") from (
            error
        )
    if problem := refuse_successor(new.schema, readings(old.schema)):
        raise PromotionError(
            f"{place}: running pipelines that follow {before.uri} may refuse it: {problem}; --force promotes it all "
            "the same"
        )
