"""Convex training of two-layer ReLU networks with proven adversarial robustness."""

__version__ = "0.1.0"
