"""One file per algorithm: what to do with a batch before the update (`prepare`) and what to minimise (`loss`)."""
