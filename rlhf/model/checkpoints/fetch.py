"""The child process of `download`: fetch one handle and print the answer as JSON."""

import dataclasses
import json
import sys
from typing import Any

from rlhf.model.checkpoints import hub, kaggle
from rlhf.model.checkpoints.handles import HubHandle, KaggleHandle


def fetch(order: dict[str, Any]) -> dict[str, Any]:
    """`path` and `handle`, or `error` and whether to try `again`."""
    module: Any
    handle: Any
    if order["world"] == KaggleHandle.__name__:
        module, handle = kaggle, KaggleHandle(**order["handle"])
    else:
        module, handle = hub, HubHandle(**order["handle"])
    try:
        path, full = module.fetch(handle)
    except Exception as error:  # the clients raise many kinds; each is told to the user
        text, again = module.explain(error, handle)
        return {"error": text, "again": again}
    return {"path": str(path), "handle": dataclasses.asdict(full)}


if __name__ == "__main__":
    print(f"\n{json.dumps(fetch(json.loads(sys.argv[1])))}")
