"""Closed-form fits of predictors from unlabelled images: no gradient, no label."""
