"""How cost grows with experts, layers, batch and context: see __main__.py."""
