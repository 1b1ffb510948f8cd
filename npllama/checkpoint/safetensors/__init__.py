"""safetensors files, and Hugging Face's checkpoints made of them."""

from npllama.checkpoint.safetensors.file import SafetensorsFile, open_safetensors
from npllama.checkpoint.safetensors.hf import open_hf

__all__ = ["SafetensorsFile", "open_hf", "open_safetensors"]
