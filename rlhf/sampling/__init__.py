"""Generation: sampling methods, a cached decoder compiled once per bucket, samples and evaluation."""
