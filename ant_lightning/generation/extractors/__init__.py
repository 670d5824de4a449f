"""Feature extractors of the metrics."""
