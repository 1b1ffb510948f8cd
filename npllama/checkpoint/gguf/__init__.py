"""GGUF: tensors, configuration and tokenizer in one file."""

from npllama.checkpoint.gguf.checkpoint import open_gguf_checkpoint
from npllama.checkpoint.gguf.file import GgufFile, open_gguf
from npllama.checkpoint.gguf.tokenizer import tokenizer_files

__all__ = ["GgufFile", "open_gguf", "open_gguf_checkpoint", "tokenizer_files"]
