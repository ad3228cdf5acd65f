"""Audit of a server, from outside: do answers depend on what else is asked meanwhile?"""

from .audit import audit_server

__all__ = ["audit_server"]
