"""Routing traces, predictors of the next layers' experts, their training and their metrics."""
