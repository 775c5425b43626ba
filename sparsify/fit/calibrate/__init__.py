"""Closed-form fits from unlabelled images: no gradient, no label.

calibrate                      a dense model -> a sparse one with fitted predictors
head_lowrank, token_lowrank    the two predictors
head_errors                    what each head loses by its rank, keep and cells
budgets                        what a keep costs, spent over the heads
token_importance               which tokens matter
repair                         least squares of the backbone's linear maps
"""
