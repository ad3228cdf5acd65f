"""Audit of a callable: at which batch sizes, places and neighbours do a row's bits change?"""

from .audit import RELATIONS, assert_batch_invariant, audit_op

__all__ = ["RELATIONS", "assert_batch_invariant", "audit_op"]
