"""Quantise a GGUF file with llama.cpp's own quantiser: SOURCE TARGET FORMAT THREADS."""

from __future__ import annotations

import sys

import llama_cpp as llama


def main(source: str, target: str, kind: str, threads: str) -> int:
    """Write TARGET; the exit code is llama.cpp's."""
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = int(threads)
    return int(llama.llama_model_quantize(source.encode(), target.encode(), settings))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
