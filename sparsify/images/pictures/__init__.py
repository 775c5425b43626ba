"""The built-in calibration images: crops and collages of seven free photographs (NOTICE.md)."""
