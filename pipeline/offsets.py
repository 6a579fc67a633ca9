"""What sources read in order by splittable DoFns have in common: offsets, which one reader claims one after another."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.utils.timestamp import Timestamp

FOREVER = 2**62  # the end of what has no known end
RESTRICTION = beam.DoFn.RestrictionParam()  # the DoFn itself says where it begins
WATERMARK = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())


class Tracker(OffsetRestrictionTracker):
    """Divides only into what was read and the rest: elsewhere, two readers would break the order."""

    def try_split(self, fraction_of_remainder: float) -> tuple[OffsetRange, OffsetRange] | None:
        return None if fraction_of_remainder else super().try_split(0)

    def check_done(self) -> None:
        try:
            super().check_done()
        except ValueError as error:
            wanted = "expected a runner that has splittable DoFns, such as FnApiRunner"
            raise ValueError(f"{wanted}, got one that left out a part ({error})") from error

    def is_bounded(self) -> bool:
        return self._range.stop != FOREVER


class Offsets(RestrictionProvider):
    """A DoFn that is one too has still to say where an element begins."""

    def create_tracker(self, restriction: OffsetRange) -> Tracker:
        return Tracker(restriction)

    def restriction_size(self, element: Any, restriction: OffsetRange) -> int:
        return 1 if restriction.stop == FOREVER else restriction.size()


def advance(watermark: Any, timestamp: Timestamp) -> None:
    """Sets a watermark, which never goes back."""
    now = watermark.current_watermark()
    if now is None or timestamp > now:
        watermark.set_watermark(timestamp)
