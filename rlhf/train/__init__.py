"""The loop around any algorithm: state, update, checkpoints, metrics. No algorithm is named here."""
