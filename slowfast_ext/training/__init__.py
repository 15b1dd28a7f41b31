"""Training: configurations, the loop, and what keeps a run from losing work."""
