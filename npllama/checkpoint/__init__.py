"""Checkpoint files in, memory maps out. Nothing here imports torch, and nothing in a file is ever executed."""
