"""Rewards: text (and a reference answer) in, a number out."""
