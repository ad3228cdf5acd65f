"""batchproof in Hugging Face transformers: swap a model's modules, and generate by continuous batching."""

from .engine import Completion, Engine, Request
from .swap import Report, make_invariant

__all__ = ["Completion", "Engine", "Report", "Request", "make_invariant"]
