"""Maths: arrays in, arrays out. No config objects, models, files or logging."""
