"""The built-in `digits` data set: 1,797 scans of 8 x 8 pixels that scikit-learn ships (NOTICE.md, CC BY 4.0)."""
