"""Activation statistics that operators need: Gram matrices and means, one block at a time."""

from autocomp.calibrate.stats import SiteStats, UnitStats, load_stats, save_stats

__all__ = ["SiteStats", "UnitStats", "load_stats", "save_stats"]
