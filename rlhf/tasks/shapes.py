"""Print the first batch as the model gets it, and stop (`debug=shapes`)."""

from typing import Any

from rlhf.build import Experiment
from rlhf.config import config, require_range
from rlhf.data.batches import Batches, collate_tokens
from rlhf.data.describe import describe_batch


@config
class Shapes:
    """n_rows: rows of the batch that are shown token by token."""

    n_rows: int = 2

    def __post_init__(self):
        require_range(self, "n_rows", at_least=1)

    def __call__(self, experiment: Experiment) -> dict[str, Any]:
        algorithm = experiment.settings.algorithm
        examples = experiment.examples("train", algorithm.form)
        batches = Batches(examples, algorithm.batch_size, experiment.settings.seed)
        batch = collate_tokens(examples, batches.order.rows(0))
        print(describe_batch(batch, experiment.tokenizer, self.n_rows))
        return {f"shape/{name}": str(tuple(x.shape)) for name, x in batch.items()}
