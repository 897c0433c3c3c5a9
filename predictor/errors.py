"""What can be wrong with a trace or a predictor that the user names. Every message says what to do about it."""


class TraceError(ValueError):
    """A trace is missing, damaged, unfinished, or of another model or version."""


class PredictorError(ValueError):
    """A predictor is missing, damaged, or of another model or version."""
