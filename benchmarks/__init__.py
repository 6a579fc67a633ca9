"""Comparisons, each in one run on one machine, printed as ratios. Not part of the installed package."""
