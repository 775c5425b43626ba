"""Closed-form fits of predictors from unlabelled images: no gradient, no label (`calibrate`)."""

from sparsify.calibration.calibrate import Calibration, calibrate, first, fit_importance, spends_ranks

__all__ = ["Calibration", "calibrate", "first", "fit_importance", "spends_ranks"]
