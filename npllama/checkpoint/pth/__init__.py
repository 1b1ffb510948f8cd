"""PyTorch's ``.pth``, Meta's checkpoints made of them, and lone state dicts, read without torch and without trust."""

from npllama.checkpoint.pth.file import PthFile, open_pth
from npllama.checkpoint.pth.meta import open_meta
from npllama.checkpoint.pth.state_dict import open_state_dict

__all__ = ["PthFile", "open_meta", "open_pth", "open_state_dict"]
