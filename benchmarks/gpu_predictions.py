"""What `gpu.py` expects of each GPU: arithmetic made before anything was timed, and the bars that were set."""

from __future__ import annotations

CARDS = ("H200", "A100", "L4", "4090")

PEAK = {"H200": (4800, 990), "A100": (2039, 312), "L4": (300, 121), "4090": (1008, 165)}
"""GB/s of memory and TFLOP/s of bfloat16 with float32 sums, as the makers state them, by card."""

DENSE = {
    "H200": {
        197: (2.01, 1.57),
        577: (1.15, 0.90),
        1025: (1.11, 0.86),
        1370: (0.90, 0.71),
        4097: (0.87, 0.68),
    },
    "A100": {577: (2.45, 2.45), 1370: (1.93, 1.93), 4097: (1.86, 1.86)},
    "L4": {577: (6.68, 6.68), 1370: (5.26, 5.26), 4097: (5.06, 5.06)},
    "4090": {577: (2.62, 2.62), 1370: (2.07, 2.07), 4097: (1.99, 1.99)},
}
"""ps for a query-key pair of a head, head size 64, by FlashAttention 2 and by the best dense kernel, by tokens."""

TILES = {
    "H200": {
        197: (0.81, 0.87, 0.97),
        577: (0.82, 0.94, 1.10),
        1025: (0.90, 1.07, 1.30),
        1370: (0.84, 0.99, 1.26),
        4097: (0.88, 1.09, 1.42),
    },
    "A100": {577: (None, 1.00, 1.23), 1370: (None, 1.05, 1.39), 4097: (None, 1.12, 1.54)},
    "L4": {577: (None, 1.46, 1.72), 1370: (None, 1.53, 1.94), 4097: (None, 1.72, 2.27)},
    "4090": {577: (None, 1.23, 1.54), 1370: (None, 1.25, 1.70), 4097: (None, 1.40, 2.00)},
}
"""Times faster than the best dense kernel of sparse attention in tiles of 64 queries, keep 0.25: with scores of 32 bits, of
16 bits, and of the mean queries of 2x2 patches."""
TILES_BAR = 1.3  # the finished op is built where it measures at least that

MODELS = {
    ("H200", "DeiT-S"): {1: 0.76, 8: 0.88, 64: 1.81, 256: 2.03},
    ("H200", "ViT-B"): {1: 0.81, 8: 1.39, 64: 1.98, 256: 2.12},
    ("A100", "DeiT-S"): {1: 0.80, 8: 1.28, 64: 1.96, 256: 2.10},
    ("L4", "DeiT-S"): {1: 0.94, 8: 1.74, 64: 2.07, 256: 2.11},
}
"""Times faster than dense with 42 % of the MACs, both in CUDA graphs, by card, model and batch."""

BARS = {
    ("DeiT-S", 64): 1.8,
    ("DeiT-S", 256): 2.0,
    ("ViT-B", 8): 1.3,
    ("ViT-B", 64): 1.9,
    ("ViT-S/14 518", 8): 1.8,
}
"""Times faster than the best dense model that the converted one should be, by model and batch; on an H200."""
LOADED_BAR = 0.98  # of any converted model as `load(graph=True)` gives it


def card(name: str) -> str:
    """The card of `CARDS` that a device's name says; '' for another."""
    return next((each for each in CARDS if each in name.split() or each in name.replace("-", " ").split()), "")
