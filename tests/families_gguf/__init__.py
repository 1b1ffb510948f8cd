"""Families of models by way of GGUF files, which are written as llama.cpp's converter writes them."""
