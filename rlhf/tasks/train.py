"""Train: the algorithm on the dataset, in the run's folder, from the start or from where the run stopped."""

from rlhf.build import Experiment
from rlhf.config import config
from rlhf.train.loop import Trainer


@config
class Train:
    """`rlhf algorithm=… dataset=…`."""

    def __call__(self, experiment: Experiment) -> dict[str, float]:
        """Train to the end; the held-out metrics before and after, and the last metrics of training."""
        first, last = Trainer(experiment.training_job()).fit()
        held_out = {name.removeprefix("val/"): value for name, value in last.items() if name.startswith("val/")}
        before = {f"before/{name}": first[f"val/{name}"] for name in held_out if f"val/{name}" in first}
        after = {f"after/{name}": value for name, value in held_out.items()}
        trained: dict[str, float] = {name: last[name] for name in ("loss", "grad_norm") if name in last}
        return {**trained, **before, **after}
