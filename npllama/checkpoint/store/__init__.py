"""The folder that a conversion writes and a model is loaded from: a manifest, and one ``.npy`` file per tensor."""

from npllama.checkpoint.store.folder import PARTIAL, Progress, Store, Verification, verify_store
from npllama.checkpoint.store.manifest import is_model_folder

__all__ = ["PARTIAL", "Progress", "Store", "Verification", "is_model_folder", "verify_store"]
