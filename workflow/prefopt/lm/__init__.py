"""The language-model engine: loading, batching, log-probabilities, sampling. It knows no task."""
