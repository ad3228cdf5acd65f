"""batchproof inside an engine, through that engine's own extension points. One engine a module."""
