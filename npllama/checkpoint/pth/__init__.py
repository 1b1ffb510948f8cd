"""PyTorch's ``.pth`` and Meta's checkpoints made of them, read without torch and without trust."""

from npllama.checkpoint.pth.file import PthFile, open_pth
from npllama.checkpoint.pth.meta import open_meta

__all__ = ["PthFile", "open_meta", "open_pth"]
