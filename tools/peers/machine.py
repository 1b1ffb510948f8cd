"""What the measurements ran on."""

from __future__ import annotations

import platform
from pathlib import Path

#: What the kernel calls the instructions that matter here, and what people call them.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor and the instructions that matter here: what a virtual one calls itself says little."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    features = [title for flag, title in _FEATURES.items() if flag in flags]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} with {', '.join(features)}" if features else name
