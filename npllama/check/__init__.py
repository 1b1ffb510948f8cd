"""Checking: traces of a run's tensors, their comparison, the verdict, and the mistake behind a difference."""
