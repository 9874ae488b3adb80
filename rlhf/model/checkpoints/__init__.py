"""Checkpoints of other libraries, in and out: which files, which names, which shapes.

`find` says what a folder holds, `orbax` and `safetensors` read arrays, `names` says which array is which parameter,
`stream` puts them on the devices one at a time; `kaggle`, `hub` and `download` fetch; `write_*` are the way back.
"""
