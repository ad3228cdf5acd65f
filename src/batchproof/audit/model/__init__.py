"""Audit of a model: which op is the first whose bits change in company?"""

from .audit import MODES, audit_model

__all__ = ["MODES", "audit_model"]
