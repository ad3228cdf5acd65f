"""The kernels, one op family a module. Nothing here knows of a model or an engine."""
