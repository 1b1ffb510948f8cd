"""The numbers that define a model, and the strict readers that find them in a checkpoint's own metadata.

A key that is neither understood nor known to be harmless is an error: a model that runs with a setting ignored gives
fluent, wrong text.
"""

from npllama.config.gguf_metadata import from_gguf
from npllama.config.hf_json import from_hf_json
from npllama.config.model_config import Experts, ModelConfig, RopeScaling
from npllama.config.params_json import from_params_json

__all__ = ["Experts", "ModelConfig", "RopeScaling", "from_gguf", "from_hf_json", "from_params_json"]
