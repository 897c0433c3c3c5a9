"""LayerScope, its rivals and ours on simulated legacy servers: see __main__.py."""
