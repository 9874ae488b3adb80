"""RLHF on Gemma 3 in JAX. The entry point is `rlhf.run`; `conf/` holds every setting."""
