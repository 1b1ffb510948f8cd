"""Export a Hugging Face folder to OpenVINO with weights in 8 or 4 bits: SOURCE TARGET BITS."""

from __future__ import annotations

import sys

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def main(source: str, target: str, bits: str) -> None:
    """Write TARGET; 8 bits by row, 4 bits in groups of 64 where that divides the rows, as optimum-intel does it."""
    config = OVWeightQuantizationConfig(bits=int(bits), sym=bits == "4", **({"group_size": 64} if bits == "4" else {}))
    OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=config).save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
