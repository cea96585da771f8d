"""Axis inference: logical axes of unmodified models, found in their jaxprs."""
