"""Audits: which op varies with the batch, and from which size on, in any callable, model or server."""
