"""Names of the policies in `policies.py` that a user can choose; imports no compiled code."""

POLICIES = ("ours", "static", "static-offload32", "fiddler", "lru", "tokens", "makespan-greedy", "qstar")
