"""The model card of a checkpoint: what it is, how it came about, how to load it."""

from collections.abc import Mapping
from pathlib import Path

from zk0bot.config.models import RunConfig
from zk0bot.version import __version__


def write_card(config: RunConfig, run_id: str, round_: int, losses: Mapping[int, float]) -> str:
    """Markdown with the figures known when the checkpoint was made; names no client or path."""
    is_folder = Path(config.model_name).is_absolute()
    model = Path(config.model_name).name if is_folder else config.model_name
    return f"""---
library_name: lerobot
tags: [robotics, smolvla, federated-learning, zk0bot]
base_model: {model}
---
# SmolVLA, federated with zk0bot

Checkpoint after round {round_} of {config.num_server_rounds} of run `{run_id}`
(zk0bot {__version__}). No demonstration left the machine of its owner.

| Setting | Value |
|---|---|
| base model | `{model}` |
| strategy | {config.strategy} |
| local steps a round | {config.local_epochs or config.local_steps}\
{" epochs" if config.local_epochs else ""} |
| batch size | {config.batch_size} |
| learning rate | {config.initial_lr:g} to {config.eta_min:g}, {config.scheduler_type} |
| normalisation | {config.statistics} statistics |
| seed | {config.seed} |

## Held-out loss

{_loss_table(losses)}

## Load it

```python
from lerobot.policies import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

policy = SmolVLAPolicy.from_pretrained(FOLDER)
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=FOLDER)
```
"""


def _loss_table(losses: Mapping[int, float]) -> str:
    if not losses:
        return "Not evaluated when this checkpoint was written."
    rows = [f"| {number} | {losses[number]:.4f} |" for number in sorted(losses)]
    return "\n".join(["| Round | Loss |", "|---|---|", *rows])
