"""Every policy on every virtual server: see __main__.py."""
