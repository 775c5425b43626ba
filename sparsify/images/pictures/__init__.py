"""The built-in calibration pictures."""
