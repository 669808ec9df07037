"""The residual stream's sum and its root mean square norm."""
