"""The names of the policies in `policies.py` that need no knowledge of the future, for who must not import compiled code."""

POLICIES = ("ours", "static", "static-offload32", "fiddler", "lru", "tokens", "makespan-greedy", "qstar")
